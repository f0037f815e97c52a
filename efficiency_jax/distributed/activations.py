"""How a decoder's activations lie on a mesh, and which of them are kept.

GSPMD lays activations out by guessing from the parameters, and may guess that
the residual stream is split over its width and copied over the batch. Here it
is told: after the embedding and after every block, rows are split as the batch
is; and a table of embeddings, whose width lies on the devices of a batch's
rows, is put together before rows of it are looked up.

Blocks can also be computed again in the backward pass instead of keeping what
is inside them (arXiv 1604.06174), and each device can run them on its rows by
itself. None of this changes what is computed.
"""

import functools
from typing import Any

import flax.linen as nn
import jax

from efficiency_jax.distributed import mesh as meshes
from efficiency_jax.models import transformer
from efficiency_jax.types import ApplyFn

REMAT = ('none', 'dots', 'blocks')


@functools.cache
def wrap(
  apply: ApplyFn,
  mesh: jax.sharding.Mesh | None = None,
  remat: str = 'none',
  *,
  local: bool = False,
) -> ApplyFn:
  """The `ApplyFn` of a `DecoderLM` with its activations laid out on a mesh.

  Args:
    apply: From `transformer.apply_fn`.
    mesh: Where the residual stream [B, T, D] is split over `data` and `fsdp`,
      over a cache at the embedding alone; None leaves the layout to the
      compiler.
    remat: What the backward pass finds of each block: 'none' of it computed
      again; 'dots', the results of products with weights; 'blocks', nothing
      but the block's input.
    local: Each device puts the weights of a block together and runs it on its
      rows by itself (`jax.shard_map`). The compiler cannot split a Pallas
      kernel; so attention may be one. Needs a mesh with `tensor` 1 and calls
      without a cache.

  Returns:
    The same function of the same arguments; the same object for equal ones.

  Raises:
    ValueError: `remat` is unknown, or `local` has no such mesh.
  """
  if remat not in REMAT:
    raise ValueError(f'remat must be one of {", ".join(REMAT)}, got {remat!r}.')
  if local and (mesh is None or mesh.shape['tensor'] > 1):
    sizes = None if mesh is None else dict(mesh.shape)
    raise ValueError(f'local needs a mesh with tensor=1, got {sizes}.')
  intercept = functools.partial(_intercept, mesh, remat, local)

  def wrapped(params, tokens, cache=None, **options):
    if mesh is not None:
      params = {name: _whole_rows(part, mesh) for name, part in params.items()}
    with nn.intercept_methods(intercept):
      return apply(params, tokens, cache, **options)

  return wrapped


def _intercept(mesh, remat, local, call, args, kwargs, context):
  module = context.module
  # A block that runs by itself (below) is a root: it has no path.
  if context.method_name != '__call__' or not module.path:
    return call(*args, **kwargs)
  if isinstance(module, transformer.Embedding):
    return _split_rows(call(*args, **kwargs), mesh)
  if isinstance(module, transformer.Block):
    if remat != 'none' or local:
      call = functools.partial(_alone, module, mesh, remat, local)
    x, slots = call(*args, **kwargs)
    return _split_rows(x, mesh), slots
  return call(*args, **kwargs)


def _alone(module, mesh, remat, local, *args):
  """Runs a block as a pure function of its parameters and arguments."""
  root = module.clone(parent=None, name=None)
  params = module.variables['params']
  body = run = lambda params, *args: root.apply({'params': params}, *args)
  if local:
    rows = meshes.batch_sharding(mesh).spec
    body = jax.shard_map(
      run,
      mesh=mesh,
      in_specs=(jax.sharding.PartitionSpec(), *[rows] * len(args)),
      out_specs=rows,
    )
  if mesh is not None:
    # Apart until here: else the weights that were put together for the forward
    # pass are kept for the backward pass, all layers at once.
    where = meshes.shardings(params, mesh)
    run = lambda params, *args: body(
      jax.lax.with_sharding_constraint(params, where), *args
    )
  if remat == 'none':
    return run(params, *args)
  policy = jax.checkpoint_policies.nothing_saveable
  if remat == 'dots':
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
  return jax.checkpoint(run, policy=policy)(params, *args)


def _whole_rows(part: Any, mesh: jax.sharding.Mesh) -> Any:
  """A module's parameters; if it is a table, with its width in one place."""
  table = part.get('table')
  if not isinstance(table, jax.Array):
    return part
  rules = [('table', ('vocabulary', None))]
  where = meshes.shardings({'table': table}, mesh, rules)['table']
  return {'table': jax.lax.with_sharding_constraint(table, where)}


def _split_rows(x: jax.Array, mesh: jax.sharding.Mesh | None) -> jax.Array:
  if mesh is None:
    return x
  return jax.lax.with_sharding_constraint(x, meshes.batch_sharding(mesh))
