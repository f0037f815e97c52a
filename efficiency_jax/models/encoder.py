"""A text encoder in Flax Linen: BERT and MPNet, and embeddings of sentences.

BERT (arXiv 1810.04805) and MPNet (arXiv 2004.09297) differ in `EncoderConfig`.
Every token sees every other of its text. Kernels are leaves that `linear`
reads, tables leaves that `embed` reads, so weight techniques enter through the
same door as in `transformer`. The query, key and value projections are one
kernel with columns [q | k | v].
"""

from collections.abc import Callable
import functools
import math
from typing import TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from efficiency_jax.models.encoder_config import RELATIVE_BUCKETS
from efficiency_jax.models.encoder_config import EncoderConfig
from efficiency_jax.models.transformer import Embedding
from efficiency_jax.models.transformer import Linear
from efficiency_jax.types import Params
from pallas_kernels.attention import api as flash
from pallas_kernels.dispatch import Implementation

EncodeFn: TypeAlias = Callable[[Params, jax.Array, jax.Array], jax.Array]
"""Parameters, tokens [B, T] and mask [B, T] to hidden states [B, T, D]."""

# Distances from here on share the last bucket of their direction.
_FAR = 128


class LayerNorm(nn.Module):
  """(x - mean) / sqrt(variance + epsilon) * scale + bias, in float32."""

  epsilon: float

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    shape = (x.shape[-1],)
    scale = self.param('scale', nn.initializers.ones, shape)
    bias = self.param('bias', nn.initializers.zeros, shape)
    scale, bias = (
      jnp.expand_dims(leaf.astype(jnp.float32), range(x.ndim - 1))
      for leaf in (scale, bias)
    )
    x32 = x.astype(jnp.float32)
    x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    variance = jnp.mean(x32 * x32, axis=-1, keepdims=True)
    x32 = x32 * jax.lax.rsqrt(variance + self.epsilon)
    return (x32 * scale + bias).astype(x.dtype)


class Attention(nn.Module):
  """Attention of all tokens to the real tokens of their text."""

  config: EncoderConfig
  implementation: Implementation = None

  @nn.compact
  def __call__(self, x, mask, bias):
    c = self.config
    qkv = Linear(3 * c.width, True, name='qkv')(x)
    qkv = qkv.reshape(*x.shape[:2], 3 * c.num_heads, c.head_dim)
    queries, keys, values = jnp.split(qkv, 3, axis=2)
    if bias is None:
      out, _ = flash.attention(
        queries,
        keys,
        values,
        q_segments=jnp.ones_like(mask),
        kv_segments=mask,
        implementation=self.implementation,
      )
    else:
      out = _biased_attention(queries, keys, values, mask, bias)
    return Linear(c.width, True, name='output')(out.reshape(x.shape))


class FeedForward(nn.Module):
  """down(gelu(up(x))), with the exact gelu: x times the normal CDF of x."""

  config: EncoderConfig

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    c = self.config
    up = Linear(c.ffn_width, True, name='up')(x)
    up = jax.nn.gelu(up, approximate=False)
    return Linear(c.width, True, name='down')(up)


class Block(nn.Module):
  """One encoder layer: each part is added to x, and the sum normalized."""

  config: EncoderConfig
  implementation: Implementation = None

  @nn.compact
  def __call__(self, x, mask, bias):
    c = self.config
    attend = Attention(c, self.implementation, name='attention')
    x = _norm(c, 'attention_norm')(x + attend(x, mask, bias))
    after = FeedForward(c, name='ffn')(x)
    return _norm(c, 'ffn_norm')(x + after)


class Encoder(nn.Module):
  """Tokens [B, T] and a mask of real ones [B, T] in, hidden [B, T, D] out."""

  config: EncoderConfig
  implementation: Implementation = None

  @nn.compact
  def __call__(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    c = self.config
    time = tokens.shape[1]
    if time > c.max_positions:
      raise ValueError(
        f'tokens must have at most max_positions = {c.max_positions} a text,'
        f' got {time}.'
      )
    mask = (mask != 0).astype(jnp.int32)
    rows = c.first_position + c.max_positions
    places = jnp.arange(time, dtype=jnp.int32)[None]
    x = Embedding(c.vocab_size, c.width, name='embedding')(tokens)
    x += Embedding(rows, c.width, name='positions')(c.first_position + places)
    if c.token_types:
      types = Embedding(c.token_types, c.width, name='token_types')
      x += types(jnp.zeros_like(places))
    x = _norm(c, 'embedding_norm')(x)
    bias = None
    if c.relative_bias:
      table = Embedding(RELATIVE_BUCKETS, c.num_heads, name='relative_bias')
      bias = _relative_bias(table, time)
    for layer in range(c.num_layers):
      block = Block(c, self.implementation, name=f'layers_{layer}')
      x = block(x, mask, bias)
    return x


@functools.cache
def apply_fn(
  config: EncoderConfig, implementation: Implementation = None
) -> EncodeFn:
  """The encoder as a pure function of parameters, tokens and mask.

  The mask [B, T] is 1 at the tokens of the text and 0 at padding: hidden states
  of the text do not depend on padding, and those of padding mean nothing.
  `implementation` names the attention kernels (`pallas_kernels.dispatch`); None
  is the platform's choice, and 'reference' has second derivatives as well.
  Equal arguments give the same function object, so that it can be a static
  argument of `jax.jit` without compiling again.

  Raises:
    ValueError: When called, on more than `config.max_positions` tokens a text.
  """
  model = Encoder(config, implementation)
  return lambda params, tokens, mask: model.apply(
    {'params': params}, tokens, mask
  )


def init(config: EncoderConfig, key: jax.Array) -> Params:
  """Random float32 parameters: normal(0, 0.02) kernels, unit norms."""
  tokens = jnp.zeros((1, 1), jnp.int32)
  model = Encoder(config)
  return jax.jit(model.init)(key, tokens, jnp.ones_like(tokens))['params']


def sentence_embedding(
  hidden: jax.Array,  # [B, T, D]
  mask: jax.Array,  # [B, T]
) -> jax.Array:
  """The mean of a text's hidden states, scaled to length 1: [B, D] float32.

  This is how sentence-transformers pool (arXiv 1908.10084), so that the dot
  product of two embeddings is their cosine. A text of no tokens gets zeros.
  """
  mask = (mask != 0).astype(jnp.float32)[..., None]
  # A sum of the real ones alone: what padding holds must not matter.
  total = jnp.where(mask > 0, hidden.astype(jnp.float32), 0.0).sum(1)
  mean = total / jnp.maximum(mask.sum(1), 1.0)
  length = jnp.linalg.norm(mean, axis=-1, keepdims=True)
  return mean / jnp.maximum(length, 1e-12)


def relative_buckets(distances: np.ndarray) -> np.ndarray:
  """The bucket in 0..31 of distances `key - query` between tokens.

  Half of the buckets are for keys after the query. In each half 8 distances
  have a bucket of their own, and log-spaced ranges up to 128 share the other 8
  (T5, arXiv 1910.10683, section 2.1).
  """
  half = RELATIVE_BUCKETS // 2
  exact = half // 2
  size = np.abs(distances)
  # In float32, as the tables were trained.
  share = np.log(np.maximum(size, 1).astype(np.float32) / np.float32(exact))
  share = share / np.float32(math.log(_FAR / exact))
  shared = exact + (share * np.float32(half - exact)).astype(np.int32)
  bucket = np.where(size < exact, size, np.minimum(shared, half - 1))
  return (bucket + np.where(distances > 0, half, 0)).astype(np.int32)


def _relative_bias(table: Embedding, time: int) -> jax.Array:
  """What is added to the scores of every query and key: [H, T, T]."""
  buckets = jnp.asarray(relative_buckets(np.arange(1 - time, time)))
  by_distance = table(buckets)
  places = jnp.arange(time)
  distances = places[None, :] - places[:, None]
  return by_distance[distances + time - 1].transpose(2, 0, 1)


def _biased_attention(queries, keys, values, mask, bias) -> jax.Array:
  """softmax(q k' / sqrt(head_dim) + bias) v: [B, T, H, head_dim].

  Flash attention takes no bias, so that this one holds the [T, T] scores.
  """
  scores = jnp.einsum(
    'bthd,bshd->bhts', queries, keys, preferred_element_type=jnp.float32
  )
  scores = scores * queries.shape[-1] ** -0.5
  scores = scores + bias.astype(jnp.float32)[None]
  scores = jnp.where(
    mask[:, None, None] > 0, scores, jnp.finfo(scores.dtype).min
  )
  weights = jax.nn.softmax(scores, axis=-1)
  return jnp.einsum(
    'bhts,bshd->bthd',
    weights.astype(values.dtype),
    values,
    preferred_element_type=jnp.float32,
  ).astype(values.dtype)


def _norm(c: EncoderConfig, name: str) -> LayerNorm:
  return LayerNorm(c.norm_epsilon, name=name)
