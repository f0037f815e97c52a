"""A random model adapted for its heads: another model, decoded exactly."""

import json

import jax
import numpy as np
import pytest

from efficiency_jax import drafts
from efficiency_jax import generation
from efficiency_jax import trees
from efficiency_jax.adaptation import lora
from efficiency_jax.decoding import eagle
from efficiency_jax.decoding import medusa
from efficiency_jax.decoding import token_tree
from efficiency_jax.io import arrays
from efficiency_jax.io import pretrained
from efficiency_jax.io import untrained
from experiments import train_medusa2


def _start(workdir, answers, draft, *flags):
  train_medusa2.main(
    [
      'train_medusa2',
      '--config=configs/train_medusa2.py:tiny',
      f'--workdir={workdir}',
      f'--config.answers={answers}',
      f'--config.draft={draft}',
      '--nocompilation_cache',
      *flags,
    ]
  )


@pytest.fixture(scope='module')
def begun(tmp_path_factory):
  """Heads to begin from."""
  lm = untrained.language_model()
  seen = {'token': True, 'layers': (0,)}
  form = medusa.Heads(count=2, markov=4, confidence=True, **seen)
  params = medusa.init(
    form,
    jax.random.key(0),
    lm.config.width,
    lm.config.vocab_size,
    {'embedding': lm.params['embedding']},
  )
  heads = medusa.TrainedHeads(
    form=form, params=params, trees=(token_tree.chain(2),)
  )
  path = tmp_path_factory.mktemp('heads') / 'draft.safetensors'
  drafts.save(path, heads, lm=lm, card={})
  return path


@pytest.fixture(scope='module')
def finished(tmp_path_factory, tiny_answers, begun):
  workdir = tmp_path_factory.mktemp('runs') / 'joint'
  _start(workdir, tiny_answers, begun)
  return workdir


def test_the_model_is_the_original_with_its_adapter(finished):
  lm = untrained.language_model()
  values, facts = arrays.load(finished / 'adapter.safetensors')
  assert facts['base'] == lm.name
  settings = json.loads(facts['adapter'])
  adapted, report = lora.adapt(lm.params, **settings, key=jax.random.key(0))
  names = [name for name, _ in trees.leaves(lora.factors(adapted))]
  assert sorted(values) == sorted(names)
  assert all(np.abs(x).max() > 0 for x in values.values())
  factors = jax.tree_util.tree_map_with_path(
    lambda path, _: values[trees.path_string(path)], lora.factors(adapted)
  )
  model = pretrained.load(finished / 'model')
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6),
    model.params,
    lora.merge(lora.with_factors(adapted, factors)),
  )
  assert len(report.paths) == 4 * lm.config.num_layers


def test_report_and_card_say_that_it_is_another_model(finished):
  report = (finished / 'report.md').read_text()
  card = drafts.card(finished / 'draft.safetensors')
  for text in (report, card['target']):
    assert 'another model than untrained-0' in text
  assert card['KL(original || adapted)'].endswith('nats')
  assert 'same likeliest token as the original' in report
  rows = json.loads((finished / 'results.json').read_text())['rows']
  assert [row['method'] for row in rows if 'alpha' in row] == [
    'head 1',
    'head 2',
  ]
  log = (finished / 'training.jsonl').read_text().splitlines()
  steps = [json.loads(line) for line in log]
  names = {name for entry in steps for name in entry}
  assert {
    'tokens_per_run',
    'validation_original_kl',
    'validation_confidence_error_2',
  } <= names


@pytest.mark.slow
def test_decoding_with_the_heads_is_exact_for_the_adapted_model(finished):
  lm = pretrained.load(finished / 'model')
  heads = drafts.load(finished / 'draft.safetensors', lm)
  assert heads.form.confidence
  options = {'max_new_tokens': 24, 'draft_length': 3}
  plain = generation.generate(lm, [[1, 2, 3]], drafter='plain', **options)
  drafted = generation.generate(
    lm, [[1, 2, 3]], drafter='medusa', heads=heads, **options
  )
  np.testing.assert_array_equal(drafted.rows[0].tokens, plain.rows[0].tokens)


def test_a_draft_of_another_kind_is_refused(tmp_path, tiny_answers, capsys):
  lm, path = untrained.language_model(), tmp_path / 'other.safetensors'
  form = eagle.Form(target=lm.config)
  params = eagle.init(form, jax.random.key(0), lm.params)
  drafts.save(
    path, eagle.TrainedDraft(form=form, params=params), lm=lm, card={}
  )
  with pytest.raises(SystemExit):
    _start(tmp_path / 'run', tiny_answers, path)
  assert 'other.safetensors holds no heads of Medusa' in capsys.readouterr().err
