"""Writes a small BERT and a small MPNet with what transformers makes of texts.

Run with the peers installed (`make test-peers` does that):

  .venv-peers/bin/python -m tests.golden.make_encoders

Each file under `tests/golden/encoders` is one model: its weights under the
names of the checkpoint, `golden.tokens`, `golden.mask` [B, T], `golden.hidden`
[B, T, D], zero at padding, and its `config.json` in the metadata.
"""

import json
import pathlib
from typing import NamedTuple

import numpy as np

from tests.golden import files

DIRECTORY = pathlib.Path(__file__).parent / 'encoders'
# Longer than the farthest distance with a bucket of its own in MPNet (128).
LENGTHS = (150, 7, 40)
_SIZES = {
  'vocab_size': 97,
  'hidden_size': 32,
  'intermediate_size': 40,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'max_position_embeddings': 160,
  # Large, so that forgetting it shows.
  'layer_norm_eps': 1e-2,
}
FAMILIES = {
  'bert': ('BertConfig', 'BertModel'),
  'mpnet': ('MPNetConfig', 'MPNetModel'),
}


class Golden(NamedTuple):
  """A model as its files spell it, and what it says about some texts."""

  config: dict  # the content of config.json
  weights: dict[str, np.ndarray]
  tokens: np.ndarray  # [B, T] int32
  mask: np.ndarray  # [B, T] int32
  hidden: np.ndarray  # [B, T, D] float32


def build(name: str, seed: int) -> Golden:
  """Runs a random model of the family in transformers, in float32."""
  import torch
  import transformers

  config_name, model_name = FAMILIES[name]
  config = getattr(transformers, config_name)(**_SIZES)
  config._attn_implementation = 'eager'
  model = getattr(transformers, model_name)(config).eval()
  rng = np.random.default_rng(seed)
  weights = {
    key: _random(rng, key, tuple(parameter.shape))
    for key, parameter in model.named_parameters()
  }
  lengths = np.asarray(LENGTHS)[:, None]
  mask = (np.arange(max(LENGTHS)) < lengths).astype(np.int32)
  # The first ids are special; MPNet tells padding by id 1.
  tokens = rng.integers(4, config.vocab_size, mask.shape, dtype=np.int32)
  tokens = np.where(mask, tokens, config.pad_token_id).astype(np.int32)
  with torch.no_grad():
    for key, parameter in model.named_parameters():
      parameter.copy_(torch.from_numpy(weights[key]))
    hidden = model(
      input_ids=torch.from_numpy(tokens.astype(np.int64)),
      attention_mask=torch.from_numpy(mask.astype(np.int64)),
    ).last_hidden_state.numpy()
  # What save_pretrained writes.
  written = json.loads(config.to_json_string())
  return Golden(written, weights, tokens, mask, hidden * mask[..., None])


def _random(rng, name: str, shape) -> np.ndarray:
  """Values that make every weight matter: no unit norm and no zero bias."""
  noise = rng.standard_normal(shape).astype(np.float32)
  if 'LayerNorm.weight' in name:
    return 1 + 0.3 * noise
  if name.endswith('bias') or 'relative_attention_bias' in name:
    return 0.3 * noise
  if 'embeddings' in name:
    return 0.4 * noise
  return (1.2 / np.sqrt(shape[-1]) * noise).astype(np.float32)


def read(path: pathlib.Path) -> Golden:
  """Reads what `write` wrote."""
  config, weights, results = files.read(path)
  return Golden(config, weights, **results)


def write(path: pathlib.Path, golden: Golden) -> None:
  """Writes a model, its texts and its results in one file."""
  results = {
    name: getattr(golden, name) for name in ('tokens', 'mask', 'hidden')
  }
  files.write(path, golden.config, golden.weights, results)


def main() -> None:
  DIRECTORY.mkdir(exist_ok=True)
  for seed, name in enumerate(FAMILIES):
    path = DIRECTORY / f'{name}.safetensors'
    golden = build(name, seed)
    write(path, golden)
    spread = golden.hidden.std()
    print(f'{name}: {path.stat().st_size} bytes, hidden {spread:.2f} wide')


if __name__ == '__main__':
  main()
