"""Ways to train a network of images, by name."""

import dataclasses

from efficiency_jax.binarization.networks import Config


@dataclasses.dataclass(frozen=True)
class Method:
  """What differs from plain training.

  Attributes:
    choices: Fields of `Config`.
    clipped: Whether latent weights stay within [-1, 1].
    optimizer: 'adam', 'bop' or 'shift adamax'.
  """

  choices: dict[str, object]
  clipped: bool = True
  optimizer: str = 'adam'


_BNN = {'weights': 'sign', 'activations': 'sign'}
_CONNECT = {'weights': 'sign', 'activations': 'relu'}
_DRAWN = 'stochastic'

METHODS = {
  'float': Method({'weights': 'float', 'activations': 'relu'}, clipped=False),
  'BinaryConnect': Method(_CONNECT),
  'BinaryConnect stochastic': Method({**_CONNECT, 'weights': _DRAWN}),
  'BNN': Method(_BNN),
  # Activations are drawn in training, as in the paper; weights are signs.
  'BNN stochastic': Method({**_BNN, 'activations': _DRAWN}),
  'ternary': Method({'weights': 'ternary', 'activations': 'relu'}),
  'BNN, slope not clipped': Method({**_BNN, 'estimator': 'unclipped'}),
  'BNN, weights not clipped': Method(_BNN, clipped=False),
  'BNN without normalization': Method({**_BNN, 'norm': 'none'}),
  'BNN, approx sign': Method({**_BNN, 'estimator': 'approx'}),
  'BNN, swish sign': Method({**_BNN, 'estimator': 'swish'}),
  'BNN, shift norm': Method({**_BNN, 'norm': 'shift'}),
  'BNN, real ends': Method({**_BNN, 'real_ends': True}),
  'BNN, Bop': Method(_BNN, clipped=False, optimizer='bop'),
  'BNN, shifts alone': Method(
    {**_BNN, 'norm': 'shift'}, optimizer='shift adamax'
  ),
}


def named(name: str) -> Method:
  """A method.

  Raises:
    ValueError: There is none of that name.
  """
  if name not in METHODS:
    raise ValueError(
      f'there is no method {name!r}; there are {", ".join(METHODS)}.'
    )
  return METHODS[name]


def network(name: str, image: tuple[int, int, int], config) -> Config:
  """The network that a method trains."""
  return Config(
    image=image,
    convolutions=tuple(tuple(layer) for layer in config.convolutions),
    hidden=tuple(config.hidden),
    dropout=tuple(config.dropout),
    **named(name).choices,
  )
