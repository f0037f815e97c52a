"""Tests of the correspondence of checkpoint tensors and parameters."""

import jax
import numpy as np
import pytest

from efficiency_jax.io import errors
from efficiency_jax.io import tensor_names
from tests.efficiency_jax.io import tiny_models

_FAMILIES = sorted(tiny_models.CONFIGS)


def _hf(name):
  config = tiny_models.config(name)
  params = tiny_models.params(config)
  slots = tensor_names.hf_slots(config)
  return config, params, dict(tensor_names.write_tensors(slots, params))


def _read(config, tensors):
  return tensor_names.read_params(
    tensor_names.hf_slots(config),
    tensors,
    tensors.__getitem__,
    'somewhere',
    ignored=tensor_names.hf_ignored(config),
  )


@pytest.mark.parametrize('name', _FAMILIES)
def test_reading_undoes_writing(name):
  config, params, tensors = _hf(name)
  found = _read(config, tensors)
  assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(found))
  jax.tree.map(np.testing.assert_array_equal, found, params)


@pytest.mark.parametrize('name', _FAMILIES)
def test_reading_undoes_writing_in_gguf_names(name):
  config, params, _ = _hf(name)
  slots = list(tensor_names.gguf_slots(config, ()))
  tensors = dict(tensor_names.write_tensors(iter(slots), params))
  found = tensor_names.read_params(
    iter(slots),
    tensors,
    tensors.__getitem__,
    'somewhere',
    ignored=tensor_names.gguf_ignored,
  )
  # One plus a norm and minus one again costs a rounding (Gemma).
  tolerance = 1e-6 if config.norm_plus_one else 0
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance),
    found,
    params,
  )


def test_projections_are_fused_in_the_documented_order():
  config, params, tensors = _hf('llama')
  qkv = params['layers_1']['attention']['qkv']['kernel']
  prefix = 'model.layers.1.'
  query, key = 4 * 8, 2 * 8
  q = tensors[f'{prefix}self_attn.q_proj.weight']
  k = tensors[f'{prefix}self_attn.k_proj.weight']
  v = tensors[f'{prefix}self_attn.v_proj.weight']
  np.testing.assert_array_equal(qkv[:, :query], q.T)
  np.testing.assert_array_equal(qkv[:, query : query + key], k.T)
  np.testing.assert_array_equal(qkv[:, query + key :], v.T)
  gate_up = params['layers_1']['ffn']['gate_up']['kernel']
  gate = tensors[f'{prefix}mlp.gate_proj.weight']
  np.testing.assert_array_equal(gate_up[:, : config.ffn_width], gate.T)


def test_head_permutation_pairs_the_halves_and_is_undone():
  rows = np.arange(2 * 6 * 3).reshape(12, 3)
  paired = tensor_names.interleave_heads(rows, 2)
  np.testing.assert_array_equal(paired[:6], rows[[0, 3, 1, 4, 2, 5]])
  np.testing.assert_array_equal(tensor_names.split_heads(paired, 2), rows)
  bias = np.arange(12)
  np.testing.assert_array_equal(
    tensor_names.split_heads(tensor_names.interleave_heads(bias, 2), 2), bias
  )


def test_rotation_of_neighbours_is_rotation_of_halves():
  # What the permutation is for: rotating neighbours of permuted rows gives
  # the permuted result of rotating halves.
  rng = np.random.default_rng(0)
  x, angles = rng.normal(size=8), rng.normal(size=4)
  cos, sin = np.cos(angles), np.sin(angles)
  a, b = x[:4], x[4:]
  halves = np.concatenate([a * cos - b * sin, b * cos + a * sin])
  even, odd = tensor_names.interleave_heads(x, 1).reshape(4, 2).T
  pairs = np.stack([even * cos - odd * sin, odd * cos + even * sin], -1)
  np.testing.assert_allclose(
    tensor_names.split_heads(pairs.reshape(-1), 1), halves
  )


@pytest.mark.parametrize('name', ['qwen2', 'qwen3', 'gemma2', 'phi3'])
def test_only_llama_is_permuted(name):
  slots = tensor_names.gguf_slots(tiny_models.config(name), ())
  assert not any(p.interleaved_heads for s in slots for p in s.parts)


def test_errors_name_the_tensor():
  config, _, tensors = _hf('llama')
  name = 'model.layers.0.self_attn.k_proj.weight'

  missing = {k: v for k, v in tensors.items() if k != name}
  with pytest.raises(errors.FileFormatError, match=name):
    _read(config, missing)

  with pytest.raises(errors.FileFormatError) as caught:
    _read(config, tensors | {name: np.zeros((3, 5), np.float32)})
  for word in (name, '(3, 5)', '(16, 32)'):
    assert word in str(caught.value)

  with pytest.raises(errors.FileFormatError, match=r'first is extra\.weight'):
    _read(config, tensors | {'extra.weight': np.zeros(3, np.float32)})


def test_old_buffers_and_a_tied_head_are_ignored():
  config, _, tensors = _hf('llama')
  extra = {
    'lm_head.weight': np.zeros((2, 2), np.float32),
    'model.layers.0.self_attn.rotary_emb.inv_freq': np.zeros(4, np.float32),
  }
  assert 'head' not in _read(config, tensors | extra)


def test_writing_refuses_parameters_of_another_model():
  config, params, _ = _hf('llama')
  other = tiny_models.config('qwen3')
  with pytest.raises(ValueError, match='query_norm'):
    dict(tensor_names.write_tensors(tensor_names.hf_slots(other), params))
  params['final_norm'] = {'scale': np.zeros(3, np.float32)}
  with pytest.raises(ValueError, match='final_norm/scale'):
    dict(tensor_names.write_tensors(tensor_names.hf_slots(config), params))
