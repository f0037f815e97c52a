"""Text in, text out: the decoding loops behind prompts and strings.

    lm = pretrained.load('smollm2-135m')
    result = generation.generate(lm, ['Once upon a time'], drafter='n-gram')
    print(result.texts[0], result.guarantee, result.statistics[0])

Everything below this module works on arrays and knows no tokenizer.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from efficiency_jax.decoding import sampling
from efficiency_jax.decoding import speculative
from efficiency_jax.decoding import statistics
from efficiency_jax.decoding import verifiers
from efficiency_jax.engine import Engine
from efficiency_jax.engine import measured_costs
from efficiency_jax.engine import prepare
from efficiency_jax.engine import run
from efficiency_jax.engine import slots_for_text
from efficiency_jax.engine import start
from efficiency_jax.io.pretrained import LanguageModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
  """One generated text.

  Attributes:
    tokens: New tokens, the stop token included.
    text: Their text, without special tokens and cut before a stop string.
    finish: 'stop' at a stop token or string, 'length' at the budget.
    statistics: Runs, drafted and accepted tokens.
    accepted_draft: For each token, whether it came from an accepted draft.
    run: For each token, the pass of the target that committed it, from 1.
    refused: For each token, the draft token refused in its place, or -1.
  """

  tokens: np.ndarray
  text: str
  finish: str
  statistics: statistics.Statistics
  accepted_draft: np.ndarray
  run: np.ndarray
  refused: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
  """What `generate` gives.

  Attributes:
    rows: One for each prompt.
    guarantee: 'greedy': the text is the arg max text of the target.
      'distribution': it has exactly the target's distribution. 'seed': it is
      the text of plain sampling with this seed. 'none': none of these.
    rounds: Rounds that used each compiled draft length.
    prefill_seconds: Reading the prompts; compilation included if there was any.
    decode_seconds: Writing the texts; the same holds.
  """

  rows: list[Row]
  guarantee: str
  rounds: dict[int, int]
  prefill_seconds: float
  decode_seconds: float

  @property
  def texts(self) -> list[str]:
    """The generated texts."""
    return [row.text for row in self.rows]

  @property
  def statistics(self) -> list[statistics.Statistics]:
    """Statistics of each row."""
    return [row.statistics for row in self.rows]

  @property
  def tokens_per_second(self) -> float:
    """New tokens of all rows over the time to write them."""
    return sum(len(row.tokens) for row in self.rows) / self.decode_seconds


def generate(
  lm: LanguageModel | Engine,
  prompts: Sequence[str | Sequence[int]],
  *,
  max_new_tokens: int = 128,
  temperature: float | list[float] = 0.0,
  top_k: int | list[int] = 0,
  top_p: float | list[float] = 1.0,
  min_p: float | list[float] = 0.0,
  repetition_penalty: float | list[float] = 1.0,
  seed: int = 0,
  stop_strings: Sequence[str] = (),
  batch: int | None = None,
  costs: np.ndarray | None = None,
  slots: int | None = None,
  force_length: int | None = None,
  **choices: Any,
) -> Generation:
  """Continues every prompt, `batch` of them at a time.

  Where a row ends the next prompt takes its place (continuous batching), so
  that rows whose drafts are worse keep no others waiting. Greedy, plain and
  coupled text depends on the seed and on the prompt's place in the list, not on
  the other prompts. With the verifiers token and block the law of the text is
  fixed, but which text is drawn also depends on the draft lengths, which an
  adaptive batch shares.

  Args:
    lm: A model, or an `Engine` from `prepare` to keep its choices.
    prompts: Texts, or token ids. Chats are written with
      `lm.tokenizer.apply_chat_template`.
    max_new_tokens: Budget of each row.
    temperature: 0 is greedy; like the next four one value or one a prompt.
    top_k: Keep the k most likely tokens; 0 keeps all.
    top_p: Keep the smallest set of that probability.
    min_p: Keep tokens with this share of the largest probability.
    repetition_penalty: Above 1 makes tokens seen before less likely.
    seed: Of all random choices.
    stop_strings: End a row where its text first contains one of them.
    batch: Rows that are decoded at a time; None takes all prompts.
    costs: Seconds a round of each draft length, if already measured.
    slots: Room for prompt and text. None takes the next power of two; a larger
      one makes prompts of different lengths run one compiled program.
    force_length: One of the compiled draft lengths, to use in every round.
    **choices: Arguments of `prepare`, when `lm` is a model.

  Raises:
    ValueError: An argument is out of range, or a prompt is empty or too long.
  """
  pieces = stream(
    lm,
    prompts,
    max_new_tokens=max_new_tokens,
    temperature=temperature,
    top_k=top_k,
    top_p=top_p,
    min_p=min_p,
    repetition_penalty=repetition_penalty,
    seed=seed,
    stop_strings=stop_strings,
    batch=batch,
    costs=costs,
    slots=slots,
    force_length=force_length,
    rounds=8 if stop_strings else None,
    **choices,
  )
  *_, last = pieces
  return last


def stream(
  lm: LanguageModel | Engine,
  prompts: Sequence[str | Sequence[int]],
  *,
  max_new_tokens: int = 128,
  temperature: float | list[float] = 0.0,
  top_k: int | list[int] = 0,
  top_p: float | list[float] = 1.0,
  min_p: float | list[float] = 0.0,
  repetition_penalty: float | list[float] = 1.0,
  seed: int = 0,
  stop_strings: Sequence[str] = (),
  batch: int | None = None,
  costs: np.ndarray | None = None,
  slots: int | None = None,
  force_length: int | None = None,
  rounds: int | None = 4,
  **choices: Any,
) -> Iterator[Generation]:
  """`generate` in pieces: yields all there is after every `rounds` rounds.

  The rounds are those of an uninterrupted generation, and so is the last piece;
  but for a row that a stop string ends, which is known when a piece ends, so
  that a prompt that waits for its place begins then. A piece also ends where a
  row gives its place away.
  `rounds=None` yields the finished generation only. A `Row.text` never ends
  inside a character of several tokens, and grows from piece to piece.
  """
  if isinstance(lm, Engine):
    if choices:
      raise ValueError(f'an Engine has these already: {", ".join(choices)}.')
    engine = lm
  else:
    greedy = bool(np.all(np.asarray(temperature) == 0))
    engine = prepare(lm, greedy=greedy, **choices)
  if batch is not None and batch < 1:
    raise ValueError(f'batch must be >= 1, got {batch}.')
  if any(not text for text in stop_strings):
    raise ValueError('stop_strings must not be empty strings.')
  settings = sampling.make(
    len(prompts),
    temperature=temperature,
    top_k=top_k,
    top_p=top_p,
    min_p=min_p,
    repetition_penalty=repetition_penalty,
  )
  if engine.decoder.verifier is verifiers.GREEDY and not sampling.is_greedy(
    settings
  ):
    raise ValueError("verifier 'greedy' needs temperature 0 in every row.")
  encoded = _encode(engine, prompts, max_new_tokens)
  slots = slots_for_text(engine, max(map(len, encoded)) + max_new_tokens, slots)
  lengths = engine.decoder.schedule.lengths
  if force_length is not None and force_length not in lengths:
    raise ValueError(
      f'force_length must be one of {lengths}, got {force_length}.'
    )
  batch = min(batch or len(prompts), len(prompts))
  if costs is None and len(lengths) > 1 and force_length is None:
    kind = _of_rows(settings, list(range(batch)))
    costs = measured_costs(engine, kind, batch, slots)
  keys = sampling.row_keys(seed, jnp.arange(len(prompts)))

  def read(some: list[int]) -> speculative.State:
    """A state whose rows have read some of the prompts."""
    ids = [encoded[number] for number in some]
    rows = _of_rows(settings, some), keys[np.array(some)]
    return jax.block_until_ready(
      start(engine, ids, max_new_tokens, *rows, slots)
    )

  sizes = np.array([len(ids) for ids in encoded])
  how = costs, rounds, force_length
  yield from _pieces(engine, read, sizes, batch, stop_strings, how)


def _pieces(
  engine: Engine,
  read: Callable[[list[int]], speculative.State],
  sizes: np.ndarray,
  batch: int,
  stop_strings: Sequence[str],
  how: tuple[np.ndarray | None, int | None, int | None],
) -> Iterator[Generation]:
  """Decodes prompts of these sizes, which `read` reads; `how` is for `run`."""
  _, rounds, _ = how
  lengths = engine.decoder.schedule.lengths
  # Which prompt stands in each place of the batch, and those that wait.
  places, waiting = list(range(batch)), list(range(batch, len(sizes)))
  begin = time.perf_counter()
  state = read(places)
  reading = time.perf_counter() - begin
  rows = [_NOTHING] * len(sizes)
  earlier = np.zeros(len(lengths), int)  # rounds of accounts that were closed
  while True:
    state = run(engine, state, *how, bool(waiting))
    made = _rows(engine, state, sizes[places], stop_strings)
    for number, (row, _) in zip(places, made, strict=True):
      rows[number] = row
    done = np.array([ended for _, ended in made])
    state = state._replace(done=jnp.asarray(done))
    over = done.all() and not waiting
    if rounds is not None or over:
      chosen = (earlier + np.asarray(state.account.rounds)).tolist()
      yield Generation(
        rows=list(rows),
        guarantee=engine.guarantee,
        rounds=dict(zip(lengths, chosen, strict=True)),
        prefill_seconds=reading,
        decode_seconds=time.perf_counter() - begin - reading,
      )
    if over:
      return
    for place in np.flatnonzero(done)[: len(waiting)]:
      places[place] = waiting.pop(0)
      since = time.perf_counter()
      row = read([places[place]])
      reading += time.perf_counter() - since
      state = speculative.replace(state, jnp.int32(place), row)
      if not waiting:
        # What a place won with earlier rows is no credit of those that are
        # left: for them a new account begins.
        earlier += np.asarray(state.account.rounds)
        account = jax.tree.map(jnp.zeros_like, state.account)
        state = state._replace(account=account)


def _of_rows(settings: sampling.Sampling, rows: list[int]) -> sampling.Sampling:
  return jax.tree.map(lambda field: field[np.array(rows)], settings)


def _encode(
  engine: Engine, prompts: Sequence[str | Sequence[int]], budget: int
) -> list[list[int]]:
  if not prompts:
    raise ValueError('prompts must hold at least one prompt.')
  if budget < 1:
    raise ValueError(f'max_new_tokens must be >= 1, got {budget}.')
  tokenizer, config = engine.lm.tokenizer, engine.lm.config
  encoded = []
  for place, prompt in enumerate(prompts):
    if isinstance(prompt, str):
      prompt = tokenizer.encode(prompt)
    ids = [int(token) for token in prompt]
    if not ids:
      raise ValueError(f'prompt {place} is empty: give it at least one token.')
    if not 0 <= min(ids) <= max(ids) < config.vocab_size:
      raise ValueError(
        f'prompt {place} has tokens outside 0..{config.vocab_size - 1}.'
      )
    if len(ids) + budget > config.max_positions:
      raise ValueError(
        f'prompt {place} has {len(ids)} tokens and max_new_tokens is'
        f' {budget}: together more than the context of'
        f' {config.max_positions}; shorten one of them.'
      )
    encoded.append(ids)
  return encoded


# A prompt that waits for its place.
_NOTHING = Row(
  tokens=np.zeros(0, np.int32),
  text='',
  finish='length',
  statistics=statistics.Statistics(generated=0, runs=0, drafted=0, accepted=0),
  accepted_draft=np.zeros(0, bool),
  run=np.zeros(0, np.int32),
  refused=np.zeros(0, np.int32),
)


def _rows(
  engine: Engine,
  state: speculative.State,
  prompt_length: np.ndarray,
  stop_strings: Sequence[str],
) -> list[tuple[Row, bool]]:
  """The text of every row so far, and whether the row has ended."""
  tokens, length, done = map(
    np.asarray, (state.tokens, state.length, state.done)
  )
  traces = [
    np.asarray(x) for x in (state.accepted_draft, state.run, state.refused)
  ]
  stats = statistics.of_rows(state.counters, length - prompt_length)
  decode = engine.lm.tokenizer.decode
  rows = []
  for row, (first, last) in enumerate(zip(prompt_length, length, strict=True)):
    new = tokens[row, first:last]
    text = decode(new.tolist())
    places = [p for p in map(text.find, stop_strings) if p >= 0]
    if places:
      text = text[: min(places)]
    elif not done[row]:
      # The bytes of a character may still be on their way.
      text = text.rstrip('\N{REPLACEMENT CHARACTER}')
    stopped = len(new) and new[-1] in engine.stop_tokens
    accepted, run_index, refused = (t[row, first:last] for t in traces)
    made = Row(
      tokens=new,
      text=text,
      finish='stop' if places or stopped else 'length',
      statistics=stats[row],
      accepted_draft=accepted,
      run=run_index,
      refused=refused,
    )
    rows.append((made, bool(done[row] or places)))
  return rows
