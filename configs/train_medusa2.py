"""SmolLM2-135M-Instruct and its heads trained together, by self-distillation.

    python -m experiments.train_medusa2 --config=configs/train_medusa2.py \
      --workdir=runs/train_medusa2 --config.answers=runs/answers \
      --config.draft=runs/train_medusa/draft.safetensors

The second stage of Medusa-2 (arXiv 2401.10774): it begins from the heads of
`configs/train_medusa.py` and the same answers. The model learns through an
adapter of low rank, with a quarter of the heads' learning rate, to be easier to
guess and yet to say what it said before. `configs/train_medusa2.py:tiny` is a
check on random weights; it needs heads for them.

The adapted model is another model: the report says how far it went, and its
text is its own.

Hardware: two CPU cores, 8 GB of memory, 1 GB of disk, half an hour.
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
  config.draft = 'runs/train_medusa/draft.safetensors'  # what to begin from
  config.num_train = 8 if tiny else 640  # answers to learn from, the first ones
  config.adapter = ml_collections.ConfigDict(
    {
      'rules': ('/kernel$',),  # every product of every layer
      'rank': 4 if tiny else 16,
      'alpha': 4.0 if tiny else 16.0,  # over the rank: the adapter's scale
    }
  )
  # 'forward_kl' to the model as it was; 'token' is the text's next token.
  config.backbone = ml_collections.ConfigDict({'forward_kl': 1.0})
  config.heads_weight = 0.2  # of the heads' loss beside it
  config.objectives = ml_collections.ConfigDict({'token': 1.0})  # of the heads
  config.decay = 0.8  # weight of a head over that of the one before
  config.tree_nodes = (4, 8) if tiny else (4, 8, 16, 32, 64)
  config.tree_choices = 4 if tiny else 10  # that a node may have
  config.seed = 0
  config.training = ml_collections.ConfigDict()
  config.training.batch = 4
  config.training.epochs = 1
  config.training.accumulation = 1
  config.training.evaluate_every = 2 if tiny else 80
  config.training.save_every = 0
  config.training.average_decay = 0.0  # of the parameters' average; 0 is none
  config.training.tensorboard = False
  config.training.optimizer = ml_collections.ConfigDict(
    {
      'learning_rate': 2e-3,
      'shares': {'adapter': 0.25},  # of the learning rate
      'warmup_steps': 1 if tiny else 20,
      'schedule': 'cosine',
      'weight_decay': 0.0,
      'clip_norm': 1.0,
    }
  )
  return config
