"""Times kernels against what a straightforward program does.

    python -m experiments.benchmark_kernels \\
      --config=configs/benchmark_kernels_cpu.py --workdir=runs/benchmark_kernels

Every case runs its implementations in turns on the same random data; memory is
what the compiler plans for scratch and outputs.
"""

from collections.abc import Sequence
import sys

import jax
import jax.numpy as jnp
import ml_collections

from efficiency_jax.evaluation import speed
from experiments import display
from experiments import figures
from experiments import kernel_cases as cases
from experiments import launch
from experiments import workdir as workdirs

COLUMNS = {
  'operation': 'operation',
  'implementation': 'implementation',
  'sequence_length': 'n',
  'milliseconds': 'ms',
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
  machine = workdir.row('machine', measure_machine)
  rows = []
  made = [(case.key, case) for case in cases.attention(config)]
  for key, case in display.track(made, 'kernels'):
    rows += workdir.row(
      key, lambda case=case: {'rows': cases.measure(case, config, machine)}
    )['rows']
  workdir.write_results(rows)
  table = display.table(rows, COLUMNS)
  table.show()
  image = workdir.save_figure(figures.kernels(rows), 'attention')
  workdir.write_report(
    f'{table.markdown()}\n\n![time and memory]({image.name})\n\nPeaks here:'
    f' {machine["flops_per_second"] / 1e9:.0f} GFLOP/s by a product of two'
    f' 1024 x 1024 matrices, {machine["bytes_per_second"] / 1e9:.1f} GB/s by a'
    ' sum. Speed-ups are over the first implementation of a case; errors are'
    ' the largest difference to it.\n'
  )


def check(config: ml_collections.ConfigDict) -> None:
  """Finds what is wrong with a config before anything is measured."""
  for name in ('forward', 'backward', 'sparse'):
    for size in config[name]:
      if size < 1:
        raise ValueError(f'--config.{name} must hold sizes >= 1, got {size}.')
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


def measure_machine() -> workdirs.Row:
  """What one large product and one long sum reach."""
  x = jax.random.normal(jax.random.key(0), (1024, 1024))
  product = speed.measure(jax.jit(jnp.matmul), x, x, repeats=9)
  return {
    'flops_per_second': 2 * 1024**3 / min(product.times),
    'bytes_per_second': speed.read_bandwidth(),
  }


def main(argv: Sequence[str]) -> None:
  """Runs the experiment from a command line."""
  launch.run('benchmark_kernels', experiment, argv)


if __name__ == '__main__':
  main(sys.argv)
