"""Golden models as files: weights, results and the config in one."""

from collections.abc import Mapping
import json
import pathlib
from typing import Any

import numpy as np

_PREFIX = 'golden.'

Arrays = Mapping[str, np.ndarray]


def read(path: pathlib.Path) -> tuple[dict[str, Any], Arrays, Arrays]:
  """The config, weights and results that `write` wrote."""
  import safetensors

  with safetensors.safe_open(path, 'numpy') as file:
    config = json.loads(file.metadata()['config'])
    arrays = {key: file.get_tensor(key) for key in list(file.keys())}
  results = {k: v for k, v in arrays.items() if k.startswith(_PREFIX)}
  weights = {k: v for k, v in arrays.items() if k not in results}
  return (
    config,
    weights,
    {k.removeprefix(_PREFIX): v for k, v in results.items()},
  )


def write(
  path: pathlib.Path,
  config: Mapping[str, Any],
  weights: Arrays,
  results: Arrays,
) -> None:
  """Writes a model and what it makes of some texts."""
  import safetensors.numpy

  safetensors.numpy.save_file(
    {**weights, **{_PREFIX + k: v for k, v in results.items()}},
    path,
    metadata={'config': json.dumps(config)},
  )
