"""A draft model cut from SmolLM2-135M-Instruct, distilled on its own answers.

    python -m experiments.answer_chats --config=configs/answer_chats.py \
      --workdir=runs/answers
    python -m experiments.distill_draft --config=configs/distill_draft.py \
      --workdir=runs/distill_draft --config.answers=runs/answers

Five of the 30 layers, with the target's embedding and output head; the head
scores the 8,192 most frequent tokens of the training answers. Other objectives
are reverse_kl, jensen_shannon and total_variation, alone or mixed.
`configs/distill_draft.py:tiny` is a check on random weights and the answers of
`configs/answer_chats.py:tiny`.

Hardware: two CPU cores, 4 GB of memory, 37 minutes. Expect any drafted token to
be right in 36 % of the places of held-out answers.
"""

import ml_collections


def get_config(size: str = 'full') -> ml_collections.ConfigDict:
  """The whole run, or a tiny one."""
  if size not in ('full', 'tiny'):
    raise ValueError(f'sizes are full and tiny, got {size!r}')
  tiny = size == 'tiny'
  config = ml_collections.ConfigDict()
  config.model = 'untrained' if tiny else 'smollm2-135m'
  config.dtype = 'float32'
  config.answers = 'runs/answers'  # a folder that answer_chats made
  config.layers = (1,) if tiny else (0, 7, 15, 22, 29)  # of the target
  config.vocabulary = 128 if tiny else 8192  # tokens it may draft; 0 is all
  config.ffn_width = 96 if tiny else 0  # strongest units; 0 is all
  config.objectives = ml_collections.ConfigDict({'forward_kl': 1.0})
  config.draft_length = 3  # of the chain that `tokens_per_run` is for
  config.tree_nodes = (4, 8) if tiny else (4, 8, 16, 32, 64)
  config.tree_height = 3 if tiny else 7
  config.tree_choices = 4 if tiny else 10  # that a node may have
  config.seed = 0
  config.training = ml_collections.ConfigDict()
  config.training.batch = 4 if tiny else 8
  config.training.epochs = 2 if tiny else 3
  config.training.accumulation = 1
  config.training.evaluate_every = 2 if tiny else 128
  config.training.save_every = 0
  config.training.average_decay = 0.99  # of the parameters' average; 0 is none
  config.training.tensorboard = False
  config.training.optimizer = ml_collections.ConfigDict(
    {
      'learning_rate': 5e-4,
      'warmup_steps': 1 if tiny else 50,
      'schedule': 'cosine',
      'weight_decay': 0.0,
      'clip_norm': 1.0,
    }
  )
  return config
