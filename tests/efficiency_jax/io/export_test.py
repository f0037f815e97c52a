"""Tests of saving, and of files that go to and come from other programs.

The comparisons need torch, transformers and llama.cpp (marked `peers`). They
run whole forward passes, so they also hold the model to its families.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficiency_jax import generation
from efficiency_jax.io import assets
from efficiency_jax.io import errors
from efficiency_jax.io import export
from efficiency_jax.io import pretrained
from efficiency_jax.models import transformer
from tests.efficiency_jax.io import tiny_models
from tests.golden import texts

# Long enough to leave the sliding windows of 16.
_TOKENS = np.arange(40)[None] * 7 % 200
_CLASSES = {
  'llama': ('LlamaConfig', {}),
  'llama_biased': (
    'LlamaConfig',
    {
      'attention_bias': True,
      'mlp_bias': True,
      'rope_parameters': {
        'rope_type': 'llama3',
        'rope_theta': 5e5,
        'factor': 8.0,
        'low_freq_factor': 1.0,
        'high_freq_factor': 4.0,
        'original_max_position_embeddings': 64,
      },
    },
  ),
  'mistral': ('MistralConfig', {'sliding_window': 16}),
  'qwen2': (
    'Qwen2Config',
    {
      'use_sliding_window': True,
      'sliding_window': 16,
      'max_window_layers': 3,
      'tie_word_embeddings': True,
    },
  ),
  'qwen3': (
    'Qwen3Config',
    {
      'head_dim': 32,
      'rope_parameters': {
        'rope_type': 'linear',
        'factor': 2.0,
        'rope_theta': 1e6,
      },
    },
  ),
  'gemma2': (
    'Gemma2Config',
    {'head_dim': 32, 'sliding_window': 16, 'query_pre_attn_scalar': 24},
  ),
  'gemma3_text': (
    'Gemma3TextConfig',
    {'head_dim': 32, 'sliding_window': 16, 'query_pre_attn_scalar': 24},
  ),
  'phi3': ('Phi3Config', {'sliding_window': 16, 'pad_token_id': 0}),
}


def _logits(lm):
  model = transformer.DecoderLM(lm.config)
  output, _ = model.apply({'params': lm.params}, jnp.asarray(_TOKENS))
  return np.asarray(output.logits)


def _calm(name):
  """A model whose activations stay in the range that real ones have."""
  lm = tiny_models.model(name)
  params = jax.tree.map(lambda leaf: 0.2 * leaf, lm.params)
  return dataclasses.replace(lm, params=params)


def _assert_close(found, expected, tolerance):
  scale = np.abs(expected).max()
  np.testing.assert_allclose(found / scale, expected / scale, atol=tolerance)


def test_settings_name_the_stop_tokens(tmp_path):
  lm = tiny_models.model('llama')
  directory = export.save(lm, tmp_path / 'a')
  assert sorted(path.name for path in directory.iterdir()) == [
    'config.json',
    'generation_config.json',
    'model.safetensors',
    'tokenizer.json',
    'tokenizer_config.json',
  ]
  generation = json.loads((directory / 'generation_config.json').read_text())
  assert generation['eos_token_id'] == [0, 2]
  config = json.loads((directory / 'config.json').read_text())
  assert config['architectures'] == ['LlamaForCausalLM']
  assert config['torch_dtype'] == 'float32'


def test_save_refuses_what_it_would_overwrite(tmp_path):
  lm = tiny_models.model('llama')
  target = tmp_path / 'a'
  target.mkdir()
  export.save(lm, target)
  with pytest.raises(ValueError, match='not an empty folder'):
    export.save(lm, target)
  (tmp_path / 'file').write_text('')
  with pytest.raises(ValueError, match='not an empty folder'):
    export.save(lm, tmp_path / 'file')


def test_failed_save_leaves_nothing(tmp_path, monkeypatch):
  def full(*unused_args, **unused_options):
    raise OSError('No space left on device')

  monkeypatch.setattr(export.safetensors.flax, 'save_file', full)
  with pytest.raises(OSError, match='No space'):
    export.save(tiny_models.model('llama'), tmp_path / 'a')
  assert list(tmp_path.iterdir()) == []


def test_save_refuses_typed_leaves(tmp_path):
  lm = tiny_models.model('llama')
  lm.params['final_norm']['scale'] = object()
  with pytest.raises(ValueError, match='final_norm/scale'):
    export.save(lm, tmp_path / 'a')


@pytest.mark.peers
@pytest.mark.parametrize('name', sorted(tiny_models.CONFIGS))
def test_transformers_loads_what_we_save(tmp_path, name):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  lm = _calm(name)
  directory = export.save(lm, tmp_path / name)

  model, report = transformers.AutoModelForCausalLM.from_pretrained(
    directory,
    dtype=torch.float32,
    attn_implementation='eager',
    output_loading_info=True,
  )
  assert not any(report.values())
  with torch.no_grad():
    found = model.eval()(torch.tensor(_TOKENS)).logits.numpy()
  _assert_close(found, _logits(lm), 2e-5)

  tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
  text = 'hello world 2024, naïve <|im_end|>\n\n  x'
  assert tokenizer(text).input_ids == lm.tokenizer.encode(text)
  messages = [{'role': 'user', 'content': 'hello'}]
  assert lm.tokenizer.apply_chat_template(
    messages
  ) == tokenizer.apply_chat_template(
    messages, tokenize=False, add_generation_prompt=True
  )


@pytest.mark.peers
@pytest.mark.parametrize('name', sorted(_CLASSES))
def test_we_load_what_transformers_saves(tmp_path, name):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  class_name, choices = _CLASSES[name]
  config = getattr(transformers, class_name)(
    vocab_size=len(tiny_models.VOCAB),
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=7,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    **choices,
  )
  torch.manual_seed(0)
  model = transformers.AutoModelForCausalLM.from_config(
    config, dtype=torch.float32, attn_implementation='eager'
  ).eval()
  with torch.no_grad():
    # Norms and biases start as ones and zeros, which would hide a mix-up.
    for parameter in model.parameters():
      parameter.add_(0.05 * torch.randn_like(parameter))
    expected = model(torch.tensor(_TOKENS)).logits.numpy()
  model.save_pretrained(tmp_path)
  (tmp_path / 'tokenizer.json').write_text(
    tiny_models.tokenizer().backend.to_str()
  )
  _assert_close(_logits(pretrained.load(tmp_path)), expected, 2e-5)


@pytest.mark.peers
@pytest.mark.parametrize(
  'name', ['llama', 'qwen2', 'qwen3', 'gemma2', 'gemma3_text', 'phi3']
)
def test_llama_cpp_agrees_about_gguf(tmp_path, name):
  llama_cpp = pytest.importorskip('llama_cpp')
  path = tiny_models.write_gguf(tmp_path / 'a.gguf', _calm(name))
  model = llama_cpp.Llama(
    str(path), n_ctx=64, n_threads=1, logits_all=True, verbose=False
  )
  model.eval(_TOKENS[0].tolist())
  found = np.array(model.scores[: _TOKENS.shape[1]])
  # It keeps keys and values in float16.
  _assert_close(found[None], _logits(pretrained.load(path)), 2e-3)


@pytest.fixture(scope='module')
def released(tmp_path_factory):
  """The released model as we load it, and as transformers loads our export."""
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  try:
    assets.fetch('smollm2-135m')
  except errors.FetchError as error:
    pytest.skip(f'the released model cannot be had: {error}')
  lm = pretrained.load('smollm2-135m')
  directory = export.save(lm, tmp_path_factory.mktemp('released') / 'export')
  tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
  model, report = transformers.AutoModelForCausalLM.from_pretrained(
    directory, dtype=torch.float32, output_loading_info=True
  )
  assert not any(report.values())
  return lm, tokenizer, model.eval()


@pytest.mark.model
@pytest.mark.peers
def test_released_tokenizer_is_that_of_transformers(released):
  lm, peer, _ = released
  for text in texts.TEXTS:
    ids = lm.tokenizer.encode(text)
    assert ids == peer.encode(text, add_special_tokens=False), text
    for skip in (False, True):
      decoded = lm.tokenizer.decode(ids, skip_special=skip)
      assert decoded == peer.decode(ids, skip_special_tokens=skip)
  for messages in texts.CONVERSATIONS:
    for prompt in (False, True):
      found = lm.tokenizer.apply_chat_template(
        messages, add_generation_prompt=prompt
      )
      assert found == peer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=prompt
      )
  assert lm.tokenizer.eos_id == peer.eos_token_id
  assert lm.tokenizer.bos_id == peer.bos_token_id


@pytest.mark.model
@pytest.mark.peers
def test_released_model_writes_what_transformers_writes(released):
  torch = pytest.importorskip('torch')
  lm, _, peer = released
  prompt = lm.tokenizer.encode(
    lm.tokenizer.apply_chat_template(
      [{'role': 'user', 'content': 'Tell me a long story about a lighthouse.'}]
    )
  )
  ids = torch.tensor([prompt])
  with torch.no_grad():
    expected = peer(ids).logits.numpy()
    written = peer.generate(
      ids,
      attention_mask=torch.ones_like(ids),
      do_sample=False,
      max_new_tokens=64,
    )
  apply = jax.jit(transformer.apply_fn(lm.config))
  found = apply(lm.params, jnp.asarray([prompt]))[0].logits
  np.testing.assert_allclose(found, expected, rtol=0, atol=2e-3)
  result = generation.generate(lm, [prompt], max_new_tokens=64, drafter='plain')
  tokens = result.rows[0].tokens.tolist()
  assert tokens == written[0, len(prompt) :].tolist()
  assert len(tokens) == 64
