"""The ways of decoding that a config names."""

import dataclasses
import functools
import pathlib

from efficiency_jax import drafts
from efficiency_jax import engine as engine_lib
from efficiency_jax.decoding import token_tree
from efficiency_jax.evaluation import decoding
from efficiency_jax.io import pretrained
from efficiency_jax.models import layers


def build(lm, config) -> list[decoding.Method]:
  """The methods that `config.methods` names; plain is always the first."""
  greedy = config.sampling.temperature == 0
  kept = range(0, lm.config.num_layers, config.draft_every)
  shallow, params = layers.select(lm.config, lm.params, kept)
  draft = pretrained.LanguageModel(
    name=f'{lm.name}, every {config.draft_every}th layer',
    config=shallow,
    params=params,
    tokenizer=lm.tokenizer,
  )
  chosen = [
    decoding.Method(
      name='plain',
      engine=engine_lib.prepare(
        lm,
        drafter='plain',
        greedy=greedy,
        verifier=None if greedy else 'coupled',
        stop=config.stop,
      ),
    )
  ]
  trained = functools.cache(lambda kind: _trained(lm, config, kind))
  for name in config.methods:
    kind, _, length = name.partition(', ')
    drafter, _, verifier = kind.partition('/')
    drafter, _, _ = drafter.partition(' chain')
    if length and not length.isdigit():
      raise ValueError(
        f"methods are 'drafter', 'drafter/verifier' or either with ', LENGTH':"
        f' {name!r} is none of them.'
      )
    heads = trained(drafter) if drafter in ('medusa', 'eagle') else None
    if name.startswith(f'{drafter} chain'):
      if heads is None or not length:
        raise ValueError(
          f"{name!r}: chains are 'medusa chain, LENGTH' or 'eagle chain,"
          " LENGTH'."
        )
      shapes = (token_tree.chain(int(length)),) if drafter == 'medusa' else ()
      heads = dataclasses.replace(heads, trees=shapes)
    engine = engine_lib.prepare(
      lm,
      drafter=drafter,
      heads=heads,
      draft=draft if drafter == 'draft model' else None,
      exit_layers=config.exit_layers if drafter == 'early exit' else None,
      draft_length=int(length) if length else None,
      verifier=verifier or None,
      greedy=greedy,
      stop=config.stop,
    )
    chosen.append(decoding.Method(name=name, engine=engine))
    # Fixed lengths are those of the same compiled program.
    lengths = config.fixed_lengths if kind == 'n-gram' and not length else ()
    chosen += [
      decoding.Method(name=f'{name}, {g}', engine=engine, force_length=g)
      for g in lengths
    ]
  return chosen


def _trained(lm, config, kind: str) -> drafts.Draft:
  """The trained draft that `config.trained` names: a shipped one, or a file."""
  name = config.trained.get(kind, '')
  if not name:
    script = {'eagle': 'train_draft', 'medusa': 'train_medusa'}[kind]
    raise ValueError(
      f'method {kind!r} needs --config.trained.{kind}: the name of a shipped'
      f' draft, or a file that {script} made.'
    )
  is_file = name.endswith('.safetensors')
  if is_file and not pathlib.Path(name).is_file():
    raise ValueError(f'--config.trained.{kind}={name}: there is no such file.')
  draft = drafts.load(name if is_file else drafts.shipped(name), lm)
  wanted = drafts.kind(draft)
  if wanted != kind:
    raise ValueError(
      f'--config.trained.{kind}={name} is a draft for {wanted!r}.'
    )
  return draft
