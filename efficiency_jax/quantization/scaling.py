"""Input features scaled before a weight is rounded: AWQ and SmoothQuant.

    x @ W  =  (x / c) @ (c W),        c [K] > 0

changes nothing until something is rounded. A large c_k gives row k of W finer
steps, which pays where x_k is large (AWQ, arXiv 2306.00978); and makes x_k
smaller, which pays where x is rounded too (SmoothQuant, arXiv 2211.10438).
The division stays with the leaf (`QTensor.input_scales`), one multiplication a
feature, and is not folded into what comes before: that exists for some weights
only.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from efficiency_jax import leaves
from efficiency_jax.quantization import absmax
from efficiency_jax.quantization.calibration import Inputs

_SMALLEST = 1e-8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Awq:
  """A calibrated method of `rules.quantize`: c = mean |x|^alpha.

  alpha is the one of 0, 1/20 .. 1 that changes the product least, mean over
  the text of |x W - x W'|^2; 0 is plain rounding.

  Attributes:
    integers: How c W is rounded.
    choices: How many alphas are tried.
  """

  integers: absmax.Integers
  choices: int = 20
  calibrated: bool = dataclasses.field(default=True, init=False)
  statistics: tuple[str, ...] = dataclasses.field(default=('gram',), init=False)

  @property
  def name(self) -> str:
    return f'AWQ, {self.integers.name}'

  def __call__(self, matrix: jax.Array, inputs: Inputs) -> leaves.QTensor:
    """Stores a matrix [K, N]."""
    gram = inputs.gram / inputs.rows
    sizes = jnp.maximum(inputs.sizes / inputs.rows, _SMALLEST)
    alphas = jnp.arange(self.choices) / self.choices
    errors = _output_errors(matrix, sizes, alphas, gram, self.integers)
    best = alphas[jnp.argmin(errors)]
    return _scaled(matrix, sizes**best, self.integers)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmoothQuant:
  """A calibrated method: c_k = max |x_k|^alpha / max |w_k|^(1 - alpha).

  Attributes:
    integers: How c W is rounded; with an activation, or nothing is won.
    alpha: How much of the difficulty goes from x to W.
  """

  integers: absmax.Integers = absmax.Integers(activation=leaves.Activation())
  alpha: float = 0.5
  calibrated: bool = dataclasses.field(default=True, init=False)
  statistics: tuple[str, ...] = dataclasses.field(default=(), init=False)

  def __post_init__(self):
    if not 0 <= self.alpha <= 1:
      raise ValueError(f'alpha must be in [0, 1], got {self.alpha}.')

  @property
  def name(self) -> str:
    return f'SmoothQuant, {self.integers.name}'

  def __call__(self, matrix: jax.Array, inputs: Inputs) -> leaves.QTensor:
    """Stores a matrix [K, N]."""
    of_x = jnp.maximum(inputs.largest, _SMALLEST)
    of_w = jnp.maximum(jnp.abs(matrix).max(1), _SMALLEST)
    c = of_x**self.alpha / of_w ** (1 - self.alpha)
    return _scaled(matrix, c, self.integers)


def _scaled(
  matrix: jax.Array, c: jax.Array, integers: absmax.Integers
) -> leaves.QTensor:
  """c W rounded, to multiply x / c."""
  # A common factor changes nothing but the range.
  c = c / jnp.sqrt(c.max() * c.min())
  q = integers(matrix * c[:, None])
  return dataclasses.replace(q, input_scales=1 / c)


@functools.partial(jax.jit, static_argnames='integers')
def _output_errors(matrix, sizes, alphas, gram, integers) -> jax.Array:
  """The mean of |x W - x W'|^2 over rows x with the given mean of x x'.

  Of each alpha, [alphas].
  """

  def error_of(alpha):
    q = _scaled(matrix, sizes**alpha, integers)
    error = matrix - leaves.dequantize(q)
    return jnp.sum(error * jnp.matmul(gram, error))

  return jax.lax.map(error_of, alphas)
