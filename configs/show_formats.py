"""fp32, fp16, bf16 and fp8: bits, ranges, and what a cast of SmolLM2 loses.

    python -m experiments.show_formats --config=configs/show_formats.py \
      --workdir=runs/show_formats

Half a minute on two CPU cores. `:tiny` after the file's name takes a model of
random weights.
"""

import ml_collections


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  """The settings; `variant` may be 'tiny'."""
  if variant not in ('', 'tiny'):
    raise ValueError(f"variant {variant!r} is unknown; there is 'tiny'.")
  config = ml_collections.ConfigDict()
  config.model = 'untrained' if variant else 'smollm2-135m'
  config.dtype = 'float32'
  config.number = 3.14159
  return config
