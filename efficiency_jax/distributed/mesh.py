"""Which device holds what: a mesh of devices, and a table from names to axes.

The mesh has three axes. `data` splits the batch, `fsdp` splits the batch and
every parameter with its optimizer state (ZeRO-3, arXiv 1910.02054), `tensor`
splits heads and feed-forward units (arXiv 1909.08053). GSPMD (arXiv 2105.04663)
inserts the communication, so a layout changes time and memory and never what
is computed, but for rounding. That holds for fused kernels too: a part of the
columns [q | k | v] may hold queries and keys, and XLA moves what it must.
"""

from collections.abc import Callable, Mapping, Sequence
import math
import re
from typing import Any, NamedTuple

import jax
import numpy as np

from efficiency_jax import trees

AXES = ('data', 'fsdp', 'tensor')

LOGICAL: Mapping[str | None, tuple[str, ...]] = {
  'batch': ('data', 'fsdp'),
  'vocabulary': ('tensor',),
  'width': ('fsdp',),
  'heads': ('tensor',),
  'ffn': ('tensor',),
  None: (),
}
"""Logical axis -> mesh axes. The one place that says what is split how."""

Rules = Sequence[tuple[str, tuple[str | None, ...]]]

RULES: Rules = (
  ('(embedding|head)/table', ('vocabulary', 'width')),
  ('attention/qkv/kernel', ('width', 'heads')),
  ('attention/qkv/bias', ('heads',)),
  ('attention/output/kernel', ('heads', 'width')),
  ('attention/output/bias', (None,)),
  ('ffn/gate_up/kernel', ('width', 'ffn')),
  ('ffn/gate_up/bias', ('ffn',)),
  ('ffn/down/kernel', ('ffn', 'width')),
  ('ffn/down/bias', (None,)),
  ('[a-z_]*norm/scale', (None,)),
)
"""The end of a parameter's path -> its logical axes; the first match counts.

Moments of an optimizer and averages have the parameter's path at the end of
theirs, and lie where it lies.
"""

SMALL = 2**14
"""Arrays without a rule and with fewer elements are copied to all devices."""


class Report(NamedTuple):
  """What a layout comes to.

  Attributes:
    total_bytes: Of the tree, each array once.
    device_bytes: Of the part that each device holds.
    replicated: A sentence for each axis that a rule wanted to split and could
      not, because its size is no multiple of the devices.
  """

  total_bytes: int
  device_bytes: int
  replicated: tuple[str, ...]


def make(
  *,
  data: int = -1,
  fsdp: int = 1,
  tensor: int = 1,
  devices: Sequence[jax.Device] | None = None,
) -> jax.sharding.Mesh:
  """A mesh with the axes `data`, `fsdp` and `tensor`.

  Args:
    data: Devices along the axis; one of the three may be -1, the rest of them.
    fsdp: The same.
    tensor: The same. Neighbours on this axis are nearest to each other.
    devices: None is all devices of all processes.

  Raises:
    ValueError: The sizes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else list(devices)
  sizes = {'data': data, 'fsdp': fsdp, 'tensor': tensor}
  said = ', '.join(f'{name}={size}' for name, size in sizes.items())
  for name, size in sizes.items():
    if size != -1 and size < 1:
      raise ValueError(f'{name} must be >= 1, or -1 for the rest, got {size}.')
  free = [name for name, size in sizes.items() if size == -1]
  if len(free) > 1:
    raise ValueError(f'only one of {said} may be -1.')
  known = math.prod(size for size in sizes.values() if size != -1)
  if free and len(devices) % known == 0:
    sizes[free[0]] = len(devices) // known
  if math.prod(sizes.values()) != len(devices):
    raise ValueError(
      f'{said} is for {"a multiple of " if free else ""}{known} devices, and'
      f' there are {len(devices)}.'
    )
  auto = (jax.sharding.AxisType.Auto,) * len(AXES)
  shape = tuple(sizes[axis] for axis in AXES)
  return jax.make_mesh(shape, AXES, axis_types=auto, devices=devices)


def plan(
  tree: Any, mesh: jax.sharding.Mesh, rules: Rules = RULES
) -> tuple[Any, Report]:
  """A sharding for every leaf of a tree, and what that comes to.

  A leaf that a rule matches is split as the rule says, apart from axes whose
  size is no multiple of the devices along the mesh axis: those are copied, and
  the report says so. A leaf without a rule (the head of another tree, parts of
  a quantized weight) is split over `fsdp` along its largest divisible axis, and
  copied where it is `SMALL` or has no such axis. Arrays stay in the kind of
  memory where they are.

  Args:
    tree: Arrays or `jax.ShapeDtypeStruct`s: parameters, or a whole train state.
    mesh: From `make`.
    rules: In place of `RULES`.

  Returns:
    The tree with a `jax.sharding.NamedSharding` for every leaf, and the report.
  """
  total = held = 0
  replicated = []
  chosen = []
  for path, leaf in trees.leaves(tree):
    spec, notes = _spec(path, leaf.shape, mesh, rules)
    kind = getattr(getattr(leaf, 'sharding', None), 'memory_kind', None)
    sharding = jax.sharding.NamedSharding(mesh, spec, memory_kind=kind)
    chosen.append(sharding)
    replicated += notes
    total += math.prod(leaf.shape) * leaf.dtype.itemsize
    held += math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
  structure = jax.tree.structure(tree)
  report = Report(total, held, tuple(replicated))
  return jax.tree.unflatten(structure, chosen), report


def shardings(tree: Any, mesh: jax.sharding.Mesh, rules: Rules = RULES) -> Any:
  """A sharding for every leaf of a tree: the first part of `plan`."""
  return plan(tree, mesh, rules)[0]


def batch_sharding(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
  """Of arrays whose leading axis is the batch: split over `data` and `fsdp`."""
  spec = jax.sharding.PartitionSpec(LOGICAL['batch'])
  return jax.sharding.NamedSharding(mesh, spec)


def replicated(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
  """Of arrays that every device holds whole."""
  return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def shard(tree: Any, mesh: jax.sharding.Mesh, rules: Rules = RULES) -> Any:
  """Lays a tree out on a mesh.

  With several processes each of them holds the whole tree, the same one, and
  puts its part of it onto its own devices.
  """
  if jax.process_count() == 1:
    return jax.device_put(tree, shardings(tree, mesh, rules))

  def one(leaf, sharding):
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
      return jax.device_put(leaf, sharding)
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      data = one(jax.random.key_data(leaf), replicated(mesh))
      return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    host = np.asarray(leaf)
    return jax.make_array_from_callback(
      host.shape, sharding, lambda index: host[index]
    )

  return jax.tree.map(one, tree, shardings(tree, mesh, rules))


def create(
  make_tree: Callable[..., Any],
  mesh: jax.sharding.Mesh,
  *args: Any,
  rules: Rules = RULES,
) -> Any:
  """`make_tree(*args)`, every part made on the device that keeps it.

  No device ever holds the whole tree, so a model may be larger than one. The
  numbers are those of `make_tree` alone.
  """
  shapes = jax.eval_shape(make_tree, *args)
  where = shardings(shapes, mesh, rules)
  return jax.jit(make_tree, out_shardings=where)(*args)


def jit_step(
  step: Callable[..., Any],
  mesh: jax.sharding.Mesh,
  state: Any,
  frozen: Any,
  rules: Rules = RULES,
) -> Callable[..., Any]:
  """Compiles `step(state, frozen, batch) -> (state, metrics)` for a mesh.

  The state stays laid out as `shard` does it and its memory is used again for
  the new one; batches lie as `batch_sharding`, metrics on all devices.

  Args:
    step: A pure function.
    mesh: From `make`.
    state: Arrays or shapes, for their layout.
    frozen: Arrays or shapes of what is not trained.
    rules: In place of `RULES`.
  """
  where = shardings(state, mesh, rules)
  return jax.jit(
    step,
    in_shardings=(where, shardings(frozen, mesh, rules), batch_sharding(mesh)),
    out_shardings=(where, replicated(mesh)),
    donate_argnums=0,
  )


def _spec(path, shape, mesh, rules):
  """The layout of one leaf, and which axes could not be split."""
  for pattern, names in rules:
    if len(names) != len(shape) or not re.search(f'(^|/){pattern}$', path):
      continue
    spec, notes = [], []
    for axis, (name, size) in enumerate(zip(names, shape, strict=True)):
      over = tuple(a for a in LOGICAL[name] if mesh.shape[a] > 1)
      devices = math.prod(mesh.shape[a] for a in over)
      if size % devices:
        notes.append(
          f'{path}: axis {axis} ({name}, {size}) is no multiple of'
          f' {"*".join(over)}={devices} and is copied.'
        )
        over = ()
      spec.append(over[0] if len(over) == 1 else over or None)
    return jax.sharding.PartitionSpec(*spec), notes
  fsdp = mesh.shape['fsdp']
  splits = [n for n, size in enumerate(shape) if size % fsdp == 0]
  if fsdp == 1 or math.prod(shape) < SMALL or not splits:
    return jax.sharding.PartitionSpec(), []
  largest = max(splits, key=lambda n: shape[n])
  spec = [None] * len(shape)
  spec[largest] = 'fsdp'
  return jax.sharding.PartitionSpec(*spec), []
