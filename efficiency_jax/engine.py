"""A model made ready for one way of decoding: drafter, verifier, lengths.

`generation` puts text around an engine; here are token ids and arrays.
"""

from collections.abc import Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from efficiency_jax import leaves
from efficiency_jax.decoding import cost_table
from efficiency_jax.decoding import draft_model
from efficiency_jax.decoding import draft_trees
from efficiency_jax.decoding import drafters
from efficiency_jax.decoding import eagle
from efficiency_jax.decoding import medusa
from efficiency_jax.decoding import medusa_drafter
from efficiency_jax.decoding import sampling
from efficiency_jax.decoding import schedule as schedule_lib
from efficiency_jax.decoding import speculative
from efficiency_jax.decoding import verifiers
from efficiency_jax.decoding.prefill import slots_for
from efficiency_jax.io.pretrained import LanguageModel
from efficiency_jax.models import cache as kv_cache
from efficiency_jax.models import transformer
from efficiency_jax.models import width
from efficiency_jax.types import Params

DRAFTERS = (
  'plain',
  'n-gram',
  'early exit',
  'draft model',
  'medusa',
  'eagle',
)

# What is trained for one target, and drafts beside it.
Heads = medusa.TrainedHeads | eagle.TrainedDraft | draft_model.TrainedDraft

# Those that draft several guesses at a place, and that look at hidden states.
_WITH_TREES = ('draft model', 'medusa', 'eagle')
_WITH_FEATURES = ('medusa', 'eagle')

# Draft lengths that an adaptive generation compiles; 0 is plain decoding.
# N-grams cost nothing and are right for long where a text repeats itself; of a
# model's guesses every one takes a pass of it.
ADAPTIVE_LENGTHS = (0, 1, 3, 7, 15)
MODEL_LENGTHS = (0, 1, 3)

# Chance that the first draft token is kept, before any was seen, for n-gram
# matches of 1 .. 8 tokens: rounded from greedy texts of SmolLM2 (DESIGN.md).
_NGRAM_PRIOR = (0.2, 0.45, 0.65, 0.7, 0.8, 0.85, 0.85, 0.9)
# And of the shipped one-layer draft (RESULTS.md: 1.6 to 1.7 tokens a run).
_PRIORS = {'n-gram': _NGRAM_PRIOR, 'eagle': (0.65,)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Engine:
  """A model prepared for decoding in one way.

  Attributes:
    lm: The target model.
    decoder: The loop's static choices.
    weights: Parameters of target and draft.
    stop_tokens: Tokens that end a row; the token itself is kept.
    cache_dtype: Of the target's keys and values.
  """

  lm: LanguageModel
  decoder: speculative.Decoder
  weights: drafters.Weights
  stop_tokens: tuple[int, ...]
  cache_dtype: Any

  @functools.cached_property
  def guarantee(self) -> str:
    """That of the verifier, or 'none' where it cannot be given.

    Passes of different widths differ in the last bits of floats. A model that
    rounds its activations, or keys and values, to integers makes steps of such
    bits, so that with drafts its text is one of a model with the same weights,
    and not token for token what single steps write: unless its bits do not
    depend on the width (`models.width`), and drafts are chains.
    """
    rounds = leaves.rounds_activations(self.lm.params)
    rounds |= self.cache_dtype == jnp.int8
    lengths = self.decoder.schedule.lengths
    if rounds and lengths != (0,):
      tree = self.decoder.drafter.tree
      chains = all(tree(length).is_chain for length in lengths)
      cache_dtype = self.cache_dtype or jnp.float32
      if not chains or not width.is_independent(
        self.lm.config, self.lm.params, cache_dtype, max(lengths) + 1
      ):
        return 'none'
    return self.decoder.verifier.guarantee


def prepare(
  lm: LanguageModel,
  *,
  drafter: str = 'n-gram',
  draft: LanguageModel | None = None,
  heads: Heads | None = None,
  trees: tuple[draft_trees.Shape, ...] | None = None,
  exit_layers: int | None = None,
  draft_length: int | None = None,
  verifier: str | None = None,
  greedy: bool = True,
  stop: bool = True,
  cache_dtype: Any = None,
) -> Engine:
  """Chooses drafter, verifier and draft lengths for a model.

  Args:
    lm: The target.
    drafter: 'plain', 'n-gram', 'early exit', 'draft model', 'medusa' or
      'eagle'.
    draft: The model of 'draft model'; must have the target's tokenizer.
    heads: What was trained for this target: the heads of 'medusa', the draft
      of 'eagle', or that of 'draft model' in place of `draft`.
    trees: Shapes of drafts in place of those that `heads` come with; with
      'eagle' and 'draft model' other lengths are chains.
    exit_layers: Layers that 'early exit' runs; a third of them if None.
    draft_length: Tokens a draft; None adapts it from round to round. With
      'plain' it widens the target's pass without drafting, which makes its
      products those of verification. With trees it is the number of tokens of
      one of them, or of a chain.
    verifier: 'greedy', 'token', 'block', 'coupled' or 'typical'; None takes
      greedy, or else block, or coupled for trees.
    greedy: Whether every row will be greedy.
    stop: Whether the model's stop tokens end a row.
    cache_dtype: Of the target's keys and values: a float dtype, or int8 with a
      scale for each row of head_dim numbers. None is that of the model. The
      text is then that of the model with such a cache.

  Raises:
    ValueError: A choice is unknown or does not fit the model.
  """
  trees = _checked(drafter, draft_length, heads, trees)
  sampled = 'coupled' if trees else 'block'
  verifier = verifier or ('greedy' if greedy else sampled)
  if verifier == 'greedy' and not greedy:
    raise ValueError(
      "verifier 'greedy' needs temperature 0; use 'block', 'token' or"
      " 'coupled'."
    )
  chosen, own = _drafter(lm, drafter, draft, heads, trees, exit_layers)
  # Of what layers below the last one the drafter looks at, if at any.
  inner = heads.form.layers if drafter in _WITH_FEATURES else ()
  decoder = speculative.Decoder(
    apply=transformer.apply_fn(lm.config, layers=inner),
    drafter=chosen,
    verifier=verifiers.named(verifier),
    schedule=schedule_lib.Schedule(
      lengths=_lengths(drafter, draft_length, trees),
      prior=_PRIORS.get(drafter, (0.5,)),
    ),
  )
  weights = drafters.Weights(lm.params, own)
  return Engine(
    lm=lm,
    decoder=decoder,
    weights=weights,
    stop_tokens=lm.tokenizer.stop_ids if stop else (),
    cache_dtype=jnp.dtype(_dtype(lm) if cache_dtype is None else cache_dtype),
  )


def _checked(
  drafter: str,
  draft_length: int | None,
  heads: Heads | None,
  trees: tuple[draft_trees.Shape, ...] | None,
) -> tuple[draft_trees.Shape, ...] | None:
  """The trees to draft, of choices that fit together."""
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
  if drafter in _WITH_TREES:
    return (heads.trees if heads else ()) if trees is None else trees
  if trees:
    raise ValueError(
      f'drafter {drafter!r} takes no trees; {", ".join(_WITH_TREES)} do.'
    )
  return trees


def _drafter(
  lm: LanguageModel,
  name: str,
  draft: LanguageModel | None,
  heads: Heads | None,
  trees: tuple[draft_trees.Shape, ...] | None,
  exit_layers: int | None,
) -> tuple[drafters.Drafter, Params | None]:
  """A drafter and its own weights."""
  if name == 'plain':
    return drafters.Nothing(), None
  if name == 'n-gram':
    return drafters.NGram(), None
  if name == 'early exit':
    layers = max(1, lm.config.num_layers // 3)
    layers = layers if exit_layers is None else exit_layers
    shallow = lm.config.truncated(layers)
    return drafters.EarlyExit(apply=transformer.apply_fn(shallow)), None
  if name == 'medusa':
    return _medusa(lm, heads, trees), heads.weights
  if name == 'eagle':
    return _eagle(lm, heads, trees), heads.weights
  return _draft_model(lm, draft, heads, trees)


def _lengths(
  drafter: str,
  draft_length: int | None,
  trees: tuple[draft_trees.Shape, ...] | None,
) -> tuple[int, ...]:
  """The draft lengths to compile."""
  if drafter == 'plain':
    return (draft_length or 0,)
  if draft_length is not None:
    return (draft_length,)
  if trees:
    return (0, *sorted(len(tree) - 1 for tree in trees))
  return ADAPTIVE_LENGTHS if drafter == 'n-gram' else MODEL_LENGTHS


def _medusa(
  lm: LanguageModel,
  heads: medusa.TrainedHeads | None,
  trees: tuple[draft_trees.Shape, ...],
) -> medusa_drafter.Medusa:
  if not isinstance(heads, medusa.TrainedHeads):
    raise ValueError("drafter 'medusa' needs heads=, trained for the target.")
  hidden = heads.params['head_0']['block_0']['kernel'].shape[0]
  if hidden != lm.config.width:
    raise ValueError(
      f'heads are for hidden states of {hidden}, those of {lm.name} have'
      f' {lm.config.width}: take heads trained for it.'
    )
  return medusa_drafter.Medusa(
    heads=heads.form,
    output_head=transformer.head_fn(lm.config),
    trees=trees,
    least_chance=heads.least_chance,
  )


def _eagle(
  lm: LanguageModel,
  draft: eagle.TrainedDraft | None,
  trees: tuple[draft_trees.Shape, ...],
) -> eagle.Eagle:
  if not isinstance(draft, eagle.TrainedDraft):
    raise ValueError("drafter 'eagle' needs heads=, a draft for the target.")
  _check_target(lm, draft)
  return eagle.Eagle(form=draft.form, trees=trees)


def _draft_model(
  lm: LanguageModel,
  draft: LanguageModel | None,
  trained: draft_model.TrainedDraft | None,
  trees: tuple[draft_trees.Shape, ...],
) -> tuple[drafters.DraftModel, Params]:
  """The drafter and its weights, of a whole model or of a cut of the target."""
  if draft is None and isinstance(trained, draft_model.TrainedDraft):
    _check_target(lm, trained)
    # Shapes fit its vocabulary, or they are refused.
    trained = dataclasses.replace(trained, trees=trees)
    form = trained.form
    chosen = drafters.DraftModel(
      apply=draft_model.apply_fn(form),
      init_cache=kv_cache.initializer(form.config, _dtype(lm)),
      head=transformer.head_fn(form.config),
      trees=trees,
    )
    return chosen, trained.weights(lm.params)
  if draft is None or trained is not None:
    raise ValueError(
      "drafter 'draft model' needs draft=, a loaded model, or else heads=, a"
      ' draft model trained for the target.'
    )
  same = draft.tokenizer.fingerprint == lm.tokenizer.fingerprint
  if not same or draft.config.vocab_size != lm.config.vocab_size:
    raise ValueError(
      f'draft {draft.name} and target {lm.name} have different tokenizers:'
      ' take a draft of the same family.'
    )
  chosen = drafters.DraftModel(
    apply=transformer.apply_fn(draft.config),
    init_cache=kv_cache.initializer(draft.config, _dtype(draft)),
    head=transformer.head_fn(draft.config),
    trees=trees,
  )
  return chosen, draft.params


def _check_target(
  lm: LanguageModel, draft: eagle.TrainedDraft | draft_model.TrainedDraft
) -> None:
  if draft.form.target != lm.config:
    raise ValueError(
      f'the draft is for another config than that of {lm.name}: take one'
      ' trained for it.'
    )


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
    engine.lm.config, len(prompts), slots_for(slots), engine.cache_dtype
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
  waiting: bool = False,
) -> speculative.State:
  """Runs the compiled loop to the end, or for `rounds` rounds.

  If prompts are `waiting` for a place, the first row that ends is the end.
  """
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
    jnp.bool_(waiting),
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
  number, waiting = jnp.int32(0), jnp.bool_(False)
  return speculative.run.lower(
    engine.decoder, engine.weights, state, number, costs, number, waiting
  ).compile()


_COSTS: dict[Any, list[np.ndarray]] = {}  # the tables of all measurements


def measured_costs(
  engine: Engine, settings: sampling.Sampling, batch: int, slots: int
) -> np.ndarray:
  """Seconds a round of each draft length for a batch of this size.

  Measured in this process for a decoder, kind of sampling, batch and buffer
  size, once if not by `measure_costs`. The table steers speed alone, never the
  law of the text.
  """
  key = _costs_key(engine, settings, batch, slots)
  if key not in _COSTS:
    measure_costs(engine, settings, batch, slots)
  return cost_table.combined(_COSTS[key])


def measure_costs(
  engine: Engine,
  settings: sampling.Sampling,
  batch: int,
  slots: int,
  repeats: int = 4,
) -> np.ndarray:
  """Such a table measured now; `measured_costs` combines all that there are.

  Engines that are compared take turns, so that none has a slow moment alone.
  """
  table = _measured(engine, settings, batch, slots, repeats)
  key = _costs_key(engine, settings, batch, slots)
  _COSTS.setdefault(key, []).append(table)
  return table


def _costs_key(engine, settings, batch, slots):
  kind = jax.tree.structure(settings)
  weights = jax.tree.structure(engine.weights), _dtype(engine.lm)
  return engine.decoder, kind, batch, slots, weights, engine.cache_dtype


def _measured(engine, settings, batch, slots, repeats) -> np.ndarray:
  slack = engine.decoder.slack
  rounds = max(1, min(6, slots // slack // 2))
  text = max(1, min(slots // 2, slots - slack * (rounds + 1)))
  budget = slots - slack - text
  keys = sampling.row_keys(0, jnp.arange(batch))
  prompts = [[0]] * batch
  state = start(engine, prompts, slots - slack - 1, settings, keys, slots)
  return cost_table.measure(
    engine.decoder,
    engine.weights,
    _after(state, text, engine.lm.config.vocab_size),
    rounds=min(rounds, budget // slack),
    repeats=repeats,
  )


def _after(state: speculative.State, text: int, vocab: int):
  """The state after a random text that no model has read: its caches are empty.

  A round takes as long whatever they hold, and reading would take longer.
  """
  batch, slots = state.tokens.shape
  ids = np.random.default_rng(0).integers(0, vocab, (batch, slots))
  # One array for each of them: all are given away to the loop.
  end = lambda at: jnp.full((batch,), at, jnp.int32)
  is_cache = lambda node: isinstance(node, kv_cache.Cache)
  moved = lambda node: node._replace(length=end(text - 1))
  return state._replace(
    tokens=jnp.asarray(ids, jnp.int32),
    length=end(text),
    cache=moved(state.cache),
    draft=jax.tree.map(
      lambda node: moved(node) if is_cache(node) else node,
      state.draft,
      is_leaf=is_cache,
    ),
  )


def slots_for_text(engine: Engine, tokens: int, slots: int | None) -> int:
  """Buffer size: the next power of two that holds `tokens` and a round.

  Prompts of one size share their compiled programs. A given `slots` is kept, if
  it is large enough.
  """
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
  """What the model computes in."""
  return lm.params['embedding']['table'].dtype
