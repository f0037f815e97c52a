"""Three values for every weight of a language model: BitNet b1.58.

    params = qat.prepare(params, [('kernel$', ternary.Ternary())])
    ...                                   # train params as those of any model
    params = qat.freeze(params)           # -1, 0, 1, two bits each

(arXiv 2402.17764.) Trained from the start or for long, since rounding a trained
model to three values leaves little of it.
"""

import dataclasses

import jax
import jax.numpy as jnp

from efficiency_jax import leaves


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
    """Stores a matrix [K, N].

    Raises:
      ValueError: K is not a multiple of 8.
    """
    scale = jnp.abs(matrix).mean()
    # A matrix of zeros has no scale, and needs none.
    scale = jnp.where(scale > 0, scale, 1.0)
    codes = jnp.clip(jnp.round(matrix / scale), -1, 1).astype(jnp.int32)
    return leaves.QTensor(
      values=leaves.pack(codes, 2),
      scales=scale.reshape(1, 1),
      bits=2,
      dtype=matrix.dtype,
      activation=self.activation,
    )
