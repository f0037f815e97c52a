"""Our drafts beside assisted generation of transformers, on the same weights.

    .venv-peers/bin/python -m experiments.benchmark_decode \
      --config=configs/benchmark_drafts.py --workdir=runs/benchmark_drafts

The assistant of transformers is our untrained draft model, every third layer of
the target, so that both draft the same tokens; 3 of them before every pass of
the target, as ours. With --config.trained.draft_model=FILE both take the one
that distill_draft made. A tool's gain is that over its own plain decoding.

Two CPU cores and 8 GB of memory, on a machine that does nothing else. Run it
with the Python of .venv-peers (make test-peers). `:tiny` after the file's name
runs every part of it in seconds, on random weights and without peers. The
fields are those of configs/benchmark_decode.py.
"""

import ml_collections

from configs import benchmark_decode


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  """The settings; `variant` may be 'tiny'."""
  config = benchmark_decode.get_config(variant)
  config.batch = 1
  if variant == 'tiny':
    config.methods = ('n-gram', 'draft model, 3')
    return config
  config.new_tokens = 64
  config.single = 8
  config.methods = (
    'medusa, 7',
    'medusa chain, 3',
    'eagle, 7',
    'eagle chain, 3',
    'draft model, 3',
    'n-gram',
  )
  config.peers = (
    'transformers',
    'transformers, prompt lookup',
    'transformers, assistant',
  )
  return config
