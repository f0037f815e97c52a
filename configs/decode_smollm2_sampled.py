"""Sampled decoding of SmolLM2-135M-Instruct with exact verification.

    python -m experiments.decode --config=configs/decode_smollm2_sampled.py \
      --workdir=runs/decode_sampled

    python -m experiments.decode \
      --config=configs/decode_smollm2_sampled.py:nucleus \
      --workdir=runs/decode_nucleus

The first samples at temperature 1, the second at temperature 0.7 with top-p
0.9. Verifiers token and block keep the distribution, so their texts differ
from plain ones by design; coupled keeps the text itself and must say exact.

Hardware: two CPU cores, 4 GB of memory; about 20 minutes each. Expect 1.15x
plain with n-grams on HumanEval at temperature 1, and 1.0x on MT-bench. The
second was checked on two prompts only; the law is proved on small models in
tests.
"""

import ml_collections

from configs import decode_smollm2


def get_config(kind: str = 'plain') -> ml_collections.ConfigDict:
  """Temperature 1, or `nucleus`."""
  if kind not in ('plain', 'nucleus'):
    raise ValueError(f'kinds are plain and nucleus, got {kind!r}')
  config = decode_smollm2.get_config()
  config.num_prompts = 16
  config.batches = (1,)
  config.methods = (
    'n-gram/block',
    'n-gram/token',
    'n-gram/coupled',
    'early exit/block, 3',
    'draft model/block, 3',
    'draft model/coupled, 3',
  )
  config.fixed_lengths = ()
  nucleus = kind == 'nucleus'
  config.sampling.temperature = 0.7 if nucleus else 1.0
  config.sampling.top_p = 0.9 if nucleus else 1.0
  return config
