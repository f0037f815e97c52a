"""Models and data on disk: named assets, checkpoints and tokenizers."""
