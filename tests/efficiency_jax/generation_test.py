"""Text in, text out: the promises of `generate`, mostly on random weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficiency_jax import engine as engine_lib
from efficiency_jax import generation
from efficiency_jax import panels
from efficiency_jax import trees
from efficiency_jax.data import prompts
from efficiency_jax.decoding import medusa
from efficiency_jax.decoding import sampling
from efficiency_jax.decoding import token_tree
from efficiency_jax.io import pretrained
from efficiency_jax.io import untrained
from efficiency_jax.io.pretrained import LanguageModel
from efficiency_jax.models import layers
from efficiency_jax.models.config import DecoderConfig
from tests import fixtures


@pytest.fixture(scope='module')
def lm():
  return untrained.language_model()


@pytest.fixture(scope='module')
def other(lm):
  turned = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)[::-1]), lm.params)
  return dataclasses.replace(lm, name='other', params=turned)


PROMPTS = ['to be or not to be or', 'héllo', 'x']


@pytest.fixture(scope='module')
def heads(lm):
  """Two heads that guess at random, with two trees."""
  form = medusa.Heads(count=2)
  width, size = lm.config.width, lm.config.vocab_size
  key = jax.random.key(3)
  params = medusa.init(form, key, width, size, {})
  rng = np.random.default_rng(3)
  params = jax.tree.map(
    lambda x: jnp.asarray(rng.standard_normal(x.shape), jnp.float32), params
  )
  shapes = [(0,)], [(0,), (1,), (0, 0), (0, 1), (1, 0)]
  trees = tuple(map(token_tree.from_choices, shapes))
  return medusa.TrainedHeads(form=form, params=params, trees=trees)


@pytest.mark.short
def test_methods_agree_on_greedy_text(lm, other, heads):
  plain = generation.generate(lm, PROMPTS, drafter='plain', max_new_tokens=20)
  assert plain.guarantee == 'greedy'
  for choices in (
    {'drafter': 'n-gram', 'draft_length': 3},
    {'drafter': 'early exit', 'exit_layers': 1, 'draft_length': 2},
    {'drafter': 'draft model', 'draft': other, 'draft_length': 2},
    # Of one program.
    {'drafter': 'medusa', 'heads': heads, 'force_length': 5},
    {'drafter': 'medusa', 'heads': heads},
  ):
    mine = generation.generate(lm, PROMPTS, max_new_tokens=20, **choices)
    for a, b in zip(plain.rows, mine.rows, strict=True):
      np.testing.assert_array_equal(a.tokens, b.tokens)
      assert a.text == b.text
      assert a.finish == b.finish
      assert len(b.run) == len(b.accepted_draft) == len(b.tokens)
      assert b.run[-1] == b.statistics.runs
      assert b.accepted_draft.sum() == b.statistics.accepted


def test_greedy_text_is_penalized_whatever_the_drafter(lm, heads):
  """Arg max of penalized logits, where the loop makes no point mass of them."""
  ids = [[1, 2, 3, 1, 2], [7]]
  expected = fixtures.plain_texts(
    lm.config,
    lm.params,
    ids,
    16,
    settings=sampling.make(2, repetition_penalty=1.7),
  )
  options = {'max_new_tokens': 16, 'stop': False}
  bare = generation.generate(lm, ids, drafter='plain', **options)
  for choices in (
    {'drafter': 'plain'},
    {'drafter': 'n-gram', 'draft_length': 3},
    {'drafter': 'early exit', 'exit_layers': 1, 'draft_length': 2},
    {'drafter': 'medusa', 'heads': heads, 'draft_length': 5},
  ):
    made = generation.generate(
      lm, ids, repetition_penalty=1.7, **options, **choices
    )
    assert made.guarantee == 'greedy'
    for prompt, row, text in zip(ids, made.rows, expected, strict=True):
      np.testing.assert_array_equal([*prompt, *row.tokens], text)
  assert any(
    not np.array_equal(a.tokens, b.tokens)
    for a, b in zip(bare.rows, made.rows, strict=True)
  )


def test_adaptive_lengths_measure_their_costs_once(lm, monkeypatch):
  monkeypatch.setattr(engine_lib, '_COSTS', {})
  engine = engine_lib.prepare(lm, drafter='n-gram')
  result = generation.generate(engine, PROMPTS[:1], max_new_tokens=30)
  assert set(result.rounds) == set(engine_lib.ADAPTIVE_LENGTHS)
  assert sum(result.rounds.values()) == result.statistics[0].runs
  tables = lambda: [
    table
    for key, found in engine_lib._COSTS.items()
    if key[0] == engine.decoder
    for table in found
  ]
  costs = tables()
  assert len(costs) == 1
  assert (costs[0] > 0).all()
  generation.generate(engine, PROMPTS[:1], max_new_tokens=20)
  again = tables()
  assert len(again) == 1
  assert again[0] is costs[0]
  forced = generation.generate(
    engine, PROMPTS[:1], max_new_tokens=30, force_length=7
  )
  assert forced.rounds[7] == sum(forced.rounds.values())
  np.testing.assert_array_equal(forced.rows[0].tokens, result.rows[0].tokens)


def test_coupled_text_is_the_plain_text_of_the_seed(lm):
  settings = {'temperature': 1.0, 'top_p': 0.9, 'seed': 3, 'max_new_tokens': 24}
  coupled = {'verifier': 'coupled'}
  plain = generation.generate(
    lm, PROMPTS, drafter='plain', **coupled, **settings
  )
  drafted = generation.generate(
    lm, PROMPTS, drafter='n-gram', draft_length=3, **coupled, **settings
  )
  assert plain.guarantee == drafted.guarantee == 'seed'
  assert plain.texts == drafted.texts
  # A row's text does not depend on the rows behind it.
  alone = generation.generate(
    lm, PROMPTS[:1], drafter='plain', **coupled, **settings
  )
  assert alone.texts[0] == plain.texts[0]


def test_streaming_ends_with_the_whole_text(lm):
  whole = generation.generate(
    lm, PROMPTS, drafter='n-gram', draft_length=3, max_new_tokens=20
  )
  pieces = list(
    generation.stream(
      lm, PROMPTS, drafter='n-gram', draft_length=3, max_new_tokens=20, rounds=2
    )
  )
  assert len(pieces) > 1
  assert pieces[-1].texts == whole.texts
  for before, after in zip(pieces, pieces[1:], strict=False):
    for a, b in zip(before.texts, after.texts, strict=True):
      assert b.startswith(a)


def test_stop_strings_cut_text_and_end_the_row(lm):
  whole = generation.generate(
    lm, PROMPTS[:1], drafter='plain', max_new_tokens=40
  )
  stop = whole.texts[0][6:8]
  cut = generation.generate(
    lm, PROMPTS[:1], drafter='plain', max_new_tokens=40, stop_strings=[stop]
  )
  assert cut.texts[0] == whole.texts[0][: whole.texts[0].find(stop)]
  assert cut.rows[0].finish == 'stop'
  assert len(cut.rows[0].tokens) < 40


def test_token_ids_are_prompts_too(lm):
  ids = lm.tokenizer.encode(PROMPTS[0])
  one = generation.generate(lm, [ids], drafter='plain', max_new_tokens=8)
  two = generation.generate(lm, PROMPTS[:1], drafter='plain', max_new_tokens=8)
  assert one.texts == two.texts


@pytest.mark.parametrize(
  ('change', 'said'),
  [
    ({'drafter': 'telepathy'}, "drafter 'telepathy' is unknown"),
    ({'verifier': 'vibes'}, "verifier 'vibes' is unknown"),
    ({'draft_length': 0}, 'draft_length must be >= 1'),
    ({'drafter': 'draft model'}, 'needs draft='),
    ({'drafter': 'early exit', 'exit_layers': 9}, 'num_layers must be in'),
    ({'drafter': 'medusa'}, 'needs heads='),
    ({'temperature': -1.0}, 'temperature must be >= 0'),
    ({'temperature': 1.0, 'top_p': 0.0}, r'top_p must be in \(0, 1\]'),
    ({'temperature': 1.0, 'verifier': 'greedy'}, 'needs temperature 0'),
    ({'max_new_tokens': 0}, 'max_new_tokens must be >= 1'),
    ({'max_new_tokens': 5000}, 'more than the context'),
    ({'slots': 16}, 'slots must be >='),
    ({'stop_strings': ['']}, 'stop_strings'),
    ({'prompts': []}, 'at least one prompt'),
    ({'prompts': ['']}, 'prompt 0 is empty'),
    ({'prompts': [[999]]}, 'tokens outside'),
  ],
)
def test_mistakes_name_the_argument_and_the_remedy(lm, change, said):
  arguments = {'prompts': PROMPTS[:1], 'drafter': 'n-gram', **change}
  with pytest.raises(ValueError, match=said) as raised:
    generation.generate(lm, arguments.pop('prompts'), **arguments)
  assert '\n' not in str(raised.value)


def test_a_draft_with_another_tokenizer_is_refused(lm):
  config = DecoderConfig(
    vocab_size=300,
    width=16,
    ffn_width=16,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=16,
  )
  stranger = untrained.language_model(config)
  with pytest.raises(ValueError, match='different tokenizers'):
    engine_lib.prepare(lm, drafter='draft model', draft=stranger)


def test_heads_of_another_target_and_trees_there_are_not_are_refused(lm, heads):
  with pytest.raises(
    ValueError, match=r'no tree has 3 tokens: there are \[1, 5'
  ):
    engine_lib.prepare(lm, drafter='medusa', heads=heads, draft_length=3)
  narrow = jax.tree.map(lambda x: x[:5, :5], heads.params)
  heads = dataclasses.replace(heads, params=narrow)
  with pytest.raises(ValueError, match='heads are for hidden states of 5'):
    engine_lib.prepare(lm, drafter='medusa', heads=heads)


def test_sampled_trees_keep_the_text_of_the_seed(lm, heads):
  settings = {'temperature': 1.0, 'top_p': 0.9, 'seed': 4, 'max_new_tokens': 20}
  plain = generation.generate(
    lm, PROMPTS, drafter='plain', verifier='coupled', **settings
  )
  mine = generation.generate(
    lm, PROMPTS, drafter='medusa', heads=heads, **settings
  )
  assert mine.guarantee == 'seed'
  assert mine.texts == plain.texts


def test_a_cut_of_the_target_drafts_and_all_layers_draft_perfectly(lm):
  def cut(kept):
    config, params = layers.select(lm.config, lm.params, kept)
    return LanguageModel(
      name='cut', config=config, params=params, tokenizer=lm.tokenizer
    )

  choices = {'drafter': 'draft model', 'draft_length': 3, 'max_new_tokens': 16}
  whole = generation.generate(lm, PROMPTS, draft=cut([0, 1]), **choices)
  for row in whole.rows:
    assert row.statistics.acceptance_rate == 1.0
  half = generation.generate(lm, PROMPTS, draft=cut([1]), **choices)
  assert half.texts == whole.texts
  with pytest.raises(ValueError, match='layers must name blocks'):
    cut([2])


@pytest.fixture(scope='module')
def smollm2():
  return pretrained.load('smollm2-135m')


def _chats(lm, name: str, count: int) -> list[list[int]]:
  chats = []
  for prompt in prompts.load(name):
    message = [{'role': 'user', 'content': prompt.message}]
    ids = lm.tokenizer.encode(lm.tokenizer.apply_chat_template(message))
    if len(ids) <= 180:
      chats.append(ids)
  return chats[:count]


@pytest.mark.model
@pytest.mark.parametrize('drafter', ['n-gram', 'early exit', 'draft model'])
@pytest.mark.parametrize(
  'layout', [lambda params: params, panels.for_cpu], ids=['matrices', 'panels']
)
def test_real_text_is_the_plain_text_with_every_drafter(
  smollm2, drafter, layout
):
  smollm2 = dataclasses.replace(smollm2, params=layout(smollm2.params))
  config, params = layers.select(
    smollm2.config, smollm2.params, range(0, 30, 3)
  )
  draft = dataclasses.replace(smollm2, config=config, params=params)
  choices = {'draft': draft} if drafter == 'draft model' else {}
  plain = engine_lib.prepare(smollm2, drafter='plain')
  drafted = engine_lib.prepare(
    smollm2, drafter=drafter, draft_length=3, **choices
  )
  chats = _chats(smollm2, 'mt-bench', 16) + _chats(smollm2, 'humaneval', 16)
  assert len(chats) == 32
  for i in range(0, 32, 8):
    texts = [
      generation.generate(
        engine, chats[i : i + 8], max_new_tokens=40, slots=256
      )
      for engine in (plain, drafted)
    ]
    for mine, theirs in zip(texts[1].rows, texts[0].rows, strict=True):
      np.testing.assert_array_equal(mine.tokens, theirs.tokens)


@pytest.mark.model
def test_real_bfloat16_text_is_the_plain_text_of_the_same_width(smollm2):
  half = dataclasses.replace(
    smollm2, params=trees.cast(smollm2.params, jnp.bfloat16)
  )
  chats = _chats(half, 'humaneval', 4)
  wide, drafted = (
    generation.generate(
      half, chats, drafter=drafter, draft_length=3, max_new_tokens=24, slots=256
    )
    for drafter in ('plain', 'n-gram')
  )
  assert sum(s.accepted for s in drafted.statistics) > 0
  for mine, theirs in zip(drafted.rows, wide.rows, strict=True):
    np.testing.assert_array_equal(mine.tokens, theirs.tokens)
