# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Flash attention, built up from nothing
#
# Attention compares each of $n$ tokens with each other. Written down as in a
# textbook, it needs memory for all $n^2$ comparisons at once. Flash attention
# ([arXiv 2205.14135](https://arxiv.org/abs/2205.14135)) gives the same numbers
# with memory that grows with $n$, and is faster where memory is what takes the
# time. Here we build it in seven steps, in plain JAX:
#
# 1. naive attention, and how much memory it takes;
# 2. a softmax that reads its row only once;
# 3. tiles: the forward pass;
# 4. the backward pass, which computes the scores a second time;
# 5. block-sparse attention: tiles that are left out;
# 6. the same from this library, and over a cache with a tree of tokens;
# 7. time and memory of all of them, on this machine.
#
# It runs in under two minutes on a CPU, and unchanged on a TPU.

# %%
# On Colab, first `git clone` this repository: it is installed from the clone.
import pathlib
import subprocess
import sys

try:
  import google.colab  # noqa: F401
except ImportError:
  pass
else:
  clones = [path.parent for path in pathlib.Path.cwd().glob('*/pallas_kernels')]
  if not clones:
    raise FileNotFoundError('Clone the repository into this folder first.')
  dev = pathlib.Path('/dev')
  chips = [*dev.glob('accel[0-9]*'), *dev.glob('vfio/[0-9]*')]  # of a TPU
  package = f'{clones[0]}[tpu]' if chips else str(clones[0])
  pip = [sys.executable, '-m', 'pip', 'install', '-q', package]
  subprocess.run(pip, check=True)

# %%
import functools
import math
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from matplotlib import patches
import matplotlib.pyplot as plt
import numpy as np

from efficiency_jax.evaluation import speed
from pallas_kernels import masks
from pallas_kernels.attention import api
from pallas_kernels.attention import patterns
from pallas_kernels.decode_attention import api as decode_api

# A TPU rounds float32 to bfloat16 before it multiplies. Not here: we compare.
jax.config.update('jax_default_matmul_precision', 'highest')

LENGTHS = (1024, 2048, 4096, 8192)  # numbers of tokens n
WIDTH = 64  # numbers in the query of one token, d
TILE = 128  # tokens on each side of a tile
print(f'jax {jax.__version__} on {jax.devices()[0].device_kind}')

# %% [markdown]
# ## 1. Naive attention, and its memory
#
# Every token $i$ has a query $q_i$, a key $k_i$ and a value $v_i$, each a
# vector of $d$ numbers. How much token $i$ looks at token $j$ is a score
# $s_{ij}$; a softmax makes the scores of a row sum to one, and the output is
# the mean of the values with these weights (`lse` below is the log of the sum
# under the line):
#
# $$s_{ij} = \frac{q_i \cdot k_j}{\sqrt d}, \qquad
# p_{ij} = \frac{e^{s_{ij}}}{\sum_c e^{s_{ic}}}, \qquad
# o_i = \sum_j p_{ij} v_j .$$


# %%
def naive(q, k, v, seen=None):
  """Attention as in the equations; `seen` [n, n] says who sees whom."""
  scores = q @ k.T / math.sqrt(q.shape[-1])  # [n, n]
  if seen is not None:
    scores = jnp.where(seen, scores, -jnp.inf)
  lse = jax.nn.logsumexp(scores, axis=1, keepdims=True)
  return jnp.exp(scores - lse) @ v


def random_arrays(n, count=3, seed=0):
  """As many arrays [n, d] of normal numbers as `count` says."""
  keys = jax.random.split(jax.random.key(seed), count)
  return [jax.random.normal(key, (n, WIDTH)) for key in keys]


# %% [markdown]
# How much memory does it take? There is no need to run it. JAX compiles a
# function to a program before it runs, and the compiler has to plan where every
# intermediate result lies. Its plan can be read: `temp_size_in_bytes` is the
# scratch memory, that is everything besides the inputs and the output.
#
# A warning, should you try other programs. XLA may hand a part of a program to
# a library as a whole, and the plan does not count what the library takes for
# itself. With jax 0.10 on a CPU it does so with `jax.nn.softmax(scores) @ v`
# from $n = 4096$ on: the plan says 0 bytes, and the process grows by the whole
# matrix all the same.


# %%
def scratch_bytes(function, *arrays):
  """Scratch memory that the compiler plans for `function(*arrays)`."""
  program = jax.jit(function).lower(*arrays).compile()
  return program.memory_analysis().temp_size_in_bytes


print('     n   inputs   scratch   scratch / 4 n^2')
for n in LENGTHS:
  arrays = random_arrays(n)
  inputs = sum(x.nbytes for x in arrays)
  scratch = scratch_bytes(naive, *arrays)
  print(
    f'{n:6} {inputs / 1e6:5.1f} MB {scratch / 1e6:6.1f} MB'
    f' {scratch / (4 * n * n):12.2f}'
  )

# %% [markdown]
# Scratch is the $n \times n$ scores, 4 bytes each: once, or twice where the
# compiler keeps $e^{s}$ beside $s$. It grows with the square: from the first
# line to the last, eight times the tokens make the inputs eight times as large,
# and each copy of the matrix 64 times. A model does this for every head of
# every layer. And memory is time as well: the scores do not fit the small fast
# memory beside the arithmetic, so they go out to the large slow one and come
# back, several times.
#
# To get rid of the matrix, we should use each score as soon as it is there, and
# then forget it. The softmax seems to forbid that: it divides by a sum over the
# whole row.

# %% [markdown]
# ## 2. A softmax that reads its row once
#
# First, a practical problem. $e^{s}$ overflows float32 for $s > 88$. A softmax
# stays the same when a number is subtracted from all scores, so everybody
# subtracts the largest one, $m$:
#
# $$o = \frac{\sum_j e^{s_j - m} v_j}{\sum_j e^{s_j - m}},
# \qquad m = \max_j s_j .$$
#
# But to know $m$ one must have read the whole row. Unless the past can be
# corrected ([arXiv 1805.02867](https://arxiv.org/abs/1805.02867)). Keep three
# things while reading: the largest score so far $m$, the sum $l$ and the
# output $o$, not yet divided. When key $j$ arrives:
#
# $$m' = \max(m, s_j), \qquad
# l' = l \, e^{m - m'} + e^{s_j - m'}, \qquad
# o' = o \, e^{m - m'} + e^{s_j - m'} v_j .$$
#
# The factor $e^{m - m'}$ turns "relative to the old maximum" into "relative to
# the new one". It is 1 as long as the maximum stays. At the end the result is
# $o / l$. We start with $m = -\infty$, $l = 0$, $o = 0$.
#
# One row, in float64, with one score that is large enough to overflow:

# %%
numbers = np.random.default_rng(0)
row_scores = numbers.normal(size=50) * 3
row_scores[20] = 800.0  # e^800 is more than even float64 can hold
row_scores[30] = 799.0
row_values = numbers.normal(size=(50, WIDTH))

largest, total, out = -np.inf, 0.0, np.zeros(WIDTH)  # m, l, o
for j, (score, value) in enumerate(zip(row_scores, row_values)):
  new = max(largest, score)
  shrink, weight = np.exp(largest - new), np.exp(score - new)
  total = total * shrink + weight
  out = out * shrink + weight * value
  if new > largest:
    print(f'key {j:2}: m = {new:7.3f}, l = {total:6.3f}')
  largest = new

weights = np.exp(row_scores - row_scores.max())
expected = weights @ row_values / weights.sum()
print('largest difference to softmax:', np.abs(out / total - expected).max())
assert np.allclose(out / total, expected, rtol=1e-12, atol=1e-12)

# %% [markdown]
# The same numbers. Nothing in the recurrence asks for one key at a time: a
# whole tile of keys can arrive, and for a whole tile of queries. Then $s_j$
# becomes a small matrix, the maximum and the sum run over its columns, and
# "times $v_j$" becomes a matrix product, which is what the hardware is good
# at. That is the only change:


# %%
class Row(NamedTuple):
  """What is kept of the keys that a tile of queries has seen."""

  largest: jax.Array  # m, [tile]: the largest score
  total: jax.Array  # l, [tile]: the sum of exp(s - m)
  out: jax.Array  # o, [tile, d]: the sum of exp(s - m) v


def see(row, scores, values):
  """The recurrence, for scores [tile, keys] and values [keys, d]."""
  largest = jnp.maximum(row.largest, scores.max(axis=1))
  shrink = jnp.exp(row.largest - largest)
  weights = jnp.exp(scores - largest[:, None])
  total = row.total * shrink + weights.sum(axis=1)
  out = row.out * shrink[:, None] + weights @ values
  return Row(largest, total, out)


# %% [markdown]
# ## 3. Tiles
#
# Cut the score matrix into tiles, and go through it one row of tiles at a time.
# Only the tile we stand on exists; of those before it only $m, l, o$ are left.


# %%
def draw_tiles(tiles=6, row=2, column=3):
  """One moment of the forward pass."""
  done, now, later, past = '#c9dcef', '#d1602f', '#f4f4f4', '#e2eadf'
  figure, axes = plt.subplots(figsize=(6.4, 5.0), layout='constrained')

  def box(x, y, width, height, color):
    axes.add_patch(
      patches.Rectangle(
        (x, y), width, height, facecolor=color, edgecolor='#555'
      )
    )

  for i in range(tiles):
    for j in range(tiles):
      before = (i, j) < (row, column)
      color = past if i < row else done if before else later
      box(j, i, 1, 1, now if (i, j) == (row, column) else color)
    box(-1.0, i, 0.5, 1, now if i == row else 'white')
    box(i, -1.3, 1, 0.35, now if i == column else 'white')
    box(i, -0.85, 1, 0.35, now if i == column else 'white')
    box(tiles + 0.5, i, 0.5, 1, past if i < row else now if i == row else later)
  write = functools.partial(axes.text, ha='center', va='center', fontsize=11)
  label = functools.partial(
    write,
    fontsize=9,
    bbox={'facecolor': 'white', 'edgecolor': 'none', 'pad': 2},
  )
  write(column + 0.5, row + 0.5, '$s, p$', color='white')
  label(column / 2, row + 0.5, 'forgotten; kept as $m, l, o$')
  label(tiles / 2, row / 2, 'rows that are finished')
  label(tiles / 2, (tiles + row + 1) / 2, 'not yet computed')
  write(-0.75, -0.25, '$q$')
  write(-0.35, -1.12, '$k$')
  write(-0.35, -0.67, '$v$')
  write(tiles + 0.75, row + 0.5, '$m$\n$l$\n$o$', color='white', fontsize=9)
  write(tiles + 0.75, -0.25, 'out')
  axes.set(xlim=(-1.2, tiles + 1.2), ylim=(tiles + 0.2, -1.5), aspect='equal')
  axes.axis('off')
  axes.set_title('in fast memory now: the orange boxes', fontsize=11)
  plt.show()


draw_tiles()

# %% [markdown]
# In JAX a walk with a memory is `lax.scan`: here along the columns, with `Row`
# as the memory. `lax.map` does one row of tiles after the other. Besides the
# output we return the *log-sum-exp* of each row, $L_i = \log \sum_j e^{s_{ij}}
# = m_i + \log l_i$: one number a query, which the next step needs.
#
# For later, each row of tiles gets a list of the columns that it looks at. Here
# it looks at all of them. (A causal mask would be a list that ends at the
# diagonal, and a mask within the diagonal tile.)


# %%
def cut(x, tile):
  """[n, ...] -> [n / tile, tile, ...]; n must be a multiple of the tile."""
  return x.reshape(-1, tile, *x.shape[1:])


def all_columns(n, tile):
  """Every column, for every row: [rows, columns]."""
  return np.tile(np.arange(n // tile), (n // tile, 1))


def flash_forward(q, k, v, columns, tile=TILE):
  """Attention [n, d] and its log-sum-exp [n], tile by tile."""
  scale = 1 / math.sqrt(q.shape[-1])
  k_tiles, v_tiles = cut(k, tile), cut(v, tile)

  def row_of_tiles(inputs):
    q_tile, my_columns = inputs

    def step(row, column):
      scores = q_tile @ k_tiles[column].T * scale  # [tile, tile]
      return see(row, scores, v_tiles[column]), None

    empty = Row(
      largest=jnp.full(tile, -jnp.inf),
      total=jnp.zeros(tile),
      out=jnp.zeros_like(q_tile),
    )
    row, _ = lax.scan(step, empty, my_columns)
    return row.out / row.total[:, None], row.largest + jnp.log(row.total)

  out, lse = lax.map(row_of_tiles, (cut(q, tile), jnp.asarray(columns)))
  return out.reshape(q.shape), lse.reshape(-1)


# %% [markdown]
# Is it right? Two programs that add in a different order differ in their last
# digits, so "equal" needs a measure: we compute the truth in float64, and ask
# that our error is not more than twice that of the naive program.


# %%
def truth(function, *arrays):
  """The result in float64, computed on the CPU."""
  with jax.enable_x64(True), jax.default_device(jax.devices('cpu')[0]):
    arrays = [jnp.asarray(np.asarray(x), jnp.float64) for x in arrays]
    return np.asarray(jax.jit(function)(*arrays))


def check(name, ours, straight, exact):
  """Prints the errors of two float32 results, and asserts that ours is fine."""
  error = lambda x: np.linalg.norm(x - exact) / np.linalg.norm(exact)
  ours, straight = (error(np.asarray(x, np.float64)) for x in (ours, straight))
  print(f'{name:32} error {ours:.1e}, naive {straight:.1e}')
  assert ours <= 2 * straight, f'{name} is wrong'


n = LENGTHS[0]
q, k, v, d_out = random_arrays(n, count=4)
columns = all_columns(n, TILE)
out, lse = jax.jit(flash_forward)(q, k, v, columns)
exact = truth(naive, q, k, v)
check('flash_forward', out, jax.jit(naive)(q, k, v), exact)

for n in LENGTHS:
  arrays = random_arrays(n)
  ours = scratch_bytes(flash_forward, *arrays, all_columns(n, TILE))
  print(
    f'n = {n:5}: {ours / 1e6:6.2f} MB scratch,'
    f' naive {scratch_bytes(naive, *arrays) / 1e6:6.1f} MB'
  )

# %% [markdown]
# ## 4. The backward pass
#
# For training we need gradients. JAX can differentiate `flash_forward` as it
# is, but then it keeps what every step computed until the backward pass: all
# the tiles of $p$, together the whole matrix again.
#
# The idea of the paper: keep nothing of the matrix, and *compute it again*.
# With the log-sum-exp $L_i$ at hand no second pass over the row is needed,
# since $p_{ij} = e^{s_{ij} - L_i}$. Let $do$ be the gradient that arrives at
# the output. The chain rule gives
#
# $$dv_j = \sum_i p_{ij} \, do_i, \qquad dp_{ij} = do_i \cdot v_j, \qquad
# ds_{ij} = p_{ij} \, (dp_{ij} - D_i),$$
#
# where $D_i = \sum_c p_{ic} \, dp_{ic}$ comes from the sum below the line of
# the softmax. It looks like a sum over the row, but it is not one:
#
# $$D_i = \sum_c p_{ic} \, (do_i \cdot v_c)
# = do_i \cdot \sum_c p_{ic} v_c = do_i \cdot o_i .$$
#
# Two vectors that we have. Then
# $dq_i = \sum_j ds_{ij} k_j / \sqrt d$ and
# $dk_j = \sum_i ds_{ij} q_i / \sqrt d$.


# %%
def flash_backward(q, k, v, columns, out, lse, d_out, tile=TILE):
  """Gradients of q, k and v, tile by tile."""
  scale = 1 / math.sqrt(q.shape[-1])
  k_tiles, v_tiles = cut(k, tile), cut(v, tile)
  delta = (d_out * out).sum(axis=1)  # D, [n]

  def row_of_tiles(totals, inputs):
    q_tile, d_out_tile, lse_tile, delta_tile, my_columns = inputs

    def step(gradients, column):
      dq, dk, dv = gradients
      k_tile, v_tile = k_tiles[column], v_tiles[column]
      p = jnp.exp(q_tile @ k_tile.T * scale - lse_tile[:, None])  # once more
      dp = d_out_tile @ v_tile.T
      ds = p * (dp - delta_tile[:, None]) * scale
      dk = dk.at[column].add(ds.T @ q_tile)
      dv = dv.at[column].add(p.T @ d_out_tile)
      return (dq + ds @ k_tile, dk, dv), None

    start = (jnp.zeros_like(q_tile), *totals)
    (dq, *totals), _ = lax.scan(step, start, my_columns)
    return tuple(totals), dq

  rows = [cut(x, tile) for x in (q, d_out, lse, delta)]
  zeros = (jnp.zeros_like(k_tiles), jnp.zeros_like(v_tiles))
  (dk, dv), dq = lax.scan(row_of_tiles, zeros, (*rows, jnp.asarray(columns)))
  return dq.reshape(q.shape), dk.reshape(k.shape), dv.reshape(v.shape)


# %% [markdown]
# `jax.custom_vjp` tells JAX to use it: what to keep on the way forward, and
# what to do with it on the way back.


# %%
@jax.custom_vjp
def flash(q, k, v, columns):
  """Attention [n, d] in tiles, with a backward pass in tiles."""
  return flash_forward(q, k, v, columns)[0]


def keep(q, k, v, columns):
  """The forward pass, and what the backward pass needs of it."""
  out, lse = flash_forward(q, k, v, columns)
  return out, (q, k, v, columns, out, lse)


flash.defvjp(keep, lambda kept, d_out: (*flash_backward(*kept, d_out), None))


def gradients(attention):
  """Gradients of q, k and v when `d_out` arrives at the output, [3, n, d]."""

  def total(q, k, v, d_out):
    return (attention(q, k, v) * d_out).sum()

  return lambda *arrays: jnp.stack(jax.grad(total, (0, 1, 2))(*arrays))


def with_columns(attention, columns):
  """A function of q, k and v alone."""
  return lambda q, k, v: attention(q, k, v, columns)


ours = jax.jit(gradients(with_columns(flash, columns)))(q, k, v, d_out)
straight = jax.jit(gradients(naive))(q, k, v, d_out)
exact = truth(gradients(naive), q, k, v, d_out)
for name, *results in zip('qkv', ours, straight, exact):
  check(f'gradient of {name}', *results)

# %%
n = LENGTHS[-1]
arrays = random_arrays(n, count=4)
everything = all_columns(n, TILE)
only_forward = lambda *args: flash_forward(*args)[0]
backward_scratch = {
  name: scratch_bytes(gradients(attention), *arrays)
  for name, attention in (
    ('naive', naive),
    ('flash_forward, left to JAX', with_columns(only_forward, everything)),
    ('flash, computed again', with_columns(flash, everything)),
  )
}
print(f'scratch of forward and backward, n = {n}')
for name, scratch in backward_scratch.items():
  print(f'{name:28} {scratch / 1e6:8.1f} MB')

# %% [markdown]
# ## 5. Block-sparse attention
#
# So far every number is exactly that of naive attention. If we are ready to
# change the model, tiles offer more: leave some out. The time is that of the
# tiles that are left.
#
# A well-chosen pattern still lets any token reach any other within a few
# layers. In the *butterfly* pattern
# ([arXiv 2112.00029](https://arxiv.org/abs/2112.00029)) row $i$ keeps column
# $j$ if the binary numbers $i$ and $j$ differ in at most one bit. In each layer
# one bit can change, so $\log_2 t$ layers connect all of $t$ tiles, and each
# row keeps only $\log_2 t + 1$ of them. Given lists of columns, our functions
# do this already, backward pass included.


# %%
def butterfly_columns(n, tile):
  """Columns that differ from the row in at most one bit: [rows, kept]."""
  tiles = n // tile  # a power of two
  flips = [0, *(2**bit for bit in range(tiles.bit_length() - 1))]
  return np.arange(tiles)[:, None] ^ np.array(flips)


def as_matrix(columns):
  """The same as a boolean matrix with an entry a tile."""
  rows = len(columns)
  kept = np.zeros((rows, rows), bool)
  kept[np.arange(rows)[:, None], columns] = True
  return kept


def quarter_columns(n, tile):
  """A quarter of the columns, those that differ in the fewest bits."""
  tiles = n // tile
  flips = sorted(range(tiles), key=lambda x: (x.bit_count(), x))
  return np.arange(tiles)[:, None] ^ np.array(flips[: max(1, tiles // 4)])


def draw_patterns(n=32 * TILE):
  """Kept tiles of three patterns."""
  figure, axes = plt.subplots(1, 3, figsize=(8.4, 3.1), layout='constrained')
  makers = (all_columns, butterfly_columns, quarter_columns)
  for axis, name, make in zip(axes, ('all', 'butterfly', 'a quarter'), makers):
    kept = as_matrix(make(n, TILE))
    axis.imshow(kept, cmap='Blues', vmin=0, vmax=1.4)
    axis.set_title(f'{name}: {kept.mean():.0%} of tiles', fontsize=10)
    axis.set(xlabel='tile of keys', xticks=[], yticks=[])
  axes[0].set_ylabel('tile of queries')
  plt.show()


draw_patterns()

# %%
n = LENGTHS[0]
few = butterfly_columns(n, TILE)
seen = as_matrix(few).repeat(TILE, axis=0).repeat(TILE, axis=1)
masked = lambda q, k, v: naive(q, k, v, seen)
sparse = with_columns(flash, few)
print(f'{as_matrix(few).mean():.0%} of the tiles')
check(
  'block-sparse',
  jax.jit(sparse)(q, k, v),
  jax.jit(masked)(q, k, v),
  truth(masked, q, k, v),
)
check(
  'block-sparse, gradients',
  jax.jit(gradients(sparse))(q, k, v, d_out),
  jax.jit(gradients(masked))(q, k, v, d_out),
  truth(gradients(masked), q, k, v, d_out),
)

# %% [markdown]
# ## 6. The library
#
# `pallas_kernels.attention.api` is the same with what a model needs besides:
# a batch, heads (arrays are `[batch, n, heads, d]`), masks, any length.
# `implementation=` chooses the program: `'reference'` is naive attention,
# `'blockwise'` is what we have built, in larger tiles, and `'mosaic_tpu'` is a
# kernel for a TPU. With `None` the platform decides.


# %%
def one_head(function, **options):
  """A library function on arrays [n, d]."""

  def attention(q, k, v):
    out, _ = function(*(x[None, :, None] for x in (q, k, v)), **options)
    return out[0, :, 0]

  return attention


on_tpu = jax.default_backend() == 'tpu'
names = ('reference', 'blockwise', None, *(['mosaic_tpu'] if on_tpu else []))
tiles = masks.Tiles.of((TILE, TILE), as_matrix(few))
assert tiles == patterns.butterfly((TILE, TILE), n, n)  # it has ours as well
causal = lambda q, k, v: naive(q, k, v, jnp.tri(n, dtype=bool))
for kind, options, straight in (
  ('all', {}, naive),
  ('causal', {'causal': True}, causal),
  ('butterfly', {'tiles': tiles}, masked),
):
  exact = truth(straight, q, k, v)
  for name in names:
    run = one_head(api.attention, implementation=name, **options)
    result = jax.jit(run)(q, k, v)
    check(f'{kind}, {name}', result, jax.jit(straight)(q, k, v), exact)

# %% [markdown]
# A name never runs anything else in secret. Where a kernel cannot run, it says
# so:

# %%
if not on_tpu:
  try:
    run = one_head(api.attention, implementation='mosaic_tpu')
    jax.jit(run)(q, k, v)
  except NotImplementedError as error:
    print(error)

# %% [markdown]
# ### A tree of tokens over a cache
#
# When a model writes text, it keeps the keys and values of all tokens so far in
# a cache, and only the new tokens have queries: `decode_attention`. In
# speculative decoding ([arXiv 2305.09781](https://arxiv.org/abs/2305.09781))
# the new tokens may be a *tree* of guesses. A token must see the text before
# and its own ancestors, but not the guesses of other branches. `ancestors` says
# so, and one pass answers for all branches:
#
# ```
#          ... text ...  0
#                       / \
#                      1   2
#                     / \   \
#                    3   4   5
# ```

# %%
parents = (-1, 0, 0, 1, 1, 2)
ancestors = np.eye(len(parents), dtype=bool)  # a token counts as its own
for token, parent in enumerate(parents):
  if parent >= 0:
    ancestors[token] |= ancestors[parent]
print(ancestors.astype(int))

slots, text = 256, 200  # room in the cache, and tokens of the text
length = text + len(parents)
queries, *_ = random_arrays(len(parents), seed=1)
cache_k, cache_v = random_arrays(slots, count=2, seed=2)
out, _ = decode_api.decode_attention(
  queries[None, :, None],  # [batch, new tokens, heads, d]
  cache_k[None, None],  # [batch, heads, slots, d]
  cache_v[None, None],
  jnp.array([length]),  # used slots, the new tokens among them
  ancestors=jnp.asarray(ancestors),
)

# Each branch on its own: its tokens behind the text, and naive attention.
for leaf in (3, 4, 5):
  path = [leaf]
  while parents[path[0]] >= 0:
    path.insert(0, parents[path[0]])
  rows = np.array([*range(text), *(text + token for token in path)])
  branch = (queries[leaf : leaf + 1], cache_k[rows], cache_v[rows])
  result = out[0, leaf : leaf + 1, 0]
  exact = truth(naive, *branch)
  check(f'branch {path}', result, jax.jit(naive)(*branch), exact)

# %% [markdown]
# ## 7. Time and memory
#
# The forward pass of one head: naive; ours from step 3; the library; and the
# library with a quarter of the tiles. All are compiled before the clock starts,
# they take turns, and each point is the median.


# %%
def measured(n):
  """Median seconds and scratch bytes of each program on n tokens."""
  arrays = random_arrays(n)
  quarter = masks.Tiles.of((TILE, TILE), as_matrix(quarter_columns(n, TILE)))
  programs = {
    'naive': naive,
    'blockwise, step 3': with_columns(only_forward, all_columns(n, TILE)),
    'library': one_head(api.attention),
    'library, 25 % of the tiles': one_head(api.attention, tiles=quarter),
  }
  calls = {
    name: functools.partial(jax.jit(program), *arrays)
    for name, program in programs.items()
  }
  times = speed.compare(calls, repeats=4)
  return {
    name: (times[name].median_seconds, scratch_bytes(program, *arrays))
    for name, program in programs.items()
  }


results = {n: measured(n) for n in LENGTHS}

# %%
programs = list(results[LENGTHS[0]])
for n, row in results.items():
  for name, (seconds, scratch) in row.items():
    gain = row['naive'][0] / seconds
    print(
      f'n = {n:5}  {name:28} {seconds * 1e3:8.1f} ms ({gain:4.1f}x)'
      f' {scratch / 1e6:8.2f} MB'
    )

figure, axes = plt.subplots(1, 2, figsize=(9.0, 3.8), layout='constrained')
for axis, index, factor, label in (
  (axes[0], 0, 1e3, 'milliseconds'),
  (axes[1], 1, 1e-6, 'MB of scratch'),
):
  for name, marker in zip(programs, 'osD^'):
    points = [results[n][name][index] * factor for n in LENGTHS]
    axis.loglog(LENGTHS, points, marker=marker, label=name)
  axis.set_xticks(LENGTHS, [str(n) for n in LENGTHS])
  axis.minorticks_off()
  axis.set(xlabel='tokens n', ylabel=label)
  axis.grid(alpha=0.3)
  axis.spines[['top', 'right']].set_visible(False)
axes[0].legend(fontsize=8, frameon=False)
axes[0].set_title('time', fontsize=11)
axes[1].set_title('memory', fontsize=11)
plt.show()

# %% [markdown]
# The slope is what to look at: on these axes a line that rises twice as steeply
# grows with the square.
#
# *Memory.* Naive attention grows with $n^2$. Ours holds a tile of each thing
# and does not grow at all; the library grows with $n$ at most, since it first
# brings its inputs into the shape of tiles. (On a TPU you may read 0: what fits
# the memory on the chip is not counted, and zero has no place on a log axis.)
#
# *Time.* All lines are about parallel, since flash attention does all the $n^2$
# products too. How far it lies below the naive line depends on the machine: it
# saves the way of the matrix to memory and back. On an accelerator that way
# takes far longer than the products. On a CPU with few cores the products take
# most of the time, and one small head gains little. Leaving out three quarters
# of the tiles pays everywhere.
#
# Where to go on: `pallas_kernels/attention/blockwise.py` is steps 3 to 5 as the
# library has them, with masks; `mosaic_tpu.py` beside it is the same recurrence
# as a kernel, in which the orange boxes of the drawing are arrays in the memory
# beside the arithmetic units of a TPU.
