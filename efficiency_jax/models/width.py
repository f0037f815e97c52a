"""Whether a pass over several tokens gives each the bits that it gets alone.

Mostly it does not: XLA sums the rows of a product, of a norm and of attention
in an order that follows their number, and the last bits of floats differ. That
is no harm, until activations or the cache are rounded to integers: a last bit
may turn a rounding, and such a step goes on through the model.

On a CPU with kernels of our own (`pallas_kernels.llvm_cpu`) nothing of a model
in integers depends on the number of rows: sums of integers are exact, and the
kernels of attention and norms go through each row in one order.
"""

import jax
import jax.numpy as jnp

from efficiency_jax.leaves import QTensor
from efficiency_jax.models import cache as kv_cache
from efficiency_jax.models.attention import FEW_QUERIES
from efficiency_jax.models.config import DecoderConfig
from efficiency_jax.types import Params
from pallas_kernels import masks
from pallas_kernels.decode_attention import llvm_cpu as decode_attention
from pallas_kernels.dequant_matmul import formats
from pallas_kernels.int8_matmul import llvm_cpu as int8_matmul
from pallas_kernels.rms_norm import llvm_cpu as rms_norm

_Shape = jax.ShapeDtypeStruct


def is_independent(
  config: DecoderConfig,
  params: Params,
  cache_dtype: jax.typing.DTypeLike,
  tokens: int = FEW_QUERIES,
) -> bool:
  """Whether the bits of a chain of tokens do not depend on the cut into passes.

  True promises that logits, keys and values of tokens after a cache are the
  same numbers whether a pass holds one of them or `tokens`, in any number of
  rows. A tree of tokens is promised nothing: its branches stand in other slots
  than they would alone.

  Args:
    config: Of the model.
    params: Its parameters, of which all matrices must be in integers that
      multiply rows in integers.
    cache_dtype: float32 or int8, else it is False.
    tokens: The most that a pass holds of a row; beyond 64 attention is another
      kernel, and it is False.
  """
  is_leaf = lambda node: isinstance(node, QTensor)
  leaves = jax.tree.leaves(params, is_leaf=is_leaf)
  norms = {config.width} | ({config.head_dim} if config.qk_norm else set())
  return (
    tokens <= FEW_QUERIES
    and all(_product(x) if is_leaf(x) else _vector(x) for x in leaves)
    and all(_norm(width) for width in norms)
    and _attention(config, jnp.dtype(cache_dtype))
  )


def _takes(check, *args) -> bool:
  """Whether the CPU's kernel takes these arguments."""
  try:
    check(*args)
  except NotImplementedError:
    return False
  return True


def _vector(x: jax.Array) -> bool:
  return x.ndim < 2 and x.dtype == jnp.float32


def _product(q: QTensor) -> bool:
  """Whether every row has scales of its own and exact sums."""
  how = q.activation
  if how is None or how.threshold is not None:
    return False
  if how.per != 'row' and q.x_scale is None:
    return False
  rows, columns = q.matrix_shape
  groups = q.scales.shape[0]
  if groups > 1 and rows // groups % formats.BLOCK:
    return False  # `linear` multiplies such groups in floats
  values = q.values
  if q.bits not in (4, 8):  # they become bytes for the product
    values = _Shape((rows, columns), jnp.int8)
  x = _Shape((FEW_QUERIES, rows), jnp.float32)
  scales = _Shape((groups, columns), q.scales.dtype)
  return _takes(int8_matmul.check, x, values, scales)


def _norm(width: int) -> bool:
  return _takes(rms_norm.check, _Shape((1, width), jnp.float32))


def _attention(c: DecoderConfig, dtype) -> bool:
  queries = _Shape((1, 1, c.num_heads, c.head_dim), jnp.float32)
  slots = _Shape((1, c.num_kv_heads, kv_cache.BLOCK, c.head_dim), dtype)
  rule = masks.Rule(scale=1.0, softcap=c.attention_softcap)
  return _takes(decode_attention.check, rule, None, queries, slots, slots)
