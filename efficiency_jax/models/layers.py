"""A shallower model made of some layers of another."""

from collections.abc import Sequence
import dataclasses

from efficiency_jax.models.config import DecoderConfig
from efficiency_jax.types import Params


def select(
  config: DecoderConfig, params: Params, layers: Sequence[int]
) -> tuple[DecoderConfig, Params]:
  """Keeps the blocks `layers` in this order, with embedding, norm and head.

  Arrays are shared, not copied. Without training the result guesses badly; it
  is where distillation starts (DistilBERT, arXiv 1910.01108).

  Raises:
    ValueError: No layer is named, or one that does not exist.
  """
  layers = list(layers)
  if not layers or not all(0 <= i < config.num_layers for i in layers):
    raise ValueError(
      f'layers must name blocks in 0..{config.num_layers - 1}, got {layers}.'
    )
  kept = {k: v for k, v in params.items() if not k.startswith('layers_')}
  for new, old in enumerate(layers):
    kept[f'layers_{new}'] = params[f'layers_{old}']
  windows = tuple(config.windows[i] for i in layers) if config.windows else ()
  shallow = dataclasses.replace(config, num_layers=len(layers), windows=windows)
  return shallow, kept
