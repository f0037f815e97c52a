"""The questions that `answer_chats` puts to a model, in batches."""

import itertools

import numpy as np

from efficiency_jax import answers
from efficiency_jax.data import chats
from efficiency_jax.data import prompts as prompt_sets
from efficiency_jax.data import splits


def batches(lm, config) -> list[tuple[str, str, float, list[list[int]]]]:
  """Name, split, temperature and prompts of each batch."""
  left_out = [
    prompt.message
    for name in config.left_out
    for prompt in prompt_sets.load(name)
  ]
  if config.chats == 'inline':
    asked = list(config.inline)
  else:
    if config.chats == 'own':
      held = _own(lm, config)
    else:
      held = chats.load(config.chats)
    kept = chats.without(held, left_out)
    asked = chats.user_prompts(
      kept, max_characters=config.max_characters, first_only=config.first_only
    )
  np.random.default_rng(config.seed).shuffle(asked)
  found = {'train': [], 'validation': []}
  wanted = {
    'train': config.num_train,
    'validation': config.num_validation,
  }
  for question in asked:
    held = splits.is_validation(question, config.validation_share)
    split = 'validation' if held else 'train'
    chat = [{'role': 'user', 'content': question}]
    ids = lm.tokenizer.encode(lm.tokenizer.apply_chat_template(chat))
    if (
      len(ids) <= config.max_prompt_tokens and len(found[split]) < wanted[split]
    ):
      found[split].append(ids)
    if all(len(found[s]) == wanted[s] for s in wanted):
      break
  groups = [
    (split, found[split][i : i + config.batch])
    for split in ('validation', 'train')
    for i in range(0, len(found[split]), config.batch)
  ]
  heat = itertools.cycle(config.temperatures)
  return [
    (f'{i:05d}', split, next(heat), group)
    for i, (split, group) in enumerate(groups)
  ]


def _own(lm, config) -> list[chats.Chat]:
  """Questions of the model itself, as chats without an answer."""
  found = answers.questions(lm, batch=config.batch, seed=config.seed)
  return [
    chats.Chat(name=f'own/{i}', turns=(chats.Turn(role='user', content=text),))
    for i, text in enumerate(itertools.islice(found, config.num_own))
  ]
