"""Compiles the sharded training step for TPUs that are not here.

    JAX_PLATFORMS=cpu .venv-aot/bin/python -m experiments.compile_topology \\
      --config=configs/compile_topology.py --workdir=runs/compile_topology

bfloat16 compute, float32 parameters and Adam's two moments. Memory is what the
compiler plans; times are bounds from the peaks of the chip, not measurements.
"""

from collections.abc import Sequence
import sys
import time

import jax
import jax.numpy as jnp
import ml_collections
import optax

from efficiency_jax import trees
from efficiency_jax.distributed import activations
from efficiency_jax.distributed import mesh as meshes
from efficiency_jax.distributed import topology
from efficiency_jax.models import config as configs
from efficiency_jax.models import transformer
from efficiency_jax.training import state as states
from efficiency_jax.training import step as steps
from experiments import display
from experiments import launch
from experiments import topology_figure
from experiments import workdir as workdirs

COLUMNS = {
  'method': 'model, chips, data x fsdp x tensor, rows a chip',
  'remat': 'remat',
  'attention': 'attention',
  'argument_gigabytes': 'state GB',
  'temporary_gigabytes': 'temporary GB',
  'hbm_gigabytes': 'in all GB',
  'fits': 'fits',
  'teraflops': 'TFLOP',
  'sent_gigabytes': 'sent GB',
  'collectives': 'collectives',
  'bound_milliseconds': 'step >= ms',
  'bound_by': 'bound by',
  'bound_tokens_per_second': 'tokens/s <=',
  'compile_seconds': 'compiled in s',
}


def experiment(
  config: ml_collections.ConfigDict, workdir: workdirs.Workdir
) -> None:
  """Compiles every case of the config."""
  rows = []
  for case in display.track(config.cases, 'programs'):
    key = ' '.join(map(str, case))
    rows.append(workdir.row(key, lambda case=case: compile_case(config, *case)))
    workdir.write_results(rows)
  table = display.table(rows, COLUMNS)
  table.show()
  image = workdir.save_figure(topology_figure.memory(rows), 'memory')
  workdir.write_report(
    f'{table.markdown()}\n\n![memory a chip]({image.name})\n\nA chip and a'
    f' step; rows of {config.sequence_length} tokens, bfloat16 compute, float32'
    f' parameters and Adam moments. {topology.CAVEATS}'
  )


def compile_case(config, model, name, data, fsdp, tensor, rows, remat, kernel):
  """One row: a model on a topology."""
  if model not in config.models:
    raise ValueError(f'--config.models has no {model!r}.')
  shape = configs.DecoderConfig(**config.models[model])
  chips = topology.devices(name)
  mesh = meshes.make(data=data, fsdp=fsdp, tensor=tensor, devices=chips)
  apply = activations.wrap(
    transformer.apply_fn(shape, kernel), mesh, remat, local=tensor == 1
  )
  optimizer = optax.adam(1e-4)

  def loss(params, frozen, batch):
    del frozen
    out, _ = apply(params, batch['tokens'][:, :-1])
    labels = batch['tokens'][:, 1:]
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels
    return cross_entropy(out.logits, labels).mean(), {}

  def create():
    params = transformer.init(shape, jax.random.key(0))
    return states.create(params, optimizer)

  state = jax.eval_shape(create)
  tokens = (rows * len(chips), config.sequence_length + 1)
  batch = {'tokens': jax.ShapeDtypeStruct(tokens, jnp.int32)}
  step = steps.make_step(loss, optimizer, compute_dtype=jnp.bfloat16)
  began = time.perf_counter()
  program = topology.compile_step(step, mesh, state, {}, batch)
  row = {
    'method': f'{model}, {name}, {data} x {fsdp} x {tensor}, {rows}',
    'baseline': f'memory of a {name.partition(":")[0]} chip',
    'model': model,
    'topology': name,
    'chips': len(chips),
    'parameters': trees.count_parameters(state.params),
    'rows_per_chip': rows,
    'remat': remat,
    'attention': kernel,
    'compile_seconds': time.perf_counter() - began,
    'copied_axes': len(meshes.plan(state, mesh)[1].replicated),
  }
  return row | topology.summary(program, name, tokens[0] * (tokens[1] - 1))


def main(argv: Sequence[str]) -> None:
  """Runs the experiment from a command line."""
  launch.run('compile_topology', experiment, argv)


if __name__ == '__main__':
  main(sys.argv)
