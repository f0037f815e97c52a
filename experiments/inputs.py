"""The model and the prompts that a config names."""

from efficiency_jax.data import prompts as prompt_sets
from efficiency_jax.io import pretrained
from efficiency_jax.io import untrained


def load_model(config) -> pretrained.LanguageModel:
  """The target; 'untrained' is a random tiny model."""
  if config.model == 'untrained':
    return untrained.language_model()
  return pretrained.load(config.model, dtype=config.dtype)


def load_prompts(lm, config, name):
  """Pairs of a prompt and its tokens, those that fit the context."""
  loaded = prompt_sets.load(name) if name != 'inline' else inline(config)
  pairs = []
  for prompt in loaded:
    chat = [{'role': 'user', 'content': prompt.message}]
    ids = lm.tokenizer.encode(lm.tokenizer.apply_chat_template(chat))
    if len(ids) <= config.max_prompt_tokens:
      pairs.append((prompt, ids))
  return pairs[: config.num_prompts] if config.num_prompts else pairs


def inline(config):
  """Prompts that stand in the config itself."""
  return [
    prompt_sets.Prompt(name=str(i), category='inline', message=message)
    for i, message in enumerate(config.inline)
  ]
