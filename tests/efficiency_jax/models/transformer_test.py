"""One model, two ways through it: whole sequences, and over a cache."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficiency_jax import trees
from efficiency_jax.models import cache as kv_cache
from efficiency_jax.models import transformer
from tests import fixtures

# A layer with a window and its own rotary base, and one without.
_EVERY = fixtures.every_option(num_layers=2, windows=(3, None))
_CONFIGS = {'plain': fixtures.config(), 'every': _EVERY}
_TIME = 12
_TOKENS = np.random.default_rng(0).integers(0, 11, (2, _TIME))


@functools.cache
def _whole(name):
  config = _CONFIGS[name]
  apply = jax.jit(transformer.apply_fn(config))
  output, cache = apply(fixtures.params(config), jnp.asarray(_TOKENS))
  assert cache is None
  return output


def _attend_naively(queries, keys, values, window, softcap):
  groups = queries.shape[1] // keys.shape[1]
  keys, values = (np.repeat(x, groups, axis=1) for x in (keys, values))
  scores = np.einsum('thd,shd->hts', queries, keys)
  if softcap:
    scores = softcap * np.tanh(scores / softcap)
  t, s = np.indices(scores.shape[1:])
  visible = (s <= t) & (s > t - (window or len(t)))
  scores = np.where(visible, scores, -np.inf)
  weights = np.exp(scores - scores.max(-1, keepdims=True))
  weights /= weights.sum(-1, keepdims=True)
  return np.einsum('hts,shd->thd', weights, values)


def _naive(c, params, tokens):
  """The model for one sequence in numpy, written from the config's words."""
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), dict(params))

  def norm(x, leaves):
    x = x / np.sqrt((x * x).mean(-1, keepdims=True) + c.norm_epsilon)
    return x * (leaves['scale'] + (1 if c.norm_plus_one else 0))

  def linear(x, leaves):
    return x @ leaves['kernel'] + leaves.get('bias', 0)

  def turn(x, layer):
    local = c.window(layer) is not None and c.local_rope_theta is not None
    theta = c.local_rope_theta if local else c.rope_theta
    i = np.arange(c.head_dim // 2)
    inverse = theta ** (-2.0 * i / c.head_dim)
    if c.rope_scaling and not local:
      s = c.rope_scaling
      share = s.original_context * inverse / (2 * np.pi)
      blend = np.clip(
        (share - s.low_frequency_factor)
        / (s.high_frequency_factor - s.low_frequency_factor),
        0,
        1,
      )
      inverse = inverse * ((1 - blend) / s.factor + blend)
    angle = np.arange(len(x))[:, None, None] * inverse
    pair = (x[..., : len(i)] + 1j * x[..., len(i) :]) * np.exp(1j * angle)
    return np.concatenate([pair.real, pair.imag], -1)

  x = p['embedding']['table'][tokens]
  if c.scale_embeddings:
    x = x * np.sqrt(c.width)
  for layer in range(c.num_layers):
    b = p[f'layers_{layer}']
    a = b['attention']
    qkv = linear(norm(x, b['attention_norm']), a['qkv'])
    qkv = qkv.reshape(len(x), -1, c.head_dim)
    q, k, v = np.split(qkv, [c.num_heads, c.num_heads + c.num_kv_heads], 1)
    if c.qk_norm:
      q, k = norm(q, a['query_norm']), norm(k, a['key_norm'])
    q = turn(q, layer) * (c.query_scale or c.head_dim**-0.5)
    out = _attend_naively(
      q, turn(k, layer), v, c.window(layer), c.attention_softcap
    )
    after = linear(out.reshape(len(x), -1), a['output'])
    x = x + (norm(after, b['attention_post_norm']) if c.post_norms else after)
    gate, up = np.split(
      linear(norm(x, b['ffn_norm']), b['ffn']['gate_up']), 2, -1
    )
    if c.activation == 'silu':
      gate = gate / (1 + np.exp(-gate))
    else:
      inner = np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)
      gate = 0.5 * gate * (1 + np.tanh(inner))
    after = linear(gate * up, b['ffn']['down'])
    x = x + (norm(after, b['ffn_post_norm']) if c.post_norms else after)
  x = norm(x, p['final_norm'])
  logits = x @ p['embedding' if c.tie_embeddings else 'head']['table'].T
  if c.final_softcap:
    logits = c.final_softcap * np.tanh(logits / c.final_softcap)
  return logits, x


@pytest.mark.parametrize('name', _CONFIGS)
def test_the_model_is_the_one_its_config_describes(name):
  output = _whole(name)
  assert output.logits.dtype == jnp.float32
  for row in range(2):
    logits, hidden = _naive(
      _CONFIGS[name], fixtures.params(_CONFIGS[name]), _TOKENS[row]
    )
    np.testing.assert_allclose(output.logits[row], logits, atol=2e-4)
    np.testing.assert_allclose(output.hidden[row], hidden, atol=2e-4)


def test_every_option_of_the_config_matters():
  """Else the test above would not see it."""
  config = _CONFIGS['every']
  logits, _ = _naive(config, fixtures.params(config), _TOKENS[0])
  for field in (
    'activation',
    'norm_plus_one',
    'scale_embeddings',
    'query_scale',
    'attention_softcap',
    'final_softcap',
    'rope_theta',
    'local_rope_theta',
    'rope_scaling',
    'windows',
  ):
    plain = getattr(_CONFIGS['plain'], field)
    other = dataclasses.replace(config, **{field: plain})
    changed, _ = _naive(other, fixtures.params(config), _TOKENS[0])
    assert np.abs(changed - logits).max() > 1e-2, field


@pytest.mark.parametrize('name', _CONFIGS)
@pytest.mark.parametrize('split', [(1,) * 12, (12,), (5, 1, 4, 2)])
def test_a_cache_gives_what_the_whole_sequence_gives(name, split):
  config = _CONFIGS[name]
  apply = jax.jit(transformer.apply_fn(config))
  cache = kv_cache.init(config, 2, 16)
  logits, first = [], 0
  for size in split:
    tokens = jnp.asarray(_TOKENS[:, first : first + size])
    output, cache = apply(fixtures.params(config), tokens, cache)
    logits.append(output.logits)
    first += size
    assert cache.length.tolist() == [first, first]
  np.testing.assert_allclose(
    np.concatenate(logits, 1), _whole(name).logits, atol=3e-5
  )


@pytest.mark.parametrize('name', _CONFIGS)
def test_rolling_back_forgets(name):
  """Ragged cursors: wrong tokens, then back, then the right ones."""
  config, params = _CONFIGS[name], fixtures.params(_CONFIGS[name])
  apply = jax.jit(transformer.apply_fn(config))
  cache = kv_cache.init(config, 2, 16)
  _, cache = apply(params, jnp.asarray(_TOKENS[:, :7]), cache)
  _, cache = apply(params, jnp.asarray(10 - _TOKENS[:, 7:]), cache)
  back = [7, 4]
  cache = kv_cache.roll_back(cache, jnp.asarray(back))
  tokens = np.stack([_TOKENS[b, n : n + 5] for b, n in enumerate(back)])
  output, _ = apply(params, jnp.asarray(tokens), cache)
  for row, n in enumerate(back):
    np.testing.assert_allclose(
      output.logits[row], _whole(name).logits[row, n : n + 5], atol=3e-5
    )


def test_the_first_layers_use_and_keep_the_cache_of_the_whole():
  config = _CONFIGS['every']
  params, short = fixtures.params(config), config.truncated(1)
  apply = jax.jit(transformer.apply_fn(short))
  cache = kv_cache.init(config, 2, 16)
  output, cache = apply(params, jnp.asarray(_TOKENS), cache)
  assert len(cache.keys) == config.num_layers
  assert not np.asarray(cache.keys[1]).any()
  alone, _ = apply(params, jnp.asarray(_TOKENS))
  np.testing.assert_allclose(output.logits, alone.logits, atol=3e-5)


@pytest.mark.parametrize('name', _CONFIGS)
def test_gradients_reach_every_parameter(name):
  config, params = _CONFIGS[name], fixtures.params(_CONFIGS[name])
  apply = transformer.apply_fn(config)

  @jax.jit
  @jax.grad
  def gradient(params):
    logits = apply(params, jnp.asarray(_TOKENS))[0].logits
    return -jax.nn.log_softmax(logits)[:, :-1, 3].mean()

  for path, leaf in trees.leaves(gradient(params)):
    assert np.isfinite(leaf).all(), path
    # A bias on all keys moves all scores of a query alike, up to rotation.
    assert np.abs(leaf).max() > 0, path


def test_jit_and_vmap_change_nothing():
  config = _CONFIGS['plain']
  params, apply = fixtures.params(config), transformer.apply_fn(config)
  tokens = jnp.asarray(_TOKENS)
  eager, _ = apply(params, tokens)
  mapped = jax.jit(jax.vmap(lambda row: apply(params, row[None])[0]))(tokens)
  mapped = jax.tree.map(lambda x: np.asarray(x)[:, 0], mapped)
  chex.assert_trees_all_close(eager, _whole('plain'), atol=1e-5)
  chex.assert_trees_all_close(eager, mapped, atol=1e-5)


def test_equal_configs_give_one_function():
  apply = transformer.apply_fn(fixtures.every_option())
  assert apply is transformer.apply_fn(fixtures.every_option())
  assert apply is transformer.apply_fn(fixtures.every_option(), layers=())
  assert transformer.apply_fn(fixtures.config()) is not transformer.apply_fn(
    fixtures.config(vocab_size=12)
  )


@pytest.mark.parametrize('config', _CONFIGS.values())
def test_states_hold_what_inner_blocks_read(config):
  params, tokens = fixtures.params(config), jnp.asarray(_TOKENS)
  apply = transformer.apply_fn(config, layers=(1, 0))
  assert apply is transformer.apply_fn(config, layers=(1, 0))
  final = jax.jit(transformer.apply_fn(config))(params, tokens)[0]
  start = jax.jit(transformer.embed_fn(config))(params, tokens)
  block = jax.jit(transformer.block_fn(config, 0))
  right = [final.hidden, block(params['layers_0'], start), start]
  right = np.concatenate(right, axis=-1)
  apply = jax.jit(apply)
  whole, _ = apply(params, tokens)
  np.testing.assert_allclose(whole.hidden, right, atol=1e-5)
  np.testing.assert_allclose(whole.logits, final.logits, atol=1e-5)
  cached, _ = apply(params, tokens, kv_cache.init(config, 2, tokens.shape[1]))
  np.testing.assert_allclose(cached.hidden, right, atol=1e-4)


def test_a_block_that_is_not_there_is_refused():
  with pytest.raises(ValueError, match=r'layers must be in 0\.\.1, got 2'):
    transformer.apply_fn(fixtures.config(), layers=(0, 2))


def test_parameters_are_initialized_as_documented():
  params = transformer.init(_CONFIGS['every'], jax.random.key(0))
  paths = [path for path, _ in trees.leaves(params)]
  assert 'layers_1/attention/qkv/bias' in paths
  assert 'head/table' in paths
  kernel = params['layers_0']['ffn']['gate_up']['kernel']
  assert kernel.shape == (16, 48)
  np.testing.assert_allclose(kernel.std(), 0.02, rtol=0.1)
  # Norms multiply by one: 1 + 0 where the config says so.
  assert not np.asarray(params['final_norm']['scale']).any()
  plain = transformer.init(fixtures.config(num_layers=1), jax.random.key(0))
  assert (np.asarray(plain['final_norm']['scale']) == 1).all()
  assert 'head' not in plain


def test_bfloat16_models_compute_in_bfloat16():
  config = _CONFIGS['every']
  params = trees.cast(fixtures.params(config), jnp.bfloat16)
  output, _ = jax.jit(transformer.apply_fn(config))(
    params, jnp.asarray(_TOKENS)
  )
  assert output.hidden.dtype == jnp.bfloat16
  assert output.logits.dtype == jnp.float32
  np.testing.assert_allclose(output.logits, _whole('every').logits, atol=0.5)


def test_every_implementation_of_attention_gives_the_same_logits():
  config, tokens = _CONFIGS['every'], jnp.asarray(_TOKENS)
  params = fixtures.params(config)
  for implementation in ('reference', 'blockwise'):
    apply = jax.jit(transformer.apply_fn(config, implementation))
    output, _ = apply(params, tokens)
    chex.assert_trees_all_close(output, _whole('every'), atol=1e-4)
    cache = kv_cache.init(config, tokens.shape[0], tokens.shape[1])
    output, _ = apply(params, tokens, cache)
    chex.assert_trees_all_close(output, _whole('every'), atol=1e-4)
  with pytest.raises(ValueError, match="no implementation 'flash'"):
    jax.jit(transformer.apply_fn(config, 'flash'))(params, tokens)


@pytest.mark.parametrize('name', list(_CONFIGS))
def test_a_tree_of_tokens_gives_what_each_path_gives(name):
  """Windows and rotary positions follow the depth in the tree."""
  config = _CONFIGS[name]
  apply = jax.jit(transformer.apply_fn(config))
  params = fixtures.params(config)
  parents = (-1, 0, 0, 1, 1, 2, 4)
  ancestors = np.eye(7, dtype=bool)
  for node, parent in enumerate(parents[1:], 1):
    ancestors[node] |= ancestors[parent]
  lengths = jnp.asarray([5, 3], jnp.int32)
  cache = kv_cache.init(config, 2, 64)
  _, cache = apply(params, jnp.asarray(_TOKENS[:, :5]), cache)
  cache = kv_cache.roll_back(cache, lengths)
  tree = np.random.default_rng(1).integers(0, 11, (2, 7))
  output, grown = apply(
    params, jnp.asarray(tree), cache, ancestors=jnp.asarray(ancestors)
  )
  assert grown.length.tolist() == [12, 10]
  logits = np.asarray(output.logits)
  for node in range(7):
    path = np.flatnonzero(ancestors[node])
    alone, _ = apply(params, jnp.asarray(tree[:, path]), cache)
    right = np.asarray(alone.logits)[:, -1]
    np.testing.assert_allclose(logits[:, node], right, atol=2e-5)
  with pytest.raises(ValueError, match='after a cache'):
    apply(params, jnp.asarray(tree), ancestors=jnp.asarray(ancestors))


@pytest.mark.parametrize('name', list(_CONFIGS))
def test_segments_are_sequences_of_their_own(name):
  config = _CONFIGS[name]
  apply = jax.jit(transformer.apply_fn(config))
  params = fixtures.params(config)
  segments = np.array([[1] * 5 + [2] * 7, [3] * 1 + [1] * 8 + [0] * 3])
  output, _ = apply(
    params, jnp.asarray(_TOKENS), segments=jnp.asarray(segments)
  )
  places = [
    (row, np.flatnonzero(segments[row] == segment))
    for row in range(2)
    for segment in set(segments[row].tolist())
  ]
  # All in one batch; what comes after a sequence cannot change it.
  alone = np.zeros((len(places), _TIME), np.int32)
  for tokens, (row, own) in zip(alone, places, strict=True):
    tokens[: len(own)] = _TOKENS[row, own]
  expected = np.asarray(apply(params, jnp.asarray(alone))[0].logits)
  logits = np.asarray(output.logits)
  for right, (row, own) in zip(expected, places, strict=True):
    np.testing.assert_allclose(logits[row, own], right[: len(own)], atol=2e-5)
  with pytest.raises(ValueError, match='without a cache'):
    apply(
      params,
      jnp.asarray(_TOKENS),
      kv_cache.init(config, 2, 64),
      segments=jnp.asarray(segments),
    )


@pytest.mark.parametrize('config', _CONFIGS.values())
def test_the_parts_in_their_order_are_the_model(config):
  params = fixtures.params(config)
  tokens = jnp.asarray(_TOKENS)
  output, _ = jax.jit(transformer.apply_fn(config))(params, tokens)
  x = jax.jit(transformer.embed_fn(config))(params, tokens)
  for layer in range(config.num_layers):
    block = jax.jit(transformer.block_fn(config, layer))
    x = block(params[f'layers_{layer}'], x)
  x = np.asarray(x, np.float32)
  scale = params['final_norm']['scale'] + config.norm_plus_one
  size = np.sqrt(np.square(x).mean(-1, keepdims=True) + config.norm_epsilon)
  np.testing.assert_allclose(x / size * scale, output.hidden, atol=1e-4)


def test_layers_that_are_alike_are_traced_once_over_a_cache(monkeypatch):
  config = fixtures.config(
    vocab_size=13, num_layers=5, windows=(None, 3, 3, None, 7)
  )
  params = fixtures.params(config)
  windows = []
  attend = transformer.attention.cached_attention

  def watched(*args, window, **options):
    windows.append(window)
    return attend(*args, window=window, **options)

  monkeypatch.setattr(transformer.attention, 'cached_attention', watched)
  cache = kv_cache.init(config, 2, 128, jnp.float32)
  apply = transformer.apply_fn(config)
  _, grown = jax.eval_shape(apply, params, jnp.asarray(_TOKENS), cache)
  assert windows == [None, 3, 7]
  chex.assert_trees_all_equal_shapes(grown, cache)
