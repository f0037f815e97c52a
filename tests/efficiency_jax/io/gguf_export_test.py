"""Tests of writing GGUF files, for us and for llama.cpp (marked `peers`)."""

import dataclasses

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficiency_jax import generation
from efficiency_jax import leaves
from efficiency_jax.io import assets
from efficiency_jax.io import errors
from efficiency_jax.io import gguf_blocks
from efficiency_jax.io import gguf_export
from efficiency_jax.io import gguf_file
from efficiency_jax.io import pretrained
from efficiency_jax.models import config as model_config
from efficiency_jax.models import transformer
from efficiency_jax.quantization import rules
from tests.efficiency_jax.io import tiny_models
from tests.golden import texts

_KINDS = [kind.name for kind in gguf_blocks.KINDS]
_TOKENS = np.arange(40)[None] * 7 % 200


def _model(name, dtype='float32', scale=1.0):
  """A tiny model that GGUF can describe."""
  lm = tiny_models.model(name, dtype)
  config = lm.config
  if name in ('mistral', 'qwen2'):
    config = dataclasses.replace(config, windows=())
  if name == 'llama_biased':
    # Only then are there frequencies that the scaling of Llama 3 divides.
    config = dataclasses.replace(config, rope_theta=5e5)
  params = jax.tree.map(lambda leaf: scale * leaf, lm.params)
  # llama.cpp expects the special tokens of Phi-3 where a name says phi3.
  return dataclasses.replace(lm, name='tiny', config=config, params=params)


def _quantized(lm, kind):
  """The same with all matrices in blocks; tables have 8 bits, as is common."""

  def one(path, leaf):
    if leaf.ndim == 1:
      return leaf
    if path[-1].key == 'table':
      return gguf_blocks.quantize(leaf, 'Q8_0', transposed=True)
    return gguf_blocks.quantize(leaf, kind)

  params = jax.tree_util.tree_map_with_path(one, lm.params)
  return dataclasses.replace(lm, params=params)


def _assert_same(found, expected):
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  jax.tree.map(np.testing.assert_array_equal, found, expected)
  types = jax.tree.map(lambda leaf: leaf.dtype, found)
  assert types == jax.tree.map(lambda leaf: leaf.dtype, expected)


def _logits(lm, tokens=_TOKENS):
  apply = jax.jit(transformer.apply_fn(lm.config))
  return np.asarray(apply(lm.params, jnp.asarray(tokens))[0].logits)


@pytest.mark.parametrize('name', sorted(tiny_models.CONFIGS))
def test_our_reader_gives_the_model_back(tmp_path, name):
  lm = _model(name)
  path = gguf_export.save(lm, tmp_path / 'new' / f'{name}.gguf')
  found = pretrained.load(path)
  # One plus a norm and minus one again costs a rounding (Gemma).
  tolerance = 1e-6 if lm.config.norm_plus_one else 0
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance),
    found.params,
    lm.params,
  )
  family = 'llama' if name == 'mistral' else lm.config.family
  assert found.config == dataclasses.replace(lm.config, family=family)
  assert found.name == name
  assert found.tokenizer.fingerprint == lm.tokenizer.fingerprint
  assert found.tokenizer.stop_ids == lm.tokenizer.stop_ids
  assert found.tokenizer.pad_id == lm.tokenizer.pad_id
  assert found.tokenizer.chat_template == lm.tokenizer.chat_template
  for text in texts.TEXTS:
    assert found.tokenizer.encode(text) == lm.tokenizer.encode(text)
  assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
def test_narrow_floats_stay_narrow(tmp_path, dtype):
  lm = _model('llama', dtype)
  path = gguf_export.save(lm, tmp_path / 'a.gguf')
  _assert_same(pretrained.load(path, dtype=dtype).params, lm.params)
  tensors = gguf_file.read(path).tensors
  kinds = {info.kind.name for info in tensors.values() if len(info.shape) == 2}
  assert kinds == {{'float16': 'F16', 'bfloat16': 'BF16'}[dtype]}
  assert tensors['output_norm.weight'].kind.name == 'F32'


@pytest.mark.parametrize(
  ('name', 'kind'),
  [('llama', 'Q4_0'), ('llama_biased', 'Q4_1'), ('phi3', 'Q8_0')],
)
def test_blocks_come_back_as_they_were(tmp_path, name, kind):
  lm = _quantized(_model(name), kind)
  path = gguf_export.save(lm, tmp_path / 'a.gguf')
  packed = pretrained.load(path, packed=True)
  _assert_same(packed.params, lm.params)
  file = gguf_file.read(path)
  kinds = {i.kind.name for i in file.tensors.values() if len(i.shape) == 2}
  assert kinds == {kind, 'Q8_0'}
  mostly = gguf.LlamaFileType[f'MOSTLY_{kind}']
  assert file.metadata['general.file_type'] == mostly
  # Read by `gguf` and put in place as floats, they are the same numbers.
  dense = pretrained.load(path)
  _assert_same(rules.dequantize(packed.params), dense.params)


def test_packed_weights_give_the_logits_of_floats(tmp_path):
  lm = _quantized(_model('llama', scale=0.2), 'Q4_1')
  path = gguf_export.save(lm, tmp_path / 'a.gguf')
  expected = _logits(pretrained.load(path))
  np.testing.assert_allclose(
    _logits(pretrained.load(path, packed=True)),
    expected,
    rtol=0,
    atol=1e-5 * np.abs(expected).max(),
  )


def test_export_refuses_what_it_would_overwrite(tmp_path):
  path = gguf_export.save(_model('llama'), tmp_path / 'a.gguf')
  before = path.read_bytes()
  with pytest.raises(ValueError, match='exists: choose another'):
    gguf_export.save(_model('qwen3'), path)
  assert path.read_bytes() == before
  with pytest.raises(ValueError, match='exists: choose another'):
    gguf_export.save(_model('llama'), tmp_path)


def test_failed_export_leaves_nothing(tmp_path, monkeypatch):
  def full(*unused_args, **unused_options):
    raise OSError('No space left on device')

  monkeypatch.setattr(gguf.GGUFWriter, 'write_tensors_to_file', full)
  with pytest.raises(OSError, match='No space'):
    gguf_export.save(_model('llama'), tmp_path / 'a.gguf')
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('name', ['mistral', 'qwen2'])
def test_windows_that_the_file_would_lose_are_refused(tmp_path, name):
  with pytest.raises(ValueError, match='no place for the windows'):
    gguf_export.save(tiny_models.model(name), tmp_path / 'a.gguf')
  assert list(tmp_path.iterdir()) == []


def test_other_configurations_are_refused(tmp_path):
  lm = _model('llama')
  for fields, problem in (
    ({'family': 'mamba'}, "got family 'mamba'"),
    (
      {'activation': 'gelu_tanh', 'query_scale': 0.4},
      'activation, query_scale',
    ),
    # Nothing turns slowly enough to be divided, so no factor is in the file.
    (
      {
        'rope_theta': 100.0,
        'rope_scaling': model_config.RopeScaling(kind='llama3', factor=8.0),
      },
      'no place for the rope_scaling',
    ),
  ):
    other = dataclasses.replace(
      lm, config=dataclasses.replace(lm.config, **fields)
    )
    with pytest.raises(ValueError, match=problem):
      gguf_export.save(other, tmp_path / 'a.gguf')
  assert list(tmp_path.iterdir()) == []


def test_leaves_without_a_form_are_named(tmp_path):
  lm = _model('llama')
  attention = lm.params['layers_1']['attention']
  kernel = attention['qkv']['kernel']
  nearly = gguf_blocks.quantize(kernel, 'Q8_0')
  for leaf, problem in (
    (
      dataclasses.replace(nearly, scales=jnp.full((1, 64), 0.1)),
      'layers_1/attention/qkv/kernel: its scales are not numbers of float16',
    ),
    (
      gguf_blocks.quantize(kernel, 'Q8_0', transposed=True),
      r'layers_1/attention/qkv/kernel gives \(32, 64\)',
    ),
    (
      leaves.LoraTensor(
        base=kernel, a=jnp.ones((32, 2)), b=jnp.ones((2, 64)), scale=1.0
      ),
      'layers_1/attention/qkv/kernel is a LoraTensor',
    ),
  ):
    attention['qkv']['kernel'] = leaf
    with pytest.raises(ValueError, match=problem):
      gguf_export.save(lm, tmp_path / 'a.gguf')
  assert list(tmp_path.iterdir()) == []


@pytest.mark.peers
@pytest.mark.parametrize('name', sorted(tiny_models.CONFIGS))
def test_llama_cpp_computes_what_we_do(tmp_path, name):
  llama_cpp = pytest.importorskip('llama_cpp')
  lm = _model(name, scale=0.2)  # activations as small as real ones
  path = gguf_export.save(lm, tmp_path / 'a.gguf')
  peer = llama_cpp.Llama(
    str(path), n_ctx=64, n_threads=1, logits_all=True, verbose=False
  )
  for text in texts.TEXTS:
    ids = peer.tokenize(text.encode(), add_bos=False, special=True)
    assert lm.tokenizer.encode(text) == ids, text
  peer.eval(_TOKENS[0].tolist())
  found, expected = np.array(peer.scores[: _TOKENS.shape[1]]), _logits(lm)[0]
  # It keeps keys and values in float16.
  np.testing.assert_allclose(
    found, expected, rtol=0, atol=2e-3 * np.abs(expected).max()
  )


@pytest.mark.peers
@pytest.mark.parametrize('kind', _KINDS)
def test_llama_cpp_reads_blocks_as_we_do(tmp_path, kind):
  llama_cpp = pytest.importorskip('llama_cpp')
  lm = _quantized(_model('llama', scale=0.2), kind)
  path = gguf_export.save(lm, tmp_path / 'a.gguf')
  peer = llama_cpp.Llama(
    str(path), n_ctx=64, n_threads=1, logits_all=True, verbose=False
  )
  peer.eval(_TOKENS[0].tolist())
  found, expected = np.array(peer.scores[: _TOKENS.shape[1]]), _logits(lm)[0]
  # It rounds the left operand of such products to 8 bits.
  np.testing.assert_allclose(
    found, expected, rtol=0, atol=3e-2 * np.abs(expected).max()
  )


def _released():
  try:
    return assets.fetch('smollm2-135m')
  except errors.FetchError as error:
    pytest.skip(f'the released model cannot be had: {error}')


@pytest.mark.model
def test_the_released_file_comes_back_byte_for_byte(tmp_path):
  original = gguf_file.read(_released())
  lm = pretrained.load('smollm2-135m', packed=True)
  # Q4_1 and Q8_0 in memory: 5 and 8.5 bits a weight.
  assert sum(leaf.nbytes for leaf in jax.tree.leaves(lm.params)) < 97e6
  found = gguf_file.read(gguf_export.save(lm, tmp_path / 'a.gguf'))
  assert found.tensors.keys() == original.tensors.keys()
  for name, info in original.tensors.items():
    assert found.tensors[name].kind == info.kind
    assert found.tensors[name].shape == info.shape
    np.testing.assert_array_equal(found.raw(name), original.raw(name))
  for name, value in original.metadata.items():
    # What the file says of its making is lost; bytes leave nothing unknown,
    # and only SentencePiece adds spaces.
    section, _, rest = name.rpartition('.')
    if section == 'general' and rest not in ('architecture', 'file_type'):
      continue
    if rest not in ('unknown_token_id', 'add_space_prefix'):
      np.testing.assert_array_equal(found.metadata[name], value)


@pytest.mark.model
def test_the_released_model_packed_has_the_logits_of_the_dense_one():
  _released()
  packed = pretrained.load('smollm2-135m', packed=True)
  dense = pretrained.load('smollm2-135m')
  tokens = [dense.tokenizer.encode('The capital of France is the city of')]
  expected = _logits(dense, tokens)
  np.testing.assert_allclose(
    _logits(packed, tokens),
    expected,
    rtol=0,
    atol=2e-5 * np.abs(expected).max(),
  )


@pytest.mark.model
@pytest.mark.peers
def test_llama_cpp_writes_what_the_released_model_writes(tmp_path):
  llama_cpp = pytest.importorskip('llama_cpp')
  _released()
  lm = pretrained.load('smollm2-135m')
  path = gguf_export.save(lm, tmp_path / 'a.gguf')
  peer = llama_cpp.Llama(str(path), n_ctx=256, n_threads=2, verbose=False)
  for text in texts.TEXTS:
    ids = peer.tokenize(text.encode(), add_bos=False, special=True)
    assert lm.tokenizer.encode(text) == ids, text
  for question in ('What is a lighthouse?', 'Write a haiku about rain.'):
    prompt = lm.tokenizer.encode(
      lm.tokenizer.apply_chat_template([{'role': 'user', 'content': question}])
    )
    result = generation.generate(
      lm, [prompt], max_new_tokens=32, drafter='plain'
    )
    ours = result.rows[0].tokens.tolist()
    peer.reset()
    theirs = []
    for token in peer.generate(prompt, temp=0.0):
      theirs.append(int(token))
      if len(theirs) == len(ours):
        break
    assert ours == theirs
