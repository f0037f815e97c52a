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
# # Networks of one bit
#
# A binarized network ([arXiv 1602.02830](https://arxiv.org/abs/1602.02830)) has
# weights and activations of $+1$ and $-1$ alone. A weight takes one bit instead
# of 32, and a product of 32 of them is one exclusive or and a count. Here we
#
# 1. see why such a network cannot learn, and the trick that makes it learn;
# 2. train one on handwritten digits, beside one of real numbers;
# 3. look at what became of the real weights behind its signs;
# 4. fold it by hand: a sum of signs is a count of bits, and batch normalization
#    with a sign is one comparison;
# 5. fold all of it with the library, and compare predictions, bytes and time.
#
# It runs in under three minutes on two CPU cores, and unchanged on a TPU.

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
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from efficiency_jax.binarization import binarizers
from efficiency_jax.binarization import folding
from efficiency_jax.binarization import latent
from efficiency_jax.binarization import networks
from efficiency_jax.data import images
from efficiency_jax.evaluation import speed
from pallas_kernels.binary_matmul import api as binary

# %% [markdown]
# ## 1. A step has no slope
#
# The sign of $x$ is a step. Its slope is zero on either side, so gradient
# descent gets nothing back through it:

# %%
x = jnp.linspace(-2, 2, 401)
step = lambda x: jnp.where(x >= 0, 1.0, -1.0)
slopes_of_step = jax.vmap(jax.grad(step))(x)
print('largest slope of the step:', float(jnp.abs(slopes_of_step).max()))

# %% [markdown]
# The way out is to lie in the backward pass alone. Forward, the step; backward,
# the slope of something gentler, here of $\min(\max(x, -1), 1)$. In JAX this is
# a function with a gradient of its own:


# %%
@jax.custom_vjp
def straight_through(x):
  return step(x)


def forward(x):
  return step(x), x


def backward(x, gradient):
  return (jnp.where(jnp.abs(x) <= 1, gradient, 0.0),)


straight_through.defvjp(forward, backward)

slopes = jax.vmap(jax.grad(straight_through))(x)
np.testing.assert_array_equal(
  slopes, jax.vmap(jax.grad(binarizers.sign))(x)
)  # the library's

figure, axes = plt.subplots(1, 3, figsize=(10, 2.6), layout='constrained')
shown = {
  'sign': binarizers.sign,
  'approx sign': binarizers.approx_sign,
  'swish sign': binarizers.swish_sign,
}
for axis, (name, function) in zip(axes, shown.items(), strict=True):
  axis.plot(x, function(x), label='forward')
  axis.plot(x, jax.vmap(jax.grad(function))(x), label='backward')
  axis.set_title(name, fontsize=10)
axes[0].legend()
plt.show()

# %% [markdown]
# Outside $[-1, 1]$ the slope is zero on purpose: a number that is far from the
# step is not going to turn, and pushing it further would only make it harder to
# bring back.
#
# ## 2. Training
#
# Ten thousand digits, 8,000 to train on. The weights that are trained are real
# numbers in $[-1, 1]$; the network uses their signs. Adam moves the real ones a
# little in every step, they are clipped, and now and then a sign turns.

# %%
EPOCHS = 12
WIDTH = 512
digits = images.load('mnist-10k')
print(digits.train.pixels.shape, digits.test.pixels.shape)


def train(config, epochs=EPOCHS, batch=100, seed=0):
  """Parameters, and the error on the test images after every epoch."""
  total = epochs * (len(digits.train.labels) // batch)
  rate = optax.exponential_decay(3e-3, total, 1e-3)
  binary_weights = config.weights != 'float'
  optimizer = optax.chain(
    optax.scale_by_adam(),
    latent.scale_by_fans() if binary_weights else optax.identity(),
    optax.scale_by_learning_rate(rate),
    latent.clip() if binary_weights else optax.identity(),
  )
  params = networks.init(config, jax.random.key(seed))
  state = optimizer.init(params)

  @jax.jit
  def update(params, state, pixels, labels):
    def loss(params):
      scores = networks.apply(config, params, pixels).scores
      targets = 2 * jax.nn.one_hot(labels, config.classes) - 1
      return (jnp.maximum(0, 1 - targets * scores) ** 2).mean()

    slopes = jax.grad(loss)(params)
    updates, state = optimizer.update(slopes, state, params)
    return optax.apply_updates(params, updates), state

  rng = np.random.default_rng(seed)
  errors = []
  for _ in range(epochs):
    order = rng.permutation(len(digits.train.labels))
    for start in range(0, len(order) - batch + 1, batch):
      some = order[start : start + batch]
      params, state = update(
        params, state, digits.train.pixels[some], digits.train.labels[some]
      )
    seen = statistics(config, params)
    scores = networks.apply(config, params, digits.test.pixels, seen).scores
    errors.append(100 * float((scores.argmax(-1) != digits.test.labels).mean()))
  return params, errors


def statistics(config, params):
  """What inference normalizes by: of 2,000 training images."""
  pixels = digits.train.pixels[:2000]
  return networks.statistics(config, params, np.split(pixels, 4))


shape = {'image': digits.train.pixels.shape[1:], 'hidden': (WIDTH, WIDTH)}
real = networks.Config(**shape, weights='float', activations='relu')
signs = networks.Config(**shape)  # weights and activations are signs
real_params, real_errors = train(real)
params, errors = train(signs)

figure, axis = plt.subplots(figsize=(5, 3), layout='constrained')
axis.plot(real_errors, label=f'real numbers: {real_errors[-1]:.1f} %')
axis.plot(errors, label=f'signs: {errors[-1]:.1f} %')
axis.set_xlabel('epoch')
axis.set_ylabel('test error, %')
axis.set_ylim(bottom=0)
axis.legend()
plt.show()

# %% [markdown]
# ## 3. The real weights behind the signs
#
# They began uniform in $[-1, 1]$. Many were pushed to a bound: these are the
# signs that are sure. Those near zero could still turn.

# %%
figure, axes = plt.subplots(1, 3, figsize=(10, 2.4), layout='constrained')
for axis, (name, layer) in zip(axes, params.items(), strict=True):
  axis.hist(np.ravel(layer['kernel']), bins=100)
  axis.set_title(name, fontsize=10)
  axis.set_yticks([])
plt.show()

# %% [markdown]
# ## 4. Folding by hand
#
# Two signs multiply to $-1$ where their bits differ. So a sum of $K$ products
# is $K - 2 \cdot$ (number of bits that differ):

# %%
rng = np.random.default_rng(0)
a, b = rng.choice([-1, 1], (2, 96))
words = binary.pack_signs(jnp.asarray(np.stack([a, b])))  # 3 words of 32 bits
print([f'{word:032b}' for word in np.asarray(words[0])])
different = jax.lax.population_count(words[0] ^ words[1]).sum()
print(96 - 2 * int(different), '=', int(a @ b))

# %% [markdown]
# After the sum come batch normalization and a sign. Normalization is a
# straight line in the whole number $y$, so its sign turns at one place:
# everything from a threshold on is $+1$, or $-1$ if the line falls.

# %%
seen = statistics(signs, params)
layer, moments = params['layer_1'], seen['layer_1']
y = jnp.arange(-WIDTH, WIDTH + 1)[:, None]
z = networks.normalized(signs, 1, layer, y.astype(jnp.float32), moments)
rises = layer['scale'] > 0  # none is zero here, and each turns somewhere
turns = jnp.where(rises, (z < 0).sum(0), (z >= 0).sum(0)) - WIDTH  # thresholds

folded = folding.fold(signs, params, seen)
np.testing.assert_array_equal(turns, folded.layers[1].threshold)
np.testing.assert_array_equal(rises, ~folded.layers[1].flip)
print('thresholds of eight neurons:', np.asarray(turns[:8]))

# %% [markdown]
# ## 5. The whole network in bits
#
# No real number is left but the last scores. The predictions are the same for
# every image, not nearly but exactly:


# %%
def predict_real(pixels):
  return networks.apply(signs, params, pixels, seen).scores


def predict_bits(pixels):
  return folding.apply(signs, folded, pixels)


everything = np.concatenate(
  [part.pixels for part in (digits.train, digits.validation, digits.test)]
)
equal = [
  bool((predict_real(part).argmax(-1) == predict_bits(part).argmax(-1)).all())
  for part in np.array_split(everything, 10)
]
print('equal for', len(everything), 'images:', all(equal))

kernels = sum(layer['kernel'].nbytes for layer in params.values())
bits = sum(layer.words.nbytes for layer in folded.layers)
print(
  f'weights: {kernels / 1e6:.2f} MB as float32, {bits / 1e6:.3f} MB as bits'
)

real_seen = statistics(real, real_params)
programs = {
  'real numbers': lambda pixels: (
    networks.apply(real, real_params, pixels, real_seen).scores
  ),
  'bits': predict_bits,
}
for size in (1, 100):
  pixels = jnp.asarray(digits.test.pixels[:size])
  for name, program in programs.items():
    timing = speed.measure(program, pixels, repeats=20)
    print(f'{size:4} images, {name}: {1e3 * timing.median_seconds:.2f} ms')

# %% [markdown]
# What the bits of the first layer look at: the weights of twelve neurons as
# images, $+1$ white and $-1$ black.

# %%
height, width, _ = shape['image']
first = binary.unpack_signs(folded.layers[0].words[:12], height * width)
figure, axes = plt.subplots(1, 12, figsize=(10, 1.1), layout='constrained')
for axis, weights in zip(axes, np.asarray(first), strict=True):
  axis.imshow(weights.reshape(height, width), cmap='gray')
  axis.set_axis_off()
plt.show()
