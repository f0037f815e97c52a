"""Small decoders with weights of one bit or three values (BitNet), on text.

    python -m experiments.train_bitnet --config=configs/train_bitnet.py \
      --workdir=runs/train_bitnet

Bytes of the Brown corpus; documents that are held out are measured. Kernels are
ternary from the start, with activations of 8 bits (b1.58, arXiv 2402.17764) or
with real ones; or signs, with 8 bits (arXiv 2310.11453); or are rounded after
training. The paper of b1.58 finds no loss from 3 billion parameters on.

Four minutes a training on two CPU cores, and 2 GB of memory. `:tiny` after the
file's name is a check of the machinery on a sentence.

Fields:
  text: Of data.documents; 'inline' is a sentence.
  width, layers: Of the decoder; a head has 32 numbers, a feed-forward 3 widths.
  length, batch, tokens: Of training rows; how many bytes to train on.
  epochs, learning_rate: AdamW, warm-up of a tenth, cosine.
  measured: Held-out bytes to predict.
"""

import ml_collections


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  """The settings; `variant` may be 'tiny'."""
  if variant not in ('', 'tiny'):
    raise ValueError(f"variant {variant!r} is unknown; there is 'tiny'.")
  config = ml_collections.ConfigDict()
  config.text = 'brown'
  config.width = 256
  config.layers = 4
  config.length = 128
  config.batch = 16
  config.tokens = 1_000_000
  config.epochs = 1
  config.learning_rate = 2e-3
  config.measured = 20_000
  config.seed = 0
  if variant == 'tiny':
    config.text = 'inline'
    config.width = 64
    config.layers = 1
    config.length = 32
    config.batch = 4
    config.tokens = 1000
    config.measured = 200
  return config
