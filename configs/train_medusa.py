"""Medusa's heads for SmolLM2-135M-Instruct, from its own answers.

    python -m experiments.answer_chats --config=configs/answer_chats.py \
      --workdir=runs/answers
    python -m experiments.train_medusa --config=configs/train_medusa.py \
      --workdir=runs/train_medusa --config.answers=runs/answers

Four heads of one residual block each share the target's output head, of which
they read the 8,192 most frequent tokens, and know the token before a guess.
`configs/train_medusa.py:tiny` is a check on random weights and the answers of
`configs/answer_chats.py:tiny`.

`--config.heads.confidence=True` lets every head also learn how much its guess
is to be trusted; that begins with the share of the target's probability that
the vocabulary holds at every place of the training answers, a few minutes more.
Alpha of held-out answers counts what is outside as lost; in the log of the
steps it does so only with confidence.

Hardware: two CPU cores, 6 GB of memory, 25 minutes. Expect head 1 to be right
in 30 % of the places of held-out answers.

`:large` is for one GPU and the answers of `configs/answer_chats.py:large` and
of questions that the model asks itself. Its heads also see the token before
their guesses and inner states of the target; what the answers hold of states is
then left aside, and the target computes them at every step. It made the heads
that are shipped, of 73,728 answers three times, in less than three minutes of
an H200: head 1 is right in 59 % of the places. Heads that see the last state
alone, with a bias of rank 32, were right in 53 % (RESULTS.md).
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
  config.vocabulary = 128 if tiny else 8192  # tokens it may guess; 0 is all
  config.heads = ml_collections.ConfigDict(
    {
      'count': 3 if tiny else 4,
      'blocks': 1,
      'own': False,  # an output head of its own for each head
      'rank': 0,  # of a correction to the shared output head
      # Of a bias by the token before the guess.
      'markov': {'full': 32, 'large': 96, 'tiny': 8}[size],
      'confidence': tiny,  # whether heads learn how much to trust a guess
      'token': tiny or large,  # whether they see the token before all guesses
      # Blocks of the target whose inputs they see.
      'layers': (2, 15, 27) if large else (0,) if tiny else (),
    }
  )
  config.random_outputs = False  # own output heads begin at random
  # 'token' is the text's next token; others are of distillation/losses.py.
  config.objectives = ml_collections.ConfigDict(
    {
      'token': 1.0,
      'forward_kl': 0.0,
      'reverse_kl': 0.0,
      'jensen_shannon': 0.0,
      'total_variation': 0.0,
    }
  )
  config.decay = 0.8  # weight of a head over that of the one before
  config.tree_nodes = (4, 8) if tiny else (4, 8, 16, 32, 64)
  config.tree_choices = 4 if tiny else 10  # that a node may have
  config.file_bits = 8 if large else 16  # of matrices in the draft's file
  config.seed = 0
  config.training = ml_collections.ConfigDict()
  config.training.batch = 4 if tiny else 64 if large else 8
  config.training.epochs = 2 if tiny else 3
  config.training.accumulation = 1
  config.training.evaluate_every = 2 if tiny else 512 if large else 128
  config.training.save_every = 0
  config.training.average_decay = 0.99  # of the parameters' average; 0 is none
  config.training.tensorboard = False
  config.training.optimizer = ml_collections.ConfigDict(
    {
      'learning_rate': 3e-3 if large else 1e-3,
      'warmup_steps': 1 if tiny else 100 if large else 30,
      'schedule': 'cosine',
      'weight_decay': 0.0,
      'clip_norm': 1.0,
      'state_bits': 32,  # of Adam's moments, or 8
      'state_memory': 'device',  # or 'host'
    }
  )
  return config
