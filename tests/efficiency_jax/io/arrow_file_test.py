"""Arrow streams that pyarrow 26 wrote, whole and damaged."""

import base64
import zlib

import pytest

from efficiency_jax.io import arrow_file
from efficiency_jax.io import errors

pytestmark = pytest.mark.short

_KINDS = {'text': str, 'label': '<i8', 'idx': '<i4'}
# Four rows in batches of three and one; and two rows, one of them without text.
_STREAM, _GAP = (
  zlib.decompress(base64.b64decode(packed))
  for packed in (
    (
      'eNqNUkFqwzAQHEd2YoKgoYTiQw869gF5QI55Qq8ONqUQkksoOZac84FCoU/II3rpMU'
      '/oE3rsqequvGrF0uIsrMYjjXZXg733/h3ABBxjWAxRoKQviiwnDmIlrbmsgKF8pJwJ'
      'f6YaJB5wjansQXT3zQ6ncI7M0fKWaF2iLShX9bJdhX6WchT68b15mG9KfEi7NrBu3q'
      'xgvE7qMG7b3bb7zn/2qa3/lPk4LK7kpTZUhMlREdwixpi4Da9mLw7ikcFvjPB/TBRe'
      'Ct4oXeROcKHOF6pO9NUoXR+P3nBeUN5tNs26fj0+tO7j5Wm/rBsxW9358l2k9VgzkB'
      '7n+up6fM3O9LVUaP7wJ+VRV6nzKvEk9Uy/v4/He9FAo+by3b+Pb/rKPNI='
    ),
    (
      'eNpdUbsNwjAQfU4ciJCLFBFKQcEIKSgoWQVEhJCQaChSMgAjMBAlIzAGnXl2LuHkJ5'
      '3vnu9ve+/9B0CFgAUcZihQ0iKMJQdZydPKCeSUO2Uj/MkaDM5CjVruIHHnY4939MOs'
      'ebxU7FrFFpTL/tBdYj9Hmcd+IW8X56vJZ7x1kQ3zmiLolaoT9K3rb4Ntp3u29V+ZL8'
      'BhKZu6WBG5RUO1xYgFuYtbh7d4yBtl+GOubCO6nOoPaNRckJ01Rl6JbhN/m9Qd3zVL'
      '+mZJXsqNsq2a53S9HlO/zvHD3+EH7kglGw=='
    ),
  )
)


def _read(tmp_path, content, kinds=None):
  path = tmp_path / 'a.arrow'
  path.write_bytes(content)
  return arrow_file.read(path, kinds or _KINDS)


def test_columns_of_several_batches(tmp_path):
  assert _read(tmp_path, _STREAM) == {
    'text': ['good', '', 'naïve 🙂', 'bad'],
    'label': [1, 0, -2, 3],
    'idx': [0, 1, 2, 3],
  }


def test_the_mark_of_the_end_may_be_missing(tmp_path):
  assert _STREAM.endswith(b'\xff\xff\xff\xff\x00\x00\x00\x00')
  found = _read(tmp_path, _STREAM[:-8])
  assert found['idx'] == [0, 1, 2, 3]


@pytest.mark.parametrize('size', range(5, len(_STREAM) - 8, 44))
def test_a_file_that_breaks_off_is_an_error(tmp_path, size):
  with pytest.raises(errors.FileFormatError, match='not an Arrow stream') as e:
    _read(tmp_path, _STREAM[:size])
  assert '\n' not in str(e.value)


def test_nothing_is_read_behind_the_end(tmp_path):
  assert _read(tmp_path, _STREAM + b'x') == _read(tmp_path, _STREAM)


@pytest.mark.parametrize(
  ('content', 'problem'),
  [
    (b'nothing to see', 'no message begins at byte 0'),
    (_GAP, 'column text has gaps'),
  ],
)
def test_other_files_are_errors(tmp_path, content, problem):
  with pytest.raises(errors.FileFormatError, match=problem):
    _read(tmp_path, content)


def test_other_columns_are_an_error(tmp_path):
  kinds = {'text': str, 'label': '<i8'}
  with pytest.raises(errors.FileFormatError, match='has 7 buffers, not 5'):
    _read(tmp_path, _STREAM, kinds)
