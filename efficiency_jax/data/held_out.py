"""Texts to measure perplexity on, of which nothing is trained or calibrated."""

from efficiency_jax.data import choices
from efficiency_jax.data import documents
from efficiency_jax.data import splits

TEXTS = ('lambada', 'brown', 'perl-manual', 'python-manual')
# The part of the documents of `documents.load` that is kept for measuring.
SHARE = 0.5


def load(name: str) -> list[str]:
  """The held-out documents of a text, in the order of the release.

  Args:
    name: `lambada`, the passages of that test, whole (`choices.last_words`); or
      the validation half (`splits.is_validation` of a share of 0.5) of `brown`,
      `perl-manual` or `python-manual` (`documents.load`). The other half is
      free to train and calibrate on.

  Raises:
    ValueError: `name` is none of these.
    FetchError: The text could not be downloaded.
    FileFormatError: The file is damaged.
  """
  if name not in TEXTS:
    raise ValueError(
      f'held-out text {name!r} is unknown; there are {", ".join(TEXTS)}.'
    )
  if name == 'lambada':
    return [word.context + word.continuation for word in choices.last_words()]
  return [
    text
    for text in documents.load(name)
    if splits.is_validation(text, share=SHARE)
  ]
