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

from configs import train_medusa


def get_config(size: str = 'full') -> ml_collections.ConfigDict:
  """The settings of the first stage, where they are not said here."""
  config = train_medusa.get_config(size)
  tiny = size == 'tiny'
  # Those of the heads it begins from.
  del config.vocabulary, config.heads, config.random_outputs
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
  config.backbone = ml_collections.ConfigDict({'forward_kl': 1.0, 'token': 0.0})
  config.heads_weight = 0.2  # of the heads' loss beside it
  config.training.batch = 4
  config.training.epochs = 1
  config.training.evaluate_every = 2 if tiny else 80
  config.training.average_decay = 0.0
  optimizer = config.training.optimizer
  optimizer.learning_rate = 2e-3
  optimizer.warmup_steps = 1 if tiny else 20
  optimizer.shares = {'adapter': 0.25}  # of the learning rate
  return config
