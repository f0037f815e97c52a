"""What kernels are measured against: naive programs and other libraries.

A candidate is a function from random inputs to something ready to be timed, so
that packing, quantizing, compiling and moving to another library stay out of
the time.
"""

from collections.abc import Callable
import functools
import importlib.util
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from efficiency_jax.evaluation import speed
from pallas_kernels import llvm_cpu

# Attention by others; the last three need more than this project does.
ATTENTION = ('naive', 'jax.nn', 'cudnn', 'attention_mgpu', 'torch')


class Ready(NamedTuple):
  """Something to time."""

  call: Callable[[], Any]  # returns when the work is done, or JAX arrays
  peak_bytes: int | None = None  # scratch and outputs as planned, if known
  read: Callable[[Any], Any] = lambda result: result  # what a call returned
  # The time of so many calls by the device's own clock, if it has one.
  on_device: Callable[[int], speed.Timing] | None = None


Prepare = Callable[..., Ready]


def compiled(
  function: Callable[..., Any],
  convert: Callable[..., Any] = lambda *arrays: arrays,
) -> Prepare:
  """A JAX function of the converted inputs; compiled apart."""

  def prepare(*arrays: jax.Array) -> Ready:
    arrays = tuple(convert(*arrays))
    program = jax.jit(function).lower(*arrays).compile()
    plan = program.memory_analysis()
    peak = plan.temp_size_in_bytes + plan.output_size_in_bytes
    call = functools.partial(program, *arrays)
    if jax.default_backend() != 'gpu':
      return Ready(call, peak)
    by_its_clock = lambda repeats: speed.on_gpu(
      program, *arrays, repeats=repeats
    )
    return Ready(call, peak, on_device=by_its_clock)

  return prepare


def gradients(run: Callable[..., jax.Array]) -> Callable[..., Any]:
  """The gradients of q, k and v, of the sum of the outputs."""
  return jax.grad(lambda *arrays: run(*arrays).sum(), (0, 1, 2))


def missing(name: str) -> str | None:
  """Why a peer, or our kernel, cannot run here, or None if it can."""
  if name == 'torch':
    if importlib.util.find_spec('torch') is None:
      return 'torch is not installed: make test-peers'
  elif name == 'llvm_cpu':
    return llvm_cpu.missing()
  elif name in ('cudnn', 'attention_mgpu') and jax.default_backend() != 'gpu':
    return f'{name} needs a GPU, and this is {jax.default_backend()}'
  return None


def attention(backward: bool) -> dict[str, Prepare]:
  """Causal attention by others, of q, k and v; those that can run here."""
  functions = {
    'naive': naive_attention,
    'jax.nn': functools.partial(
      jax.nn.dot_product_attention, is_causal=True, implementation='xla'
    ),
    'cudnn': functools.partial(
      jax.nn.dot_product_attention, is_causal=True, implementation='cudnn'
    ),
  }
  if not backward:  # its backward pass knows no causal mask
    functions['attention_mgpu'] = _attention_mgpu
  found = {
    name: compiled(gradients(function) if backward else function)
    for name, function in functions.items()
    if missing(name) is None
  }
  if missing('torch') is None:
    found['torch'] = functools.partial(_torch_attention, backward)
  return found


def naive_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  """Attention as a textbook writes it: heads repeated, every score kept."""
  groups = q.shape[2] // k.shape[2]
  k, v = (jnp.repeat(x, groups, axis=2) for x in (k, v))
  scores = jnp.einsum('bqhd,bkhd->bhqk', q, k) / q.shape[-1] ** 0.5
  mask = jnp.tril(jnp.ones(scores.shape[2:], bool))
  scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
  return jnp.einsum('bhqk,bkhd->bqhd', jax.nn.softmax(scores, axis=-1), v)


def _attention_mgpu(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  """jax's own Hopper kernel, which its wheel ships as an example."""
  from jax.experimental.pallas.ops.gpu import attention_mgpu

  config = attention_mgpu.TuningConfig(
    block_q=64, block_kv=128, max_concurrent_steps=2, causal=True
  )
  # Its buffers are float16, whatever its arguments are.
  scaled, k, v = (
    x.astype(jnp.float16) for x in (q * q.shape[-1] ** -0.5, k, v)
  )
  return attention_mgpu.attention(scaled, k, v, config).astype(q.dtype)


def _torch_attention(
  backward: bool, q: jax.Array, k: jax.Array, v: jax.Array
) -> Ready:
  """PyTorch's scaled_dot_product_attention, on its own fastest backend."""
  import torch

  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  dtype = getattr(torch, str(q.dtype))
  tensors = [
    torch.tensor(np.asarray(x, np.float32).swapaxes(1, 2))
    .to(device, dtype)
    .contiguous()
    .requires_grad_(backward)
    for x in (q, k, v)
  ]

  groups = q.shape[2] // k.shape[2]

  def start():
    q, k, v = tensors
    if groups > 1:  # its fast kernels want as many key heads as query heads
      k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    out = torch.nn.functional.scaled_dot_product_attention(
      q, k, v, is_causal=True
    )
    return torch.autograd.grad(out.sum(), tensors) if backward else (out,)

  def call():
    results = start()
    if device == 'cuda':
      torch.cuda.synchronize()
    return results

  def on_device(repeats):
    start()
    ends = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    for end in ends:
      end.record()
      start()
    torch.cuda.synchronize()
    pairs = itertools.pairwise(ends)
    times = tuple(1e-3 * before.elapsed_time(after) for before, after in pairs)
    return speed.Timing(times=times, compile_seconds=0.0)

  def read(results):
    arrays = [x.detach().transpose(1, 2).float().cpu().numpy() for x in results]
    return tuple(arrays) if backward else arrays[0]

  on_cuda = on_device if device == 'cuda' else None
  return Ready(call, read=read, on_device=on_cuda)
