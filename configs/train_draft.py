"""A one-layer draft (EAGLE) for SmolLM2-135M-Instruct, from its own answers.

    python -m experiments.answer_chats --config=configs/answer_chats.py \
      --workdir=runs/answers
    python -m experiments.train_draft --config=configs/train_draft.py \
      --workdir=runs/train_draft --config.answers=runs/answers

One block of the target's kind, which begins as the best linear draft; the
output head scores the 8,192 most frequent tokens of the training answers; three
drafted tokens are trained for. `configs/train_draft.py:tiny` is a check on
random weights and the answers of `configs/answer_chats.py:tiny`.

Hardware: two CPU cores, 6 GB of memory, 26 minutes. Expect the first drafted
token to be right in 40 % of the places of held-out answers.

`:large` is for one GPU and the answers of `configs/answer_chats.py:large` and
of questions that the model asks itself, both in bfloat16; the draft sees inner
states of the target and has a wider feed-forward. On an H200 it took 220
seconds with loading, and the first token was right in 79 % of the places. That
draft is shipped; all commands are in RESULTS.md.
"""

import ml_collections


def get_config(size: str = 'full') -> ml_collections.ConfigDict:
  """The whole run, a large one for a GPU, or a tiny one."""
  if size not in ('full', 'large', 'tiny'):
    raise ValueError(f'sizes are full, large and tiny, got {size!r}')
  tiny, large = size == 'tiny', size == 'large'
  config = ml_collections.ConfigDict()
  config.model = 'untrained' if tiny else 'smollm2-135m'
  config.dtype = 'bfloat16' if large else 'float32'  # of the target
  config.answers = 'runs/answers'  # folders that answer_chats made, with commas
  config.vocabulary = 128 if tiny else 8192  # tokens it may draft; 0 is all
  config.ffn_width = (
    3072 if large else 0
  )  # of its feed-forward; 0: the target's
  config.layers = (2, 15, 27) if large else (0,) if tiny else ()  # that it sees
  config.start = ''  # a trained draft to begin with, a file
  config.ridge = 100.0  # of the least-squares beginning; 0 begins at random
  config.ridge_rows = 2048  # answers that it takes
  config.steps = 2 if tiny else 3  # drafted tokens that are trained for
  config.objectives = ml_collections.ConfigDict(
    {
      'forward_kl': 1.0,
      'reverse_kl': 0.0,
      'jensen_shannon': 0.0,
      'total_variation': 0.0,
    }
  )
  config.tree_nodes = (4, 8) if tiny else (4, 8, 16, 32, 64)
  config.tree_height = 3 if tiny else 6
  config.tree_choices = 4 if tiny else 10  # that a node may have
  config.file_bits = 8 if large else 16  # of matrices in the draft's file
  config.seed = 0
  config.training = ml_collections.ConfigDict()
  config.training.batch = 4 if tiny else 64 if large else 8
  config.training.epochs = 2 if tiny else 4 if large else 5
  config.training.accumulation = 1
  config.training.evaluate_every = 2 if tiny else 512 if large else 128
  config.training.save_every = 0
  config.training.average_decay = 0.99  # of the parameters' average; 0 is none
  config.training.tensorboard = False
  config.training.optimizer = ml_collections.ConfigDict(
    {
      'learning_rate': 1e-3 if large else 3e-4,
      'warmup_steps': 1 if tiny else 100 if large else 50,
      'schedule': 'cosine',
      'weight_decay': 0.0,
      'clip_norm': 1.0,
      'state_bits': 32,  # of Adam's moments, or 8
      'state_memory': 'device',  # or 'host'
    }
  )
  return config
