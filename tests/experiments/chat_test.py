"""Conversations with random weights, typed through a pipe."""

import io

import jax
import pytest

from efficiency_jax import engine as engine_lib
from efficiency_jax import generation
from efficiency_jax.io import export
from efficiency_jax.io import pretrained
from efficiency_jax.io import untrained
from experiments import chat

ROOM = 96
SLOTS = ROOM + 1 + engine_lib.ADAPTIVE_LENGTHS[-1]  # as chats have it


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return export.save(
    untrained.language_model(), tmp_path_factory.mktemp('chat') / 'model'
  )


@pytest.fixture(scope='module')
def lm(folder):
  return pretrained.load(folder)


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


def _last(pieces):
  *_, last = pieces
  return last


def test_an_answer_continues_the_whole_conversation(lm):
  talked = chat.Chat(lm, max_new_tokens=8, context=ROOM)
  messages = []
  for message in ('one', 'two'):
    got = _last(talked.answer(message))
    messages.append({'role': 'user', 'content': message})
    prompt = lm.tokenizer.apply_chat_template(messages)
    expected = generation.generate(
      talked.engine, [prompt], max_new_tokens=8, slots=SLOTS
    )
    assert got.rows[0].tokens.tolist() == expected.rows[0].tokens.tolist()
    messages.append({'role': 'assistant', 'content': got.texts[0]})
    assert talked.messages == messages


def test_answers_run_the_programs_that_were_compiled_at_the_start(lm, caplog):
  talked = chat.Chat(lm, max_new_tokens=8, context=ROOM)
  talked.compile()
  with jax.log_compiles():
    for message in ('a', 'a longer message', 'b'):
      _last(talked.answer(message))
    quiet = len(caplog.records)
    jax.jit(lambda x: x + 1)(1.0)  # the log would have shown one
  messages = [record.getMessage() for record in caplog.records]
  compiled = [m.startswith('Compiling') for m in messages]
  assert not any(compiled[:quiet])
  assert any(compiled[quiet:])


def test_a_full_context_forgets_the_oldest_turns(lm):
  talked = chat.Chat(lm, max_new_tokens=8, context=ROOM)
  forgotten = []
  for number in range(5):
    _last(talked.answer(f'message {number}'))
    forgotten.append(talked.forgotten)
  assert forgotten[0] == 0
  assert max(forgotten) >= 1
  assert talked.messages[-2]['content'] == 'message 4'
  assert talked.messages[0]['role'] == 'user'
  with pytest.raises(chat.TooLongError, match='shorten it, raise --context'):
    next(talked.answer('x' * ROOM))
  assert talked.messages[-2]['content'] == 'message 4'


def test_a_conversation_through_a_pipe(talk):
  lines = talk('hello', '', '/what', '/reset', 'hello', '/quit', 'unread')
  answers = [line for line in lines if 'tokens/s' in line]
  assert len(answers) == 2
  assert all('cut at --max_new_tokens' in line for line in answers)
  assert all('8 tokens' in line for line in answers)
  assert lines.count(f'[{chat.HELP}]') == 1
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


def test_ctrl_c_stops_an_answer_and_not_the_conversation(talk, monkeypatch, lm):
  answer = chat.Chat.answer

  def interrupted(self, message):
    for piece in answer(self, message):
      yield piece
      if message == 'stop here':
        raise KeyboardInterrupt

  monkeypatch.setattr(chat.Chat, 'answer', interrupted)
  lines = talk('stop here', 'go on')
  facts = [line for line in lines if 'tokens/s' in line]
  assert facts[0].endswith('stopped]')
  assert len(facts) == 2


def test_control_characters_do_not_reach_the_terminal(capsys):
  import rich.console

  chat._print(rich.console.Console(), 'a\x1b[31m\x9bb\r\n\tc \N{PILE OF POO}')
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
    ('--max_new_tokens=90', '--max_new_tokens=90 leaves no room for a message'),
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
