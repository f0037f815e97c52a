"""The encoder is that of transformers, and padding changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficiency_jax.io import pretrained_encoder
from efficiency_jax.models import encoder
from efficiency_jax.quantization import absmax
from efficiency_jax.quantization import recipes
from efficiency_jax.quantization import rules
from tests.efficiency_jax.io import tiny_encoders
from tests.golden import make_encoders

pytestmark = pytest.mark.short

_FAMILIES = tuple(make_encoders.FAMILIES)
_sentence_embedding = jax.jit(encoder.sentence_embedding)


def _check(golden, directory):
  """Loads a golden model by the way of every checkpoint, and runs it."""
  tiny_encoders.write(directory, golden.config, golden.weights)
  model = pretrained_encoder.load(directory)
  apply = jax.jit(encoder.apply_fn(model.config))
  found = apply(model.params, golden.tokens, golden.mask)
  found = np.asarray(found) * golden.mask[..., None]
  np.testing.assert_allclose(found, golden.hidden, rtol=0, atol=1e-5)


@pytest.mark.parametrize('family', _FAMILIES)
def test_hidden_states_are_those_of_transformers(tmp_path, family):
  path = make_encoders.DIRECTORY / f'{family}.safetensors'
  golden = make_encoders.read(path)
  # Beyond the last distance that has a bucket of its own.
  assert golden.tokens.shape[1] > 128
  _check(golden, tmp_path)


@pytest.mark.peers
@pytest.mark.parametrize('seed', [101, 102, 103])
@pytest.mark.parametrize('family', _FAMILIES)
def test_hidden_states_of_fresh_models(tmp_path, family, seed):
  pytest.importorskip('torch')
  pytest.importorskip('transformers')
  _check(make_encoders.build(family, seed), tmp_path)


@pytest.mark.peers
def test_buckets_are_those_of_transformers():
  torch = pytest.importorskip('torch')
  pytest.importorskip('transformers')
  from transformers.models.mpnet import modeling_mpnet

  distances = np.arange(-600, 601)
  expected = modeling_mpnet.MPNetEncoder.relative_position_bucket(
    torch.from_numpy(distances)
  )
  found = encoder.relative_buckets(distances)
  np.testing.assert_array_equal(found, expected.numpy())


def test_buckets_by_hand():
  distances = np.array([0, -1, -7, -8, -11, -12, -127, -128, -999, 1, 7, 8])
  # 8 to 11 share a bucket: 8 * 16^(1/8) is 11.3; and so on up to 128.
  expected = [0, 1, 7, 8, 8, 9, 15, 15, 15, 17, 23, 24]
  np.testing.assert_array_equal(encoder.relative_buckets(distances), expected)


def _inputs(lengths, time, fill):
  rng = np.random.default_rng(3)
  tokens = np.full((len(lengths), time), fill, np.int32)
  mask = np.zeros_like(tokens)
  for row, length in enumerate(lengths):
    tokens[row, :length] = rng.integers(4, 12, length)
    mask[row, :length] = 1
  return tokens, mask


@pytest.mark.parametrize('family', _FAMILIES)
def test_padding_does_not_change_a_text(family):
  c = tiny_encoders.config(family)
  params = tiny_encoders.params(c)
  apply = jax.jit(encoder.apply_fn(c))
  tokens, mask = _inputs((3, 9, 5), 9, fill=0)
  short = apply(params, tokens, mask)
  wide = apply(params, *_inputs((3, 9, 5), 24, fill=7))
  seen = mask[..., None] > 0
  tolerance = {'rtol': 0, 'atol': 4e-6}
  np.testing.assert_allclose(
    np.where(seen, short, 0),
    np.where(seen, np.asarray(wide)[:, :9], 0),
    **tolerance,
  )
  alone = apply(params, tokens[:1, :3], mask[:1, :3])
  short, alone = np.asarray(short), np.asarray(alone)
  np.testing.assert_allclose(short[0, :3], alone[0], **tolerance)
  pooled = _sentence_embedding(short, mask)[0]
  expected = _sentence_embedding(alone, mask[:1, :3])[0]
  np.testing.assert_allclose(pooled, expected, **tolerance)


def test_sentence_embeddings_are_means_of_length_one():
  rng = np.random.default_rng(0)
  hidden = rng.standard_normal((3, 5, 4)).astype(np.float32)
  mask = np.array([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
  hidden[0, 3:] = np.nan  # What padding holds does not matter.
  found = _sentence_embedding(hidden, mask)
  mean = hidden[0, :3].mean(0)
  np.testing.assert_allclose(found[0], mean / np.linalg.norm(mean), atol=1e-6)
  np.testing.assert_allclose(np.linalg.norm(found[:2], axis=1), 1, atol=1e-6)
  np.testing.assert_array_equal(found[2], np.zeros(4))


def test_bfloat16_is_close():
  c = tiny_encoders.config()
  params = tiny_encoders.params(c)
  narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
  tokens, mask = _inputs((8, 4), 8, 0)
  apply = jax.jit(encoder.apply_fn(c))
  wide, low = (apply(p, tokens, mask) for p in (params, narrow))
  assert low.dtype == jnp.bfloat16
  pooled = [np.asarray(_sentence_embedding(x, mask)) for x in (wide, low)]
  np.testing.assert_allclose((pooled[0] * pooled[1]).sum(1), 1, atol=1e-3)


@pytest.mark.parametrize('family', _FAMILIES)
def test_quantized_weights_enter_by_the_same_door(family):
  # Layers of two shapes of matrices; a method is compiled for each shape.
  c = tiny_encoders.config(family, ffn_width=16)
  params = tiny_encoders.params(c)
  quantized, report = rules.quantize(
    params, recipes.every(absmax.Integers(bits=8))
  )
  # Four kernels a layer; tokens, positions, and types or distances.
  assert len(report.leaves) == 4 * c.num_layers + 3
  tokens, mask = _inputs((8, 4), 8, 0)
  apply = jax.jit(encoder.apply_fn(c))
  found = apply(quantized, tokens, mask)
  expected = apply(jax.jit(rules.dequantize)(quantized), tokens, mask)
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
  plain = np.asarray(apply(params, tokens, mask))
  assert np.abs(found - plain).max() > 1e-3


def test_losses_have_second_derivatives():
  """What a Hessian of weights is made of: the derivative of a gradient."""
  c = tiny_encoders.config(num_layers=1)
  params = tiny_encoders.params(c)
  tokens, mask = _inputs((6, 4), 6, 0)

  def loss(params):
    hidden = encoder.apply_fn(c, 'reference')(params, tokens, mask)
    return encoder.sentence_embedding(hidden, jnp.asarray(mask))[:, 0].sum()

  rng = np.random.default_rng(0)
  direction = jax.tree.map(
    lambda leaf: np.float32(rng.standard_normal(leaf.shape)), params
  )
  slopes = jax.jit(lambda p: jax.jvp(jax.grad(loss), (p,), (direction,)))
  _, found = slopes(params)
  moved = lambda step: jax.tree.map(
    lambda leaf, d: np.asarray(leaf) + np.float32(step) * d, params, direction
  )
  after, before = (slopes(moved(step))[0] for step in (1e-3, -1e-3))
  after, before = jax.tree.map(np.asarray, (after, before))
  expected = jax.tree.map(lambda a, b: (a - b) / 2e-3, after, before)
  scale = max(np.abs(x).max() for x in jax.tree.leaves(expected))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=0.02 * scale),
    found,
    expected,
  )


def test_too_long_a_text_is_refused():
  c = tiny_encoders.config()
  tokens, mask = _inputs((25,), 25, 0)
  with pytest.raises(ValueError, match='at most max_positions = 24'):
    encoder.apply_fn(c)(tiny_encoders.params(c), tokens, mask)


def test_init_gives_the_parameters_of_a_checkpoint():
  c = tiny_encoders.config('mpnet')
  params = encoder.init(c, jax.random.key(0))
  # Refuses a tree that lacks a parameter of the checkpoint.
  names = tiny_encoders.tensors(c, params)
  assert sum(x.size for x in names.values()) == sum(
    x.size for x in jax.tree.leaves(params)
  )


def test_equal_configs_give_one_function():
  first, second = (tiny_encoders.config() for _ in range(2))
  assert encoder.apply_fn(first) is encoder.apply_fn(second)
