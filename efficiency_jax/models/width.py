"""Whether a pass over several tokens gives each the bits that it gets alone.

Mostly it does not: XLA sums the rows of a product, of a norm and of attention
in an order that follows their number, and the last bits of floats differ. That
is no harm, until activations or the cache are rounded to integers: a last bit
may turn a rounding, and such a step goes on through the model.

On a CPU with kernels of our own (`pallas_kernels.llvm_cpu`) nothing of a model
in integers depends on the number of rows: sums of integers are exact, and the
kernels of attention and norms go through each row in one order.
"""

import functools

import jax
import jax.numpy as jnp

from efficiency_jax.leaves import QTensor
from efficiency_jax.models.config import DecoderConfig
from efficiency_jax.types import Params
from pallas_kernels.decode_attention.api import decode_attention
from pallas_kernels.int8_matmul.api import int8_matmul
from pallas_kernels.rms_norm.api import rms_norm

_Shape = jax.ShapeDtypeStruct


def is_independent(
  config: DecoderConfig, params: Params, cache_dtype: jax.typing.DTypeLike
) -> bool:
  """Whether the bits of a chain of tokens do not depend on the cut into passes.

  True promises that logits, keys and values of tokens after a cache are the
  same numbers whether a pass holds one of them or up to 64, in any number of
  rows up to 1,024 tokens together. A tree of tokens is promised nothing: its
  branches stand in other slots than they would alone.

  Args:
    config: Of the model.
    params: Its parameters, of which all matrices must be in integers that
      multiply rows in integers.
    cache_dtype: float32 or int8, else it is False.
  """
  is_leaf = lambda node: isinstance(node, QTensor)
  leaves = jax.tree.leaves(params, is_leaf=is_leaf)
  norms = {config.width} | ({config.head_dim} if config.qk_norm else set())
  return (
    all(_product(x) if is_leaf(x) else _vector(x) for x in leaves)
    and all(_norm(width) for width in norms)
    and _attention(config, jnp.dtype(cache_dtype))
  )


def _taken(function, *shapes, **options) -> bool:
  """Whether the CPU's kernel takes these arguments."""
  call = functools.partial(function, implementation='llvm_cpu', **options)
  try:
    jax.eval_shape(call, *shapes)
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
  values = q.values
  if q.bits not in (4, 8):  # they become bytes for the product
    values = _Shape((rows, columns), jnp.int8)
  scales = _Shape((groups, columns), q.scales.dtype)
  return _taken(
    int8_matmul,
    _Shape((2, rows), jnp.float32),
    values,
    scales,
    w_offsets=None if q.offsets is None else jnp.zeros((groups, columns)),
  )


def _norm(width: int) -> bool:
  row = _Shape((1, width), jnp.float32)
  return _taken(rms_norm, row, _Shape((width,), jnp.float32), epsilon=0.0)


def _attention(c: DecoderConfig, dtype) -> bool:
  new = _Shape((1, 1, c.num_heads, c.head_dim), jnp.float32)
  slots = _Shape((1, c.num_kv_heads, 128, c.head_dim), dtype)
  scales = {}
  if dtype == jnp.int8:
    scales = {
      name: jnp.ones(slots.shape[:3]) for name in ('k_scales', 'v_scales')
    }
  return _taken(
    decode_attention,
    new,
    slots,
    slots,
    _Shape((1,), jnp.int32),
    softcap=c.attention_softcap,
    **scales,
  )
