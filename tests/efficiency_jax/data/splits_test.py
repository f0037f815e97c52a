"""A split depends on the text alone and has the share that was asked for."""

import math

import pytest

from efficiency_jax.data import splits

_TEXTS = [f'document {i}' for i in range(10_000)]


def _chosen(**options):
  return {text for text in _TEXTS if splits.is_validation(text, **options)}


@pytest.mark.parametrize('share', [0.01, 0.05, 0.5])
def test_the_share_is_kept(share):
  expected = share * len(_TEXTS)
  assert abs(len(_chosen(share=share)) - expected) < 4 * math.sqrt(expected)


def test_the_ends_of_the_share():
  assert _chosen(share=0) == set()
  assert _chosen(share=1) == set(_TEXTS)


def test_a_larger_share_holds_the_smaller():
  assert _chosen(share=0.05) < _chosen(share=0.2)


def test_seeds_split_independently():
  first, second = _chosen(share=0.2), _chosen(share=0.2, seed=1)
  assert abs(len(first & second) - 0.04 * len(_TEXTS)) < 80


def test_the_split_never_changes():
  # Results of old runs stay comparable only while these do not move.
  assert _chosen(share=0.0005) == {
    'document 6437',
    'document 7029',
    'document 9151',
  }


def test_any_text_can_be_split():
  assert splits.is_validation('half of a pair \ud83d', share=1)


@pytest.mark.parametrize('share', [-0.1, 1.1, float('nan')])
def test_a_wrong_share_is_refused(share):
  with pytest.raises(ValueError, match='share must be from 0 to 1'):
    splits.is_validation('x', share=share)
