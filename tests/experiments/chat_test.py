"""Conversations with random weights, typed through a pipe."""

import io

import pytest

from efficiency_jax.conversation import Chat
from efficiency_jax.io import export
from efficiency_jax.io import untrained
from experiments import chat
from experiments import terminal

ROOM = 96


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return export.save(
    untrained.language_model(), tmp_path_factory.mktemp('chat') / 'model'
  )


@pytest.fixture
def talk(folder, monkeypatch, capsys):
  """Types lines, gives what was printed."""

  def run(*lines, flags=()):
    monkeypatch.setattr('sys.stdin', io.StringIO('\n'.join(lines)))
    chat.main(
      [
        'chat',
        f'--model={folder}',
        '--max_new_tokens=8',
        f'--context={ROOM}',
        '--nocompilation_cache',
        *flags,
      ]
    )
    return capsys.readouterr().out.splitlines()

  return run


def test_a_conversation_through_a_pipe(talk):
  lines = talk('hello', '', '/what', '/reset', 'hello', '/quit', 'unread')
  answers = [line for line in lines if 'tokens/s' in line]
  assert len(answers) == 2
  assert all('cut at --max_new_tokens' in line for line in answers)
  assert all('8 tokens' in line for line in answers)
  assert lines.count(f'[{terminal.HELP}]') == 1
  assert lines.count('[the conversation is forgotten]') == 1
  # A conversation that starts again starts with the same answer.
  middle = lines.index('[the conversation is forgotten]')
  assert lines[0] == lines[middle + 1]


def test_it_ends_with_its_input_and_says_what_it_left_out(talk):
  lines = talk('x' * ROOM, *['hello'] * 5, flags=['--show_tokens'])
  assert 'shorten it' in lines[0]
  assert any('oldest turns are left out' in line for line in lines)
  assert sum('tokens/s' in line for line in lines) == 5
  assert sum(line.startswith('run of the target:') for line in lines) == 5


def test_sampled_answers_repeat_with_their_seed(talk):
  said = lambda seed: talk(
    'hello', flags=['--drafter=plain', '--temperature=9', f'--seed={seed}']
  )[:-1]
  assert said(1) == said(1)
  assert said(1) != said(2)


def test_ctrl_c_stops_an_answer_and_not_the_conversation(talk, monkeypatch):
  answer = Chat.answer

  def interrupted(self, message):
    for piece in answer(self, message):
      yield piece
      if message == 'stop here':
        raise KeyboardInterrupt

  monkeypatch.setattr(Chat, 'answer', interrupted)
  lines = talk('stop here', 'go on')
  facts = [line for line in lines if 'tokens/s' in line]
  assert facts[0].endswith('stopped]')
  assert len(facts) == 2


def test_control_characters_do_not_reach_the_terminal(capsys):
  import rich.console

  terminal._print(
    rich.console.Console(), 'a\x1b[31m\x9bb\r\n\tc \N{PILE OF POO}'
  )
  assert capsys.readouterr().out == 'a[31mb\n\tc \N{PILE OF POO}'


@pytest.mark.parametrize(
  ('flag', 'message'),
  [
    ('--modle=x', "Unknown command line flag 'modle'. Did you mean: model ?"),
    ('hello', "'hello' is not a flag."),
    ('--model=no-such', "'no-such' is neither a file or folder"),
    ('--drafter=x', '--drafter=x is unknown; there are plain, n-gram, early'),
    ('--temperature=-1', 'temperature must be >= 0, got -1.'),
    ('--top_p=0', 'top_p must be in (0, 1], got 0.'),
    ('--max_new_tokens=0', 'flag --max_new_tokens=0: 0 is not a positive'),
    ('--max_new_tokens=90', 'max_new_tokens=90 leaves no room for a message'),
    ('--seed=x', "flag --seed=x: invalid literal for int() with base 10: 'x'"),
  ],
)
def test_a_wrong_flag_ends_in_one_line(talk, capsys, flag, message):
  with pytest.raises(SystemExit) as ended:
    talk('hello', flags=[flag])
  assert ended.value.code == 1
  error = capsys.readouterr().err.splitlines()
  assert len(error) == 1
  assert message in error[0]


def test_help(capsys):
  chat.main(['chat', '--help'])
  assert '--top_p=1.0: ' in capsys.readouterr().out
