"""Tests of drafts in few bits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficiency_jax import drafts
from efficiency_jax import quantized_drafts
from efficiency_jax import trees
from efficiency_jax.decoding import draft_vocabulary
from efficiency_jax.leaves import QTensor
from efficiency_jax.quantization import rules
from tests.efficiency_jax import draft_cases as cases


def _language_model():
  """Fewer shapes of matrices: a method is compiled for each."""
  return cases.language_model(ffn_width=16)


@pytest.mark.parametrize(('drafter', 'length'), [('eagle', 3), ('medusa', 5)])
def test_a_quantized_draft_drafts_what_its_weights_stand_for(drafter, length):
  lm = _language_model()
  draft = cases.KINDS[drafter](lm)
  small = quantized_drafts.quantize(draft, lm, 'int8')
  table = draft_vocabulary.table(small.head)
  assert isinstance(table, QTensor)
  assert trees.count_bytes(small.params) < 0.6 * trees.count_bytes(draft.params)
  meant = dataclasses.replace(
    draft,
    params=rules.dequantize(small.params),
    head=rules.dequantize(small.head),
  )
  rows = cases.write(lm, small, drafter, length)
  cases.check_alike(rows, cases.write(lm, meant, drafter, length))
  # Another head drafts something else, and no text changes.
  backwards = jax.tree.map(lambda x: x[::-1], meant.head)
  other = cases.write(
    lm, dataclasses.replace(meant, head=backwards), drafter, length
  )
  for a, b in zip(rows, other, strict=True):
    np.testing.assert_array_equal(a.tokens, b.tokens)
  assert any(
    not np.array_equal(a.refused, b.refused)
    for a, b in zip(rows, other, strict=True)
  )


def test_the_narrow_factor_of_a_markov_bias_is_not_rounded():
  lm = _language_model()
  draft = cases.KINDS['medusa'](lm)
  small = quantized_drafts.quantize(draft, lm, 'W8A8').params['markov']
  down = small['down']['kernel']
  np.testing.assert_array_equal(down, draft.params['markov']['down']['kernel'])
  assert isinstance(small['up']['kernel'], QTensor)


def test_drafts_without_a_head_of_their_own_are_quantized_too():
  lm = _language_model()
  for kind in ('eagle of all tokens', 'draft model'):
    draft = cases.KINDS[kind](lm)
    small = quantized_drafts.quantize(draft, lm, 'W8A8')
    assert getattr(small, 'head', None) is None
    size = trees.count_bytes(draft.params)
    assert trees.count_bytes(small.params) < 0.6 * size


def test_a_quantized_draft_is_not_saved(tmp_path):
  lm = _language_model()
  small = quantized_drafts.quantize(cases.eagle_draft(lm), lm, 'int8')
  plain = rules.dequantize(small.params)
  for draft in (
    small,
    dataclasses.replace(small, head=None),
    dataclasses.replace(small, params=plain),
  ):
    with pytest.raises(
      ValueError, match='the draft is quantized: save the one'
    ):
      drafts.save(tmp_path / 'x', draft, lm=lm, card=cases.CARD)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  'kind', ['eagle of all tokens', 'medusa of all tokens']
)
def test_a_head_needs_its_vocabulary(kind):
  with pytest.raises(ValueError, match='needs the vocabulary that it scores'):
    dataclasses.replace(
      cases.KINDS[kind](_language_model()),
      head={'table': jnp.ones((8, 4))},
    )


def test_recipes_that_need_text_are_refused():
  lm = _language_model()
  with pytest.raises(ValueError, match="'GPTQ int4' needs calibration text"):
    quantized_drafts.quantize(cases.eagle_draft(lm), lm, 'GPTQ int4')
