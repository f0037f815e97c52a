"""Static quantization: the scale of the activations is known beforehand.

Dynamic quantization looks at x to find its scale, at every product; static
quantization takes the scale that calibration text asked for, and clips what is
larger. It saves the look and makes the scale a constant of the program.
"""

import dataclasses

import jax

from efficiency_jax import leaves
from efficiency_jax.quantization import absmax
from efficiency_jax.quantization import calibration


@dataclasses.dataclass(frozen=True, kw_only=True)
class Static:
  """A calibrated method of `rules.quantize`: integers, and one scale of x.

  Attributes:
    integers: How the weight is rounded. Its activation says the bits of x.
    mode: How the scale is found, see `calibration.activation_scale`.
  """

  integers: absmax.Integers = absmax.Integers(
    activation=leaves.Activation(per='tensor')
  )
  mode: calibration.Mode = 'absmax'
  calibrated: bool = dataclasses.field(default=True, init=False)
  statistics: tuple[str, ...] = dataclasses.field(
    default=('histogram',), init=False
  )

  def __post_init__(self):
    how = self.integers.activation
    if how is None or how.per != 'tensor':
      raise ValueError(
        "static quantization has one scale of x: take Activation(per='tensor')."
      )

  @property
  def name(self) -> str:
    return f'static {self.mode}, {self.integers.name}'

  def __call__(
    self, matrix: jax.Array, inputs: calibration.Inputs
  ) -> leaves.QTensor:
    """Stores a matrix [K, N] and the scale of what it multiplies."""
    scale = calibration.activation_scale(
      inputs, self.mode, self.integers.activation.bits
    )
    return dataclasses.replace(self.integers(matrix), x_scale=scale)
