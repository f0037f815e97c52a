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

`:large` is for one GPU and the answers of `configs/answer_chats.py:large`: 9
epochs in some 3 minutes of an H200, near the end of which the first token was
right in 73 % of the places. The shipped draft was made there in two steps,
whose commands are in RESULTS.md: four epochs at 6e-4, then --config.start with
six epochs at 1e-3 on 16,384 answers of another seed.
"""

import ml_collections


def get_config(size: str = 'full') -> ml_collections.ConfigDict:
  """The whole run, a large one for a GPU, or a tiny one."""
  if size not in ('full', 'large', 'tiny'):
    raise ValueError(f'sizes are full, large and tiny, got {size!r}')
  tiny, large = size == 'tiny', size == 'large'
  config = ml_collections.ConfigDict()
  config.model = 'untrained' if tiny else 'smollm2-135m'
  config.dtype = 'float32'
  config.answers = 'runs/answers'  # a folder that answer_chats made
  config.vocabulary = 128 if tiny else 8192  # tokens it may draft; 0 is all
  config.ffn_width = 0  # of its feed-forward; 0 is the target's
  config.start = ''  # a trained draft to begin with, a file
  config.ridge = 100.0  # of the least-squares beginning; 0 begins at random
  config.steps = 2 if tiny else 3  # drafted tokens that are trained for
  config.objectives = ml_collections.ConfigDict({'forward_kl': 1.0})
  config.tree_nodes = (4, 8) if tiny else (4, 8, 16, 32, 64)
  config.tree_height = 3 if tiny else 6
  config.tree_choices = 4 if tiny else 10  # that a node may have
  config.seed = 0
  config.training = ml_collections.ConfigDict()
  config.training.batch = 4 if tiny else 64 if large else 8
  config.training.epochs = 2 if tiny else 9 if large else 5
  config.training.accumulation = 1
  config.training.evaluate_every = 2 if tiny else 200 if large else 128
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
