"""Bits of parts of an encoder: which values they leave, and what they take."""

import numpy as np
import pytest

from efficiency_jax import leaves
from efficiency_jax import trees
from efficiency_jax.io import untrained
from efficiency_jax.quantization import rules
from experiments import encoder_bits


def test_each_part_is_stored_in_its_bits():
  encoder = untrained.text_encoder()
  names = list(encoder_bits.groups(encoder))
  bits = {name: 2 + 2 * (place % 2) for place, name in enumerate(names)}
  stored, report = rules.quantize(
    encoder.params, encoder_bits.by_bits(encoder, bits)
  )
  parts = {'attention': 2, 'ffn': 4}
  kernels = {
    path: q for path, q in trees.whole(stored) if isinstance(q, leaves.QTensor)
  }
  assert len(kernels) == len(report.leaves) > 0
  for path, q in kernels.items():
    wanted = next(few for part, few in parts.items() if f'/{part}/' in path)
    assert q.bits == wanted
    # All of them are used: absmax would leave one out.
    assert len(np.unique(leaves.integers(q))) == 2**wanted
  sizes = np.array([[q.bits + 1, np.prod(q.shape)] for q in kernels.values()])
  expected = (sizes[:, 0] * sizes[:, 1]).sum() / sizes[:, 1].sum()
  # A scale and a zero point of 32 bits for 64 weights are a bit a weight.
  assert encoder_bits.bits_per_weight(stored) == pytest.approx(expected)
  assert encoder_bits.bits_per_weight(encoder.params) == 32
