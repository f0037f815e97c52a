"""A smaller model made of some layers of another, or of parts of them."""

from collections.abc import Sequence
import dataclasses

import jax.numpy as jnp

from efficiency_jax.models.config import DecoderConfig
from efficiency_jax.types import Params


def shallow(config: DecoderConfig, layers: Sequence[int]) -> DecoderConfig:
  """The config of a model of the blocks `layers`, in this order.

  Raises:
    ValueError: No layer is named, or one that does not exist.
  """
  layers = list(layers)
  if not layers or not all(0 <= i < config.num_layers for i in layers):
    raise ValueError(
      f'layers must name blocks in 0..{config.num_layers - 1}, got {layers}.'
    )
  windows = tuple(config.windows[i] for i in layers) if config.windows else ()
  return dataclasses.replace(config, num_layers=len(layers), windows=windows)


def select(
  config: DecoderConfig, params: Params, layers: Sequence[int]
) -> tuple[DecoderConfig, Params]:
  """Keeps the blocks `layers` in this order, with embedding, norm and head.

  Arrays are shared, not copied. Without training the result guesses badly; it
  is where distillation starts (DistilBERT, arXiv 1910.01108).

  Raises:
    ValueError: No layer is named, or one that does not exist.
  """
  smaller = shallow(config, layers)
  kept = {k: v for k, v in params.items() if not k.startswith('layers_')}
  for new, old in enumerate(layers):
    kept[f'layers_{new}'] = params[f'layers_{old}']
  return smaller, kept


def narrow(
  config: DecoderConfig, params: Params, ffn_width: int
) -> tuple[DecoderConfig, Params]:
  """Keeps the strongest `ffn_width` units of every feed-forward.

  Unit i adds `act(g_i x) (u_i x) d_i` to its layer's output, which grows with
  `|g_i| |u_i| |d_i|`: that is its strength. Units keep their order.

  Raises:
    ValueError: There are not as many.
  """
  if not 1 <= ffn_width <= config.ffn_width:
    raise ValueError(
      f'ffn_width must be in 1..{config.ffn_width}, got {ffn_width}.'
    )
  kept = dict(params)
  for layer in range(config.num_layers):
    block = params[f'layers_{layer}']
    ffn = _strongest(block['ffn'], ffn_width)
    kept[f'layers_{layer}'] = {**block, 'ffn': ffn}
  return dataclasses.replace(config, ffn_width=ffn_width), kept


def _strongest(ffn: Params, count: int) -> Params:
  down = ffn['down']
  norms = jnp.linalg.norm(ffn['gate_up']['kernel'].astype(jnp.float32), axis=0)
  gate, up = jnp.split(norms, 2)
  strength = gate * up
  strength *= jnp.linalg.norm(down['kernel'].astype(jnp.float32), axis=1)
  units = jnp.sort(jnp.argsort(-strength)[:count])
  columns = jnp.concatenate([units, units + len(strength)])
  return {
    # A kernel [D, 2 F] and perhaps a bias [2 F]: columns [gate | up].
    'gate_up': {k: v[..., columns] for k, v in ffn['gate_up'].items()},
    'down': {**down, 'kernel': down['kernel'][units]},
  }
