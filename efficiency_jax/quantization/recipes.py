"""Named ways to store a whole decoder, for configs and tables.

    params, report = recipes.quantize(lm.config, lm.params, 'int8')

All of them store every kernel and table; norms stay as they are.
"""

from collections.abc import Mapping, Sequence

import jax

from efficiency_jax.leaves import Activation
from efficiency_jax.models.config import DecoderConfig
from efficiency_jax.quantization import rules
from efficiency_jax.quantization import sequential
from efficiency_jax.quantization.absmax import Integers
from efficiency_jax.quantization.codebooks import Codes
from efficiency_jax.quantization.gobo import Gobo
from efficiency_jax.quantization.gptq import Gptq
from efficiency_jax.quantization.number_formats import Floats
from efficiency_jax.quantization.rules import Method
from efficiency_jax.quantization.rules import Rule
from efficiency_jax.quantization.scaling import Awq
from efficiency_jax.quantization.scaling import SmoothQuant
from efficiency_jax.quantization.static import Static
from efficiency_jax.types import Params

# Kernels and tables, of embedding and head.
MATRICES = '(kernel|table)$'

_ROWS = Activation()
_TENSOR = Activation(per='tensor')


def every(method: Method) -> tuple[Rule, ...]:
  """One method for all matrices."""
  return ((MATRICES, method),)


def body(method: Method, tables: Method) -> tuple[Rule, ...]:
  """One method for the blocks and another one for embedding and head."""
  return (('kernel$', method), ('table$', tables))


_INT8 = Integers(bits=8)
_INT4 = Integers(bits=4, per=64)
_INT3 = Integers(bits=3, per=64)
_W8A8 = Integers(bits=8, activation=_ROWS)

RECIPES: Mapping[str, tuple[Rule, ...]] = {
  'fp16': every(Floats(format='fp16')),
  'bf16': every(Floats(format='bf16')),
  'fp8 e4m3': every(Floats(format='fp8 e4m3', per='channel')),
  'fp8 e5m2': every(Floats(format='fp8 e5m2', per='channel')),
  'int8 per tensor': every(Integers(bits=8, per='tensor')),
  'int8': every(_INT8),
  'int8 zero point': every(Integers(bits=8, symmetric=False)),
  # Both operands in integers.
  'W8A8 per tensor': every(Integers(bits=8, per='tensor', activation=_TENSOR)),
  'W8A8': every(_W8A8),
  'LLM.int8': every(Integers(bits=8, activation=Activation(threshold=6.0))),
  'W4A8': body(Integers(bits=4, per=32, activation=_ROWS), _W8A8),
  # Four bits and fewer.
  'int4 per tensor': every(Integers(bits=4, per='tensor')),
  'int4 per channel': every(Integers(bits=4)),
  'int4': every(_INT4),
  'int4 group 32': every(Integers(bits=4, per=32)),
  'int4 zero point': every(Integers(bits=4, per=32, symmetric=False)),
  'FP4': every(Codes(code='FP4')),
  'NF4': every(Codes()),
  'NF4 double': every(Codes(double=True)),
  'int3': every(_INT3),
  'int2': every(Integers(bits=2, per=64)),
  'GOBO 4 bits': every(Gobo(bits=4)),
  'GOBO 3 bits': every(Gobo(bits=3)),
  # Calibrated: they need text.
  'W8A8 static': body(Static(), _W8A8),
  'W8A8 static, percentile': body(Static(mode='percentile'), _W8A8),
  'W8A8 static, moving average': body(Static(mode='moving average'), _W8A8),
  'W8A8 static, mse': body(Static(mode='mse'), _W8A8),
  'SmoothQuant': body(SmoothQuant(), _W8A8),
  'AWQ int4': body(Awq(integers=_INT4), _INT4),
  'AWQ int3': body(Awq(integers=_INT3), _INT3),
  'GPTQ int4': body(Gptq(integers=_INT4), _INT4),
  'GPTQ int3': body(Gptq(integers=_INT3), _INT3),
}
"""What each name stores. Tables of 'W4A8' keep 8 bits, as llama.cpp does."""


def quantize(
  config: DecoderConfig,
  params: Params,
  name: str,
  batches: Sequence[jax.Array] = (),
) -> tuple[Params, rules.Report]:
  """A decoder stored by a recipe.

  Args:
    config: Of the model.
    params: Its parameters, plain arrays.
    name: Of `RECIPES`.
    batches: Calibration text for `sequential.quantize`, if the recipe needs it.

  Raises:
    ValueError: There is no such recipe, or it needs text that is not given.
  """
  chosen = named(name)
  if not needs_text(name):
    return rules.quantize(params, chosen)
  return sequential.quantize(config, params, chosen, batches)


def needs_text(name: str) -> bool:
  """Whether a recipe is calibrated."""
  return any(getattr(m, 'calibrated', False) for _, m in named(name))


def named(name: str) -> tuple[Rule, ...]:
  """The rules of a recipe.

  Raises:
    ValueError: There is none of that name.
  """
  if name not in RECIPES:
    raise ValueError(
      f'there is no recipe {name!r}; there are {", ".join(RECIPES)}.'
    )
  return RECIPES[name]
