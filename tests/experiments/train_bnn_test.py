"""Binarized networks on generated images: rows, figures, and mistakes."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from configs import bnn_mnist_quick
from configs import train_bnn as configs
from efficiency_jax.binarization import networks
from experiments import bnn_methods
from experiments import bnn_rows
from experiments import train_bnn

CONFIGS = pathlib.Path(__file__).parents[2] / 'configs'


def _run(workdir, *flags):
  train_bnn.main(
    [
      'train_bnn',
      f'--config={CONFIGS / "train_bnn.py"}:tiny',
      f'--workdir={workdir}',
      '--nocompilation_cache',
      *flags,
    ]
  )


def test_networks_learn_and_fold(tmp_path):
  _run(tmp_path / 'run', '--config.methods=("float", "BNN")')
  rows = json.loads((tmp_path / 'run/results.json').read_text())['rows']
  real, binary = rows
  for row in rows:
    # Of ten patterns; by chance 90 % are wrong.
    assert row['test_error'] < 30
    assert len(row['curve']) == 10
    assert row['validation_error'] == min(row['curve'])
    assert row['milliseconds_batch_1'] > 0
  assert binary['folded_matches'] is True
  assert 'folded_matches' not in real
  assert binary['bytes'] < real['bytes'] / 8
  report = (tmp_path / 'run/report.md').read_text()
  for name in ('errors.png', 'weights_of_float.png', 'weights_of_BNN.png'):
    assert name in report
    assert (tmp_path / 'run' / name).stat().st_size > 5_000


@pytest.mark.network
@pytest.mark.skipif(not shutil.which('apt-get'), reason='needs apt-get')
def test_a_trained_network_folds_the_same_on_all_real_images(tmp_path):
  train_bnn.main(
    [
      'train_bnn',
      f'--config={CONFIGS / "train_bnn.py"}:fashion',
      f'--workdir={tmp_path / "run"}',
      '--config.methods=("BNN",)',
      '--config.hidden=(128, 64)',
      '--config.epochs=1',
      '--config.seeds=1',
    ]
  )
  (row,) = json.loads((tmp_path / 'run/results.json').read_text())['rows']
  # All 70,000 images, the 10,000 official test images among them.
  assert row['folded_matches'] is True
  assert row['test_error'] < 30


def test_a_border_is_black():
  config = configs.get_config('tiny')
  plain = bnn_rows.load(config)
  config.border = 2
  wide = bnn_rows.load(config)
  for part in ('train', 'validation', 'test'):
    inside, whole = getattr(plain, part), getattr(wide, part)
    assert whole.pixels.shape[1:] == (12, 12, 1)
    np.testing.assert_array_equal(whole.pixels[:, 2:-2, 2:-2], inside.pixels)
    assert whole.pixels.sum(dtype=int) == inside.pixels.sum(dtype=int)
    np.testing.assert_array_equal(whole.labels, inside.labels)


def test_latent_weights_stay_clipped_where_they_should():
  config = configs.get_config('tiny')
  config.epochs = 2
  data = bnn_rows.load(config)
  network = bnn_methods.network('BNN', (8, 8, 1), config)
  trained = {
    clipped: bnn_rows.train(
      network, data, config, 0, bnn_methods.Method({}, clipped=clipped)
    )
    for clipped in (True, False)
  }
  largest = {
    clipped: max(
      float(np.abs(layer['kernel']).max()) for layer in best.params.values()
    )
    for clipped, best in trained.items()
  }
  assert largest[True] <= 1 < largest[False]
  # The same weights before training and after each epoch, which move.
  history = trained[True].weights
  assert len(history) == 3
  begun = networks.init(network, jax.random.key(0))
  assert set(history[0]) == set(begun)
  for name, first in history[0].items():
    assert np.isin(first, begun[name]['kernel']).all()
    assert (history[2][name] != first).any()


@pytest.mark.parametrize(
  'name',
  [
    'BNN, Bop',
    *(
      pytest.param(name, marks=pytest.mark.slow)
      for name in ('BNN, shifts alone', 'BNN stochastic', 'BNN, real ends')
    ),
  ],
)
def test_other_ways_learn(name):
  config = configs.get_config('tiny')
  data = bnn_rows.load(config)
  network = bnn_methods.network(name, (8, 8, 1), config)
  best = bnn_rows.train(network, data, config, 0, bnn_methods.named(name))
  assert best.error < 0.5  # by chance 0.9


@pytest.mark.parametrize(
  ('flag', 'message'),
  [
    (
      '--config.methods=("BNN2",)',
      "there is no method 'BNN2'; there are float",
    ),
    ('--config.epochs=0', '--config.epochs must be >= 1, got 0'),
    ('--config.border=-1', '--config.border must be >= 0, got -1'),
    ('--config.batch=401', '--config.batch=401 is more than the 400 images'),
    ('--config.last_learning_rate=1.0', 'must be above 0 and at most 0.003'),
    ('--config.data=cifar10', "images 'cifar10' are in no package registry"),
    (
      '--config.convolutions=((4, True), (4, True), (4, True), (4, True))',
      'cannot be halved',
    ),
  ],
)
def test_mistakes_are_one_line(tmp_path, capsys, flag, message):
  with pytest.raises(SystemExit):
    _run(tmp_path / 'run', flag)
  error = capsys.readouterr().err.splitlines()[-1]
  assert error.startswith('error: ')
  assert message in error


def test_configs_name_methods_that_exist():
  for variant in ('', *configs.VARIANTS):
    config = configs.get_config(variant)
    size = 28 + 2 * config.border
    for method in config.methods:
      bnn_methods.network(method, (size, size, 1), config)
  for method in bnn_mnist_quick.get_config().methods:
    bnn_methods.named(method)
  with pytest.raises(ValueError, match='variants are'):
    configs.get_config('small')
