"""Medusa's heads with the trees that suit them, from held-out answers."""

from collections.abc import Mapping
import functools
from typing import Any

import jax
import ml_collections
import numpy as np

from efficiency_jax.decoding import medusa
from efficiency_jax.decoding import medusa_training
from efficiency_jax.io import pretrained
from efficiency_jax.models import transformer
from efficiency_jax.training import objectives
from efficiency_jax.types import Params
from experiments import calibration


def calibrated(
  lm: pretrained.LanguageModel,
  form: medusa.Heads,
  params: Params,
  held_out: Mapping[str, np.ndarray],
  vocabulary: jax.Array | np.ndarray | None,
  config: ml_collections.ConfigDict,
) -> tuple[
  medusa.TrainedHeads, tuple[np.ndarray, np.ndarray], list[dict[str, Any]]
]:
  """Grows the trees: the heads with them, and what a report shows.

  Args:
    lm: The target.
    form: Of the heads.
    params: Of the heads.
    held_out: Arrays of answers, with the states that `lm` has for them.
    vocabulary: [R], tokens that they may guess, if the form has a vocabulary.
    config: As for `calibration.calibrated`.

  Returns:
    The heads, and what `calibration.calibrated` returns beside their trees.
  """
  frozen = objectives.frozen(lm.params, vocabulary)
  ranks = functools.partial(
    medusa_training.ranks,
    form,
    transformer.head_fn(lm.config),
    params,
    frozen['target'],
    vocabulary=frozen.get('vocabulary'),
  )
  shapes, found, shown = calibration.calibrated(ranks, held_out, config)
  heads = medusa.TrainedHeads(
    form=form, params=params, vocabulary=vocabulary, trees=shapes
  )
  return heads, found, shown
