"""Documents of token ids packed into rows of one length, and batches of them.

Documents of all lengths share rows, so that little of a batch is padding
(best-fit packing, arXiv:2404.10830); the model keeps them apart by `segments`.
"""

import bisect
from collections.abc import Sequence
import dataclasses

import grain
import numpy as np

from efficiency_jax.data import rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Document:
  """Token ids of which some are not trained on, such as those of a prompt.

  Attributes:
    tokens: int [T].
    loss_mask: bool [T], whether a token is one to predict.
  """

  tokens: np.ndarray
  loss_mask: np.ndarray


@dataclasses.dataclass(frozen=True)
class _Piece:
  """What of a document lies in one row."""

  document: int
  start: int
  size: int


def pack(
  documents: Sequence[Document | Sequence[int] | np.ndarray], length: int
) -> dict[str, np.ndarray]:
  """Packs documents into R rows of L = `length` tokens.

  Every token of every document lies in exactly one row, in the order of the
  document. A document of up to L tokens is never cut; a longer one is cut into
  pieces of L tokens and a rest, each of them a segment of its own. Pieces are
  placed from the longest to the shortest, each in the row where it leaves the
  least room.

  Args:
    documents: Each is its token ids [T], every one to be predicted, or a
      `Document`.
    length: Of a row.

  Returns:
    `tokens` int32 [R, L], 0 at padding; `segments` int32 [R, L], the document
    of a token counted from 1 in each row, 0 at padding; and `loss_mask` bool
    [R, L], whether a token is one to predict from those before it in its row.
    That is never so for padding and for the first token of a segment, which no
    token of its own document precedes.

  Raises:
    ValueError: `length` is below 2, or a document is empty, is no list of
      int32 token ids or has a mask of another length.
  """
  if length < 2:
    raise ValueError(f'length must be at least 2, not {length}.')
  if not len(documents):
    raise ValueError('documents must hold at least one document, not none.')
  read = [_read(document, n) for n, document in enumerate(documents)]
  filled = _best_fit([len(document.tokens) for document in read], length)
  packed = {
    'tokens': np.zeros((len(filled), length), np.int32),
    'segments': np.zeros((len(filled), length), np.int32),
    'loss_mask': np.zeros((len(filled), length), np.bool_),
  }
  for row, pieces in enumerate(filled):
    begin = 0
    for segment, piece in enumerate(pieces, 1):
      document = read[piece.document]
      of_document = slice(piece.start, piece.start + piece.size)
      end = begin + piece.size
      packed['tokens'][row, begin:end] = document.tokens[of_document]
      packed['segments'][row, begin:end] = segment
      packed['loss_mask'][row, begin:end] = document.loss_mask[of_document]
      packed['loss_mask'][row, begin] = False
      begin = end
  return packed


def batches(
  source: Sequence[Document | Sequence[int] | np.ndarray],
  *,
  batch_size: int,
  length: int,
  seed: int,
  epochs: int | None = None,
  process_index: int = 0,
  process_count: int = 1,
) -> grain.IterDataset:
  """Shuffled batches of packed documents, of which each host makes its part.

  An epoch holds every row of `pack` once, in an order that depends on the seed
  and the epoch; rows of padding fill its last batch up. Of every batch, each
  of the hosts makes `batch_size / process_count` rows, and all hosts together
  make the batch that one host alone would.

  An iterator of the result has `get_state` and `set_state`: a new iterator,
  also after a restart, set to the state goes on with the very next batch.
  The state is a place in the order, so the documents and all settings must be
  those of the run that it was taken from; only `epochs` may grow.

  Args:
    source: The documents, the same and in the same order on every host.
    batch_size: Rows B of a batch, counted over all hosts.
    length: Tokens L of a row.
    seed: Of the order, from 0 to 2**32 - 1; the same on every host.
    epochs: How often all is gone through; None never ends.
    process_index: Which of the hosts this is.
    process_count: How many hosts there are.

  Returns:
    A dataset of the arrays of `pack`, [B / hosts, L] each.

  Raises:
    ValueError: A number is out of its range, the batch cannot be divided
      among the hosts, or `pack` refuses the documents.
  """
  return rows.batches(
    pack(source, length),
    batch_size=batch_size,
    seed=seed,
    epochs=epochs,
    process_index=process_index,
    process_count=process_count,
  )


def _read(
  document: Document | Sequence[int] | np.ndarray, number: int
) -> Document:
  """The document as arrays, checked."""
  given = document.tokens if isinstance(document, Document) else document
  tokens = np.asarray(given)
  if tokens.ndim != 1 or not tokens.size:
    raise ValueError(
      f'document {number} must be a list of at least one token id, not an'
      f' array of shape {tokens.shape}.'
    )
  integers = tokens.dtype.kind in 'iu'
  if not integers or tokens.min() < 0 or tokens.max() >= 2**31:
    raise ValueError(
      f'document {number} must hold token ids from 0 to 2**31 - 1, not'
      f' {tokens.dtype} from {tokens.min()} to {tokens.max()}.'
    )
  if not isinstance(document, Document):
    return Document(tokens=tokens, loss_mask=np.ones(len(tokens), np.bool_))
  loss_mask = np.asarray(document.loss_mask, np.bool_)
  if loss_mask.shape != tokens.shape:
    raise ValueError(
      f'document {number} has {len(tokens)} tokens, but a loss_mask of shape'
      f' {loss_mask.shape}.'
    )
  return Document(tokens=tokens, loss_mask=loss_mask)


def _best_fit(sizes: Sequence[int], length: int) -> list[list[_Piece]]:
  """Which pieces of documents of these sizes lie in which row."""
  pieces = [
    _Piece(number, start, min(length, size - start))
    for number, size in enumerate(sizes)
    for start in range(0, size, length)
  ]
  pieces.sort(key=lambda piece: -piece.size)
  rows = []
  with_room = {}  # Rows by the room left in them.
  rooms = []  # Its keys, in order.
  for piece in pieces:
    place = bisect.bisect_left(rooms, piece.size)
    if place == len(rooms):
      room, row = length, len(rows)
      rows.append([])
    else:
      room = rooms[place]
      row = with_room[room].pop()
      if not with_room[room]:
        del with_room[room], rooms[place]
    rows[row].append(piece)
    left = room - piece.size
    if left and left not in with_room:
      bisect.insort(rooms, left)
    if left:
      with_room.setdefault(left, []).append(row)
  return rows
