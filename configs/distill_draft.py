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

from configs import train_draft


def get_config(size: str = 'full') -> ml_collections.ConfigDict:
  """The settings of the one-layer draft, where they are not said here."""
  config = train_draft.get_config(size)
  tiny = size == 'tiny'
  del config.ridge, config.ridge_rows, config.steps, config.start
  config.layers = (1,) if tiny else (0, 7, 15, 22, 29)  # of the target
  config.ffn_width = 96 if tiny else 0  # strongest units; 0 is all
  config.draft_length = 3  # of the chain that `tokens_per_run` is for
  config.tree_height = 3 if tiny else 7
  config.training.epochs = 2 if tiny else 3
  config.training.optimizer.learning_rate = 5e-4
  return config
