"""Every recipe makes a model that runs, of the size it promises."""

import jax
import numpy as np
import pytest

from efficiency_jax.models import transformer
from efficiency_jax.quantization import recipes
from tests import fixtures

# Five matrices of two shapes: a recipe is compiled for each shape.
_CONFIG = fixtures.config(
  vocab_size=128,
  width=128,
  ffn_width=128,
  num_layers=1,
  num_heads=2,
  num_kv_heads=1,
  head_dim=64,
)

# Bits of all parameters over their number, norms and scales included.
_BITS = {
  'bf16': (16, 16.1),
  'fp8 e4m3': (8, 8.7),
  'int8': (8, 8.7),
  'W4A8': (5, 6.7),
  'int4': (4.5, 4.7),
  'NF4': (4.5, 4.9),
  'NF4 double': (4.1, 4.6),
  'int3': (3.5, 3.7),
  'int2': (2.5, 2.7),
}


# One of each kind; the others are slow together.
_FIRST = (
  'bf16',
  'int8',
  'W8A8',
  'LLM.int8',
  'W4A8',
  'NF4 double',
  'GOBO 3 bits',
  'GPTQ int4',
)


@pytest.mark.parametrize(
  'name',
  [
    name if name in _FIRST else pytest.param(name, marks=pytest.mark.slow)
    for name in recipes.RECIPES
  ],
)
def test_a_recipe_makes_a_model(name):
  params = fixtures.params(_CONFIG)
  text = [np.random.default_rng(1).integers(0, 64, (16, 64))]
  batches = text if recipes.needs_text(name) else ()
  quantized, report = recipes.quantize(_CONFIG, params, name, batches)
  assert len(report.leaves) == 5
  if name in _BITS:
    low, high = _BITS[name]
    assert low <= report.bits_per_weight <= high
  tokens = np.random.default_rng(0).integers(0, 64, (1, 5))
  output, _ = jax.jit(transformer.apply_fn(_CONFIG))(quantized, tokens)
  assert np.isfinite(output.logits).all()


def test_a_calibrated_recipe_says_that_it_needs_text():
  with pytest.raises(ValueError, match='calibration text has 0 tokens'):
    recipes.quantize(_CONFIG, fixtures.params(_CONFIG), 'GPTQ int4')


def test_a_name_that_does_not_exist_is_refused():
  with pytest.raises(ValueError, match="no recipe 'int5'; there are fp16, "):
    recipes.named('int5')
