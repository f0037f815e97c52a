"""The distillation of a draft model against formulas and the drafter."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from efficiency_jax.decoding import draft_model
from efficiency_jax.decoding import draft_model_training
from efficiency_jax.decoding import drafters
from efficiency_jax.decoding import sampling
from efficiency_jax.models import cache as kv_cache
from efficiency_jax.models import transformer
from tests import fixtures

_VOCABULARY = jnp.asarray([3, 0, 9, 2, 10, 7], jnp.int32)
_OBJECTIVES = (
  ('forward_kl', 0.4),
  ('reverse_kl', 0.3),
  ('jensen_shannon', 0.2),
  ('total_variation', 0.1),
)


def _problem(reduced: bool = True, **fields):
  """A form, the target and its answers."""
  target = fixtures.config(**fields)
  params = fixtures.params(target)
  form = draft_model.Form(
    target=target, layers=(1,), vocabulary=6 if reduced else None
  )
  rng = np.random.default_rng(0)
  tokens = jnp.asarray(rng.integers(0, target.vocab_size, (3, 9)), jnp.int32)
  output, _ = jax.jit(transformer.apply_fn(target))(params, tokens)
  mask = jnp.asarray(rng.integers(0, 3, (3, 9)), jnp.float32)
  batch = {'tokens': tokens, 'hidden': output.hidden, 'loss_mask': mask}
  return form, params, batch, output.logits


def _softmax(x):
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize('tied', [True, False])
def test_the_loss_is_its_formula(tied):
  form, target, batch, logits = _problem(tie_embeddings=tied)
  own = draft_model.init(form, target)
  loss = jax.jit(
    functools.partial(
      draft_model_training.loss,
      form,
      vocabulary=_VOCABULARY,
      objectives=_OBJECTIVES,
      length=4,
    )
  )
  value, metrics = loss(own, target, batch)
  columns = np.asarray(_VOCABULARY)
  whole = _softmax(np.asarray(logits, float))
  p = _softmax(np.asarray(logits, float)[..., columns])
  weights = draft_model.weights(form, own, target, _VOCABULARY)
  apply = jax.jit(draft_model.apply_fn(form))
  mine = apply(weights, batch['tokens'])[0].logits
  q = _softmax(np.asarray(mine, float)[..., columns])
  weight = np.asarray(batch['loss_mask'])
  mean = lambda x: (x * weight).sum() / weight.sum()
  kl = lambda a, b: (a * np.log(a / b)).sum(-1)
  m = (p + q) / 2
  variation = np.abs(p - q).sum(-1) / 2
  expected = mean(
    0.4 * kl(p, q)
    + 0.3 * kl(q, p)
    + 0.2 * (kl(p, m) + kl(q, m)) / 2
    + 0.1 * variation
  )
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  np.testing.assert_allclose(metrics['loss'], [expected], rtol=1e-5)
  alpha = 1 - mean(variation)
  np.testing.assert_allclose(metrics['alpha'], [alpha], rtol=1e-5)
  np.testing.assert_allclose(
    metrics['agreement'], [mean(p.argmax(-1) == q.argmax(-1))], rtol=1e-5
  )
  np.testing.assert_allclose(
    metrics['tokens_per_run'], (1 - alpha**5) / (1 - alpha), rtol=1e-5
  )
  # What the target may say outside the vocabulary is never drafted.
  coverage = jnp.asarray(whole[..., columns].sum(-1), jnp.float32)
  same, covered = loss(own, target, {**batch, 'coverage': coverage})
  assert same == value
  alpha = mean(np.minimum(whole[..., columns], q).sum(-1))
  np.testing.assert_allclose(covered['alpha'], [alpha], rtol=1e-5)


def test_only_the_draft_is_trained():
  form, target, batch, _ = _problem()
  own = draft_model.init(form, target)

  @jax.jit
  def gradients(own, target, hidden):
    loss = lambda *x: draft_model_training.loss(
      form, *x[:2], {**batch, 'hidden': x[2]}, vocabulary=_VOCABULARY
    )[0]
    return jax.grad(loss, argnums=(0, 1, 2))(own, target, hidden)

  mine, theirs, states = gradients(own, target, batch['hidden'])
  assert all((g != 0).any() for g in jax.tree.leaves(mine))
  assert not any((g != 0).any() for g in jax.tree.leaves((theirs, states)))


@pytest.mark.parametrize('reduced', [True, False])
def test_the_target_itself_has_nothing_to_learn(reduced):
  form, target, batch, _ = _problem(reduced)
  form = draft_model.Form(
    target=form.target, layers=(0, 1), vocabulary=form.vocabulary
  )
  value, metrics = jax.jit(
    functools.partial(
      draft_model_training.loss,
      form,
      vocabulary=_VOCABULARY if reduced else None,
      objectives=_OBJECTIVES,
    )
  )(draft_model.init(form, target), target, batch)
  np.testing.assert_allclose(value, 0, atol=1e-5)
  np.testing.assert_allclose(metrics['alpha'], [1], atol=1e-5)
  np.testing.assert_allclose(metrics['tokens_per_run'], 4, atol=1e-4)
  assert metrics['agreement'] == 1


@pytest.mark.parametrize('name', [name for name, _ in _OBJECTIVES])
def test_every_objective_raises_acceptance(name):
  form, target, batch, _ = _problem()
  loss = functools.partial(
    draft_model_training.loss,
    form,
    target=target,
    batch=batch,
    vocabulary=_VOCABULARY,
    objectives=((name, 1.0),),
  )
  optimizer = optax.adam(1e-2)

  @jax.jit
  def train(own):
    def step(carry, _):
      own, state = carry
      gradient, metrics = jax.grad(loss, has_aux=True)(own)
      updates, state = optimizer.update(gradient, state)
      return (optax.apply_updates(own, updates), state), metrics['alpha'][0]

    return jax.lax.scan(step, (own, optimizer.init(own)), length=40)[1]

  alphas = train(draft_model.init(form, target))
  assert alphas[-1] > alphas[0] + 0.2


@pytest.mark.parametrize('reduced', [True, False])
def test_ranks_are_those_of_the_guesses_of_the_drafter(reduced):
  form, target, batch, _ = _problem(reduced)
  own = draft_model.init(form, target)
  vocabulary = _VOCABULARY if reduced else None
  weights = draft_model.weights(form, own, target, vocabulary)
  mask = jnp.ones((3, 9)).at[0, 4].set(0).at[1, :3].set(0)
  tokens = np.asarray(batch['tokens'])
  places, usable = jax.jit(
    functools.partial(
      draft_model_training.ranks, form, steps=3, vocabulary=vocabulary, most=4
    )
  )(own, target, {**batch, 'loss_mask': mask})
  # By sorting what the drafter would draw from after each prefix.
  apply = jax.jit(draft_model.apply_fn(form))
  logits = np.asarray(apply(weights, batch['tokens'])[0].logits)
  for row in range(3):
    for t in range(9):
      ends = range(t, t + 3)
      learnt = [e < 8 and bool(mask[row, e]) for e in ends]
      assert bool(usable[row, t]) == all(learnt)
      for k, e in enumerate(ends):
        if e < 8:
          order = np.argsort(-logits[row, e], kind='stable')[:4].tolist()
          right = tokens[row, e + 1]
          place = order.index(right) if right in order else -1
          assert places[row, t, k] == place
  # And the drafter itself, where it goes on from a text.
  drafter = drafters.DraftModel(
    apply=draft_model.apply_fn(form),
    init_cache=kv_cache.initializer(form.config),
  )
  context = fixtures.context([tokens[0, :5].tolist()], room=8)
  both = drafters.Weights(target, weights)

  @jax.jit
  def propose(context):
    state = drafter.init(both, context, 1)
    return drafter.propose(
      both, state, None, context, 1, sampling.Purpose.DRAFT
    )[0]

  assert propose(context).tokens[0, 0] == logits[0, 4].argmax()
