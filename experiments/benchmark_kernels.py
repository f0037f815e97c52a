"""Times kernels against what a straightforward program does.

    python -m experiments.benchmark_kernels \\
      --config=configs/benchmark_kernels_cpu.py --workdir=runs/benchmark_kernels

Every case runs its implementations on the same random data, in turns, or on a
GPU by its own clock; memory is what the compiler plans for scratch and outputs.
"""

from collections.abc import Sequence
import sys

import jax
import jax.numpy as jnp
import ml_collections

from efficiency_jax.evaluation import speed
from experiments import display
from experiments import figures
from experiments import kernel_baselines as baselines
from experiments import kernel_cases as cases
from experiments import launch
from experiments import workdir as workdirs

COLUMNS = {
  'operation': 'operation',
  'implementation': 'implementation',
  'sequence_length': 'n',
  'milliseconds': 'ms',
  'clock': 'by the clock of the',
  'speedup': 'speed-up',
  'gigaflops_per_second': 'GFLOP/s',
  'roofline_fraction': 'of roofline',
  'peak_megabytes': 'MB',
  'max_error': 'error',
}


def experiment(
  config: ml_collections.ConfigDict, workdir: workdirs.Workdir
) -> None:
  """Measures the machine, then every case of the config."""
  check(config)
  machine = workdir.row('machine', lambda: measure_machine(config))
  rows = []
  made = [(case.key, case) for case in cases.cases(config)]
  for key, case in display.track(made, 'kernels'):
    rows += workdir.row(
      key, lambda case=case: {'rows': cases.measure(case, config, machine)}
    )['rows']
  workdir.write_results(rows)
  table = display.table(rows, COLUMNS)
  table.show()
  grown = [row for row in rows if 'attention' in row['operation']]
  image = grown and workdir.save_figure(figures.kernels(grown), 'attention')
  drawn = f'![time and memory]({image.name})\n\n' if image else ''
  missing = filter(None, map(baselines.missing, config.attention))
  left_out = ' '.join(f'Left out: {why}.' for why in missing)
  workdir.write_report(
    f'{table.markdown()}\n\n{drawn}Peaks here:'
    f' {machine["flops_per_second"] / 1e9:.0f} GFLOP/s by a {config.dtype}'
    f' product of two {config.machine_size} x {config.machine_size} matrices,'
    f' {machine["bytes_per_second"] / 1e9:.1f} GB/s by a sum. Speed-ups are'
    ' over the first implementation of a case; errors are the largest'
    ' difference to it over its largest number. MB are scratch and outputs as'
    f' the compiler plans them. {left_out}\n'
  )


def check(config: ml_collections.ConfigDict) -> None:
  """Finds what is wrong with a config before anything is measured."""
  sizes_of = 'forward backward sparse decode_slots machine_size memory_size'
  for name in sizes_of.split():
    sizes = config[name]
    for size in sizes if isinstance(sizes, tuple) else (sizes,):
      if size < 1:
        raise ValueError(f'--config.{name} must hold sizes >= 1, got {size}.')
  for name in ('few_rows', 'int8', 'dequant', 'binary'):
    for shape in config[name]:
      if len(shape) != 3 or min(shape) < 1:
        raise ValueError(
          f'--config.{name} must hold sizes (m, k, n) >= 1, got {shape}.'
        )
  if not 0 < config.sparse_density <= 1:
    raise ValueError(
      f'--config.sparse_density must be in (0, 1], got {config.sparse_density}.'
    )
  if config.repeats < 1:
    raise ValueError(f'--config.repeats must be >= 1, got {config.repeats}.')
  if config.heads % config.kv_heads:
    raise ValueError(
      f'--config.kv_heads={config.kv_heads} must divide --config.heads ='
      f' {config.heads}.'
    )
  for field, known in cases.NAMES.items():
    for name in config[field]:
      if name not in known:
        raise ValueError(
          f'--config.{field} has no {name!r}; there are {", ".join(known)}.'
        )


def measure_machine(config: ml_collections.ConfigDict) -> workdirs.Row:
  """What one large product and one long sum reach."""
  size = config.machine_size
  x = jax.random.normal(jax.random.key(0), (size, size), config.dtype)
  product = speed.measure(jax.jit(jnp.matmul), x, x, repeats=9)
  return {
    'flops_per_second': 2 * size**3 / min(product.times),
    'bytes_per_second': speed.read_bandwidth(config.memory_size * 2**20),
  }


def main(argv: Sequence[str]) -> None:
  """Runs the experiment from a command line."""
  launch.run('benchmark_kernels', experiment, argv)


if __name__ == '__main__':
  main(sys.argv)
