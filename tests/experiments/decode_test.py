"""The whole experiment on random weights: its files, its rows, its promises."""

import json
import pathlib
import sys

import pytest

from efficiency_jax import engine
from experiments import decode

REQUIRED = (
  'method',
  'prompts',
  'batch',
  'tokens_per_second',
  'speedup',
  'tokens_per_run',
  'acceptance_rate',
  'exact',
  'peak_bytes',
)


def start(workdir: pathlib.Path, *overrides: str) -> None:
  decode.main(
    [
      'decode',
      '--config=configs/decode_tiny.py',
      f'--workdir={workdir}',
      '--nocompilation_cache',
      *overrides,
    ]
  )


@pytest.fixture(autouse=True, scope='module')
def _two_lengths():
  """Of five, each would be a compiled round more, for each batch size."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(engine, 'ADAPTIVE_LENGTHS', (0, 3))
    yield


@pytest.fixture(scope='module')
def orders() -> list[bool]:
  """Whether each case went through the methods backwards."""
  return []


@pytest.fixture(scope='module')
def finished(tmp_path_factory, orders) -> pathlib.Path:
  workdir = tmp_path_factory.mktemp('runs') / 'tiny'
  measure = decode.decoding.measure

  def watched(*args, **options):
    orders.append(options['backwards'])
    assert options['batch'] == min(2, len(args[1]))
    return measure(*args, **options)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(decode.decoding, 'measure', watched)
    start(workdir)
  return workdir


def test_no_method_is_always_the_first(finished, orders):
  """Cases go both ways in turn; the one of batch 2 is alone."""
  assert orders == [False, True, False, False]
  lines = (finished / 'rows.jsonl').read_text().splitlines()
  turns = [len(json.loads(line)['row']['turns']) for line in lines]
  assert turns == [1, 1, 1, 2]


def test_rows_carry_what_readers_compare(finished):
  results = json.loads((finished / 'results.json').read_text())
  rows = results['rows']
  assert {row['method'] for row in rows} == {
    'plain',
    'n-gram',
    'n-gram, 3',
    'early exit, 3',
    'draft model, 3',
  }
  assert {row['batch'] for row in rows} == {1, 2}
  for row in rows:
    assert not set(REQUIRED) - set(row)
    assert row['baseline'] == 'plain'
    assert row['exact'] is True, row['method']
    assert row['num_rows'] == 3
    if row['batch'] == 2:  # one case
      assert row['predicted_minimum'] == pytest.approx(row['predicted_speedup'])
    if row['method'] == 'plain':
      assert row['predicted_minimum'] == 1


def test_a_plain_run_emits_one_token_and_drafts_nothing(finished):
  rows = json.loads((finished / 'results.json').read_text())['rows']
  for row in rows:
    if row['method'] == 'plain':
      assert row['tokens_per_run'] == 1
      assert row['acceptance_rate'] is None
      assert row['speedup'] == 1


def test_report_and_figure_are_there(finished):
  report = (finished / 'report.md').read_text()
  assert '| n-gram ' in report
  assert 'speedup.png' in report
  assert (finished / 'speedup.png').read_bytes().startswith(b'\x89PNG')
  lines = (finished / 'log.jsonl').read_text().splitlines()
  assert len(lines) == 4
  assert all(json.loads(line) for line in lines)


def test_finished_cases_are_not_decoded_again(finished, monkeypatch):
  monkeypatch.setattr(
    decode.decoding, 'measure', lambda *a, **k: pytest.fail('decoded again')
  )
  before = json.loads((finished / 'results.json').read_text())['rows']
  start(finished)
  after = json.loads((finished / 'results.json').read_text())['rows']
  assert before == after


def test_trace_shows_runs_and_refusals(finished, capsys):
  start(finished, '--show_tokens')
  shown = capsys.readouterr().out
  assert 'accepted draft' in shown
  assert 'token of the target' in shown


@pytest.mark.parametrize(
  ('override', 'said'),
  [
    ('--config.sampling.temperature=-1.0', 'temperature must be >= 0'),
    ('--config.sampling.top_p=1.5', 'top_p must be in (0, 1]'),
    ('--config.methods=("n-gram, 0",)', 'draft_length must be >= 1'),
    ('--config.methods=("psychic",)', "drafter 'psychic' is unknown"),
    ('--config.max_new_tokens=100000', 'more than the context'),
    ('--config.queue=-1', 'queue must be >= 0'),
    ('--config.model=no/such/path.gguf', 'no/such/path.gguf'),
    ('--config.temperatur=1', 'temperatur'),
  ],
)
def test_mistakes_end_in_one_line(tmp_path, capsys, override, said):
  with pytest.raises(SystemExit) as stopped:
    start(tmp_path / 'run', override)
  assert stopped.value.code == 1
  error = capsys.readouterr().err.strip().splitlines()[-1]
  assert error.startswith('error: ')
  assert said in error
  assert not (tmp_path / 'run' / 'results.json').exists()


def test_another_config_is_refused(finished, capsys):
  before = (finished / 'results.json').read_bytes()
  with pytest.raises(SystemExit) as stopped:
    start(finished, '--config.max_new_tokens=7')
  assert stopped.value.code == 1
  assert 'max_new_tokens' in capsys.readouterr().err
  assert (finished / 'results.json').read_bytes() == before


if __name__ == '__main__':
  sys.exit(pytest.main([__file__]))
