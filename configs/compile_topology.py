"""What training needs on TPUs, compiled ahead of time without one.

    make .venv-aot/.installed
    .venv-aot/bin/python -m experiments.compile_topology \\
      --config=configs/compile_topology.py --workdir=runs/compile_topology

Needs libtpu and 8 GB of memory; a case compiles in three to seven minutes on
one CPU core, about an hour for all. `:tiny` after the file's name compiles two
small cases in seconds.

Fields:
  models: Shapes of decoders by name (fields of `DecoderConfig`).
  cases: (model, topology, data, fsdp, tensor, rows a chip, remat,
    attention). remat is what the backward pass computes again (none, dots,
    blocks); attention an implementation of the kernel. A Pallas kernel
    (mosaic_tpu) runs inside shard_map, so with tensor 1; the compiler splits
    `reference` over heads.
  sequence_length: T; a row has T + 1 tokens.
"""

import ml_collections

MODELS = {
  'SmolLM2-135M': {
    'vocab_size': 49152,
    'width': 576,
    'ffn_width': 1536,
    'num_layers': 30,
    'num_heads': 9,
    'num_kv_heads': 3,
    'head_dim': 64,
  },
  'SmolLM2-1B7': {
    'vocab_size': 49152,
    'width': 2048,
    'ffn_width': 8192,
    'num_layers': 24,
    'num_heads': 32,
    'num_kv_heads': 32,
    'head_dim': 64,
  },
  'Llama-2-7B': {
    'vocab_size': 32000,
    'width': 4096,
    'ffn_width': 11008,
    'num_layers': 32,
    'num_heads': 32,
    'num_kv_heads': 32,
    'head_dim': 128,
    'tie_embeddings': False,
  },
}

_FLASH = 'mosaic_tpu'
CASES = (
  ('SmolLM2-135M', 'v5e:2x2', 1, 4, 1, 4, 'blocks', _FLASH),
  ('SmolLM2-1B7', 'v5e:2x2', 1, 4, 1, 2, 'blocks', _FLASH),
  ('Llama-2-7B', 'v5e:2x2', 1, 4, 1, 1, 'blocks', _FLASH),
  ('Llama-2-7B', 'v6e:2x2', 1, 4, 1, 1, 'blocks', _FLASH),
  ('Llama-2-7B', 'v5e:4x4', 1, 16, 1, 1, 'blocks', _FLASH),
  ('Llama-2-7B', 'v5e:8x8', 1, 64, 1, 1, 'blocks', _FLASH),
  ('Llama-2-7B', 'v5e:16x16', 1, 256, 1, 1, 'blocks', _FLASH),
  ('Llama-2-7B', 'v6e:4x4', 1, 16, 1, 1, 'blocks', _FLASH),
  ('SmolLM2-1B7', 'v5e:4x4', 1, 16, 1, 2, 'blocks', _FLASH),
  ('SmolLM2-1B7', 'v5e:16x16', 16, 16, 1, 2, 'blocks', _FLASH),
  ('SmolLM2-135M', 'v5e:16x16', 256, 1, 1, 4, 'blocks', _FLASH),
  ('Llama-2-7B', 'v5e:8x8', 1, 16, 4, 1, 'blocks', 'reference'),
)

_TINY = {
  'vocab_size': 512,
  'width': 128,
  'ffn_width': 256,
  'num_layers': 2,
  'num_heads': 2,
  'num_kv_heads': 2,
  'head_dim': 64,
}


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  """The settings; `variant` may be 'tiny'."""
  if variant not in ('', 'tiny'):
    raise ValueError(f"variant {variant!r} is unknown; there is 'tiny'.")
  config = ml_collections.ConfigDict()
  config.models = MODELS
  config.cases = CASES
  config.sequence_length = 2048
  if variant == 'tiny':
    config.models = {'tiny': _TINY}
    config.cases = (
      ('tiny', 'v5e:2x2', 1, 4, 1, 1, 'blocks', _FLASH),
      ('tiny', 'v6e:2x2', 1, 2, 2, 1, 'none', 'reference'),
    )
    config.sequence_length = 128
  return config
