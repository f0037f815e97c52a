"""Text in, text out: the decoding loops behind prompts and strings.

    lm = pretrained.load('smollm2-135m')
    result = generation.generate(lm, ['Once upon a time'], drafter='n-gram')
    print(result.texts[0], result.guarantee, result.statistics[0])

Everything below this module works on arrays and knows no tokenizer.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from efficiency_jax.decoding import cost_table, drafters, sampling
from efficiency_jax.decoding import schedule as schedule_lib
from efficiency_jax.decoding import speculative, statistics, verifiers
from efficiency_jax.decoding.prefill import slots_for
from efficiency_jax.io.pretrained import LanguageModel
from efficiency_jax.models import cache as kv_cache
from efficiency_jax.models import transformer

DRAFTERS = ('plain', 'n-gram', 'early exit', 'draft model')

# Draft lengths that an adaptive generation compiles; 0 is plain decoding.
ADAPTIVE_LENGTHS = (0, 3, 7, 15)

# Chance that a draft token is kept, before any was seen, for n-gram matches of
# 1 .. 8 tokens: rounded from greedy texts of SmolLM2 (DESIGN.md).
_NGRAM_PRIOR = (0.35, 0.65, 0.8, 0.85, 0.85, 0.9, 0.9, 0.95)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Engine:
  """A model prepared for decoding in one way.

  Attributes:
    lm: The target model.
    decoder: The loop's static choices.
    weights: Parameters of target and draft.
    stop_tokens: Tokens that end a row; the token itself is kept.
  """

  lm: LanguageModel
  decoder: speculative.Decoder
  weights: drafters.Weights
  stop_tokens: tuple[int, ...]


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
      the text of plain sampling with this seed.
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


def prepare(
    lm: LanguageModel,
    *,
    drafter: str = 'n-gram',
    draft: LanguageModel | None = None,
    exit_layers: int | None = None,
    draft_length: int | None = None,
    verifier: str | None = None,
    greedy: bool = True,
    stop: bool = True,
) -> Engine:
  """Chooses drafter, verifier and draft lengths for a model.

  Args:
    lm: The target.
    drafter: 'plain', 'n-gram', 'early exit' or 'draft model'.
    draft: The model of 'draft model'; must have the target's tokenizer.
    exit_layers: Layers that 'early exit' runs; a third of them if None.
    draft_length: Tokens a draft; None adapts it from round to round. With
      'plain' it widens the target's pass without drafting, which makes its
      products those of verification.
    verifier: 'greedy', 'token', 'block' or 'coupled'; None takes greedy or
      block by `greedy`.
    greedy: Whether every row will be greedy.
    stop: Whether the model's stop tokens end a row.

  Raises:
    ValueError: A choice is unknown or does not fit the model.
  """
  if drafter not in DRAFTERS:
    raise ValueError(
        f'drafter {drafter!r} is unknown; there are {", ".join(DRAFTERS)}.'
    )
  smallest = 0 if drafter == 'plain' else 1
  if draft_length is not None and draft_length < smallest:
    raise ValueError(
        f'draft_length must be >= {smallest} with drafter {drafter!r}, got'
        f' {draft_length}.'
    )
  verifier = verifier or ('greedy' if greedy else 'block')
  if verifier == 'greedy' and not greedy:
    raise ValueError(
        "verifier 'greedy' needs temperature 0; use 'block', 'token' or"
        " 'coupled'."
    )
  lengths = ADAPTIVE_LENGTHS if draft_length is None else (draft_length,)
  prior = (0.5,)
  if drafter == 'plain':
    lengths = (draft_length or 0,)
    chosen = drafters.Nothing()
  elif drafter == 'n-gram':
    chosen, prior = drafters.NGram(), _NGRAM_PRIOR
  elif drafter == 'early exit':
    layers = max(1, lm.config.num_layers // 3)
    layers = layers if exit_layers is None else exit_layers
    shallow = lm.config.truncated(layers)
    chosen = drafters.EarlyExit(apply=transformer.apply_fn(shallow))
  else:
    chosen = _draft_model(lm, draft)
  decoder = speculative.Decoder(
      apply=transformer.apply_fn(lm.config),
      drafter=chosen,
      verifier=verifiers.named(verifier),
      schedule=schedule_lib.Schedule(lengths=lengths, prior=prior),
  )
  weights = drafters.Weights(lm.params, draft.params if draft else None)
  return Engine(
      lm=lm,
      decoder=decoder,
      weights=weights,
      stop_tokens=lm.tokenizer.stop_ids if stop else (),
  )


def _draft_model(
    lm: LanguageModel, draft: LanguageModel | None
) -> drafters.DraftModel:
  if draft is None:
    raise ValueError("drafter 'draft model' needs draft=, a loaded model.")
  same = draft.tokenizer.fingerprint == lm.tokenizer.fingerprint
  if not same or draft.config.vocab_size != lm.config.vocab_size:
    raise ValueError(
        f'draft {draft.name} and target {lm.name} have different tokenizers:'
        ' take a draft of the same family.'
    )
  return drafters.DraftModel(
      apply=transformer.apply_fn(draft.config),
      init_cache=kv_cache.initializer(draft.config, _dtype(draft)),
  )


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
    costs: np.ndarray | None = None,
    slots: int | None = None,
    force_length: int | None = None,
    **choices: Any,
) -> Generation:
  """Continues every prompt, all of them in one batch.

  What a prompt gets depends on the seed and on its place in the list, not on
  the other prompts.

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
    costs: np.ndarray | None = None,
    slots: int | None = None,
    force_length: int | None = None,
    rounds: int | None = 4,
    **choices: Any,
) -> Iterator[Generation]:
  """`generate` in pieces: yields all there is after every `rounds` rounds.

  The rounds are those of an uninterrupted generation, and so is the last piece.
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
  prompt_length = np.array([len(ids) for ids in encoded], np.int32)
  slots = _slots(engine, int(prompt_length.max()) + max_new_tokens, slots)
  lengths = engine.decoder.schedule.lengths
  if force_length is not None and force_length not in lengths:
    raise ValueError(
        f'force_length must be one of {lengths}, got {force_length}.'
    )
  if costs is None and len(lengths) > 1 and force_length is None:
    costs = measured_costs(engine, settings, len(prompts), slots)

  begin = time.perf_counter()
  keys = sampling.row_keys(seed, jnp.arange(len(prompts)))
  state = start(engine, encoded, max_new_tokens, settings, keys, slots)
  jax.block_until_ready(state.length)
  prefilled = time.perf_counter()
  cut: list[str | None] = [None] * len(prompts)
  while True:
    state = run(engine, state, costs, rounds, force_length)
    done = np.asarray(state.done)
    seconds = (prefilled - begin, time.perf_counter() - prefilled)
    result, found = _collect(engine, state, prompt_length, stop_strings, seconds)
    if found.any():
      done = done | found
      state = state._replace(done=jnp.asarray(done))
    yield result
    if done.all():
      return


def start(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    settings: sampling.Sampling,
    keys: jax.Array,
    slots: int,
) -> speculative.State:
  """Reads encoded prompts into buffers of `slots` tokens a row."""
  lengths = np.array([len(ids) for ids in prompts], np.int32)
  tokens = np.zeros((len(prompts), slots), np.int32)
  for row, ids in enumerate(prompts):
    tokens[row, : len(ids)] = ids
  cache = kv_cache.init(
      engine.lm.config, len(prompts), slots_for(slots), _dtype(engine.lm)
  )
  return speculative.start(
      engine.decoder,
      engine.weights,
      jnp.asarray(tokens),
      jnp.asarray(lengths),
      jnp.asarray(lengths + max_new_tokens),
      jnp.asarray(engine.stop_tokens or (-1,), jnp.int32),
      settings,
      keys,
      cache,
  )


def run(
    engine: Engine,
    state: speculative.State,
    costs: np.ndarray | None = None,
    rounds: int | None = None,
    force_length: int | None = None,
) -> speculative.State:
  """Runs the compiled loop to the end, or for `rounds` rounds."""
  forced = -1
  if force_length is not None:
    forced = engine.decoder.schedule.lengths.index(force_length)
  if costs is None:
    costs = np.ones(len(engine.decoder.schedule.lengths), np.float32)
  state = speculative.run(
      engine.decoder,
      engine.weights,
      state,
      jnp.int32(np.iinfo(np.int32).max if rounds is None else rounds),
      jnp.asarray(costs, jnp.float32),
      jnp.int32(forced),
  )
  return jax.block_until_ready(state)


def compiled(
    engine: Engine, settings: sampling.Sampling, batch: int, slots: int
) -> jax.stages.Compiled:
  """The program of a generation, to ask it for memory or to read it."""
  prompts = [[0]] * batch
  keys = sampling.row_keys(0, jnp.arange(batch))
  state = start(engine, prompts, 1, settings, keys, slots)
  costs = jnp.ones((len(engine.decoder.schedule.lengths),), jnp.float32)
  number = jnp.int32(0)
  arguments = (engine.decoder, engine.weights, state, number, costs, number)
  return speculative.run.lower(*arguments).compile()


_COSTS: dict[Any, np.ndarray] = {}


def measured_costs(
    engine: Engine, settings: sampling.Sampling, batch: int, slots: int
) -> np.ndarray:
  """Seconds a round of each draft length for a batch of this size.

  Measured once in a process for a decoder, kind of sampling, batch and buffer
  size. The table steers speed alone, never the law of the text.
  """
  kind = jax.tree.structure(settings)
  key = (engine.decoder, kind, batch, slots, _dtype(engine.lm))
  if key not in _COSTS:
    slack = engine.decoder.slack
    rounds = max(1, min(6, slots // slack // 2))
    prompt = max(1, min(slots // 2, slots - slack * (rounds + 1)))
    vocab = engine.lm.config.vocab_size
    ids = np.random.default_rng(0).integers(0, vocab, (batch, prompt))
    keys = sampling.row_keys(0, jnp.arange(batch))
    budget = slots - slack - prompt
    state = start(engine, ids.tolist(), budget, settings, keys, slots)
    _COSTS[key] = cost_table.measure(
        engine.decoder, engine.weights, state, rounds=min(rounds, budget // slack)
    )
  return _COSTS[key]


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


def _collect(
    engine: Engine,
    state: speculative.State,
    prompt_length: np.ndarray,
    stop_strings: Sequence[str],
    seconds: tuple[float, float],
) -> tuple[Generation, np.ndarray]:
  """The generation so far, and which rows hold a stop string."""
  tokens, length, done = map(
      np.asarray, (state.tokens, state.length, state.done)
  )
  traces = [
      np.asarray(x) for x in (state.accepted_draft, state.run, state.refused)
  ]
  stats = statistics.of_rows(state.counters, length - prompt_length)
  decode = engine.lm.tokenizer.decode
  found = np.zeros(len(tokens), bool)
  rows = []
  for row, (first, last) in enumerate(zip(prompt_length, length, strict=True)):
    new = tokens[row, first:last]
    text = decode(new.tolist())
    places = [p for p in map(text.find, stop_strings) if p >= 0]
    if places:
      found[row] = True
      text = text[: min(places)]
    elif not done[row]:
      # The bytes of a character may still be on their way.
      text = text.rstrip('\N{REPLACEMENT CHARACTER}')
    stopped = len(new) and new[-1] in engine.stop_tokens
    accepted, run_index, refused = (t[row, first:last] for t in traces)
    rows.append(
        Row(
            tokens=new,
            text=text,
            finish='stop' if places or stopped else 'length',
            statistics=stats[row],
            accepted_draft=accepted,
            run=run_index,
            refused=refused,
        )
    )
  lengths = engine.decoder.schedule.lengths
  chosen = np.asarray(state.counters.chosen).tolist()
  generation = Generation(
      rows=rows,
      guarantee=engine.decoder.verifier.guarantee,
      rounds=dict(zip(lengths, chosen, strict=True)),
      prefill_seconds=seconds[0],
      decode_seconds=seconds[1],
  )
  return generation, found


def _slots(engine: Engine, tokens: int, slots: int | None) -> int:
  """The next power of two that holds `tokens` and a round, or `slots`."""
  need = tokens + engine.decoder.slack
  if slots is None:
    return max(128, 1 << (need - 1).bit_length())
  if slots < need:
    raise ValueError(
        f'slots must be >= {need} for prompt, max_new_tokens and one round, got'
        f' {slots}.'
    )
  return slots


def _dtype(lm: LanguageModel) -> Any:
  return jax.tree.leaves(lm.params)[0].dtype
