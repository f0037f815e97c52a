"""Block by block: what a block is calibrated on is what it will see."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficiency_jax.models import transformer
from efficiency_jax.quantization import calibration
from efficiency_jax.quantization import rules
from efficiency_jax.quantization import sequential
from efficiency_jax.quantization.absmax import Integers
from efficiency_jax.quantization.gptq import Gptq
from tests import fixtures

pytestmark = pytest.mark.short

_CONFIG = fixtures.config(width=32, ffn_width=32, head_dim=8)
_PARAMS = fixtures.params(_CONFIG)
_BATCHES = np.random.default_rng(0).integers(0, 11, (2, 4, 16))
_INT3 = Integers(bits=3, per=32)


class _Seen:
  """Remembers what it was calibrated on."""

  calibrated = True
  name = 'seen'

  def __init__(self):
    self.inputs = []

  def __call__(self, matrix, inputs):
    self.inputs.append(inputs)
    return _INT3(matrix)


def test_a_block_is_calibrated_on_quantized_blocks_before_it():
  seen = _Seen()
  quantized, _ = sequential.quantize(
    _CONFIG, _PARAMS, [('ffn/down/kernel', seen)], _BATCHES, tokens=128
  )
  partly = {**_PARAMS, 'layers_0': quantized['layers_0']}
  expected = calibration.observe(
    transformer.apply_fn(_CONFIG), partly, _BATCHES, rows=1
  )
  for layer in range(2):
    np.testing.assert_allclose(
      seen.inputs[layer].gram,
      expected[f'layers_{layer}/ffn/down/kernel'].gram,
      rtol=1e-3,
      atol=1e-3,
    )
  whole = calibration.observe(
    transformer.apply_fn(_CONFIG), _PARAMS, _BATCHES, rows=1
  )
  gram = whole['layers_1/ffn/down/kernel'].gram
  assert not np.allclose(seen.inputs[1].gram, gram, rtol=1e-2)


def test_what_no_method_reads_is_not_computed():
  """Sums that take as long as the block itself."""
  for wanted in ((), ('gram',), ('histogram',), calibration.COSTLY):
    seen = _Seen()
    seen.statistics = wanted
    sequential.quantize(
      _CONFIG, _PARAMS, [('ffn/down/kernel', seen)], _BATCHES, tokens=128
    )
    for inputs in seen.inputs:
      found = [
        name for name in calibration.COSTLY if getattr(inputs, name) is not None
      ]
      assert tuple(found) == wanted
      assert inputs.rows == 128
      assert (inputs.largest > 0).all()


def test_without_calibration_it_is_plain_quantization():
  given = [('layers_1/', None), ('kernel', _INT3), ('table', Integers())]
  one, report = sequential.quantize(_CONFIG, _PARAMS, given, _BATCHES, tokens=1)
  other, expected = rules.quantize(_PARAMS, given)
  chex.assert_trees_all_equal(one, other)
  assert report.num_bytes == expected.num_bytes
  assert set(report.leaves) == set(expected.leaves)


def test_gptq_of_a_model_is_nearer_to_it_than_rounding():
  tokens = jnp.asarray(_BATCHES[0])
  apply = jax.jit(transformer.apply_fn(_CONFIG))
  exact = apply(_PARAMS, tokens)[0].logits
  plain, _ = rules.quantize(_PARAMS, [('kernel', _INT3)])
  tuned, report = sequential.quantize(
    _CONFIG, _PARAMS, [('kernel', Gptq(integers=_INT3))], _BATCHES, tokens=1
  )
  error = lambda params: float(
    jnp.square(apply(params, tokens)[0].logits - exact).mean()
  )
  assert error(tuned) < 0.7 * error(plain)
  assert len(report.leaves) == 8


@pytest.mark.parametrize(
  ('given', 'message'),
  [
    ([('nothing', _INT3)], 'applies to nothing'),
    ([('table', Gptq(integers=_INT3))], 'needs to know what the weight'),
  ],
)
def test_rules_that_cannot_be_followed_are_refused(given, message):
  with pytest.raises(ValueError, match=message):
    sequential.quantize(_CONFIG, _PARAMS, given, _BATCHES, tokens=1)


def test_too_little_text_is_refused():
  with pytest.raises(ValueError, match='has 128 tokens and needs 1024'):
    sequential.quantize(_CONFIG, _PARAMS, [('kernel', _INT3)], _BATCHES)
