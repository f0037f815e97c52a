"""Settings of all tests; they must come before the first use of a device."""

import os

import hypothesis
import jax
import pytest

# Programs that a test starts see the same platform: the CPU, except where
# somebody asks for a GPU by `make test-gpu`.
platform = os.environ.get('EFFICIENCY_JAX_TEST_PLATFORM', 'cpu')
os.environ['JAX_PLATFORMS'] = platform
jax.config.update('jax_platforms', platform)
if platform == 'cpu':
  # Eight virtual devices, so that sharding is tested on any machine.
  jax.config.update('jax_num_cpu_devices', 8)
# Most of the suite's time is that of compiling programs that run once, so XLA
# is asked to optimize little, here and in programs that a test starts. Turning
# fusions into loops by way of MLIR takes as long as LLVM then, and can be left
# out. EFFICIENCY_JAX_TEST_OPTIMIZED=1 asks for the programs that users get.
optimized = os.environ.get('EFFICIENCY_JAX_TEST_OPTIMIZED')
little = platform == 'cpu' and not optimized
if little:
  os.environ['JAX_DISABLE_MOST_OPTIMIZATIONS'] = '1'
  jax.config.update('jax_disable_most_optimizations', True)
  if jax.__version_info__ < (0, 11):  # XLA ends where it does not know a flag
    flags = os.environ.get('XLA_FLAGS', '')
    os.environ['XLA_FLAGS'] = f'{flags} --xla_cpu_use_fusion_emitters=false'

# The same few examples every time, however slow the first, compiling one is;
# more of them in `make test-slow`.
hypothesis.settings.register_profile(
  'repeatable',
  deadline=None,
  derandomize=True,
  database=None,
  max_examples=int(os.environ.get('EFFICIENCY_JAX_EXAMPLES', '15')),
)
hypothesis.settings.load_profile('repeatable')


@pytest.fixture(autouse=True, scope='module')
def _programs(request):
  """Compiles as a module asks (`optimized`), and forgets the programs after it.

  Every compiled program maps memory, and a process may hold so many maps only
  (65,530 on Linux): the whole suite in one process would pass that.
  """
  if request.node.get_closest_marker('optimized'):
    jax.config.update('jax_disable_most_optimizations', False)
  yield
  jax.config.update('jax_disable_most_optimizations', little)
  jax.clear_caches()
