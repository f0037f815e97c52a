"""The model and the prompts that a config names."""

import dataclasses

from efficiency_jax import panels
from efficiency_jax.data import prompts as prompt_sets
from efficiency_jax.io import pretrained
from efficiency_jax.io import untrained
from efficiency_jax.quantization import activations
from efficiency_jax.quantization import recipes


def load_model(config) -> pretrained.LanguageModel:
  """The target; 'untrained' is a random tiny model.

  `config.weights` names a recipe that its weights are stored by; '' stores them
  in `config.dtype`, and 'packed' as the GGUF file has them, to multiply rows of
  8 bits.
  """
  recipe = config.get('weights', '')
  if recipe == 'packed':
    lm = pretrained.load(config.model, dtype=config.dtype, packed=True)
    params = activations.in_integers(lm.params)
    return dataclasses.replace(lm, name=f'{lm.name}, packed', params=params)
  if recipe and recipes.needs_text(recipe):
    raise ValueError(
      f'--config.weights={recipe!r} needs calibration text, which is given by'
      ' experiments.quantize alone: take another one.'
    )
  if config.model == 'untrained':
    lm = untrained.language_model()
  else:
    lm = pretrained.load(config.model, dtype=config.dtype)
  if not recipe:
    return lm
  params, _ = recipes.quantize(lm.config, lm.params, recipe)
  return dataclasses.replace(lm, name=f'{lm.name}, {recipe}', params=params)


def for_decoding(lm: pretrained.LanguageModel) -> pretrained.LanguageModel:
  """The model as it decodes fastest here: see `panels.for_cpu`."""
  return dataclasses.replace(lm, params=panels.for_cpu(lm.params))


def weights(config, field: str) -> tuple[tuple[str, float], ...]:
  """Names and weights of the losses of a field, without those of weight 0."""
  chosen = tuple((name, w) for name, w in config[field].items() if w)
  if not chosen:
    raise ValueError(f'--config.{field} has no loss: give one a weight.')
  return chosen


def load_prompts(lm, config, name):
  """Pairs of a prompt and its tokens, those that fit the context.

  With `config.num_prompts` a set is cut into as many parts, and the middle one
  of each is taken, so that 8 questions of MT-bench are of its 8 categories; 0
  is all.
  """
  loaded = prompt_sets.load(name) if name != 'inline' else inline(config)
  pairs = []
  for prompt in loaded:
    chat = [{'role': 'user', 'content': prompt.message}]
    ids = lm.tokenizer.encode(lm.tokenizer.apply_chat_template(chat))
    if len(ids) <= config.max_prompt_tokens:
      pairs.append((prompt, ids))
  wanted = min(config.num_prompts or len(pairs), len(pairs))
  return [
    pairs[(2 * i + 1) * len(pairs) // (2 * wanted)] for i in range(wanted)
  ]


def slots(lm, config, prompts) -> int:
  """Buffer size for lists of pairs, those of every method of `decode`."""
  longest = max(len(ids) for pairs in prompts for _, ids in pairs)
  if longest + config.max_new_tokens > lm.config.max_positions:
    # Before anything of that size is compiled.
    raise ValueError(
      f'prompts of {longest} tokens and --config.max_new_tokens='
      f'{config.max_new_tokens} are more than the context of'
      f' {lm.config.max_positions}: shorten one of them.'
    )
  return max(128, 1 << (longest + config.max_new_tokens + 32).bit_length())


def inline(config):
  """Prompts that stand in the config itself."""
  return [
    prompt_sets.Prompt(name=str(i), category='inline', message=message)
    for i, message in enumerate(config.inline)
  ]
