"""What a training step needs on TPUs that are not here.

libtpu compiles a program for a named topology without one of its chips. The
program tells the bytes that each chip needs, its operations, and what it sends
to other chips. From these three comes the least time a step can take:

    seconds >= max(FLOPs / peak, bytes / bandwidth, sent bytes / ICI bandwidth)

(the roofline, with communication as a third line). It is a bound, not a
measurement: it supposes that all three overlap, and each at its peak. The bytes
are the least that memory must move, the arguments read and the results written
once: of activations, the compiler keeps on the chip what it can.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import math
import os
import re
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from efficiency_jax.distributed import mesh as meshes

_ENVIRONMENT = {
  'TPU_SKIP_MDS_QUERY': '1',  # there is no metadata server
  'TPU_WORKER_HOSTNAMES': 'localhost',
  'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',  # nobody holds a chip here
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
  """Peaks of one chip, as its maker gives them.

  Attributes:
    flops_per_second: Of bfloat16 products.
    hbm_bytes: Memory.
    hbm_bytes_per_second: Speed of the memory.
    link_bytes_per_second: What is sent over the link to one neighbour. The
      maker's figure for a chip counts four links, each in both directions.
    links: Links that are in use.
  """

  flops_per_second: float
  hbm_bytes: int
  hbm_bytes_per_second: float
  link_bytes_per_second: float
  links: int = 4

  @property
  def ici_bytes_per_second(self) -> float:
    """What the chip sends over all of its links at once."""
    return self.links * self.link_bytes_per_second


# docs.cloud.google.com/tpu/docs/v5e and /v6e
CHIPS: Mapping[str, Chip] = {
  'v5e': Chip(
    flops_per_second=197e12,
    hbm_bytes=16 * 2**30,
    hbm_bytes_per_second=819e9,
    link_bytes_per_second=400e9 / 4 / 2,
  ),
  'v6e': Chip(
    flops_per_second=918e12,
    hbm_bytes=32 * 2**30,
    hbm_bytes_per_second=1638e9,
    link_bytes_per_second=800e9 / 4 / 2,
  ),
}
_RING = 16  # chips along the side of a pod, where an axis closes to a ring


class Collective(NamedTuple):
  """All communication of one kind in a step.

  Attributes:
    count: Operations.
    sent_bytes: That each chip sends for them, by the ring algorithm.
  """

  count: int
  sent_bytes: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
  """A compiled step, a chip's share of everything.

  Attributes:
    fits: Whether it compiled; if not, only `hbm_bytes` is known.
    hbm_bytes: Memory in use at the peak: arguments, temporaries, the results
      that are not written over arguments, and the code.
    argument_bytes: Parameters, optimizer state and batch.
    output_bytes: The new state, written over the old one.
    temporary_bytes: What is kept in between: activations, gathered weights.
    flops: As the compiler counts them, kernels by their own estimates. The body
      of a loop counts once.
    operand_bytes: Read and written by all operations, also where the compiler
      keeps an operand on the chip: more than what the memory moves.
    collectives: Communication by kind.
  """

  fits: bool
  hbm_bytes: int
  argument_bytes: int = 0
  output_bytes: int = 0
  temporary_bytes: int = 0
  flops: float = 0.0
  operand_bytes: float = 0.0
  collectives: Mapping[str, Collective] = dataclasses.field(
    default_factory=dict
  )

  @property
  def sent_bytes(self) -> float:
    """Bytes that a chip sends in a step."""
    return sum(kind.sent_bytes for kind in self.collectives.values())


class Bound(NamedTuple):
  """The least time of a step, and by what."""

  seconds: float
  by: str  # 'compute', 'memory' or 'communication'


def grid(name: str) -> tuple[int, int]:
  """Chips along both axes of a topology such as 'v5e:4x4'.

  Raises:
    ValueError: It is no grid of chips whose peaks are known here.
  """
  found = re.fullmatch(rf'({"|".join(CHIPS)}):(\d+)x(\d+)', name)
  if not found:
    raise ValueError(
      f'topology {name!r} must be a grid of {" or ".join(CHIPS)} chips, as in'
      ' v5e:4x4.'
    )
  return int(found[2]), int(found[3])


def chip(name: str) -> Chip:
  """The chip in the corner of a topology, which has the fewest links."""
  axes = grid(name)
  links = sum(2 if size == _RING else min(size - 1, 1) for size in axes)
  return dataclasses.replace(CHIPS[name.partition(':')[0]], links=links)


def devices(name: str) -> Sequence[jax.Device]:
  """The chips of a topology that programs can be compiled for, in order.

  Raises:
    ValueError: There is no libtpu here, or no such topology.
  """
  grid(name)
  for variable, value in _ENVIRONMENT.items():
    os.environ.setdefault(variable, value)
  try:
    return topologies.get_topology_desc(name, platform='tpu').devices
  except (RuntimeError, ValueError, NotImplementedError) as error:
    why = ' '.join(str(error).split())
    raise ValueError(
      f'nothing can be compiled for topology {name!r} here: {why}. Is libtpu'
      ' installed (make .venv-aot/.installed)?'
    ) from error


def compile_step(
  step: Callable[..., Any],
  mesh: jax.sharding.Mesh,
  state: Any,
  frozen: Any,
  batch: Any,
) -> Program:
  """Compiles a training step for the chips of a mesh, and reads it.

  Args:
    step: `(state, frozen, batch) -> (state, metrics)`, pure.
    mesh: Of `devices`.
    state: Shapes of the whole state.
    frozen: Shapes of what is not trained.
    batch: Shapes of a whole batch.

  Raises:
    ValueError: The step is none for a TPU, or does not compile for another
      reason than its size.
  """
  traced = meshes.jit_step(step, mesh, state, frozen).trace(
    state, frozen, batch
  )
  try:
    lowered = traced.lower(lowering_platforms=('tpu',))
  except NotImplementedError as error:
    raise ValueError(f'the step is none for a TPU: {error}') from error
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    return Program(fits=False, hbm_bytes=needed_bytes(str(error)))
  memory = compiled.memory_analysis()
  costs = compiled.cost_analysis()
  fresh = memory.output_size_in_bytes - memory.alias_size_in_bytes
  return Program(
    fits=True,
    hbm_bytes=memory.argument_size_in_bytes
    + memory.temp_size_in_bytes
    + memory.generated_code_size_in_bytes
    + fresh,
    argument_bytes=memory.argument_size_in_bytes,
    output_bytes=memory.output_size_in_bytes,
    temporary_bytes=memory.temp_size_in_bytes,
    flops=costs['flops'],
    operand_bytes=costs['bytes accessed'],
    collectives=collectives(compiled.as_text()),
  )


def needed_bytes(message: str) -> int:
  """The memory that a program needs which does not fit, from the error.

  It is what is needed at least: some errors name temporaries alone.

  Raises:
    ValueError: The error says something else.
  """
  found = re.search(
    r'Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm'
    r'|\(([\d.]+)([KMGT]?)\) exceeds available HBM',
    message,
  )
  if not found:
    raise ValueError(f'the step did not compile: {message.strip()[:500]}')
  number, unit = found[1] or found[3], found[2] or found[4] or ' '
  return int(float(number) * 2 ** (10 * ' KMGT'.index(unit)))


def times(program: Program, peaks: Chip) -> list[tuple[str, float]]:
  """Seconds that each of the three takes by itself, at its peak."""
  state = program.argument_bytes + program.output_bytes
  return [
    ('compute', program.flops / peaks.flops_per_second),
    ('memory', state / peaks.hbm_bytes_per_second),
    ('communication', program.sent_bytes / peaks.ici_bytes_per_second),
  ]


def bound(program: Program, peaks: Chip) -> Bound:
  """The least time of a step (see the equation above)."""
  by, seconds = max(times(program, peaks), key=lambda pair: pair[1])
  return Bound(seconds, by)


def summary(
  program: Program, name: str, *, tokens: int, parameters: int
) -> dict[str, float | int | str | None]:
  """A flat row: memory, work and bounds of a step on a topology.

  A program that does not fit has its memory alone.

  Args:
    program: From `compile_step`.
    name: The topology.
    tokens: T of the whole batch.
    parameters: N of the model, whose step takes 6 N T model FLOPs (arXiv
      2001.08361); attention, and what is computed again, come on top.
  """
  peaks = chip(name)
  row = {
    'fits': program.fits,
    'hbm_gigabytes': program.hbm_bytes / 1e9,
    'hbm_fraction': program.hbm_bytes / peaks.hbm_bytes,
  }
  if not program.fits:
    return row
  seconds, by = bound(program, peaks)
  model_flops = 6 * parameters * tokens / math.prod(grid(name))
  operands = program.operand_bytes / peaks.hbm_bytes_per_second
  counts = [f'{n.count} {kind}' for kind, n in program.collectives.items()]
  return row | {
    'argument_gigabytes': program.argument_bytes / 1e9,
    'output_gigabytes': program.output_bytes / 1e9,
    'temporary_gigabytes': program.temporary_bytes / 1e9,
    'model_teraflops': model_flops / 1e12,
    'teraflops': program.flops / 1e12,
    'operand_gigabytes': program.operand_bytes / 1e9,
    'sent_gigabytes': program.sent_bytes / 1e9,
    'collectives': ', '.join(sorted(counts)) or 'none',
    **{
      f'{kind.replace("-", "_")}_sent_bytes': n.sent_bytes
      for kind, n in sorted(program.collectives.items())
    },
    **{f'{kind}_milliseconds': 1e3 * t for kind, t in times(program, peaks)},
    'operand_milliseconds': 1e3 * operands,
    'bound_milliseconds': 1e3 * seconds,
    'bound_by': by,
    'bound_tokens_per_second': tokens / seconds,
    'bound_utilization': model_flops / peaks.flops_per_second / seconds,
  }


def collectives(text: str) -> dict[str, Collective]:
  """Communication of a compiled program, by kind.

  Of n chips, each sends (n - 1) / n of the whole array in an all-gather, a
  reduce-scatter and an all-to-all, twice that in an all-reduce, which is a
  reduce-scatter and an all-gather, and the array itself in a permutation. An
  all-reduce that the TPU compiler fuses with taking a slice is a
  reduce-scatter. Inside of loops, operations count once.
  """
  found = {}
  chains = set()
  computation = ''
  for line in text.splitlines():
    if line.endswith('{') and not line.startswith(' '):
      computation = line
    op = _OPERATION.search(line)
    if not op:
      continue
    shapes, kind, start = op['shapes'], op['kind'], op['start']
    chain = re.search(r'chain_id="([^"]+)"', line)
    if chain:  # one operation, in parts beside several others
      if chain[1] in chains:
        continue
      chains.add(chain[1])
    size = _bytes(shapes, half=bool(start) and kind in _WITH_OPERANDS)
    chips = _group(line)
    share = (chips - 1) / chips
    if kind == 'all-reduce' and 'all-reduce-scatter' in computation:
      kind = 'reduce-scatter'
    elif kind == 'reduce-scatter':
      size *= chips  # the text has the part that is left
    sent = size * {'all-reduce': 2 * share, 'collective-permute': 1}.get(
      kind, share
    )
    count, total = found.get(kind, (0, 0.0))
    found[kind] = Collective(count + 1, total + sent)
  return found


_OPERATION = re.compile(
  r' = (?P<shapes>.*?) (?P<kind>all-gather|all-reduce|reduce-scatter|all-to-all'
  r'|collective-permute)(?P<start>-start)?\('
)
_WITH_OPERANDS = ('all-gather', 'collective-permute')  # in a start's result
_BITS = {'pred': 8, 'bf16': 16}


def _bytes(shapes: str, half: bool) -> float:
  """Bytes of the arrays in a result; of its second half for a start."""
  arrays = re.findall(r'\b([a-z]+\d*\w*)\[([\d,]*)\]', shapes)
  if half:
    arrays = [array for array in arrays if array != ('u32', '')]
    arrays = arrays[len(arrays) // 2 :]
  total = 0.0
  for dtype, sizes in arrays:
    bits = _BITS.get(dtype) or int(re.search(r'\d+', dtype)[0])
    total += math.prod(int(n) for n in sizes.split(',') if n) * bits / 8
  return total


def _group(line: str) -> int:
  """Chips that take part in one collective operation."""
  named = re.search(r'replica_groups=mesh\[([^]]*)\] \{([^}]*)\}', line)
  if named:
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
    return math.prod(int(sizes[n]) for n in re.findall(r"'(\w+)'", named[2]))
  counted = re.search(r'replica_groups=\[\d+,(\d+)\]', line)
  if counted:
    return int(counted[1])
  listed = re.search(r'replica_groups=\{\{([\d,]+)\}', line)
  return len(listed[1].split(',')) if listed else 2
