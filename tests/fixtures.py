"""Tiny random models, and a loop around the loop: what most tests need."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from efficiency_jax import trees
from efficiency_jax.decoding import drafters
from efficiency_jax.decoding import sampling as sampling_lib
from efficiency_jax.decoding import speculative
from efficiency_jax.models import cache as kv_cache
from efficiency_jax.models import config as config_lib
from efficiency_jax.models import transformer


def config(**fields) -> config_lib.DecoderConfig:
  """A plain decoder, two layers deep and 16 wide."""
  plain = {
    'vocab_size': 11,
    'width': 16,
    'ffn_width': 24,
    'num_layers': 2,
    'num_heads': 4,
    'num_kv_heads': 2,
    'head_dim': 4,
  }
  return config_lib.DecoderConfig(**{**plain, **fields})


def every_option(**fields) -> config_lib.DecoderConfig:
  """A decoder with every choice away from its default."""
  return config(
    **{
      'num_layers': 3,
      'head_dim': 8,
      'activation': 'gelu_tanh',
      'norm_epsilon': 1e-3,
      'norm_plus_one': True,
      'post_norms': True,
      'qk_norm': True,
      'qkv_bias': True,
      'output_bias': True,
      'mlp_bias': True,
      'tie_embeddings': False,
      'scale_embeddings': True,
      'query_scale': 0.4,
      'attention_softcap': 3.0,
      'final_softcap': 4.0,
      'rope_theta': 500.0,
      'local_rope_theta': 20.0,
      'rope_scaling': config_lib.RopeScaling(
        kind='llama3', factor=4.0, original_context=64
      ),
      'windows': (3, None, 5),
      **fields,
    }
  )


@functools.cache
def params(config: config_lib.DecoderConfig, seed: int = 0, spread=0.3):
  """Random parameters that make peaked, context-dependent distributions.

  Those of `transformer.init` give nearly uniform ones. Logits have a standard
  deviation of about `spread * sqrt(width)`.
  """
  # Of what `init` makes, only names, shapes and the scales of norms are used.
  tree = jax.eval_shape(lambda: transformer.init(config, jax.random.key(0)))
  rng = np.random.default_rng(seed)

  def one(path, leaf):
    noise = rng.standard_normal(leaf.shape)
    name = trees.path_string(path)
    if name.endswith('kernel'):
      noise *= 1.5 / np.sqrt(leaf.shape[0])
    elif name.endswith('table'):
      noise *= spread
    else:
      is_one = name.endswith('scale') and not config.norm_plus_one
      noise = float(is_one) + 0.2 * noise
    return jnp.asarray(noise, jnp.float32)

  return jax.tree_util.tree_map_with_path(one, tree)


# A key for each row; eager, it would be many programs for each new batch.
_row_keys = jax.jit(sampling_lib.row_keys)


def context(prompts, room: int, batch_seed: int = 0, rows=None, settings=None):
  """Right-padded prompts, lengths, keys and sampling as one `Context`."""
  batch = len(prompts)
  lengths = np.asarray([len(p) for p in prompts], np.int32)
  tokens = np.zeros((batch, lengths.max() + room), np.int32)
  for row, prompt in zip(tokens, prompts, strict=True):
    row[: len(prompt)] = prompt
  rows = np.arange(batch) if rows is None else rows
  return drafters.Context(
    jnp.asarray(tokens),
    jnp.asarray(lengths),
    _row_keys(batch_seed, jnp.asarray(rows)),
    settings or sampling_lib.GREEDY,
  )


def begin(
  decoder: speculative.Decoder,
  weights: drafters.Weights,
  config: config_lib.DecoderConfig,
  prompts,
  budget,
  *,
  settings=None,
  seed: int = 0,
  rows=None,
  stop: tuple[int, ...] = (),
  extra: int = 0,
  dtype=jnp.float32,
) -> speculative.State:
  """`speculative.start` on lists of tokens; `extra` widens the buffer."""
  budget = np.broadcast_to(np.asarray(budget, np.int32), (len(prompts),))
  room = int(budget.max()) + decoder.slack + extra
  c = context(prompts, room, seed, rows, settings)
  return speculative.start(
    decoder,
    weights,
    c.tokens,
    c.length,
    c.length + budget,
    jnp.asarray(stop or (-1,), jnp.int32),
    c.sampling,
    c.keys,
    kv_cache.init(config, len(prompts), c.tokens.shape[1], dtype),
  )


def proceed(
  decoder: speculative.Decoder,
  weights: drafters.Weights,
  state: speculative.State,
  *,
  max_rounds: int = 10**6,
  forced: int = -1,
  costs=None,
  waiting: bool = False,
) -> speculative.State:
  """`speculative.run` with python numbers."""
  if costs is None:
    costs = np.ones(len(decoder.schedule.lengths), np.float32)
  return speculative.run(
    decoder,
    weights,
    state,
    jnp.int32(max_rounds),
    jnp.asarray(costs, jnp.float32),
    jnp.int32(forced),
    jnp.bool_(waiting),
  )


def generate(decoder, weights, config, prompts, budget, **options):
  """The finished state of a whole generation."""
  names = ('max_rounds', 'forced', 'costs')
  ran = {n: options.pop(n) for n in names if n in options}
  state = begin(decoder, weights, config, prompts, budget, **options)
  return proceed(decoder, weights, state, **ran)


def texts(state: speculative.State) -> list[list[int]]:
  """Prompt and text of every row."""
  tokens, length = np.asarray(state.tokens), np.asarray(state.length)
  return [row[:n].tolist() for row, n in zip(tokens, length, strict=True)]


def processed_probabilities(
  logits,
  *,
  temperature=0.0,
  top_k=0,
  top_p=1.0,
  min_p=0.0,
  penalty=1.0,
  seen=(),
) -> np.ndarray:
  """What `processed_logits` means for one [V], by sorting and in float64."""
  x = np.asarray(logits, np.float64).copy()
  for token in set(seen):
    x[token] = x[token] / penalty if x[token] > 0 else x[token] * penalty
  if temperature == 0:
    return np.eye(len(x))[x.argmax()]
  x /= temperature
  if top_k:
    x[x < np.sort(x)[::-1][: min(top_k, len(x))][-1]] = -np.inf
  probs = np.exp(x - x.max())
  probs /= probs.sum()
  ordered = np.sort(probs)[::-1]
  # The fewest tokens that weigh top_p; rounding must not ask for one more.
  last = np.searchsorted(np.cumsum(ordered), top_p - 1e-9)
  probs[probs < ordered[min(last, len(x) - 1)]] = 0
  probs[probs < min_p * probs.max()] = 0
  return probs / probs.sum()


@functools.partial(jax.jit, static_argnums=0)
def _next_token(apply, params, context):
  """One token of plain decoding: full attention, no cache, no loop."""
  output, _ = apply(params, context.tokens)
  last = (context.length - 1)[:, None, None]
  logits = jnp.take_along_axis(output.logits, last, axis=1)
  seen = sampling_lib.seen_tokens(
    context.tokens, context.length, logits.shape[-1]
  )[:, None]
  q = sampling_lib.processed_logits(logits, context.sampling, seen)
  keys = sampling_lib.position_keys(
    context.keys, context.length[:, None], sampling_lib.Purpose.SAMPLE
  )
  return sampling_lib.draw(keys, q)[:, 0]


def plain_texts(
  config,
  params,
  prompts,
  budget,
  *,
  settings=None,
  seed=0,
  rows=None,
  stop=(),
  room=32,
) -> list[list[int]]:
  """Prompt and text of every row, decoded slowly one token after another."""
  budget = np.broadcast_to(np.asarray(budget), (len(prompts),))
  c = context(prompts, room, seed, rows, settings)
  found = [list(p) for p in prompts]
  live = [b > 0 for b in budget]
  apply = transformer.apply_fn(config)
  while any(live):
    tokens = np.zeros(c.tokens.shape, np.int32)
    for row, text in zip(tokens, found, strict=True):
      row[: len(text)] = text
    lengths = jnp.asarray([len(text) for text in found], jnp.int32)
    step = c._replace(tokens=jnp.asarray(tokens), length=lengths)
    for row, token in enumerate(np.asarray(_next_token(apply, params, step))):
      if live[row]:
        found[row].append(int(token))
        full = len(found[row]) == len(prompts[row]) + budget[row]
        live[row] = not (full or token in stop)
  return found
