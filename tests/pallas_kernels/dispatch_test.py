"""Names, tuples and platforms."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import dispatch


def _refuse(x):
  raise NotImplementedError(f'{x.shape} is too small')


THERE = {'blockwise': lambda x: x + 1, 'other': lambda x: x + 2, 'no': _refuse}
call = lambda choice, there=THERE: dispatch.call(
  'sum', there, choice, jnp.ones(3)
)


def test_a_name_runs_that_implementation_and_never_another():
  assert (call('other') == 3).all()
  with pytest.raises(NotImplementedError, match=r'none of: no: \(3,\) is too'):
    call('no')


def test_a_tuple_runs_the_first_that_takes_the_arguments():
  assert (call(('no', 'other', 'blockwise')) == 3).all()
  with pytest.raises(ValueError, match="sum has no implementation 'typo'"):
    call(('other', 'typo'))


def test_none_runs_on_every_platform():
  assert (call(None) == 2).all()
  # A kernel that refuses the arguments leaves them to blockwise.
  assert (call(None, THERE | {'mosaic_tpu': _refuse}) == 2).all()
  there = THERE | {'mosaic_tpu': lambda x: x * 64.0}
  assert (call(None, there) == 2).all()
  run = jax.jit(lambda x: dispatch.call('sum', there, None, x))
  traced = run.trace(jax.ShapeDtypeStruct((3,), jnp.float32))
  text = lambda platform: traced.lower(lowering_platforms=(platform,)).as_text()
  assert '6.4' in text('tpu')
  assert '6.4' not in text('cuda')
  assert '6.4' not in text('cpu')


def test_a_kernel_is_compiled_for_its_platform_only():
  there = THERE | {'mosaic_gpu': lambda x: x * 2}
  run = jax.jit(lambda x: dispatch.call('sum', there, 'mosaic_gpu', x))
  traced = run.trace(jax.ShapeDtypeStruct((3,), jnp.float32))
  traced.lower(lowering_platforms=('cuda',))
  sentence = 'mosaic_gpu is a kernel for cuda and this program is compiled for'
  for platform in ('tpu', 'cpu'):
    with pytest.raises(NotImplementedError, match=f'{sentence} {platform}'):
      traced.lower(lowering_platforms=(platform,))
  with pytest.raises(NotImplementedError, match=sentence):
    run(jnp.ones(3))


def test_the_mark_of_a_platform_has_derivatives_and_batches():
  mark = lambda x: dispatch.only_on('cpu', 'kernel', x * x)
  assert jax.jit(jax.grad(mark))(3.0) == 6.0
  batched = jax.jit(jax.vmap(mark))(jnp.arange(3.0))
  assert (batched == jnp.arange(3.0) ** 2).all()


def test_a_kernel_is_traced_once_for_calls_that_are_alike():
  traced = []

  def kernel(factor, x):
    traced.append(factor)
    return x * factor

  implementations = {'blockwise': lambda f, x: x * f, 'mosaic_tpu': kernel}

  def model(x, factors):
    for factor in factors:
      bound = dispatch.bind(implementations, factor)
      x = dispatch.call('product', bound, None, x)
    return x

  got = jax.jit(lambda x: model(x, (2.0,) * 5 + (3.0,)))(jnp.ones(3))
  assert got.tolist() == [96.0] * 3
  assert traced == [2.0, 3.0]
