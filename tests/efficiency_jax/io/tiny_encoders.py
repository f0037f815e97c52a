"""Encoders and a WordPiece tokenizer that are small enough for a test."""

import json
import pathlib

import jax
import numpy as np
import safetensors.numpy
import tokenizers
from tokenizers import models
from tokenizers import normalizers
from tokenizers import pre_tokenizers
from tokenizers import processors

from efficiency_jax.io import hf_encoder
from efficiency_jax.io import pretrained_encoder
from efficiency_jax.io import tensor_names
from efficiency_jax.models import encoder
from efficiency_jax.models.encoder_config import EncoderConfig

WORDS = ('[PAD]', '[UNK]', '[CLS]', '[SEP]', 'good', 'bad', 'film', 'a', '##s')
_SIZES = {
  'vocab_size': 12,
  'width': 16,
  'ffn_width': 24,
  'num_layers': 2,
  'num_heads': 4,
  'max_positions': 24,
}
_MPNET = {
  'first_position': 2,
  'token_types': 0,
  'relative_bias': True,
  'norm_epsilon': 1e-5,
}


def config(family: str = 'bert', **fields) -> EncoderConfig:
  """A tiny `bert` or `mpnet`."""
  choices = _MPNET if family == 'mpnet' else {}
  return EncoderConfig(**{'family': family, **_SIZES, **choices, **fields})


def params(c: EncoderConfig, seed: int = 0):
  """Random parameters that make every weight matter."""
  rng = np.random.default_rng(seed)

  def one(path, leaf):
    noise = rng.standard_normal(leaf.shape).astype(np.float32)
    if path[-1].key == 'kernel':
      return 1.2 / np.sqrt(leaf.shape[0]) * noise
    return (1.0 if path[-1].key == 'scale' else 0.0) + 0.4 * noise

  tree = jax.eval_shape(lambda: encoder.init(c, jax.random.key(0)))
  tree = jax.tree_util.tree_map_with_path(one, tree)
  return jax.tree.map(lambda leaf: jax.numpy.asarray(leaf, 'float32'), tree)


def tokenizer() -> tokenizers.Tokenizer:
  """WordPiece as BERT has it, over nine pieces."""
  vocab = {word: number for number, word in enumerate(WORDS)}
  backend = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token='[UNK]'))
  backend.normalizer = normalizers.BertNormalizer()
  backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  backend.post_processor = processors.TemplateProcessing(
    single='[CLS] $A [SEP]', special_tokens=[('[CLS]', 2), ('[SEP]', 3)]
  )
  backend.add_special_tokens(list(WORDS[:4]))
  # As the published files do; the loader must not follow.
  backend.enable_padding(length=20)
  backend.enable_truncation(5)
  return backend


def config_values(c: EncoderConfig) -> dict:
  """The content of the config.json of a model."""
  values = {
    'model_type': c.family,
    'vocab_size': c.vocab_size,
    'hidden_size': c.width,
    'intermediate_size': c.ffn_width,
    'num_hidden_layers': c.num_layers,
    'num_attention_heads': c.num_heads,
    'max_position_embeddings': c.max_positions + c.first_position,
    'layer_norm_eps': c.norm_epsilon,
    'hidden_act': 'gelu',
  }
  if c.token_types:
    values['type_vocab_size'] = c.token_types
  return values


def tensors(c: EncoderConfig, tree) -> dict[str, np.ndarray]:
  """Parameters under the names of the checkpoint."""
  return dict(tensor_names.write_tensors(hf_encoder.slots(c), tree))


def write(directory: pathlib.Path, values: dict, weights) -> pathlib.Path:
  """Writes the folder of a checkpoint."""
  directory.mkdir(exist_ok=True)
  (directory / 'config.json').write_text(json.dumps(values))
  safetensors.numpy.save_file(weights, directory / 'model.safetensors')
  (directory / 'tokenizer.json').write_text(tokenizer().to_str())
  return directory


def save(directory: pathlib.Path, c: EncoderConfig, tree) -> pathlib.Path:
  """Writes a model as sentence-transformers would."""
  pooler = {'pooler.dense.bias': np.zeros(c.width, np.float32)}
  return write(directory, config_values(c), tensors(c, tree) | pooler)


def text_encoder(directory: pathlib.Path, family: str = 'bert', seed: int = 0):
  """A tiny encoder that went through files."""
  c = config(family)
  return pretrained_encoder.load(save(directory, c, params(c, seed)))
