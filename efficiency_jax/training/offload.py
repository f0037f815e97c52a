"""Optimizer state that waits in the host's memory.

Adam remembers two numbers a parameter and reads them once a step, so an
accelerator may leave them to the host: 8 bytes a parameter less (ZeRO-Offload,
arXiv 2101.06840), for a trip over the bus and back in every step.
"""

import jax
import jax.numpy as jnp
import optax


def offloaded(
  optimizer: optax.GradientTransformation,
) -> optax.GradientTransformation:
  """The same optimizer, whose state lives in pinned memory of the host.

  The arithmetic is that of `optimizer`, on the device. Scalars stay there: a
  trip costs more than their four bytes. Needs a backend with host memory, as
  TPU, GPU and CPU have.
  """

  def init(params):
    return _put(optimizer.init(params), jax.memory.Space.Host)

  def update(updates, state, params=None):
    state = _put(state, jax.memory.Space.Device)
    updates, state = optimizer.update(updates, state, params)
    return updates, _put(state, jax.memory.Space.Host)

  return optax.GradientTransformation(init, update)


def _put(state, space):
  move = lambda x: jax.device_put(x, space) if jnp.ndim(x) else x
  return jax.tree.map(move, state)
