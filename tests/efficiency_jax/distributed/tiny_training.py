"""A tiny decoder trained for some steps on a mesh.

As a program it is one of several processes, which find each other by the
variables that `runtime.start` reads, and prints the losses of every layout:

    python -m tests.efficiency_jax.distributed.tiny_training
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax

from efficiency_jax.distributed import activations
from efficiency_jax.distributed import mesh as meshes
from efficiency_jax.distributed import runtime
from efficiency_jax.models import transformer
from efficiency_jax.training import state as states
from efficiency_jax.training import step as steps
from tests import fixtures

CONFIG = fixtures.config(
  vocab_size=64,
  width=32,
  ffn_width=64,
  num_layers=1,
  num_heads=8,
  num_kv_heads=4,
  head_dim=8,
)
OPTIMIZER = optax.adam(1e-2)
BATCH = 8
STEPS = 3
LAYOUTS = ({'data': 2, 'fsdp': 2}, {'tensor': 4})  # of four devices


def make_state() -> states.TrainState:
  """Parameters from a fixed key, and an average so that there is one."""
  params = transformer.init(CONFIG, jax.random.key(0))
  return states.create(params, OPTIMIZER, averaged=True)


def make_loss(apply):
  """Mean cross entropy of the next token."""

  def loss(params, frozen, batch):
    del frozen
    tokens = batch['tokens']
    out, _ = apply(params, tokens[:, :-1])
    each = optax.softmax_cross_entropy_with_integer_labels(
      out.logits, tokens[:, 1:]
    )
    return each.mean(), {}

  return loss


def batch_of(number: int) -> np.ndarray:
  """Tokens [BATCH, 13] of a step, the same on every process."""
  rng = np.random.default_rng(number)
  return rng.integers(0, CONFIG.vocab_size, (BATCH, 13), dtype=np.int32)


def train(mesh, **options):
  """Losses of some steps, each process feeding its rows; the last state.

  `options` are those of `activations.wrap`.
  """
  apply = activations.wrap(
    transformer.apply_fn(CONFIG, 'blockwise'), mesh, **options
  )
  state = meshes.shard(jax.jit(make_state)(), mesh)
  frozen = {}
  step = meshes.jit_step(
    steps.make_step(make_loss(apply), OPTIMIZER), mesh, state, frozen
  )
  rows = runtime.process_rows(mesh, BATCH)
  losses = []
  for number in range(STEPS):
    mine = {'tokens': batch_of(number)[rows]}
    batch = runtime.process_batch(mesh, mine)
    state, metrics = step(state, frozen, batch)
    losses.append(float(metrics['loss']))
  return losses, state


def main() -> None:
  """Trains on all devices of all processes, in every layout."""
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_num_cpu_devices', 2)
  runtime.start()
  found = {'processes': jax.process_count(), 'first': runtime.is_first()}
  found['runs'] = []
  for layout in LAYOUTS:
    mesh = meshes.make(**{'data': 1, **layout})
    losses, state = train(mesh)
    kernel = state.params['layers_0']['ffn']['gate_up']['kernel']
    found['runs'].append(
      {
        'losses': losses,
        'rows': runtime.process_rows(mesh, BATCH).tolist(),
        'kernel': list(kernel.addressable_shards[0].data.shape),
      }
    )
  # A key and a scalar, whole on every device.
  key = meshes.shard({'key': jax.random.key(3), 'n': jnp.int32(5)}, mesh)
  found['key'] = float(jax.jit(jax.random.uniform)(key['key']))
  print(json.dumps(found))
  jax.distributed.shutdown()


if __name__ == '__main__':
  main()
