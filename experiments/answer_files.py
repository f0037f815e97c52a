"""Where `answer_chats` leaves its answers, and how they are read."""

import pathlib

import numpy as np

from efficiency_jax import answers
from efficiency_jax.io import arrays

FOLDER = 'answers'


def load(workdir: str | pathlib.Path, split: str) -> answers.Answers:
  """All answers of a split, in the order in which they were made.

  Raises:
    ValueError: There are none.
  """
  parts = []
  for path in sorted((pathlib.Path(workdir) / FOLDER).glob('*.safetensors')):
    found, metadata = arrays.load(path)
    if metadata.get('split') == split:
      parts.append(answers.Answers(**found))
  if not parts:
    raise ValueError(
      f'{workdir} holds no {split} answers: make them with python -m'
      f' experiments.answer_chats --workdir={workdir}.'
    )
  return answers.Answers(*map(np.concatenate, zip(*parts, strict=True)))


def counts(
  workdir: str | pathlib.Path, split: str, vocab_size: int
) -> np.ndarray:
  """How often each token stands in the answers of a split: [V] int64."""
  made = load(workdir, split)
  place = np.arange(made.tokens.shape[1])
  written = place >= made.start[:, None]
  written &= place < made.length[:, None]
  return np.bincount(made.tokens[written], minlength=vocab_size)
