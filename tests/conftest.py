"""Settings of all tests; they must come before the first use of a device."""

import os

import hypothesis
import jax

# Programs that a test starts see the same platform.
os.environ['JAX_PLATFORMS'] = 'cpu'
jax.config.update('jax_platforms', 'cpu')
# Eight virtual devices, so that sharding is tested on any machine.
jax.config.update('jax_num_cpu_devices', 8)

# The same few examples every time, however slow the first, compiling one is.
hypothesis.settings.register_profile(
  'repeatable',
  deadline=None,
  derandomize=True,
  database=None,
  max_examples=25,
)
hypothesis.settings.load_profile('repeatable')
