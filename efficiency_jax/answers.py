"""A model's own answers and hidden states, to train drafts on.

A draft is trained for the text that its target writes, not for text that people
wrote: the target's own answers have its repetitions and its confidence. While
it writes them its hidden states are kept, in float16, so that training needs no
second pass of the target (DistillSpec, arXiv 2310.08461; Medusa's
self-distillation, 2401.10774).
"""

from collections.abc import Iterator, Sequence
import dataclasses
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from efficiency_jax import engine as engine_lib
from efficiency_jax.decoding import drafters
from efficiency_jax.decoding import sampling
from efficiency_jax.io.pretrained import LanguageModel

# What no question holds, to find its place in a chat template.
_MARK = 'the-question-stands-here'


class Answers(NamedTuple):
  """Texts of a model, a row each.

  `hidden[:, t]` is what the model predicts token t + 1 from; it is there for
  the positions `0 .. length - 2`, and zero elsewhere. None was not kept.
  """

  tokens: np.ndarray  # [R, N] int32, the prompt, then the answer
  start: np.ndarray  # [R] int32, tokens of the prompt
  length: np.ndarray  # [R] int32, tokens of both
  hidden: np.ndarray | None  # [R, N, D] float16


@dataclasses.dataclass(frozen=True)
class Recorder(drafters.Nothing):
  """Drafts nothing; keeps the target's hidden states, [B, N, D] float16."""

  name: str = 'recorder'
  needs_features: bool = True

  def init(self, weights, context, longest, hidden=None):
    """Those of the prompts."""
    del weights, longest
    slots = context.tokens.shape[1]
    hidden = hidden[:, :slots].astype(jnp.float16)
    kept = jnp.pad(hidden, ((0, 0), (0, slots - hidden.shape[1]), (0, 0)))
    known = jnp.arange(slots) < context.length[:, None] - 1
    return jnp.where(known[..., None], kept, 0)

  def observe(self, state, context, longest, features=None):
    """Adds those of the committed tokens."""
    if features is not None:
      new = features.hidden.astype(state.dtype)
      start = context.length - 1 - features.count
      held = jnp.arange(new.shape[1]) < features.count[:, None]

      def write(row, block, at, keep):
        old = lax.dynamic_slice(row, (at, 0), block.shape)
        block = jnp.where(keep[:, None], block, old)
        return lax.dynamic_update_slice(row, block, (at, 0))

      state = jax.vmap(write)(state, new, start, held)
    return super().observe(state, context, longest, features)


def answer(
  lm: LanguageModel,
  prompts: Sequence[Sequence[int]],
  *,
  slots: int,
  temperature: float = 0.0,
  seed: int = 0,
  first_row: int = 0,
  keep_hidden: bool = True,
) -> Answers:
  """Lets `lm` answer prompts, up to its stop token or the end of a row.

  Args:
    lm: The model.
    prompts: Token ids, each shorter than `slots` by two at least.
    slots: N, tokens of a row.
    temperature: 0 is greedy.
    seed: Of sampled text.
    first_row: Number of the first prompt, so that the answers to a list do not
      depend on how it is cut into batches.
    keep_hidden: Whether the states are kept.

  Raises:
    ValueError: A prompt leaves no room for an answer.
  """
  longest = max(len(ids) for ids in prompts)
  if longest + 2 > slots:
    raise ValueError(
      f'slots must be >= {longest + 2} for the longest prompt, got {slots}.'
    )
  greedy = temperature == 0
  engine = engine_lib.prepare(
    lm,
    drafter='plain',
    greedy=greedy,
    verifier=None if greedy else 'coupled',
  )
  if keep_hidden:
    decoder = dataclasses.replace(engine.decoder, drafter=Recorder())
    engine = dataclasses.replace(engine, decoder=decoder)
  start = np.array([len(ids) for ids in prompts], np.int32)
  budget = slots - engine.decoder.slack - start
  rows = jnp.arange(first_row, first_row + len(prompts))
  state = engine_lib.start(
    engine,
    prompts,
    budget,
    sampling.make(len(prompts), temperature=temperature),
    sampling.row_keys(seed, rows),
    slots,
  )
  state = engine_lib.run(engine, state)
  return Answers(
    np.asarray(state.tokens),
    start,
    np.asarray(state.length),
    np.asarray(state.draft) if keep_hidden else None,
  )


def questions(
  lm: LanguageModel,
  *,
  slots: int = 128,
  batch: int = 512,
  temperature: float = 1.0,
  seed: int = 0,
) -> Iterator[str]:
  """What a chat model asks itself, without end (Magpie, arXiv 2406.08464).

  It is given the chat template up to where a question begins, and goes on. Only
  questions that it ended are kept; some may come twice.

  Args:
    lm: A model with a chat template.
    slots: Tokens of the template's beginning and the question.
    batch: Questions that are written at once; the texts do not depend on it.
    temperature: Of the questions.
    seed: Of the questions.

  Raises:
    ValueError: The chat template does not hold the question as it is, or none
      of a batch of questions came to an end.
  """
  chat = [{'role': 'user', 'content': _MARK}]
  before, mark, _ = lm.tokenizer.apply_chat_template(chat).partition(_MARK)
  if not mark:
    raise ValueError(f'the chat template of {lm.name} changes questions.')
  ids = lm.tokenizer.encode(before)
  first = 0
  while True:
    made = answer(
      lm,
      [ids] * batch,
      slots=slots,
      temperature=temperature,
      seed=seed,
      first_row=first,
      keep_hidden=False,
    )
    found = [
      lm.tokenizer.decode(row[len(ids) : length - 1].tolist()).strip()
      for row, length in zip(made.tokens, made.length, strict=True)
      if row[length - 1] in lm.tokenizer.stop_ids
    ]
    if not found:
      raise ValueError(
        f'{lm.name} ended none of {batch} questions within {slots} tokens:'
        ' take a chat model, or more slots.'
      )
    yield from filter(None, found)
    first += batch
