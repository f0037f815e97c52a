"""The main steps of configs/quantize_smollm2.py on 6,000 tokens.

    python -m experiments.quantize --config=configs/quantize_smollm2_quick.py \
      --workdir=runs/quantize_quick

Two CPU cores and 4 GB of memory; some 12 minutes.
"""

import ml_collections

from configs import quantize_smollm2


def get_config() -> ml_collections.ConfigDict:
  """The settings."""
  return quantize_smollm2.get_config('quick')
