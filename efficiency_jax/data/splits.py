"""Which documents are trained on and which are kept for validation."""

import hashlib


def is_validation(text: str, share: float = 0.05, seed: int = 0) -> bool:
  """Whether a document belongs to the validation split.

  The answer depends on the text and the seed alone, so it is the same on every
  machine and in every run, does not change when documents are added, and two
  copies of one document never lie in different splits. A document in the
  validation split of a share is in that of every larger share.

  Args:
    text: The document, or what its copies have in common.
    share: Part of all documents that is validation, from 0 to 1.
    seed: Another seed gives an independent split.

  Raises:
    ValueError: `share` is not from 0 to 1.
  """
  if not 0 <= share <= 1:
    raise ValueError(f'share must be from 0 to 1, not {share!r}.')
  digest = hashlib.blake2b(
    text.encode('utf8', 'surrogatepass'),
    key=f'efficiency_jax split {seed}'.encode(),
    digest_size=8,
  ).digest()
  return int.from_bytes(digest, 'big') < share * 2**64
