"""Rules say which weight is stored how, and a report says what that cost.

    params, report = quantize(lm.params, [
      ('head|embedding', None),                       # stays as it is
      ('layers_0/', absmax.Integers(bits=8)),
      ('kernel$', absmax.Integers(bits=4, per=32)),
    ])

A method is a function of one matrix [K, N], as it multiplies from the right.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import math
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from efficiency_jax import leaves
from efficiency_jax import trees
from efficiency_jax.quantization.calibration import Inputs
from efficiency_jax.types import Params


class Method(Protocol):
  """A way to store a matrix.

  One that depends on what the matrix multiplies has an attribute `calibrated`
  that is True, and takes `calibration.Inputs` as a second argument. Which of
  the costly ones it reads is in `statistics`, if it has that.
  """

  def __call__(
    self,
    matrix: jax.Array,  # [K, N] float32
  ) -> leaves.QTensor:
    """The matrix in fewer bits."""
    ...


Rule = tuple[str, Method | None]
"""A regular expression, searched for in the paths of leaves, and a method.

None leaves a weight as it is. The first rule that matches a path counts
(`trees.replace`).
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeafReport:
  """What became of one weight.

  Attributes:
    path: Of the weight.
    method: Its name.
    shape: Of the weight.
    num_bytes: As it is stored now.
    bits_per_weight: The same, over the number of weights.
    mean_error: Mean |w - w'| over mean |w|, where w' includes input scales.
    max_error: Largest |w - w'|.
    snr_db: 10 log10 of the sum of w^2 over that of (w - w')^2, infinite where
      nothing was lost.
    outlier_share: Entries that are kept apart, as a share of all.
  """

  path: str
  method: str
  shape: tuple[int, ...]
  num_bytes: int
  bits_per_weight: float
  mean_error: float
  max_error: float
  snr_db: float
  outlier_share: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
  """What `quantize` did.

  Attributes:
    leaves: One for each weight that a method changed, in the order of the tree.
    num_bytes: Of all parameters, those that stayed included.
    weights: Numbers in the original parameters.
  """

  leaves: tuple[LeafReport, ...]
  num_bytes: int
  weights: int

  @property
  def bits_per_weight(self) -> float:
    """Stored bits of the whole model over its number of weights."""
    return 8 * self.num_bytes / self.weights


def quantize(
  params: Params,
  rules: Sequence[Rule],
  inputs: Mapping[str, Inputs] | None = None,
) -> tuple[Params, Report]:
  """Stores weights in fewer bits.

  Args:
    params: Of a model, plain arrays where a rule applies.
    rules: In order; the first that matches a path counts.
    inputs: What the weight of each path multiplies, of
      `calibration.observe`; methods that are calibrated need it.

  Returns:
    The parameters, with a `QTensor` where a rule with a method applied, and the
    report.

  Raises:
    ValueError: There is no rule, one applies to nothing or to what is no
      matrix of a product, a weight is quantized already or not finite, or a
      method does not take it.
  """
  reports = []

  def change(path, weight, method):
    leaf = _stored(path, weight, method, inputs)
    reports.append(_report(path, _name(method), weight, leaf))
    return leaf

  quantized = replace(params, rules, change)
  report = Report(
    leaves=tuple(reports),
    num_bytes=trees.count_bytes(quantized),
    weights=sum(math.prod(leaf.shape) for _, leaf in trees.whole(params)),
  )
  return quantized, report


def replace(
  params: Params,
  rules: Sequence[Rule],
  change: Callable[[str, jax.Array, Method], Any],
) -> Params:
  """Puts `change(path, weight, method)` where a rule with a method applies.

  All rules and weights are checked before the first is changed.

  Raises:
    ValueError: As `quantize`.
  """

  def checked(path, leaf, method):
    _check(path, leaf)
    return leaf

  trees.replace(params, rules, checked)
  return trees.replace(params, rules, change)


def dequantize(params: Params) -> Params:
  """Parameters in plain arrays again, by `leaves.dequantize`."""
  is_leaf = lambda node: isinstance(node, leaves.QTensor | leaves.PanelTensor)
  one = lambda leaf: _dequantized(leaf) if is_leaf(leaf) else leaf
  return jax.tree.map(one, params, is_leaf=is_leaf)


def _dequantized(q: leaves.QTensor | leaves.PanelTensor) -> jax.Array:
  """`leaves.dequantize`, compiled for few numbers of outliers."""
  outliers = getattr(q, 'outliers', None)
  if outliers is not None and not isinstance(q.values, jax.core.Tracer):
    count = len(q.outliers.positions)
    fill = (0, (1 << count.bit_length()) - count)
    # A scatter leaves out what lies beyond the end.
    beyond = math.prod(q.shape)
    positions = np.pad(q.outliers.positions, fill, constant_values=beyond)
    kept = leaves.Outliers(positions, np.pad(q.outliers.values, fill))
    q = dataclasses.replace(q, outliers=kept)
  return _compiled(q)


_compiled = jax.jit(leaves.dequantize)


def _check(path: str, leaf: Any) -> None:
  if not isinstance(leaf, jax.Array):
    raise ValueError(
      f'{path} is a {type(leaf).__name__} already: dequantize it first, or make'
      ' the rules narrower.'
    )
  if leaf.ndim != 2 or not path.endswith(('kernel', 'table')):
    raise ValueError(
      f'{path} {list(leaf.shape)} is no kernel or table [K, N]: make the rules'
      ' narrower.'
    )
  if not bool(_is_finite(leaf)):
    raise ValueError(
      f'{path} holds values that are not finite: check the checkpoint.'
    )


@jax.jit
def _is_finite(leaf: jax.Array) -> jax.Array:
  return jnp.isfinite(leaf).all()


def _stored(path: str, weight: jax.Array, method: Method, inputs):
  table = path.endswith('table')
  matrix = weight.astype(jnp.float32)
  arguments = [matrix.T if table else matrix]
  if getattr(method, 'calibrated', False):
    if path not in (inputs or {}):
      raise ValueError(
        f'{path}: {_name(method)} needs to know what the weight multiplies:'
        ' pass inputs=, of calibration.observe.'
      )
    arguments.append(inputs[path])
  try:
    stored = method(*arguments)
  except ValueError as error:
    raise ValueError(f'{path} {list(weight.shape)}: {error}') from error
  stored = dataclasses.replace(stored, dtype=weight.dtype, transposed=table)
  return leaves.check(stored)


def _report(path, name, before, after) -> LeafReport:
  restored = _dequantized(after).astype(jnp.float32)
  numbers = _errors(before.astype(jnp.float32), restored)
  mean_error, max_error, signal, noise = map(float, numbers)
  outliers = after.outliers
  return LeafReport(
    path=path,
    method=name,
    shape=before.shape,
    num_bytes=after.num_bytes,
    bits_per_weight=after.bits_per_weight,
    mean_error=mean_error,
    max_error=max_error,
    snr_db=10 * math.log10(signal / noise) if noise and signal else math.inf,
    outlier_share=len(outliers.values) / before.size if outliers else 0.0,
  )


@jax.jit
def _errors(before: jax.Array, after: jax.Array):
  error = jnp.abs(before - after)
  size = jnp.abs(before)
  # All zeros have no error to speak of.
  mean = error.sum() / jnp.maximum(size.sum(), jnp.finfo(jnp.float32).tiny)
  return mean, error.max(), (size * size).sum(), (error * error).sum()


def _name(method: Method) -> str:
  return getattr(method, 'name', type(method).__name__)
