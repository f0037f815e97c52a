"""Other tools must do the same work as ours before they are timed."""

import dataclasses
import importlib.util

import pytest

from efficiency_jax import generation
from efficiency_jax.io import export
from efficiency_jax.io import untrained
from efficiency_jax.models import layers as model_layers
from experiments import peers
from tests.efficiency_jax.io import tiny_models

PROMPTS = [[3, 4, 5, 3, 4], [9, 8, 7, 6, 5, 4, 3, 9, 8, 7]]
BUDGET = 12


def _ours(lm):
  made = [
    generation.generate(
      lm, [prompt], max_new_tokens=BUDGET, drafter='plain', stop=False
    )
    for prompt in PROMPTS
  ]
  return [result.rows[0].tokens.tolist() for result in made]


@pytest.mark.peers
@pytest.mark.parametrize('lookup', [None, 3])
def test_transformers_writes_our_tokens(tmp_path, lookup):
  # The first writes a text without a pattern, the second one that is all.
  lm = untrained.language_model() if lookup else tiny_models.model('llama')
  decode = peers.transformers(export.save(lm, tmp_path / 'model'), lookup)
  sample = decode(PROMPTS, BUDGET)
  assert sample.tokens == _ours(lm)
  if lookup is None:
    # The pass over the prompt gives each text its first token.
    assert sample.decoded == sample.steps == len(PROMPTS) * (BUDGET - 1)
  else:
    assert sample.steps <= sample.decoded < len(PROMPTS) * BUDGET
  assert min(sample.prefill_seconds, sample.decode_seconds) > 0


@pytest.mark.peers
@pytest.mark.parametrize('layers', [(0, 1), (0,)])
def test_an_assistant_drafts_for_transformers(tmp_path, layers):
  lm = tiny_models.model('llama')
  config, params = model_layers.select(lm.config, lm.params, layers)
  small = dataclasses.replace(lm, config=config, params=params)
  decode = peers.transformers(
    export.save(lm, tmp_path / 'model'),
    3,
    export.save(small, tmp_path / 'assistant'),
  )
  sample = decode(PROMPTS, BUDGET)
  assert sample.tokens == _ours(lm)
  assert sample.steps <= sample.decoded
  if len(layers) == lm.config.num_layers:
    # The target's own guesses are right. Of 12 tokens a pass writes four, and
    # that over the prompt too.
    assert (sample.decoded, sample.steps) == (16, 4)


@pytest.mark.peers
def test_llama_cpp_writes_our_tokens(tmp_path):
  lm = tiny_models.model('llama')
  path = tiny_models.write_gguf(tmp_path / 'model.gguf', lm)
  sample = peers.llama_cpp(path, 64)(PROMPTS, BUDGET)
  assert sample.tokens == _ours(lm)
  assert sample.decoded == sample.steps == len(PROMPTS) * (BUDGET - 1)


@pytest.mark.short
def test_a_peer_that_is_not_installed_says_what_to_do(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  assert peers.missing(peers.LLAMA_CPP) == (
    'llama_cpp not installed: make test-peers'
  )
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: name)
  assert peers.missing(peers.LOOKUP) is None


@pytest.mark.short
def test_an_unknown_peer_is_refused():
  with pytest.raises(ValueError, match="peer 'vllm' is unknown"):
    peers.missing('vllm')
