"""Every decoding method on random weights: a check of the machinery.

    python -m experiments.decode --config=configs/decode_tiny.py \
      --workdir=runs/decode_tiny

Needs neither network nor model and takes about half a minute on two CPU cores.
The speeds mean nothing; every row must say that it is exact.
"""

import ml_collections

from configs import decode_smollm2


def get_config() -> ml_collections.ConfigDict:
  """A copy of the SmolLM2 run on three inline prompts."""
  config = decode_smollm2.get_config('demo')
  config.model = 'untrained'
  config.prompts = ('inline',)
  config.inline = (
    'a b a b a b a b',
    'one two three one two three one',
    'to be or not to be',
  )
  config.num_prompts = 3
  config.max_new_tokens = 24
  config.batches = (1, 2)
  config.queue = 1
  config.methods = ('n-gram', 'early exit, 3', 'draft model, 3')
  config.fixed_lengths = (3,)
  config.trained.medusa = config.trained.eagle = ''
  config.exit_layers = 1
  config.draft_every = 2
  return config
