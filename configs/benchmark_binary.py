"""Whole dense networks in float32, int8 and bits, at batch 1 and 100.

    python -m experiments.benchmark_binary \
      --config=configs/benchmark_binary.py --workdir=runs/benchmark_binary

The shapes of arXiv 1602.02830 on MNIST: three hidden layers of 4,096, and of
1,024. The paper reports its kernel on a GPU 7 times as fast as its own float
kernel. Here bits are 2.5 to 11 times as fast as float32. Two CPU cores and 1 GB
of memory, half a minute. `:tiny` after the file's name is a check of the
machinery.

Fields:
  image, width, layers: Of the networks; a network a width.
  batch: Images at a time, a row each.
  repeats: Timed samples.
"""

import ml_collections


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  """The settings; `variant` may be 'tiny'."""
  if variant not in ('', 'tiny'):
    raise ValueError(f"variant {variant!r} is unknown; there is 'tiny'.")
  config = ml_collections.ConfigDict()
  config.image = (28, 28, 1)
  config.width = (1024, 4096)
  config.layers = 3
  config.batch = (1, 100)
  config.repeats = 20
  if variant == 'tiny':
    config.image = (4, 4, 1)
    config.width = (64,)
    config.layers = 1
    config.batch = (1, 3)
    config.repeats = 1
  return config
