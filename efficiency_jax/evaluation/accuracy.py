"""How often a language model finds the right answer the likeliest.

A question is one row: its context once, and every continuation as a branch of
its own behind it, as a tree of drafted tokens is verified. With four endings
that is half of what a row an ending would be to compute or less.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from efficiency_jax.data.choices import Choice
from efficiency_jax.data.choices import LastWord
from efficiency_jax.evaluation import scoring
from efficiency_jax.evaluation.estimates import Estimate
from efficiency_jax.io.pretrained import LanguageModel
from efficiency_jax.models import cache as kv_cache
from efficiency_jax.types import ApplyFn
from efficiency_jax.types import Cache
from efficiency_jax.types import Params

_LEAST_BUCKET = 16


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class ChoiceAccuracy:
  """How often the right continuation is the likeliest; units are questions.

  Attributes:
    plain: By log-likelihood (`acc` of the evaluation harness).
    normalized: By log-likelihood a byte (`acc_norm`).
  """

  plain: Estimate
  normalized: Estimate


def choice_accuracy(
  lm: LanguageModel,
  choices: Sequence[Choice],
  *,
  batch: int = 8,
  progress: scoring.Progress | None = None,
) -> ChoiceAccuracy:
  """How often the right continuation is the one that a model finds likeliest.

  Both numbers come from one pass: of the sums of log p over the tokens of each
  continuation, and of these sums a byte. As in the evaluation harness (lm-eval)
  the one space between context and continuation does not count as a byte; the
  harness counts characters, which for ASCII are the same. A draw goes to the
  first. The standard error is that of a binomial share.

  Args:
    lm: The model.
    choices: The questions.
    batch: Questions at a time.
    progress: Is called with the questions done and all of them.

  Raises:
    ValueError: There are no questions, or one does not fit into the model.
  """
  scored = _answers(
    lm,
    [(choice.context, choice.continuations) for choice in choices],
    batch,
    progress,
  )
  plain, normalized = [], []
  for choice, answers in zip(choices, scored, strict=True):
    total = np.array([answer.log_likelihood for answer in answers])
    size = [
      len(text.removeprefix(' ').encode()) for text in choice.continuations
    ]
    plain.append(total.argmax() == choice.answer)
    normalized.append((total / np.maximum(size, 1)).argmax() == choice.answer)
  ones = np.ones(len(choices))
  return ChoiceAccuracy(
    plain=Estimate(np.array(plain), ones),
    normalized=Estimate(np.array(normalized), ones),
  )


def last_word_accuracy(
  lm: LanguageModel,
  passages: Sequence[LastWord],
  *,
  batch: int = 8,
  progress: scoring.Progress | None = None,
) -> Estimate:
  """How often greedy decoding writes the last word of a passage.

  All of its tokens must be the likeliest ones, each after those before it: the
  `acc` of LAMBADA in the evaluation harness (lm-eval). What would follow the
  word does not matter. Arguments and errors are those of `choice_accuracy`.
  """
  scored = _answers(
    lm,
    [(passage.context, [passage.continuation]) for passage in passages],
    batch,
    progress,
  )
  right = np.array([answer.greedy for (answer,) in scored])
  return Estimate(right, np.ones(len(right)))


@dataclasses.dataclass(frozen=True)
class _Answer:
  """The sum of log p of a continuation, and whether all of it is greedy."""

  log_likelihood: float
  greedy: bool


@dataclasses.dataclass(frozen=True)
class _Tree:
  """A question as one row: its context once, then every continuation.

  The last token of a continuation is predicted and not read.
  """

  tokens: list[int]  # [T]
  branch: list[int]  # [T], 0 for the context, then 1, 2, ...
  parents: list[int]  # [C], the place in the row that predicts ...
  targets: list[int]  # [C], ... each token of the continuations
  sizes: list[int]  # tokens of each continuation


def _answers(
  lm: LanguageModel,
  questions: Sequence[tuple[str, Sequence[str]]],
  batch: int,
  progress: scoring.Progress | None,
) -> list[list[_Answer]]:
  """Scores of the continuations of every context, in the order given."""
  scoring.check_batch(batch)
  if not questions:
    raise ValueError('there must be at least one question, got none.')
  trees = [_tree(lm, *question) for question in questions]
  apply, head = scoring.functions(lm)
  empty = kv_cache.initializer(lm.config)
  # Rows of like lengths share a batch; the longest come first, so that memory
  # that does not suffice fails at once.
  order = sorted(range(len(trees)), key=lambda n: -len(trees[n].tokens))
  found: list[list[_Answer]] = [[] for _ in trees]
  for start in range(0, len(order), batch):
    numbers = order[start : start + batch]
    losses, greedy = _tree_losses(
      apply, head, empty, lm.params, *_rows([trees[n] for n in numbers], batch)
    )
    for row, number in enumerate(numbers):
      ends = np.cumsum(trees[number].sizes)
      # Padding lies beyond the last end.
      parts = (
        np.split(np.asarray(array[row]), ends)[:-1]
        for array in (losses, greedy)
      )
      found[number] = [
        _Answer(-float(loss.sum(dtype=np.float64)), bool(right.all()))
        for loss, right in zip(*parts, strict=True)
      ]
    if progress is not None:
      progress(start + len(numbers), len(order))
  return found


def _tree(
  lm: LanguageModel, context: str, continuations: Sequence[str]
) -> _Tree:
  """Encodes a question as the evaluation harness does.

  Text is encoded whole and cut behind the tokens of the context alone. Spaces
  that end the context belong to the continuation, as tokens have them in front.
  """
  encode = functools.partial(lm.tokenizer.encode, special=False)
  given = context.rstrip()
  start = encode(given)
  tails = [encode(context + text)[len(start) :] for text in continuations]
  start = encode('', add_bos=True) + start
  longest = len(start) + max(map(len, tails))
  for problem, found in (
    ('has an empty context and the model no bos', not start),
    ('has a continuation without a token', not all(tails)),
    (
      f'has {longest} tokens, more than the {lm.config.max_positions} that'
      f' {lm.name} can read',
      longest > lm.config.max_positions,
    ),
  ):
    if found:
      raise ValueError(f'question {given[:40]!r} {problem}.')
  tokens, branch = list(start), [0] * len(start)
  parents, targets = [], []
  for number, tail in enumerate(tails, 1):
    read = len(tail) - 1
    parents += [len(start) - 1, *range(len(tokens), len(tokens) + read)]
    targets += tail
    tokens += tail[:read]
    branch += [number] * read
  return _Tree(tokens, branch, parents, targets, list(map(len, tails)))


def _rows(trees: Sequence[_Tree], batch: int) -> list[np.ndarray]:
  """Tokens and branches [B, T], parents and targets [B, C] of a batch."""
  rows = []
  for name, filler in (
    ('tokens', 0),
    ('branch', -1),
    ('parents', 0),
    ('targets', 0),
  ):
    lists = [getattr(tree, name) for tree in trees]
    array = np.full((batch, _bucket(max(map(len, lists)))), filler, np.int32)
    for row, values in zip(array, lists):
      row[: len(values)] = values
    rows.append(array)
  return rows


def _bucket(size: int) -> int:
  """The next of 12, 16, 24, 32, 48, 64 ...: few programs, little padding."""
  power = max(_LEAST_BUCKET, 1 << (size - 1).bit_length())
  return power * 3 // 4 if size <= power * 3 // 4 else power


@functools.partial(jax.jit, static_argnames=('apply', 'head', 'empty'))
def _tree_losses(
  apply: ApplyFn,
  head: scoring.Head,
  empty: Callable[[int, int], Cache],
  params: Params,
  tokens: jax.Array,  # [B, T]
  branch: jax.Array,  # [B, T]
  parents: jax.Array,  # [B, C]
  targets: jax.Array,  # [B, C]
) -> tuple[jax.Array, jax.Array]:
  """-log p of the targets, and whether each is the likeliest token: [B, C]."""
  # A token sees what stands before it in the context and in its own branch.
  same = branch[:, :, None] == branch[:, None, :]
  ancestors = jnp.tril(same | (branch == 0)[:, None, :])
  output, _ = apply(params, tokens, empty(*tokens.shape), ancestors=ancestors)
  hidden = jnp.take_along_axis(output.hidden, parents[..., None], axis=1)
  return scoring.target_losses(head, params, hidden, targets)
