"""Answers of a random model, made once for all experiments that read them."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficiency_jax.io import untrained
from experiments import answer_chats


@pytest.fixture(scope='session')
def tiny_answers(tmp_path_factory) -> pathlib.Path:
  """The folder that `configs/answer_chats.py:tiny` leaves."""
  workdir = tmp_path_factory.mktemp('answers') / 'run'
  answer_chats.main(
    [
      'answer_chats',
      '--config=configs/answer_chats.py:tiny',
      f'--workdir={workdir}',
      '--nocompilation_cache',
    ]
  )
  return workdir


@pytest.fixture(autouse=True, scope='package')
def _one_random_model():
  """Experiments begin with one random model; making it compiles a program.

  Each gets arrays of its own, which it may donate.
  """
  make = functools.cache(untrained.language_model)
  numbers = functools.cache(
    lambda *which: jax.tree.map(np.asarray, make(*which).params)
  )

  def language_model(config=None, seed=0):
    params = jax.tree.map(jnp.array, numbers(config, seed))
    return dataclasses.replace(make(config, seed), params=params)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(untrained, 'language_model', language_model)
    yield
