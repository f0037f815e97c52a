"""Trained drafts beside plain decoding of SmolLM2-135M-Instruct.

    python -m experiments.decode --config=configs/decode_smollm2_trained.py \
      --workdir=runs/decode_trained

    python -m experiments.decode \
      --config=configs/decode_smollm2_trained.py:sampled \
      --workdir=runs/decode_trained_sampled

Medusa's heads and the one-layer draft (EAGLE), each as a chain, a tree, and a
tree that grows where it is sure, on 8 questions of MT-bench and 8 problems of
HumanEval, batch 1. The drafts are shipped with the package;
`train_medusa` and `train_draft` make them anew. They are stored in W8A8, which
changes no greedy text (--config.trained.weights='' keeps them in float32).
`:sampled` is temperature 1 with exact verification, of EAGLE and n-grams.
`:trees` is the table of trees against chains at equal numbers of nodes.

Hardware: two CPU cores, 4 GB of memory; 9 minutes, `:sampled` 7, `:trees` 25.
"""

import ml_collections

from configs import decode_smollm2

_SIZES = (7, 15, 31, 63)


def get_config(kind: str = 'greedy') -> ml_collections.ConfigDict:
  """Greedy, `sampled`, or greedy `trees`."""
  if kind not in ('greedy', 'sampled', 'trees'):
    raise ValueError(f'kinds are greedy, sampled and trees, got {kind!r}')
  config = decode_smollm2.get_config()
  config.num_prompts = 8
  config.max_prompt_tokens = 400
  config.batches = (1,)
  config.fixed_lengths = ()
  config.methods = (
    'medusa chain, 3',
    'medusa, 7',
    'medusa dynamic, 11',
    'medusa',
    'eagle chain, 3',
    'eagle, 7',
    'eagle dynamic, 7',
    'eagle',
    'n-gram',
  )
  if kind == 'sampled':
    config.sampling.temperature = 1.0
    config.methods = (
      'eagle chain/block, 1',
      'eagle chain/block, 2',
      'eagle chain/block, 3',
      'eagle, 7',
      'eagle dynamic, 7',
      'n-gram/block',
    )
  if kind == 'trees':
    config.methods = tuple(
      f'{name}, {size}'
      for name in ('medusa', 'medusa dynamic', 'eagle', 'eagle dynamic')
      for size in _SIZES
    ) + (
      'medusa chain, 4',
      *(f'eagle chain, {size}' for size in _SIZES[:2]),
    )
  return config
