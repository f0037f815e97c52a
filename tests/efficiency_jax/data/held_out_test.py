"""Held-out texts are whole documents, and the other half is left alone."""

import pytest

from efficiency_jax.data import choices
from efficiency_jax.data import documents
from efficiency_jax.data import held_out
from efficiency_jax.data import splits


def test_passages_are_whole(monkeypatch):
  words = [
    choices.LastWord(context='He saw the', continuation=' signs'),
    choices.LastWord(context='It was a', continuation=' dog'),
  ]
  monkeypatch.setattr(choices, 'last_words', lambda: words)
  assert held_out.load('lambada') == ['He saw the signs', 'It was a dog']


def test_half_of_the_documents_is_held_out(monkeypatch):
  texts = [f'document {number}' for number in range(1000)]
  asked = []

  def load(name):
    asked.append(name)
    return texts

  monkeypatch.setattr(documents, 'load', load)
  found = held_out.load('brown')
  assert asked == ['brown']
  # Half of 1000 drawn independently: one sigma is 16.
  assert abs(len(found) - 500) < 64
  kept = set(found)
  assert found == [text for text in texts if text in kept]
  # Splits of a smaller share keep nothing for validation that is not here.
  for share in (0.05, held_out.SHARE):
    held = {text for text in texts if splits.is_validation(text, share=share)}
    assert held <= kept


def test_unknown_texts_are_refused():
  with pytest.raises(ValueError, match="held-out text 'gcide' is unknown"):
    held_out.load('gcide')


@pytest.mark.network
@pytest.mark.parametrize(
  ('name', 'count', 'characters'),
  [
    ('brown', 268, 3_185_820),
    ('lambada', 5153, 1_656_192),
    ('perl-manual', 103, 4_492_296),
    ('python-manual', 2662, 6_928_440),
  ],
)
def test_the_real_texts_have_their_known_size(name, count, characters):
  found = held_out.load(name)
  assert (len(found), sum(map(len, found))) == (count, characters)
