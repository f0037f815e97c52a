"""One bit, or three values, for every weight of a language model: BitNet.

    params = qat.prepare(params, [('kernel$', bitnet.Ternary())])
    ...                                   # train params as those of any model
    params = qat.freeze(params)           # -1, 0, 1, two bits each

(arXiv 2310.11453 has one bit, 2402.17764 three values, "b1.58".) Trained from
the start or for long, since rounding a trained model to so few values leaves
little of it.
"""

import dataclasses

import jax
import jax.numpy as jnp

from efficiency_jax import leaves


@dataclasses.dataclass(frozen=True, kw_only=True)
class Binary:
  """A method of `quantization.rules`, for training with `quantization.qat`.

      s = mean |w|,    w' = s sign(w - mean w)

  over a whole matrix; the sign of 0 is +1. The gradient of w is that of w',
  unclipped.

  Attributes:
    activation: Of the product; 8 bits with a scale a row, None for floats.
  """

  activation: leaves.Activation | None = leaves.Activation()

  @property
  def name(self) -> str:
    return 'binary'

  def __call__(self, matrix: jax.Array) -> leaves.QTensor:
    """Stores a matrix [K, N] in a bit a weight.

    Raises:
      ValueError: K is not a multiple of 8.
    """
    signs = jnp.where(matrix >= matrix.mean(), 1, -1)
    size = jnp.abs(matrix).mean()
    return _stored(matrix, signs, size, 1, self.activation)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ternary:
  """A method of `quantization.rules`, for training with `quantization.qat`.

      s = mean |w|,    w' = s min(max(round(w / s), -1), 1)

  over a whole matrix. The gradient of w is that of w', unclipped.

  Attributes:
    activation: Of the product; 8 bits with a scale a row in the paper, None for
      floats.
  """

  activation: leaves.Activation | None = leaves.Activation()

  @property
  def name(self) -> str:
    return 'ternary'

  def __call__(self, matrix: jax.Array) -> leaves.QTensor:
    """Stores a matrix [K, N] in two bits a weight.

    Raises:
      ValueError: K is not a multiple of 8.
    """
    size = jnp.abs(matrix).mean()
    # A matrix of zeros has no scale, and needs none.
    size = jnp.where(size > 0, size, 1.0)
    codes = jnp.clip(jnp.round(matrix / size), -1, 1).astype(jnp.int32)
    return _stored(matrix, codes, size, 2, self.activation)


def _stored(matrix, codes, size, bits, activation) -> leaves.QTensor:
  return leaves.QTensor(
    values=leaves.pack(codes, bits),
    scales=size.reshape(1, 1),
    bits=bits,
    dtype=matrix.dtype,
    activation=activation,
  )
