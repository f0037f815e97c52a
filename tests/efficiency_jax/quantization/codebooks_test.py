"""NF4, FP4 and double quantization: the published anchors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficiency_jax import leaves
from efficiency_jax.quantization import codebooks
from efficiency_jax.quantization.codebooks import Codes
from pallas_kernels.dequant_matmul import formats

pytestmark = pytest.mark.short

_NORMAL = jax.random.normal(jax.random.key(0), (1024, 1024))


@pytest.mark.parametrize(
  ('code', 'block', 'mean', 'sigma'),
  [
    # Of bitsandbytes for normal weights of 1024 x 1024; the spread is that of
    # the mean of as many errors.
    ('NF4', 64, 0.072798, 6e-5),
    ('NF4', 32, 0.067746, 6e-5),
    ('NF4', 128, 0.076831, 6e-5),
    ('FP4', 64, 0.096543, 8e-5),
  ],
)
def test_the_mean_error_is_that_of_bitsandbytes(code, block, mean, sigma):
  q = Codes(code=code, block=block)(_NORMAL)
  error = float(jnp.abs(leaves.dequantize(q) - _NORMAL).mean())
  assert abs(error - mean) < 5 * sigma


def test_fp4_has_the_numbers_of_bitsandbytes():
  expected = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3]) / 12
  np.testing.assert_allclose(
    np.unique(np.abs(codebooks.CODES['FP4'])), np.sort(expected), rtol=1e-6
  )
  for code in codebooks.CODES.values():
    assert code.shape == (16,)
    assert (np.diff(code) >= 0).all()


@pytest.mark.parametrize('code', ['NF4', 'FP4'])
def test_the_nearest_code_is_taken(code):
  values = np.random.default_rng(0).uniform(-1.1, 1.1, 1000).astype(np.float32)
  table = codebooks.CODES[code]
  found = table[np.asarray(formats.nearest(jnp.asarray(values), table))]
  best = np.abs(values[:, None] - table).min(1)
  np.testing.assert_allclose(np.abs(values - found), best, atol=1e-7)


def test_double_quantization_saves_0_373_bits_and_costs_little():
  single, double = Codes()(_NORMAL), Codes(double=True)(_NORMAL)
  # 16 numbers of the table are shared by a million weights.
  table = 16 * 32 / 2**20
  np.testing.assert_allclose(single.bits_per_weight, 4.5 + table)
  exact = 4 + 8 / 64 + 32 / (64 * 256) + 32 / 2**20 + table
  np.testing.assert_allclose(double.bits_per_weight, exact)
  assert round(single.bits_per_weight - double.bits_per_weight, 3) == 0.373
  errors = [
    float(jnp.abs(leaves.dequantize(q) - _NORMAL).mean())
    for q in (single, double)
  ]
  assert errors[0] < errors[1] < 1.01 * errors[0]


def test_normal_weights_prefer_nf4():
  """int4 > FP4 > NF4 in error is the order of the paper."""
  error = lambda code: float(
    jnp.abs(leaves.dequantize(Codes(code=code)(_NORMAL)) - _NORMAL).mean()
  )
  assert error('NF4') < 0.8 * error('FP4')


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'code': 'NF3'}, r"code must be of \['FP4', 'NF4'\], got 'NF3'"),
    ({'block': 0}, 'block must be >= 1'),
  ],
)
def test_codes_that_do_not_exist_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    Codes(**options)


@pytest.mark.peers
@pytest.mark.parametrize('double', [False, True])
@pytest.mark.parametrize('code', ['NF4', 'FP4'])
def test_weights_are_those_of_bitsandbytes(code, double):
  from bitsandbytes import functional as bnb
  import torch

  weight = np.array(_NORMAL[:128].T)  # [K, N], theirs is [N, K]
  packed, state = bnb.quantize_4bit(
    torch.tensor(weight.T.copy()),
    blocksize=64,
    quant_type=code.lower(),
    compress_statistics=double,
  )
  theirs = bnb.dequantize_4bit(packed, state).numpy().T
  ours = np.asarray(leaves.dequantize(Codes(code=code, double=double)(weight)))
  # A scale in 8 bits may round the other way where it lies between two codes.
  different = np.abs(ours - theirs) > 1e-6
  assert different.mean() < (5e-3 if double else 1e-5)
  np.testing.assert_allclose(ours, theirs, atol=0.03 if double else 1e-6)
