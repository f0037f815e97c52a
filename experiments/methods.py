"""The ways of decoding that a config names."""

import functools
import pathlib

from efficiency_jax import drafts
from efficiency_jax import engine as engine_lib
from efficiency_jax import quantized_drafts
from efficiency_jax.decoding import dynamic_tree
from efficiency_jax.decoding import medusa
from efficiency_jax.decoding import token_tree
from efficiency_jax.evaluation import decoding
from efficiency_jax.io import pretrained
from efficiency_jax.models import layers

# Which script trains the drafts of a drafter.
_SCRIPTS = {
  'medusa': 'train_medusa',
  'eagle': 'train_draft',
  'draft model': 'distill_draft',
}


def _grown(nodes: int, draft) -> tuple[dynamic_tree.Growth, ...]:
  # What a layer guesses it has to read; heads guess everything at once.
  expand, highest = 4, 5
  if isinstance(draft, medusa.TrainedHeads):
    expand, highest = 8, draft.form.count
  height = min(nodes, highest)
  return (dynamic_tree.Growth(nodes=nodes, expand=expand, height=height),)


def _chain(length: int, draft) -> tuple[()]:
  del length, draft  # any
  return ()


# Trees in place of those that a draft comes with; chains may adapt theirs.
_SHAPED = {
  ('medusa', 'chain'): lambda length, _: (token_tree.chain(length),),
  ('medusa', 'dynamic'): _grown,
  ('eagle', 'chain'): _chain,
  ('eagle', 'dynamic'): _grown,
  ('draft model', 'chain'): _chain,
  ('draft model', 'dynamic'): _grown,
}


def build(lm, config) -> list[decoding.Method]:
  """The methods that `config.methods` names; plain is always the first."""
  greedy = config.sampling.temperature == 0
  cache_dtype = config.get('cache', '') or None
  chosen = [
    decoding.Method(
      name='plain',
      engine=engine_lib.prepare(
        lm,
        drafter='plain',
        greedy=greedy,
        verifier=None if greedy else 'coupled',
        stop=config.stop,
        cache_dtype=cache_dtype,
      ),
    )
  ]
  find = functools.cache(lambda kind: trained(lm, config, kind))
  for name in config.methods:
    kind, _, length = name.partition(', ')
    drafter, _, verifier = kind.partition('/')
    drafter, shape = _shape(drafter)
    if length and not length.isdigit():
      raise ValueError(
        f"methods are 'drafter', 'drafter/verifier' or either with ', LENGTH':"
        f' {name!r} is none of them.'
      )
    heads = find(drafter) if drafter in _SCRIPTS else None
    untrained = drafter == 'draft model' and heads is None
    trees = None
    if shape:
      if (drafter, shape) not in _SHAPED:
        shaped = ', '.join(map(' '.join, _SHAPED))
        raise ValueError(f'{name!r}: of shapes there are {shaped}.')
      form = _SHAPED[drafter, shape]
      if not length and form is not _chain:
        raise ValueError(f'{name!r} needs a length: {name}, 7.')
      trees = form(int(length or 0), heads)
    engine = engine_lib.prepare(
      lm,
      drafter=drafter,
      heads=heads,
      trees=trees,
      draft=cut(lm, config.draft_every) if untrained else None,
      exit_layers=config.exit_layers if drafter == 'early exit' else None,
      draft_length=int(length) if length else None,
      verifier=verifier or None,
      greedy=greedy,
      stop=config.stop,
      cache_dtype=cache_dtype,
    )
    chosen.append(decoding.Method(name=name, engine=engine))
    # Fixed lengths are those of the same compiled program.
    lengths = config.fixed_lengths if kind == 'n-gram' and not length else ()
    chosen += [
      decoding.Method(name=f'{name}, {g}', engine=engine, force_length=g)
      for g in lengths
    ]
  return chosen


def _shape(drafter: str) -> tuple[str, str]:
  """'eagle chain' is the drafter 'eagle' with the shape 'chain'."""
  for shape in ('chain', 'dynamic'):
    if drafter.endswith(f' {shape}'):
      return drafter.removesuffix(f' {shape}'), shape
  return drafter, ''


def cut(lm, every: int) -> pretrained.LanguageModel:
  """Every n-th layer of the target, as it is: an untrained draft model."""
  kept = range(0, lm.config.num_layers, every)
  config, params = layers.select(lm.config, lm.params, kept)
  return pretrained.LanguageModel(
    name=f'{lm.name}, every {every}th layer',
    config=config,
    params=params,
    tokenizer=lm.tokenizer,
  )


def trained(lm, config, kind: str) -> drafts.Draft | None:
  """The trained draft that `config.trained` names: a shipped one, or a file.

  None if it names none and there is an untrained draft model to take.
  """
  flag = kind.replace(' ', '_')
  name = config.trained.get(flag, '')
  if not name and kind == 'draft model':
    return None
  if not name:
    raise ValueError(
      f'method {kind!r} needs --config.trained.{flag}: the name of a shipped'
      f' draft, or a file that {_SCRIPTS[kind]} made.'
    )
  is_file = name.endswith('.safetensors')
  if is_file and not pathlib.Path(name).is_file():
    raise ValueError(f'--config.trained.{flag}={name}: there is no such file.')
  draft = drafts.load(name if is_file else drafts.shipped(name), lm)
  wanted = drafts.kind(draft)
  if wanted != kind:
    raise ValueError(
      f'--config.trained.{flag}={name} is a draft for {wanted!r}.'
    )
  recipe = config.trained.get('weights', '')
  return quantized_drafts.quantize(draft, lm, recipe) if recipe else draft
