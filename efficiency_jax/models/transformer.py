"""A decoder language model in Flax Linen: one module for every family.

Llama, SmolLM2, Mistral, Qwen2, Qwen3, Gemma 2, Gemma 3 and Phi-3 differ only in
`DecoderConfig`. Modules declare parameters and nothing else; the cache is an
argument and a result.

The query, key and value projections are one kernel with columns [q | k | v],
gate and up are one kernel with columns [gate | up]: at batch 1 decoding reads
every weight once a token, and fewer, larger products read faster. Layers are
unrolled with a parameter each, because a scan would copy every layer's slice
out of the stack at every token.
"""

from collections.abc import Callable
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from efficiency_jax.linear import embed
from efficiency_jax.linear import linear
from efficiency_jax.linear import logits_from_table
from efficiency_jax.models import attention
from efficiency_jax.models import cache as kv_cache
from efficiency_jax.models import rope
from efficiency_jax.models.config import DecoderConfig
from efficiency_jax.types import ApplyFn
from efficiency_jax.types import Cache
from efficiency_jax.types import ModelOutput
from efficiency_jax.types import Params
from pallas_kernels.dispatch import Implementation
from pallas_kernels.rms_norm.api import rms_norm


class Linear(nn.Module):
  """A kernel [I, O], optionally a bias, applied by `linear`."""

  features: int
  use_bias: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    init = nn.initializers.normal(0.02)
    kernel = _leaf(self, 'kernel', init, (x.shape[-1], self.features))
    bias = None
    if self.use_bias:
      bias = _leaf(self, 'bias', nn.initializers.zeros, (self.features,))
    return linear(x, kernel, bias)


class RMSNorm(nn.Module):
  """x / sqrt(mean(x^2) + epsilon) * scale (arXiv 1910.07467), in float32."""

  epsilon: float
  plus_one: bool = False
  # Decoding has a kernel; XLA would gather a batch that is split to call it.
  cached: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    ones = nn.initializers.zeros if self.plus_one else nn.initializers.ones
    scale = _leaf(self, 'scale', ones, (x.shape[-1],)).astype(jnp.float32)
    scale = 1.0 + scale if self.plus_one else scale
    implementation = None if self.cached else 'blockwise'
    return rms_norm(
      x, scale, epsilon=self.epsilon, implementation=implementation
    )


class Attention(nn.Module):
  """Grouped-query attention with rotary positions, over itself or a cache."""

  config: DecoderConfig
  layer: int
  implementation: Implementation = None

  @nn.compact
  def __call__(self, x, turn, start, slots, ancestors, segments):
    c = self.config
    batch, time, _ = x.shape
    split = (c.num_heads, c.num_heads + c.num_kv_heads)
    width = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
    qkv = Linear(width, c.qkv_bias, name='qkv')(x)
    qkv = qkv.reshape(batch, time, -1, c.head_dim)
    queries, keys, values = jnp.split(qkv, split, axis=2)
    if c.qk_norm:
      cached = slots is not None
      queries = _norm(c, 'query_norm', cached)(queries)
      keys = _norm(c, 'key_norm', cached)(keys)
    scale = c.head_dim**-0.5 if c.query_scale is None else c.query_scale
    queries = rope.rotate(queries, turn) * jnp.asarray(scale, x.dtype)
    keys = rope.rotate(keys, turn)
    options = {
      'window': c.window(self.layer),
      'softcap': c.attention_softcap,
      'implementation': self.implementation,
    }
    if slots is None:
      out = attention.full_attention(
        queries, keys, values, segments=segments, **options
      )
    else:
      slots = tuple(
        kv_cache.write(buffer, new.transpose(0, 2, 1, 3), start)
        for buffer, new in zip(slots, (keys, values), strict=True)
      )
      out = attention.cached_attention(
        queries, *slots, start, ancestors=ancestors, **options
      )
    out = out.reshape(batch, time, c.num_heads * c.head_dim)
    return Linear(c.width, c.output_bias, name='output')(out), slots


class FeedForward(nn.Module):
  """down(activation(gate(x)) * up(x)), the gated unit of arXiv 2002.05202."""

  config: DecoderConfig

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    c = self.config
    gate_up = Linear(2 * c.ffn_width, c.mlp_bias, name='gate_up')(x)
    gate, up = jnp.split(gate_up, 2, axis=-1)
    gelu = c.activation == 'gelu_tanh'
    gate = jax.nn.gelu(gate, approximate=True) if gelu else jax.nn.silu(gate)
    return Linear(c.width, c.mlp_bias, name='down')(gate * up)


class Block(nn.Module):
  """One decoder layer: attention, then feed-forward, each added to x."""

  config: DecoderConfig
  layer: int
  implementation: Implementation = None

  @nn.compact
  def __call__(self, x, turn, *places):
    c = self.config
    attend = Attention(c, self.layer, self.implementation, name='attention')
    cached = places[1] is not None
    norm = functools.partial(_norm, c, cached=cached)
    after, slots = attend(norm('attention_norm')(x), turn, *places)
    if c.post_norms:
      after = norm('attention_post_norm')(after)
    x = x + after
    after = FeedForward(c, name='ffn')(norm('ffn_norm')(x))
    if c.post_norms:
      after = norm('ffn_post_norm')(after)
    return x + after, slots


class Embedding(nn.Module):
  """A table [V, D]: looked up on the way in, scored on the way out."""

  vocab_size: int
  width: int

  def setup(self):
    shape = (self.vocab_size, self.width)
    self.table = _leaf(self, 'table', nn.initializers.normal(0.02), shape)

  def __call__(self, tokens: jax.Array) -> jax.Array:
    return embed(tokens, self.table)

  def logits(self, x: jax.Array) -> jax.Array:
    return logits_from_table(x, self.table)


class DecoderLM(nn.Module):
  """Tokens [B, T] in, `ModelOutput` and the grown cache out."""

  config: DecoderConfig
  implementation: Implementation = None
  layers: tuple[int, ...] = ()

  @nn.compact
  def __call__(
    self,
    tokens: jax.Array,
    cache: Cache | None = None,
    ancestors: jax.Array | None = None,
    segments: jax.Array | None = None,
  ) -> tuple[ModelOutput, Cache | None]:
    c = self.config
    batch, time = tokens.shape
    start = jnp.zeros((batch,), jnp.int32) if cache is None else cache.length
    positions = start[:, None] + _places(time, cache, ancestors, segments)
    turns = functools.partial(_turns, c)
    turn, local_turn = (turns if cache is None else _once(turns))(positions)

    embedding = Embedding(c.vocab_size, c.width, name='embedding')
    x = _embedded(c, embedding(tokens))
    keys, values, states = [], [], {}
    for layer in range(c.num_layers):
      states[layer] = x
      is_local = c.window(layer) is not None
      slots = None
      if cache is not None:
        slots = cache.keys[layer], cache.values[layer]
      block = self._block(layer, shared=cache is not None)
      x, slots = block(
        x, local_turn if is_local else turn, start, slots, ancestors, segments
      )
      if slots is not None:
        keys.append(slots[0])
        values.append(slots[1])
    x = _norm(c, 'final_norm', cache is not None)(x)

    head = embedding
    if not c.tie_embeddings:
      head = Embedding(c.vocab_size, c.width, name='head')
    logits = _capped(c, head.logits(x))
    if cache is not None:
      # A drafter may run the first layers only: the others' slots stay.
      cache = Cache(
        tuple(keys) + cache.keys[c.num_layers :],
        tuple(values) + cache.values[c.num_layers :],
        start + time,
      )
    if self.layers:
      x = jnp.concatenate([x, *(states[i] for i in self.layers)], axis=-1)
    return ModelOutput(logits, x), cache

  def _block(self, layer: int, shared: bool) -> Callable[..., Any]:
    """A layer; if `shared`, its program is that of the layers like it."""
    name = f'layers_{layer}'
    if not shared or self.is_initializing():
      return Block(self.config, layer, self.implementation, name=name)
    window = self.config.window(layer)
    like = next(i for i in range(layer + 1) if self.config.window(i) == window)
    run = _shared_block(self.config, like, self.implementation)
    return functools.partial(run, self.get_variable('params', name))


@functools.cache
def _shared_block(config, layer, implementation):
  """A block as a function that is traced and lowered once for like layers.

  Thirty layers at each of five draft lengths otherwise take as long to trace as
  to compile. Blocks of whole sequences stay modules, because training and
  calibration watch their methods (`nn.intercept_methods`).
  """
  block = Block(config, layer, implementation)
  return jax.jit(lambda params, *args: block.apply({'params': params}, *args))


def apply_fn(
  config: DecoderConfig,
  implementation: Implementation = None,
  layers: tuple[int, ...] = (),
) -> ApplyFn:
  """The model as a pure function of parameters, tokens and cache.

  `implementation` names the attention kernels (`pallas_kernels.dispatch`); None
  is the platform's choice. Over a cache, layers that are alike are one traced
  function, so that tracing takes no longer for thirty layers than for two;
  interceptors of methods see the layers of whole sequences only. With `layers`
  the hidden states of the output hold what those blocks read as well,
  [B, T, (1 + len(layers)) D]. Equal arguments give the same function object, so
  that it can be a static argument of `jax.jit` without compiling again.

  Raises:
    ValueError: The model has no block of that number.
  """
  check_layers(config, layers)
  return _apply_fn(config, implementation, tuple(layers))


def check_layers(config: DecoderConfig, layers: tuple[int, ...]) -> None:
  """Raises ValueError unless the model has a block of each number."""
  wrong = [i for i in layers if not 0 <= i < config.num_layers]
  if wrong:
    raise ValueError(
      f'layers must be in 0..{config.num_layers - 1}, got {wrong[0]}.'
    )


@functools.cache
def _apply_fn(config, implementation, layers) -> ApplyFn:
  model = DecoderLM(config, implementation, layers)

  def apply(params, tokens, cache=None, *, ancestors=None, segments=None):
    variables = {'params': params}
    return model.apply(variables, tokens, cache, ancestors, segments)

  return apply


@functools.cache
def embed_fn(
  config: DecoderConfig,
) -> Callable[[Params, jax.Array], jax.Array]:
  """The way in alone: parameters and tokens [B, T] to what block 0 reads."""

  def embedded(params, tokens):
    return _embedded(config, embed(tokens, params['embedding']['table']))

  return embedded


@functools.cache
def block_fn(
  config: DecoderConfig, layer: int, implementation: Implementation = None
) -> Callable[[Params, jax.Array], jax.Array]:
  """One block alone: its parameters and whole sequences x [B, T, D] to x.

  `embed_fn`, the blocks in their order, the final norm and `head_fn` are the
  model.
  """
  block = Block(config, layer, implementation)

  def run(params, x):
    batch, time, _ = x.shape
    start = jnp.zeros((batch,), jnp.int32)
    turn, local_turn = _turns(config, jnp.arange(time, dtype=jnp.int32)[None])
    if config.window(layer) is not None:
      turn = local_turn
    places = (start, None, None, None)
    return block.apply({'params': params}, x, turn, *places)[0]

  return run


@functools.cache
def head_fn(
  config: DecoderConfig,
) -> Callable[[Params, jax.Array], jax.Array]:
  """The output head alone: parameters, hidden [..., D] to logits [..., V].

  It makes the logits of `apply_fn` of its hidden states, to the last bit of a
  product of the same shape.
  """
  name = 'embedding' if config.tie_embeddings else 'head'

  def head(params, hidden):
    return _capped(config, logits_from_table(hidden, params[name]['table']))

  return head


def init(config: DecoderConfig, key: jax.Array) -> Params:
  """Random float32 parameters: normal(0, 0.02) kernels, unit norms."""
  tokens = jnp.zeros((1, 1), jnp.int32)
  return _init_fn(config)(key, tokens)['params']


@functools.cache
def _init_fn(config: DecoderConfig):
  return jax.jit(DecoderLM(config).init)


def _embedded(c: DecoderConfig, x: jax.Array) -> jax.Array:
  return x * jnp.asarray(c.width**0.5, x.dtype) if c.scale_embeddings else x


def _capped(c: DecoderConfig, logits: jax.Array) -> jax.Array:
  if c.final_softcap is None:
    return logits
  return c.final_softcap * jnp.tanh(logits / c.final_softcap)


def _places(time: int, cache, ancestors, segments) -> jax.Array:
  """Positions of the tokens from the first one on: [T], [1, T] or [B, T]."""
  places = jnp.arange(time, dtype=jnp.int32)[None]
  if ancestors is not None:
    if cache is None:
      raise ValueError('ancestors are for tokens after a cache.')
    return jnp.sum(ancestors, axis=-1, dtype=jnp.int32) - 1
  if segments is not None:
    if cache is not None:
      raise ValueError('segments are for whole sequences, without a cache.')
    begins = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)))
    first = jax.lax.cummax(jnp.where(begins, places, 0), axis=1)
    return places - first
  return places


def _turns(c: DecoderConfig, positions: jax.Array):
  """Rotations of the global and of the sliding-window layers."""
  inverse = rope.frequencies(c.head_dim, c.rope_theta, c.rope_scaling)
  turn = rope.rotation(positions, inverse)
  if c.local_rope_theta is None:
    return turn, turn
  local = rope.frequencies(c.head_dim, c.local_rope_theta)
  return turn, rope.rotation(positions, local)


def _once(f: Callable[[jax.Array], Any]) -> Callable[[jax.Array], Any]:
  """`f` of positions, which are never negative, computed once on a CPU.

  XLA would fuse it into all of its readers there, which for sines and cosines
  is every number of every head of every layer. Out of a branch it fuses
  nothing, and does not see that there is only one.
  """

  def in_branch(positions):
    zeros = lambda x: jax.tree.map(jnp.zeros_like, jax.eval_shape(f, x))
    return jax.lax.cond(positions.min() >= 0, f, zeros, positions)

  return functools.partial(jax.lax.platform_dependent, cpu=in_branch, default=f)


def _norm(c: DecoderConfig, name: str, cached: bool) -> RMSNorm:
  return RMSNorm(c.norm_epsilon, c.norm_plus_one, cached, name=name)


def _leaf(module: nn.Module, name: str, init, shape: tuple[int, ...]) -> Any:
  """A parameter that a weight technique may have replaced by a typed leaf.

  `Module.param` insists on the declared shape, which a packed leaf has not.
  """
  if module.is_initializing():
    return module.param(name, init, shape)
  return module.get_variable('params', name)
