"""Compiles the sharded training step for TPUs that are not here.

    .venv-aot/bin/python -m experiments.compile_topology \\
      --config=configs/compile_topology.py --workdir=runs/compile_topology

bfloat16 compute, float32 parameters and Adam's two moments. Memory is what the
compiler plans; times are bounds from the peaks of the chip, not measurements.
"""

from collections.abc import Sequence
import functools
import sys

import jax
import ml_collections

from experiments import display
from experiments import launch
from experiments import topology_cases
from experiments import topology_report
from experiments import workdir as workdirs


def experiment(
  config: ml_collections.ConfigDict, workdir: workdirs.Workdir
) -> None:
  """Compiles every case of the config."""
  # A program for chips that are not here can be compiled, but not loaded.
  jax.config.update('jax_compilation_cache_dir', None)
  cases = topology_cases.read_all(config)
  rows = []
  for case in display.track(cases, 'programs'):
    key = ' '.join(map(str, case))
    measure = functools.partial(topology_cases.measure, config, case)
    rows.append(workdir.row(key, measure))
    workdir.write_results(rows)
  topology_report.write(rows, config.sequence_length, workdir)


def main(argv: Sequence[str]) -> None:
  """Runs the experiment from a command line."""
  # Nothing runs here: let JAX look for no accelerator.
  jax.config.update('jax_platforms', 'cpu')
  launch.run('compile_topology', experiment, argv)


if __name__ == '__main__':
  main(sys.argv)
