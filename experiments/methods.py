"""The ways of decoding that a config names."""

from efficiency_jax import engine as engine_lib
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
  for name in config.methods:
    kind, _, length = name.partition(', ')
    drafter, _, verifier = kind.partition('/')
    if length and not length.isdigit():
      raise ValueError(
        f"methods are 'drafter', 'drafter/verifier' or either with ', LENGTH':"
        f' {name!r} is none of them.'
      )
    engine = engine_lib.prepare(
      lm,
      drafter=drafter,
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
