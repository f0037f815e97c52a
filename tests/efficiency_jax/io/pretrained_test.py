"""Tests of loading and saving whole models."""

import dataclasses
import json
import sys

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from efficiency_jax import leaves
from efficiency_jax.io import assets
from efficiency_jax.io import errors
from efficiency_jax.io import export
from efficiency_jax.io import gguf_file
from efficiency_jax.io import pretrained
from efficiency_jax.quantization import rules
from tests.efficiency_jax.io import tiny_models

_FAMILIES = sorted(tiny_models.CONFIGS)


def _assert_same(found, expected):
  jax.tree.map(np.testing.assert_array_equal, found, expected)
  types = jax.tree.map(lambda leaf: leaf.dtype, found)
  assert types == jax.tree.map(lambda leaf: leaf.dtype, expected)


@pytest.fixture
def saved(tmp_path):
  return export.save(tiny_models.model('llama'), tmp_path / 'saved')


@pytest.mark.short
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
@pytest.mark.parametrize('name', _FAMILIES)
def test_loading_undoes_saving_bit_for_bit(tmp_path, name, dtype):
  lm = tiny_models.model(name, dtype)
  found = pretrained.load(export.save(lm, tmp_path / name), dtype=dtype)
  assert found.config == lm.config
  assert found.name == name
  _assert_same(found.params, lm.params)
  assert found.tokenizer.fingerprint == lm.tokenizer.fingerprint
  assert found.tokenizer.stop_ids == lm.tokenizer.stop_ids
  assert found.tokenizer.bos_id == lm.tokenizer.bos_id
  assert found.tokenizer.chat_template == lm.tokenizer.chat_template


@pytest.mark.parametrize(
  'name', [name for name in _FAMILIES if name != 'llama_biased']
)
def test_gguf_gives_the_model_that_was_written(tmp_path, name):
  lm = tiny_models.model(name)
  path = tiny_models.write_gguf(tmp_path / 'a.gguf', lm)
  found = pretrained.load(path)
  tolerance = 1e-6 if lm.config.norm_plus_one else 0
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance),
    found.params,
    lm.params,
  )
  expected = lm.config
  # Files of Mistral say "llama", and neither they nor those of Qwen2 keep the
  # window.
  if name in ('mistral', 'qwen2'):
    expected = dataclasses.replace(expected, windows=())
  if name == 'mistral':
    expected = dataclasses.replace(expected, family='llama')
  assert found.config == expected


def _published_divisor(wavelength):
  """How the release notes of Llama 3.1 put it, a wavelength at a time."""
  if wavelength < 8192 / 4:
    return 1.0
  if wavelength > 8192 / 1:
    return 8.0
  smooth = (8192 / wavelength - 1) / (4 - 1)
  return 1 / ((1 - smooth) / 8 + smooth)


def test_llama3_scaling_is_recovered_from_divisors(tmp_path):
  lm = tiny_models.model('llama_biased')
  config = dataclasses.replace(lm.config, rope_theta=5e5)
  lm = dataclasses.replace(lm, config=config)
  wavelengths = 2 * np.pi * 5e5 ** (np.arange(0, 8, 2) / 8)
  divisors = np.array([_published_divisor(w) for w in wavelengths], np.float32)
  # One frequency of each kind, or the test would say little.
  assert len(set(divisors.tolist())) == 3

  path = tmp_path / 'good.gguf'
  _write_with_divisors(path, lm, divisors)
  assert pretrained.load(path).config == config
  path = tmp_path / 'bad.gguf'
  _write_with_divisors(path, lm, divisors * 1.5)
  with pytest.raises(errors.FileFormatError, match='rope_freqs'):
    pretrained.load(path)


def _write_with_divisors(path, lm, divisors):
  original = gguf.GGUFWriter.write_header_to_file

  def with_divisors(self, *args, **kwargs):
    self.add_tensor('rope_freqs.weight', divisors)
    return original(self, *args, **kwargs)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(gguf.GGUFWriter, 'write_header_to_file', with_divisors)
    tiny_models.write_gguf(path, lm)


def test_quantized_gguf_is_close(tmp_path):
  lm = tiny_models.model('llama')
  kind = gguf.GGMLQuantizationType.Q8_0
  found = pretrained.load(
    tiny_models.write_gguf(tmp_path / 'a.gguf', lm, kind), dtype=jnp.bfloat16
  )
  kernel = found.params['layers_0']['attention']['qkv']['kernel']
  assert kernel.dtype == jnp.bfloat16
  expected = lm.params['layers_0']['attention']['qkv']['kernel']
  np.testing.assert_allclose(kernel.astype(jnp.float32), expected, atol=0.05)


def _q8_but_values(writer, name, value, kind):
  """Blocks of Q8_0, but those of one values Q4_1 and of one output Q5_0."""
  kind = gguf.GGMLQuantizationType.Q8_0
  if name == 'blk.0.attn_v.weight':
    kind = gguf.GGMLQuantizationType.Q4_1
  elif name == 'blk.1.attn_output.weight':
    kind = gguf.GGMLQuantizationType.Q5_0
  data = value if value.ndim == 1 else gguf.quants.quantize(value, kind)
  writer.add_tensor(name, data, raw_dtype=None if value.ndim == 1 else kind)


def test_packed_keeps_blocks_where_a_parameter_has_one_kind(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(tiny_models, '_add_tensor', _q8_but_values)
  path = tiny_models.write_gguf(tmp_path / 'a.gguf', tiny_models.model('llama'))
  dense = pretrained.load(path, dtype=jnp.bfloat16).params
  packed = pretrained.load(path, dtype=jnp.bfloat16, packed=True).params
  first, second = packed['layers_0'], packed['layers_1']
  for leaf in (
    packed['embedding']['table'],
    first['attention']['output']['kernel'],
    second['attention']['qkv']['kernel'],
    first['ffn']['gate_up']['kernel'],
  ):
    assert isinstance(leaf, leaves.QTensor)
    assert leaf.values.dtype == jnp.int8
  for leaf in (
    first['attention']['qkv']['kernel'],
    second['attention']['output']['kernel'],
    packed['final_norm']['scale'],
  ):
    assert isinstance(leaf, jax.Array)
  _assert_same(rules.dequantize(packed), dense)


def test_packed_refuses_folders_and_bad_scales(saved, tmp_path):
  with pytest.raises(ValueError, match='packed is for GGUF files'):
    pretrained.load(saved, packed=True)
  lm = tiny_models.model('llama')
  kind = gguf.GGMLQuantizationType.Q4_1
  path = tiny_models.write_gguf(tmp_path / 'a.gguf', lm, kind)
  info = gguf_file.read(path).tensors['blk.0.ffn_up.weight']
  with path.open('r+b') as file:
    file.seek(info.start + 2)  # the minimum of the first block
    file.write(np.float16(np.inf).tobytes())
  for packed in (False, True):
    with pytest.raises(errors.FileFormatError, match='ffn_up.*not finite'):
      pretrained.load(path, packed=packed)


def _split(directory, names=('a.safetensors', 'b.safetensors')):
  """Turns a saved model into one with two weight files and an index."""
  single = directory / 'model.safetensors'
  tensors = safetensors.numpy.load_file(single)
  single.unlink()
  weight_map = {}
  for number, name in enumerate(sorted(tensors)):
    weight_map[name] = names[number % 2]
  for shard in set(names):
    safetensors.numpy.save_file(
      {k: tensors[k] for k, v in weight_map.items() if v == shard},
      directory / shard,
    )
  index = directory / 'model.safetensors.index.json'
  index.write_text(json.dumps({'weight_map': weight_map}))
  return index


def test_sharded_weights(saved):
  expected = pretrained.load(saved).params
  _split(saved)
  _assert_same(pretrained.load(saved).params, expected)


@pytest.mark.parametrize(
  'shard', ['../a.safetensors', '/etc/passwd', 'x/a.safetensors', '', 3, '..']
)
def test_shards_outside_the_folder_are_refused(saved, shard):
  index = _split(saved)
  index.write_text(json.dumps({'weight_map': {'model.norm.weight': shard}}))
  with pytest.raises(errors.FileFormatError):
    pretrained.load(saved)


def test_missing_shard_and_pickle(saved):
  _split(saved)
  (saved / 'b.safetensors').unlink()
  with pytest.raises(errors.FileFormatError, match=r'b\.safetensors'):
    pretrained.load(saved)
  (saved / 'model.safetensors.index.json').unlink()
  (saved / 'a.safetensors').rename(saved / 'pytorch_model.bin')
  with pytest.raises(errors.FileFormatError, match='run code'):
    pretrained.load(saved)
  with pytest.raises(errors.FileFormatError, match='convert it to safetensors'):
    pretrained.load(saved / 'pytorch_model.bin')


@pytest.mark.parametrize(
  ('value', 'problem'),
  [
    (np.full(32, np.nan, np.float32), 'not finite'),
    (np.full(32, np.inf, np.float32), 'not finite'),
    (np.zeros(32, np.int32), 'stored as I32'),
    (np.zeros(31, np.float32), r'\(31,\)'),
  ],
)
def test_bad_tensors_are_named(saved, value, problem):
  path = saved / 'model.safetensors'
  tensors = safetensors.numpy.load_file(path)
  tensors['model.norm.weight'] = value
  safetensors.numpy.save_file(tensors, path)
  with pytest.raises(errors.FileFormatError, match=problem) as caught:
    pretrained.load(saved)
  assert 'model.norm.weight' in str(caught.value)


def test_values_beyond_float16_are_refused_in_float16(saved):
  path = saved / 'model.safetensors'
  tensors = safetensors.numpy.load_file(path)
  tensors['model.norm.weight'] = np.full(32, 1e6, np.float32)
  safetensors.numpy.save_file(tensors, path)
  pretrained.load(saved)
  with pytest.raises(errors.FileFormatError, match='not finite'):
    pretrained.load(saved, dtype=jnp.float16)


@pytest.mark.parametrize(
  ('plain', 'prefixed'),
  [('', 'language_model.'), ('model.', 'model.language_model.')],
)
def test_language_half_of_a_multimodal_checkpoint(tmp_path, plain, prefixed):
  lm = tiny_models.model('gemma3_text')
  directory = export.save(lm, tmp_path / 'a')
  path = directory / 'model.safetensors'
  tensors = safetensors.numpy.load_file(path)
  tensors = {
    prefixed + name.removeprefix(plain): value
    for name, value in tensors.items()
  }
  tensors['vision_tower.weight'] = np.zeros(3, np.float32)
  safetensors.numpy.save_file(tensors, path)
  config = json.loads((directory / 'config.json').read_text())
  wrapped = {'model_type': 'gemma3', 'text_config': config}
  (directory / 'config.json').write_text(json.dumps(wrapped))
  found = pretrained.load(directory)
  assert found.config == lm.config
  _assert_same(found.params, lm.params)


def test_sources_that_are_nothing(tmp_path, monkeypatch):
  with pytest.raises(ValueError, match='smollm2-135m'):
    pretrained.load('no-such-model')
  with pytest.raises(ValueError, match='dtype'):
    pretrained.load('smollm2-135m', dtype=jnp.int8)
  with pytest.raises(errors.FileFormatError, match=r'config\.json'):
    pretrained.load(tmp_path)
  (tmp_path / 'a.txt').write_text('hello')
  with pytest.raises(errors.FileFormatError, match='not a model'):
    pretrained.load(tmp_path / 'a.txt')
  data = tmp_path / 'question.jsonl'
  data.write_text('{}')
  monkeypatch.setattr(assets, 'fetch', lambda name: data)
  with pytest.raises(errors.FileFormatError, match='not a model'):
    pretrained.load('mt-bench')


def test_hub_asks_for_safe_files_only(saved, monkeypatch):
  asked = {}

  def snapshot_download(name, allow_patterns):
    asked[name] = allow_patterns
    return str(saved)

  hub = type(sys)('huggingface_hub')
  hub.snapshot_download = snapshot_download
  monkeypatch.setitem(sys.modules, 'huggingface_hub', hub)
  assert pretrained.load('someone/model').name == 'someone/model'
  assert asked == {'someone/model': ['*.json', '*.safetensors', '*.jinja']}

  def unreachable(*unused_args, **unused_options):
    raise RuntimeError('no\nnetwork')

  hub.snapshot_download = unreachable
  with pytest.raises(errors.FetchError, match='pass its path'):
    pretrained.load('someone/model')
  monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
  with pytest.raises(errors.FetchError, match='pip install'):
    pretrained.load('someone/model')


@pytest.mark.model
def test_the_released_model():
  lm = pretrained.load('smollm2-135m')
  count = sum(leaf.size for leaf in jax.tree.leaves(lm.params))
  assert count == 134_515_008
  assert lm.config.rope_theta == 1e5
  assert lm.config.norm_epsilon == 1e-5
  assert lm.tokenizer.stop_ids == (2,)
  assert lm.tokenizer.encode('Hello world 12') == [19556, 905, 216, 33, 34]
  messages = [{'role': 'user', 'content': 'Hi'}]
  prompt = lm.tokenizer.apply_chat_template(messages)
  assert prompt.endswith('<|im_start|>assistant\n')
