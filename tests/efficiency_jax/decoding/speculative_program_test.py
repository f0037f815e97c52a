"""What XLA makes of the loop: no copy of a cache, no sine computed twice."""

import jax
import jax.numpy as jnp
import pytest

from efficiency_jax.decoding import drafters
from efficiency_jax.decoding import eagle
from efficiency_jax.decoding import schedule
from efficiency_jax.decoding import speculative
from efficiency_jax.evaluation import speed
from efficiency_jax.models import cache as kv_cache
from efficiency_jax.models import transformer
from tests import fixtures
from tests.efficiency_jax.decoding import eagle_models

pytestmark = pytest.mark.optimized

# Odd sizes, so that a shape in the program can only be a cache or a weight.
CONFIG = fixtures.config(vocab_size=97, ffn_width=37)
DRAFT = fixtures.config(vocab_size=97, ffn_width=37, num_layers=1)
EAGLE = eagle.Form(target=CONFIG, vocabulary=53)
DRAFTERS = {
  'eagle': eagle.Eagle(form=EAGLE),
  'n-gram': drafters.NGram(),
  'early exit': drafters.EarlyExit(
    apply=transformer.apply_fn(CONFIG.truncated(1))
  ),
  'draft model': drafters.DraftModel(
    apply=transformer.apply_fn(DRAFT), init_cache=kv_cache.initializer(DRAFT)
  ),
}


@pytest.mark.parametrize('drafter', list(DRAFTERS))
def test_a_round_copies_no_cache_and_converts_no_weight(drafter):
  weights, state, program = _compiled(drafter)
  cache = state.cache.keys[0].shape
  assert cache == (3, 2, 256, 4)
  found = speed.loop_operations(program)
  assert found['dynamic-update-slice', cache] or any(
    name == 'dynamic-update-slice' for name, _ in found
  )
  assert not found['copy', cache]
  if drafter == 'eagle':
    assert not found['copy', state.draft.features.shape]
  # A reduced head is made once, and is a weight from then on.
  head = state.draft.head if drafter == 'eagle' else ()
  for leaf in jax.tree.leaves((weights, head)):
    if leaf.ndim == 2:
      for shape in (leaf.shape, leaf.shape[::-1]):
        for operation in ('convert', 'copy', 'transpose'):
          assert not found[operation, shape], (operation, shape)


def test_layers_share_the_sines_of_their_rotations():
  _, _, program = _compiled('n-gram')
  # Of rounds of two lengths, each of several layers.
  assert CONFIG.num_layers > 1
  assert program.count(' sine(') == program.count(' cosine(') == 2


def _compiled(drafter):
  """Weights, the state before, and the text of the compiled loop."""
  decoder = speculative.Decoder(
    apply=transformer.apply_fn(CONFIG),
    drafter=DRAFTERS[drafter],
    schedule=schedule.Schedule(lengths=(0, 3)),
  )
  weights = drafters.Weights(fixtures.params(CONFIG), fixtures.params(DRAFT))
  if drafter == 'eagle':
    weights = eagle_models.weights(EAGLE, vocabulary=tuple(range(53)))
  prompts = [[1, 2, 3, 1, 2], [7], [4, 9, 9, 4, 9, 9, 4]]
  state = fixtures.begin(decoder, weights, CONFIG, prompts, 170)
  number, waiting = jnp.int32(0), jnp.bool_(False)
  program = speculative.run.lower(
    decoder, weights, state, number, jnp.ones(2), number, waiting
  )
  program = program.compile().as_text()
  return weights, state, program
