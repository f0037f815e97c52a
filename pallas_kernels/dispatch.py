"""Which implementation of an operation runs where.

Every public function of this package takes `implementation`:

* None lets the platform choose when the program is lowered: the kernel of that
  platform where there is one for these arguments, and `blockwise`,
  which runs everywhere, where there is not;
* a name runs that implementation and never another;
* a tuple of names runs the first one that takes the arguments.

An implementation that does not take its arguments raises NotImplementedError
with the reason, before it computes anything.
"""

from collections.abc import Callable, Mapping, Sequence
import functools
from typing import Any

import jax
from jax import lax
from jax.extend import core
from jax.interpreters import ad
from jax.interpreters import batching
from jax.interpreters import mlir

from pallas_kernels import shards

# The platform that each kernel is written for; other names run anywhere.
PLATFORMS = {'mosaic_tpu': 'tpu', 'mosaic_gpu': 'cuda', 'llvm_cpu': 'cpu'}
ANYWHERE = 'blockwise'

Implementation = str | Sequence[str] | None


def bind(
  implementations: Mapping[str, Callable[..., Any]],
  *static: Any,
  **options: Any,
) -> dict[str, Callable[..., Any]]:
  """Implementations with their static arguments, which must be hashable.

  A kernel of one platform is traced once for all calls that are alike, on every
  platform: a model calls it in each of its layers.
  """
  return {
    name: _bound(name in PLATFORMS, function, static, tuple(options.items()))
    for name, function in implementations.items()
  }


@functools.cache
def _bound(once, function, static, options):
  bound = functools.partial(function, *static, **dict(options))
  return jax.jit(bound) if once else bound


def call(
  operation: str,
  implementations: Mapping[str, Callable[..., Any]],
  implementation: Implementation,
  *args: Any,
) -> Any:
  """Runs an implementation of `operation` on `args`.

  Args:
    operation: Its name, for errors.
    implementations: All there are, by name; `blockwise` is one of them.
    implementation: None, a name, or names in the order to try.
    *args: Positional arguments, arrays or trees of arrays.

  Raises:
    ValueError: A name is unknown.
    NotImplementedError: No implementation that was named takes the arguments.
  """
  args = shards.alike(args)
  # Mosaic GPU forgets which of its results vary.
  implementations = {
    name: _marked(function) for name, function in implementations.items()
  }
  if implementation is None:
    return _platforms_choice(implementations, *args)
  names = (
    (implementation,) if isinstance(implementation, str) else implementation
  )
  for name in names:
    if name not in implementations:
      raise ValueError(
        f'{operation} has no implementation {name!r}; there are'
        f' {", ".join(implementations)}.'
      )
  reasons = []
  for name in names:
    marked = args
    if name in PLATFORMS:
      # Not the results: the kernel's own, longer error would come first.
      marked = only_on(PLATFORMS[name], name, args)
    try:
      return implementations[name](*marked)
    except NotImplementedError as error:
      reasons.append(f'{name}: {error}')
  raise NotImplementedError(
    f'{operation} takes these arguments in none of: {"; ".join(reasons)}'
  )


def _marked(function):
  return lambda *args: shards.like(function(*args), args)


def _platforms_choice(implementations, *args):
  branches = {}
  for name, platform in PLATFORMS.items():
    if name in implementations:
      try:
        jax.eval_shape(implementations[name], *args)
      except NotImplementedError:
        continue
      branches[platform] = implementations[name]
  if not branches:
    return implementations[ANYWHERE](*args)
  return lax.platform_dependent(
    *args, default=implementations[ANYWHERE], **branches
  )


def only_on(platform: str, name: str, tree: Any) -> Any:
  """`tree` itself, in a program that may be lowered for one platform only.

  Lowering for another one raises a NotImplementedError that says so.
  """
  bind = lambda x: _only_on_p.bind(x, platform=platform, name=name)
  return jax.tree.map(bind, tree)


_only_on_p = core.Primitive('only_on')
_only_on_p.def_impl(lambda x, **_: x)
_only_on_p.def_abstract_eval(lambda x, **_: x)
ad.deflinear2(_only_on_p, lambda t, _, **kwargs: [_only_on_p.bind(t, **kwargs)])
batching.defvectorized(_only_on_p)


def _lower(context, x, *, platform, name):
  lowered_for = context.module_context.platforms
  if platform not in lowered_for:
    raise NotImplementedError(
      f'{name} is a kernel for {platform} and this program is compiled for'
      f' {", ".join(lowered_for)}: use implementation=None, or'
      f' {ANYWHERE!r}, which runs everywhere.'
    )
  return [x]


mlir.register_lowering(_only_on_p, _lower)
