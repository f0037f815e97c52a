"""The tables and the report of `compile_topology`."""

from collections.abc import Sequence

from experiments import display
from experiments import topology_figure
from experiments import workdir as workdirs

_CASE = {
  'model': 'model',
  'topology': 'chips',
  'mesh': 'data x fsdp x tensor',
  'rows_per_chip': 'rows a chip',
}
MEMORY = _CASE | {
  'remat': 'remat',
  'attention': 'attention',
  'state_gigabytes': 'state GB',
  'argument_gigabytes': 'arguments GB',
  'temporary_gigabytes': 'temporary GB',
  'hbm_gigabytes': 'in all GB',
  'fits': 'fits',
  'compile_seconds': 'compiled in s',
}
TIME = _CASE | {
  'model_teraflops': '6 N T, TFLOP',
  'teraflops': 'TFLOP',
  'sent_gigabytes': 'sent GB',
  'compute_milliseconds': 'compute ms',
  'memory_milliseconds': 'memory ms',
  'communication_milliseconds': 'ICI ms',
  'operand_milliseconds': 'operands ms',
  'bound_milliseconds': 'step >= ms',
  'bound_tokens_per_second': 'tokens/s <=',
  'bound_utilization': 'MFU <=',
}

REPORT = """\
A chip and a step; rows of {length} tokens, bfloat16 compute, float32 parameters
and Adam moments.

## Memory

{memory}

![memory a chip]({image})

State is the closed form: parameters and moments as the mesh splits them. The
rest is what the compiler plans: arguments (the state and the batch),
temporaries (activations, gathered weights, gradients), and all with the
program itself. What does not fit needs at least what the compiler asked for.
Compiled in seconds of one CPU core.

## Time

{time}

These are bounds, not measurements. Compute is the compiler's FLOPs at the peak
of the chip; they hold what the backward pass computes again and attention,
which 6 N T, the model FLOPs of N parameters and T tokens, do not. Memory is the
arguments read and the results written once. ICI is what a chip sends in rings
over the links of a chip in the corner of the slice. A step takes at least the
largest of the three. Operands is the time of the memory if every operation
found its operands there and left its results there; the compiler keeps many of
them on the chip. Where that is longer than the bound, memory may be the true
limit. MFU is 6 N T over the peak and the bound.
"""


def write(
  rows: Sequence[workdirs.Row], length: int, workdir: workdirs.Workdir
) -> None:
  """Shows both tables and writes the report.

  Args:
    rows: Of `topology_cases.measure`.
    length: Tokens in a row of the batch.
    workdir: Where the report and its figure are kept.
  """
  tables = {
    'memory': display.table(rows, MEMORY),
    'time': display.table([row for row in rows if row['fits']], TIME),
  }
  for table in tables.values():
    table.show()
  image = workdir.save_figure(topology_figure.memory(rows), 'memory')
  markdown = {name: table.markdown() for name, table in tables.items()}
  workdir.write_report(
    REPORT.format(length=length, image=image.name, **markdown)
  )
