"""How well a language model predicts text: perplexity, and KL from another.

Results are `estimates.Estimate`s over windows of text. Two models measured on
the same windows are compared with `estimates.compare`, or by `kl`, which sees
more.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from efficiency_jax.data import packing
from efficiency_jax.decoding import sampling
from efficiency_jax.evaluation import scoring
from efficiency_jax.evaluation.estimates import Estimate
from efficiency_jax.io.pretrained import LanguageModel
from efficiency_jax.io.tokenizer import Tokenizer
from efficiency_jax.types import ApplyFn
from efficiency_jax.types import Params


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Perplexity:
  """exp of the mean loss a token, over windows of text.

  Attributes:
    nats: The loss -log p in nats a token; its units are the windows.
  """

  nats: Estimate

  @property
  def value(self) -> float:
    """The perplexity."""
    return math.exp(self.nats.value)

  @property
  def low(self) -> float:
    """The lower end of the interval of 95 %."""
    return math.exp(self.nats.low)

  @property
  def high(self) -> float:
    """The upper end of the interval of 95 %."""
    return math.exp(self.nats.high)

  @property
  def tokens(self) -> int:
    """How many tokens were predicted."""
    return int(self.nats.counts.sum())


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Reference:
  """What a model said about windows of text, to measure other models by.

  Attributes:
    lm: The model.
    windows: What it read: the arrays of `windows`, [N, L] each.
    hidden: Its final hidden states [N, L, D], from which its whole
      distributions can be made again. They lie in the memory of the host.
    perplexity: Its perplexity.
  """

  lm: LanguageModel
  windows: dict[str, np.ndarray]
  hidden: np.ndarray
  perplexity: Perplexity


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Divergence:
  """How far a model q is from a reference p, on the same windows of text.

  Attributes:
    nats: KL(p || q) in nats a token; its units are the windows.
    agreement: Share of tokens where both find the same token likeliest.
    perplexity: That of q.
  """

  nats: Estimate
  agreement: Estimate
  perplexity: Perplexity


def windows(
  tokenizer: Tokenizer,
  documents: Sequence[str],
  *,
  tokens: int,
  length: int = 512,
  seed: int = 0,
) -> dict[str, np.ndarray]:
  """Cuts windows of text out of documents, to predict `tokens` tokens.

  Documents are cut into pieces of `length` tokens, each with the model's bos in
  front if it was trained with one. Pieces are drawn at random, one of every
  document before a second of any, so that windows have as little to do with
  each other as the documents allow. Short ones share a window and do not see
  each other (`packing.pack`). The first token of a piece is predicted only with
  a bos before it. Text that spells a special token is text.

  Returns:
    The arrays of `packing.pack`, [N, length] each. The same arguments give the
    same windows, of which `tokens` tokens are to be predicted in all.

  Raises:
    ValueError: A number is out of its range, or the documents hold too little
      text.
  """
  for name, value, least in (('tokens', tokens, 1), ('length', length, 2)):
    if value < least:
      raise ValueError(f'{name} must be at least {least}, got {value}.')
  start = [tokenizer.bos_id] if tokenizer.starts_with_bos else []
  found, missing = [], tokens
  size = length - len(start)
  for piece in _pieces(tokenizer, documents, size, np.random.default_rng(seed)):
    piece = (start + piece)[: missing + 1]
    # The first one of a piece has nothing to be predicted from.
    if len(piece) > 1:
      found.append(piece)
      missing -= len(piece) - 1
    if not missing:
      return packing.pack(found, length)
  raise ValueError(
    f'documents hold {tokens - missing} tokens to predict, {tokens} were asked'
    ' for: ask for fewer tokens or give more text.'
  )


def perplexity(
  lm: LanguageModel,
  documents: Sequence[str],
  *,
  tokens: int,
  length: int = 512,
  batch: int = 8,
  seed: int = 0,
  progress: scoring.Progress | None = None,
) -> Perplexity:
  """exp(-1/n sum log p(token | tokens before it in its window)).

  As in most papers on quantization, windows do not overlap and every token of a
  window counts, so the first ones have little context: compare only numbers of
  one `length`. Windows begin and end with documents where those are short
  (`windows`), and differ there from papers that join all text into one stream.
  The evaluation harness (lm-eval, `loglikelihood_rolling`) also predicts the
  first token of a document, from an end-of-text token that not every model was
  trained to see there, and reports the loss by word and by byte.

  Args:
    lm: The model; its leaves may be of any kind.
    documents: Texts to draw windows from.
    tokens: How many tokens to predict.
    length: Tokens of a window.
    batch: Windows at a time.
    seed: Of the draw.
    progress: Is called with the windows done and all of them.

  Raises:
    ValueError: See `windows`; or `length` is more than the model's context.
  """
  packed = _windows(lm, documents, tokens, length, seed)
  apply, head = scoring.functions(lm)
  run = functools.partial(scoring.token_losses, apply, head, lm.params)
  return _perplexity(packed, _in_batches(run, packed, batch, progress))


def reference(
  lm: LanguageModel,
  documents: Sequence[str],
  *,
  tokens: int,
  length: int = 512,
  batch: int = 8,
  seed: int = 0,
  progress: scoring.Progress | None = None,
) -> Reference:
  """One pass of a model whose distributions others are held against.

  Arguments and errors are those of `perplexity`. The states take `4 * D` bytes
  a token of a float32 model (2.3 kB of SmolLM2-135M).
  """
  packed = _windows(lm, documents, tokens, length, seed)
  apply, head = scoring.functions(lm)
  run = functools.partial(scoring.losses_and_states, apply, head, lm.params)
  losses, hidden = _in_batches(run, packed, batch, progress)
  return Reference(
    lm=lm, windows=packed, hidden=hidden, perplexity=_perplexity(packed, losses)
  )


def kl(
  reference: Reference,
  lm: LanguageModel,
  *,
  batch: int = 8,
  progress: scoring.Progress | None = None,
) -> Divergence:
  """KL(p || q) = sum_v p_v (log p_v - log q_v), the mean over the tokens.

  p is the reference and q the model. It sees every change of a distribution,
  where perplexity sees that of one token and lets gains pay for losses, so it
  tells models apart on far fewer tokens; it is 0 only if nothing changed. The
  pass gives the perplexity of q as well. `llama-perplexity --kl-divergence`
  measures the same, from kept logits. The reference itself is not run again: it
  is 0 from itself.

  Raises:
    ValueError: The models do not share a tokenizer.
  """
  counts = reference.windows['loss_mask'].sum(1)
  if lm is reference.lm:
    return Divergence(
      nats=Estimate(np.zeros(len(counts)), counts),
      agreement=Estimate(counts.astype(np.float64), counts),
      perplexity=reference.perplexity,
    )
  if lm.tokenizer.fingerprint != reference.lm.tokenizer.fingerprint:
    raise ValueError(
      f'{lm.name} and {reference.lm.name} have different tokenizers: their'
      ' distributions cannot be compared.'
    )
  _, head_of_p = scoring.functions(reference.lm)
  apply, head = scoring.functions(lm)

  def run(tokens, mask, segments, hidden):
    return _divergences(
      *(head_of_p, reference.lm.params, hidden),
      *(apply, head, lm.params, tokens, mask, segments),
    )

  packed = reference.windows
  found = _in_batches(run, packed, batch, progress, reference.hidden)
  distance, losses, same = (x.sum(1, dtype=np.float64) for x in found)
  return Divergence(
    nats=Estimate(distance, counts),
    agreement=Estimate(same, counts),
    perplexity=Perplexity(nats=Estimate(losses, counts)),
  )


def _windows(
  lm: LanguageModel,
  documents: Sequence[str],
  tokens: int,
  length: int,
  seed: int,
) -> dict[str, np.ndarray]:
  if length > lm.config.max_positions:
    raise ValueError(
      f'length must be at most the {lm.config.max_positions} tokens that'
      f' {lm.name} can read, got {length}.'
    )
  return windows(
    lm.tokenizer, documents, tokens=tokens, length=length, seed=seed
  )


def _pieces(
  tokenizer: Tokenizer,
  documents: Sequence[str],
  size: int,
  rng: np.random.Generator,
) -> Iterator[list[int]]:
  """Pieces of all documents in random order, one of each before a second."""
  rest = []
  for number in rng.permutation(len(documents)):
    ids = tokenizer.encode(documents[number], special=False)
    pieces = [ids[place : place + size] for place in range(0, len(ids), size)]
    rng.shuffle(pieces)
    rest.append(pieces)
    if pieces:
      yield pieces.pop()
  while rest := [pieces for pieces in rest if pieces]:
    for pieces in rest:
      yield pieces.pop()


def _perplexity(packed: dict[str, np.ndarray], losses) -> Perplexity:
  sums = losses.sum(1, dtype=np.float64)
  return Perplexity(nats=Estimate(sums, packed['loss_mask'].sum(1)))


def _in_batches(
  run: Callable[..., Any],
  packed: dict[str, np.ndarray],
  batch: int,
  progress: scoring.Progress | None,
  *more: np.ndarray,
) -> Any:
  """`run` of all windows, `batch` at a time; zeros fill the last batch up."""
  scoring.check_batch(batch)
  names = ('tokens', 'loss_mask', 'segments')
  arrays = [*(packed[name] for name in names), *more]
  total = len(arrays[0])
  found = []
  for start in range(0, total, batch):
    rows = [_filled_up(array[start : start + batch], batch) for array in arrays]
    found.append(jax.tree.map(np.asarray, run(*rows)))
    if progress is not None:
      progress(min(start + batch, total), total)
  return jax.tree.map(lambda *parts: np.concatenate(parts)[:total], *found)


def _filled_up(rows: np.ndarray, batch: int) -> np.ndarray:
  missing = batch - len(rows)
  return np.pad(rows, [(0, missing)] + [(0, 0)] * (rows.ndim - 1))


@functools.partial(jax.jit, static_argnames=('head_of_p', 'apply', 'head'))
def _divergences(
  head_of_p: scoring.Head,
  params_of_p: Params,
  hidden_of_p: jax.Array,  # [B, T, D]
  apply: ApplyFn,
  head: scoring.Head,
  params: Params,
  tokens: jax.Array,  # [B, T]
  mask: jax.Array,  # [B, T]
  segments: jax.Array,  # [B, T]
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """KL(p || q), -log q of the tokens, and equal likeliest tokens: [B, T]."""

  def score(hidden_of_p, hidden, targets):
    p = head_of_p(params_of_p, hidden_of_p).astype(jnp.float32)
    q = head(params, hidden).astype(jnp.float32)
    same = sampling.arg_max(p) == sampling.arg_max(q)
    return *_of_logits(p, q, targets), same.astype(jnp.float32)

  hidden = apply(params, tokens, segments=segments)[0].hidden
  rows = hidden_of_p[:, :-1], hidden[:, :-1], tokens[:, 1:]
  padded = lambda x: jnp.where(mask, jnp.pad(x, ((0, 0), (1, 0))), 0.0)
  return jax.tree.map(padded, scoring.over_chunks(score, *rows))


def _of_logits(
  x: jax.Array,  # [R, V] float32, of p
  y: jax.Array,  # [R, V] float32, of q
  targets: jax.Array,  # [R] int32
) -> tuple[jax.Array, jax.Array]:
  """KL(p || q) and -log q of the targets, [R], right from the logits x and y.

      KL(p || q) = sum_v p_v (x_v - y_v) - log sum_v e^x_v + log sum_v e^y_v

  The losses of `distillation` write the log-probabilities down in between.
  """
  top_x, top_y = x.max(-1), y.max(-1)
  weights = jnp.exp(x - top_x[:, None])
  total_x, total_y = weights.sum(-1), jnp.exp(y - top_y[:, None]).sum(-1)
  mean = jnp.sum(weights * (x - y), axis=-1) / total_x
  distance = mean + (top_y - top_x) + (jnp.log(total_y) - jnp.log(total_x))
  of_targets = jnp.take_along_axis(y, targets[:, None], axis=-1)[:, 0]
  return distance, jnp.log(total_y) + top_y - of_targets
