"""A draft cut from its target, as a model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficiency_jax import trees
from efficiency_jax.decoding import draft_model
from efficiency_jax.models import layers
from efficiency_jax.models import transformer
from tests import fixtures

_TOKENS = jnp.asarray([[1, 2, 3, 1, 2, 5], [7, 4, 9, 9, 0, 10]])
_VOCABULARY = jnp.asarray([3, 0, 9, 2, 10, 7], jnp.int32)


@pytest.mark.parametrize('every', [False, True])
def test_the_draft_begins_as_the_layers_of_the_target(every):
  target = fixtures.every_option() if every else fixtures.config()
  params = fixtures.params(target)
  kept = (2, 0) if every else (1,)
  form = draft_model.Form(target=target, layers=kept, ffn_width=20)
  config, cut = layers.narrow(*layers.select(target, params, kept), 20)
  assert form.config == config
  own = draft_model.init(form, params)
  assert not own.keys() & {'embedding', 'head'}
  weights = draft_model.weights(form, own, params)
  # The tables are the target's, in memory too.
  assert weights['embedding'] is params['embedding']
  logits = jax.jit(draft_model.apply_fn(form))(weights, _TOKENS)[0].logits
  expected = jax.jit(transformer.apply_fn(config))(cut, _TOKENS)[0].logits
  np.testing.assert_array_equal(logits, expected)


@pytest.mark.parametrize('every', [False, True])
def test_a_reduced_head_scores_its_tokens_alike_and_no_other(every):
  target = fixtures.every_option() if every else fixtures.config()
  params = fixtures.params(target)
  whole = draft_model.Form(target=target, layers=(1,))
  form = draft_model.Form(target=target, layers=(1,), vocabulary=6)
  own = draft_model.init(form, params)
  weights = draft_model.weights(form, own, params, _VOCABULARY)
  assert weights['head']['table'].shape == (6, target.width)
  apply = jax.jit(draft_model.apply_fn(form))
  logits = np.asarray(apply(weights, _TOKENS)[0].logits)
  weights = draft_model.weights(whole, own, params)
  expected = jax.jit(draft_model.apply_fn(whole))(weights, _TOKENS)[0].logits
  inside = np.isin(np.arange(target.vocab_size), _VOCABULARY)
  np.testing.assert_allclose(
    logits[..., inside], np.asarray(expected)[..., inside], atol=1e-5
  )
  assert (logits[..., ~inside] == -np.inf).all()


def test_what_is_trained_is_a_copy_in_float32():
  target = fixtures.config()
  params = trees.cast(fixtures.params(target), jnp.bfloat16)
  own = draft_model.init(draft_model.Form(target=target, layers=(0,)), params)
  assert {x.dtype for x in jax.tree.leaves(own)} == {jnp.dtype('float32')}
  wide = trees.cast(params, jnp.float32)
  own = draft_model.init(draft_model.Form(target=target, layers=(0,)), wide)
  # As a training step does, which is given its parameters to overwrite.
  jax.tree.map(lambda x: x.delete(), own)
  assert not any(x.is_deleted() for x in jax.tree.leaves(wide))


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'layers': (0, 2)}, 'layers must name blocks in 0..1'),
    ({'layers': ()}, 'layers must name blocks'),
    ({'vocabulary': 12}, 'vocabulary must be in 1..11 or None, got 12'),
    ({'ffn_width': 0}, 'ffn_width must be in 1..24 or None, got 0'),
  ],
)
def test_impossible_forms_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    draft_model.Form(**{'target': fixtures.config(), 'layers': (0,), **fields})


def test_the_vocabulary_is_that_of_the_form():
  params = fixtures.params(fixtures.config())
  for size, given in ((6, None), (None, _VOCABULARY), (5, _VOCABULARY)):
    form = draft_model.Form(
      target=fixtures.config(), layers=(0,), vocabulary=size
    )
    own = draft_model.init(form, params)
    with pytest.raises(ValueError, match=f'must have {size} tokens'):
      draft_model.weights(form, own, params, given)
    with pytest.raises(ValueError, match=f'must have {size} tokens'):
      draft_model.TrainedDraft(form=form, params=own, vocabulary=given)


def test_programs_are_not_traced_twice():
  make = lambda: draft_model.Form(
    target=fixtures.config(), layers=(0,), vocabulary=6
  )
  assert hash(make()) == hash(make())
  assert draft_model.apply_fn(make()) is draft_model.apply_fn(make())
