"""Tests of the training loop: the same run, however often it is stopped."""

import json
import os
import signal

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from efficiency_jax.binarization import latent
from efficiency_jax.binarization import networks
from efficiency_jax.data import packing
from efficiency_jax.data import rows
from efficiency_jax.io import checkpoint
from efficiency_jax.training import logbook
from efficiency_jax.training import loop
from efficiency_jax.training import objectives
from efficiency_jax.training import optimizers
from efficiency_jax.training import state as train_state
from efficiency_jax.training import step as steps

pytestmark = pytest.mark.short

OPTIMIZER = optimizers.make(
  optimizers.OptimizerConfig(learning_rate=0.05, steps=12, warmup_steps=2)
)
PLAN = loop.Plan(steps=12, evaluate_every=4, save_every=3)


def _loss(params, frozen, batch):
  """A bigram model of tokens."""
  logits = params['w'][batch['tokens'][:, :-1]] + frozen
  log_p = jax.nn.log_softmax(logits)
  target = batch['tokens'][:, 1:, None]
  return -jnp.take_along_axis(log_p, target, axis=-1).mean(), {}


STEP = jax.jit(steps.make_step(_loss, OPTIMIZER))


class Batches:
  """Endless random batches that know where they are."""

  def __init__(self, stop=None, at=None, act=None):
    self.place, self.stop, self.at, self.act = 0, stop, at, act

  def __next__(self):
    if self.place == self.stop:
      raise StopIteration
    if self.place == self.at:
      self.act()
    rng = np.random.default_rng(self.place)
    self.place += 1
    return {'tokens': jnp.asarray(rng.integers(0, 5, (4, 9)) % 3)}

  def get_state(self):
    return {'place': self.place}

  def set_state(self, state):
    self.place = state['place']


def _start():
  return train_state.create({'w': jnp.zeros((5, 5))}, OPTIMIZER, averaged=True)


def _evaluate(params, frozen):
  return {'loss': float(jnp.square(params['w'] - 1).sum())}


def _fit(folder, batches=None, plan=PLAN, step=STEP, **options):
  store = checkpoint.Store(folder=folder / 'checkpoints')
  return loop.fit(
    step,
    _start(),
    jnp.float32(0),
    Batches() if batches is None else batches,
    plan,
    store=store,
    evaluate=_evaluate,
    logbook=logbook.Logbook(folder / 'log.jsonl'),
    **options,
  )


def _curve(folder):
  """The logged lines without the times, which no two runs share."""
  lines = (folder / 'log.jsonl').read_text().splitlines()
  lines = [json.loads(line) for line in lines]
  drop = {'seconds', 'tokens_per_second', 'model_flops_utilization'}
  return [{k: v for k, v in x.items() if k not in drop} for x in lines]


def test_it_learns_and_writes_every_step(tmp_path):
  seen = []
  state = _fit(tmp_path, report=lambda step, numbers: seen.append(step))
  assert state.step == 12
  assert seen == list(range(1, 13))
  losses = [x['loss'] for x in _curve(tmp_path) if 'loss' in x]
  assert len(losses) == 12
  assert losses[-1] < losses[0] - 0.1
  validations = [x for x in _curve(tmp_path) if 'validation_loss' in x]
  assert [x['step'] for x in validations] == [4, 8, 12]


def test_a_terminated_run_goes_on_bit_for_bit(tmp_path):
  whole, parts = tmp_path / 'whole', tmp_path / 'parts'
  whole.mkdir()
  parts.mkdir()
  expected = _fit(whole)
  terminate = lambda: os.kill(os.getpid(), signal.SIGTERM)
  before = signal.getsignal(signal.SIGTERM)
  for at in (5, 9):
    with pytest.raises(loop.Preempted, match=f'step {at + 1} of 12'):
      _fit(parts, Batches(at=at, act=terminate))
    assert signal.getsignal(signal.SIGTERM) is before
  state = _fit(parts)
  chex.assert_trees_all_equal(state, expected)
  assert _curve(parts) == _curve(whole)


def test_a_killed_run_goes_on_bit_for_bit(tmp_path):
  whole, parts = tmp_path / 'whole', tmp_path / 'parts'
  whole.mkdir()
  parts.mkdir()
  expected = _fit(whole)

  def die():
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    _fit(parts, Batches(at=7, act=die))
  store = checkpoint.Store(folder=parts / 'checkpoints')
  assert store.latest() == 6  # steps after it are done again
  chex.assert_trees_all_equal(_fit(parts), expected)
  assert _curve(parts) == _curve(whole)


def test_a_finished_run_stays_as_it_is(tmp_path):
  first = _fit(tmp_path)
  again = _fit(tmp_path, Batches(stop=0))
  chex.assert_trees_all_equal(first, again)


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, caplog):
  expected = _fit(tmp_path)
  store = checkpoint.Store(folder=tmp_path / 'checkpoints')
  latest = store.folder / str(store.latest())
  data = max(latest.rglob('d/*'), key=lambda path: path.stat().st_size)
  data.write_bytes(b'')
  state = _fit(tmp_path)
  assert 'damaged' in caplog.text
  chex.assert_trees_all_equal(state, expected)


@pytest.mark.parametrize('name', ['loss', 'gradient'])
def test_numbers_that_are_not_finite_end_the_run(tmp_path, name):
  def loss(params, frozen, batch):
    value, _ = _loss(params, 0.0, batch)
    late = params['w'].max() > 0.1
    if name == 'loss':
      return jnp.where(late, jnp.nan, value), {}
    # A root at zero: its value is fine and its gradient is not.
    root = lambda w: jnp.sqrt(jnp.sum(0 * w))
    return value + jax.lax.cond(late, root, lambda w: 0.0, params['w']), {}

  step = jax.jit(steps.make_step(loss, OPTIMIZER))
  with pytest.raises(loop.TrainingError, match=r'is (nan|inf) at step \d+'):
    _fit(tmp_path, step=step, plan=loop.Plan(steps=40, save_every=1))
  store = checkpoint.Store(folder=tmp_path / 'checkpoints')
  tree, _ = store.load(store.latest(), _start())
  assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(tree))


def test_data_that_runs_out_is_said(tmp_path):
  with pytest.raises(loop.TrainingError, match='ended after 5 of 12 steps'):
    _fit(tmp_path, Batches(stop=5))


def test_data_must_know_its_place_to_be_resumed(tmp_path):
  with pytest.raises(ValueError, match='get_state and set_state'):
    _fit(tmp_path, iter([]))


def test_the_utilization_is_the_share_of_the_peak(tmp_path):
  plan = loop.Plan(
    steps=5, tokens_per_step=32, flops_per_step=2e6, peak_flops=1e9
  )
  _fit(tmp_path, plan=plan)
  lines = (tmp_path / 'log.jsonl').read_text().splitlines()
  lines = [json.loads(line) for line in lines]
  assert 'seconds' not in lines[0]  # it holds the compilation
  timed = [line for line in lines if 'seconds' in line]
  assert timed
  for line in timed:
    share = 2e6 / line['seconds'] / 1e9
    assert line['model_flops_utilization'] == pytest.approx(share)
    assert line['tokens_per_second'] == pytest.approx(32 / line['seconds'])


def test_grain_batches_are_resumed(tmp_path):
  texts = [np.random.default_rng(i).integers(0, 5, 9) for i in range(24)]
  make = lambda: iter(packing.batches(texts, batch_size=4, length=9, seed=1))
  whole, parts = tmp_path / 'whole', tmp_path / 'parts'
  whole.mkdir()
  parts.mkdir()
  expected = _fit(whole, make())
  with pytest.raises(loop.TrainingError):
    _fit(parts, make(), step=_failing_at(8))
  chex.assert_trees_all_equal(_fit(parts, make()), expected)


def test_drawn_signs_and_dropout_are_resumed(tmp_path):
  # What a network of drawn signs draws depends on the step, not on the run.
  config = networks.Config(
    image=(4, 4, 1),
    hidden=(16,),
    weights='stochastic',
    activations='stochastic',
    dropout=(0.1, 0.3),
  )
  rng = np.random.default_rng(0)
  images = {
    'pixels': rng.integers(0, 256, (24, 4, 4, 1), np.uint8),
    'labels': rng.integers(0, 10, 24).astype(np.int32),
  }
  optimizer = optax.chain(optax.adam(1e-2), latent.clip())
  update = jax.jit(steps.make_step(objectives.binarized(config, 1), optimizer))
  params = networks.init(config, jax.random.key(0))

  def fit(folder, step=update):
    return loop.fit(
      step,
      train_state.create(params, optimizer),
      None,
      iter(rows.batches(images, batch_size=4, seed=1)),
      loop.Plan(steps=12, save_every=3),
      store=checkpoint.Store(folder=folder),
    )

  expected = fit(tmp_path / 'whole')
  with pytest.raises(loop.TrainingError, match='step 6 is saved'):
    fit(tmp_path / 'parts', _failing_at(8, update))
  chex.assert_trees_all_equal(fit(tmp_path / 'parts'), expected)


def _failing_at(number, update=STEP):
  def step(state, frozen, batch):
    state, metrics = update(state, frozen, batch)
    bad = state.step >= number
    return state, {**metrics, 'loss': jnp.where(bad, jnp.nan, metrics['loss'])}

  return step
