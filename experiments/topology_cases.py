"""The cases of `compile_topology`: read, checked, compiled to rows."""

import time
from typing import Any, NamedTuple

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
from efficiency_jax.types import ApplyFn
from experiments import workdir as workdirs
from pallas_kernels import dispatch


class Case(NamedTuple):
  """One program: the step of a model on a topology."""

  model: str
  topology: str
  data: int
  fsdp: int
  tensor: int
  rows: int  # a chip
  remat: str
  attention: str


def read_all(config: ml_collections.ConfigDict) -> list[Case]:
  """The cases of the config.

  All are checked: a mistake in the last one shows before the first is compiled.

  Raises:
    ValueError: There are none, or one of them cannot be.
  """
  if not config.cases:
    raise ValueError('--config.cases is empty.')
  if config.sequence_length < 1:
    raise ValueError(
      f'--config.sequence_length must be >= 1, got {config.sequence_length}.'
    )
  cases = [_read(config, case) for case in config.cases]
  for case in cases:
    prepare(config, case)
  return cases


def prepare(
  config: ml_collections.ConfigDict, case: Case
) -> tuple[configs.DecoderConfig, jax.sharding.Mesh, ApplyFn]:
  """The model's shape, the mesh of chips, and the model on it.

  Raises:
    ValueError: They do not go together, or there is no such topology.
  """
  shape = configs.DecoderConfig(**config.models[case.model])
  mesh = meshes.make(
    data=case.data,
    fsdp=case.fsdp,
    tensor=case.tensor,
    devices=topology.devices(case.topology),
  )
  tensor = mesh.shape['tensor']
  if tensor > 1 and case.attention in dispatch.PLATFORMS:
    raise ValueError(
      f'the compiler cannot split the kernel {case.attention} over'
      f' tensor={tensor}: take the attention reference, or tensor=1.'
    )
  apply = activations.wrap(
    transformer.apply_fn(shape, case.attention),
    mesh,
    case.remat,
    local=tensor == 1,
  )
  return shape, mesh, apply


def measure(config: ml_collections.ConfigDict, case: Case) -> workdirs.Row:
  """One row: what the step of a case needs."""
  shape, mesh, apply = prepare(config, case)
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
  layout = meshes.plan(state, mesh)[1]
  batch = (case.rows * mesh.size, config.sequence_length + 1)
  began = time.process_time()  # does not count what others do meanwhile
  program = topology.compile_step(
    steps.make_step(loss, optimizer, compute_dtype=jnp.bfloat16),
    mesh,
    state,
    {},
    {'tokens': jax.ShapeDtypeStruct(batch, jnp.int32)},
  )
  sizes = ' x '.join(str(size) for size in mesh.shape.values())
  parameters = trees.count_parameters(state.params)
  row = {
    'method': f'{case.model}, {case.topology}, {sizes}, {case.rows}',
    'baseline': f'memory of a {case.topology.partition(":")[0]} chip',
    'model': case.model,
    'topology': case.topology,
    'chips': mesh.size,
    'mesh': sizes,
    'tensor': mesh.shape['tensor'],
    'parameters': parameters,
    'rows_per_chip': case.rows,
    'remat': case.remat,
    'attention': case.attention,
    'compile_seconds': time.process_time() - began,
    'copied_axes': len(layout.replicated),
    'state_gigabytes': layout.device_bytes / 1e9,
  }
  tokens = case.rows * mesh.size * config.sequence_length
  return row | topology.summary(
    program, case.topology, tokens=tokens, parameters=parameters
  )


def _read(config: ml_collections.ConfigDict, fields: Any) -> Case:
  kinds = list(Case.__annotations__.values())
  if not isinstance(fields, tuple) or [*map(type, fields)] != kinds:
    names = ', '.join(f'{k}: {v.__name__}' for k, v in zip(Case._fields, kinds))
    raise ValueError(f'a case of --config.cases is ({names}), got {fields!r}.')
  case = Case(*fields)
  if case.model not in config.models:
    raise ValueError(f'--config.models has no {case.model!r}.')
  if case.rows < 1:
    raise ValueError(f'rows a chip must be >= 1, got {case.rows}.')
  return case
