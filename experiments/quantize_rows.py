"""What `quantize` measures of one way to store a model."""

from collections.abc import Sequence
import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from efficiency_jax import leaves
from efficiency_jax import trees
from efficiency_jax.data import choices
from efficiency_jax.data import documents
from efficiency_jax.data import held_out
from efficiency_jax.data import splits
from efficiency_jax.decoding import sampling
from efficiency_jax.evaluation import accuracy
from efficiency_jax.evaluation import estimates
from efficiency_jax.evaluation import quality
from efficiency_jax.evaluation import speed
from efficiency_jax.io.pretrained import LanguageModel
from efficiency_jax.models import cache as kv_cache
from efficiency_jax.models import transformer
from efficiency_jax.quantization import recipes
from efficiency_jax.quantization import rules
from experiments import inputs

BASELINE = 'float32'

COLUMNS = {
  'method': 'method',
  'bits_per_weight': 'bits a weight',
  'megabytes': 'MB',
  'perplexity': 'perplexity',
  'perplexity_ci': '+-',
  'perplexity_ratio': 'over float32',
  'kl': 'KL, nats',
  'agreement': 'same best token',
  'lambada': 'LAMBADA',
  'hellaswag': 'HellaSwag',
  'arc-easy': 'ARC-Easy',
  'piqa': 'PIQA',
  'prefill_tokens_per_second': 'prefill tokens/s',
  'decode_tokens_per_second': 'decode tokens/s',
}


def calibration_text(lm: LanguageModel, config) -> list[np.ndarray]:
  """Batches of tokens of documents that nothing is measured on."""
  if config.model == 'untrained':
    texts = config.inline
  else:
    texts = [
      text
      for text in documents.load(config.calibration.text)
      if not splits.is_validation(text, share=held_out.SHARE)
    ]
  length, batch = config.length, config.calibration.batch
  needed = config.calibration.tokens
  stream = itertools.chain.from_iterable(
    lm.tokenizer.encode(text, special=False) for text in texts
  )
  tokens = np.array(list(itertools.islice(stream, needed)), np.int32)
  if len(tokens) < needed:
    raise ValueError(
      f'--config.calibration.tokens={needed} are more than the {len(tokens)} of'
      ' the text: ask for fewer.'
    )
  rows = tokens[: needed // (batch * length) * batch * length]
  return list(rows.reshape(-1, batch, length))


def reference(lm: LanguageModel, config) -> quality.Reference:
  """What the model in floats says about all texts, one after another."""
  names = texts(config)
  parts = [
    quality.reference(
      lm,
      config.inline if name == 'inline' else held_out.load(name),
      tokens=config.tokens // len(names),
      length=config.length,
      batch=config.batch,
    )
    for name in names
  ]
  joined = lambda *arrays: np.concatenate(arrays)
  return quality.Reference(
    lm=lm,
    windows=jax.tree.map(joined, *(part.windows for part in parts)),
    hidden=joined(*(part.hidden for part in parts)),
    perplexity=quality.Perplexity(
      nats=_joined([part.perplexity.nats for part in parts])
    ),
  )


def texts(config) -> tuple[str, ...]:
  """Names of what is measured on."""
  return config.texts if config.model != 'untrained' else ('inline',)


def store(
  lm: LanguageModel, method: str, batches
) -> tuple[LanguageModel, dict]:
  """A model stored by a recipe, and what that did to its weights."""
  if method == BASELINE:
    weights = trees.count_parameters(lm.params)
    size = trees.count_bytes(lm.params)
    return lm, {'bits_per_weight': 8 * size / weights, 'bytes': size}
  params, report = recipes.quantize(lm.config, lm.params, method, batches)
  sizes = [math.prod(leaf.shape) for leaf in report.leaves]
  mean = lambda field: float(
    np.average([getattr(leaf, field) for leaf in report.leaves], weights=sizes)
  )
  return dataclasses.replace(lm, params=params), {
    'bits_per_weight': report.bits_per_weight,
    'bytes': report.num_bytes,
    'weight_error': mean('mean_error'),
    'outlier_share': mean('outlier_share'),
  }


def measure_quality(
  lm: LanguageModel, known: quality.Reference, config
) -> dict:
  """Perplexity over all texts together and each, and KL from floats.

  Weights that multiply floats are made floats first: the numbers are the same
  but for the order of float operations, and all such models share a program.
  """
  # By its identity `kl` knows the reference, which is not run again.
  measured = lm if lm is known.lm else as_floats(lm)
  found = quality.kl(known, measured, batch=config.batch)
  nats = found.perplexity.nats
  loss = estimates.compare(nats, known.perplexity.nats)
  row = {
    'perplexity': found.perplexity.value,
    'perplexity_ci': (found.perplexity.high - found.perplexity.low) / 2,
    'perplexity_ratio': math.exp(loss.value),
    'perplexity_ratio_low': math.exp(loss.low),
    'perplexity_ratio_high': math.exp(loss.high),
    'kl': found.nats.value,
    'kl_ci': (found.nats.high - found.nats.low) / 2,
    'agreement': found.agreement.value,
    'tokens': found.perplexity.tokens,
  }
  # Each text has as many tokens to predict, in windows of its own.
  ends = np.cumsum(nats.counts)
  share = ends[-1] / len(texts(config))
  for number, name in enumerate(texts(config)):
    mine = (ends > number * share) & (ends <= (number + 1) * share)
    value = nats.sums[mine].sum() / nats.counts[mine].sum()
    row[f'perplexity_{name}'] = math.exp(value)
  return row


def as_floats(lm: LanguageModel) -> LanguageModel:
  """The same model, if only its weights are quantized, in plain arrays."""
  if leaves.rounds_activations(lm.params):
    return lm
  return dataclasses.replace(lm, params=rules.dequantize(lm.params))


def measure_accuracy(lm: LanguageModel, config) -> dict:
  """The share of right answers in each task, and its standard error."""
  lm, row = as_floats(lm), {}
  rng = np.random.default_rng(config.seed)
  for task, count in config.tasks.items():
    if not count:
      continue
    found = choices.last_words() if task == 'lambada' else choices.load(task)
    # The first ones are no fair sample of all.
    chosen = rng.permutation(len(found))[:count]
    found = [found[n] for n in np.sort(chosen)]
    if task == 'lambada':
      share = accuracy.last_word_accuracy(lm, found, batch=config.questions)
    else:
      both = accuracy.choice_accuracy(lm, found, batch=config.questions)
      share = both.normalized
    row |= {task: share.value, f'{task}_standard_error': share.standard_error}
  return row


def measure_speed(lm: LanguageModel, config) -> dict:
  """Tokens a second: of a prompt read at once, and of one after another."""
  lm = inputs.for_decoding(lm)
  apply = transformer.apply_fn(lm.config)
  prompt = jnp.arange(config.prompt, dtype=jnp.int32)[None] % 64
  dtype = lm.params['embedding']['table'].dtype
  slots = config.prompt + 2 * kv_cache.BLOCK
  cache = kv_cache.init(lm.config, 1, slots, dtype)

  after = {}  # what was read last is written on

  def read():
    after['prompt'] = _read(apply, lm.params, prompt, cache)
    return after['prompt']

  write = functools.partial(_write, apply, config.steps, lm.params)
  prefill = speed.measure(read, repeats=config.repeats)
  decode = speed.measure(write, *after['prompt'], repeats=config.repeats)
  return {
    'prefill_tokens_per_second': config.prompt / prefill.median_seconds,
    'decode_tokens_per_second': config.steps / decode.median_seconds,
  }


# Models stored in one form share these programs.


@functools.partial(jax.jit, static_argnames='apply')
def _read(apply, params, tokens, cache):
  """The token after a text, and the filled cache."""
  output, cache = apply(params, tokens, cache)
  return sampling.arg_max(output.logits[:, -1]), cache


@functools.partial(jax.jit, static_argnames=('apply', 'steps'))
def _write(apply, steps, params, token, cache):
  """The last one of some more tokens."""

  def step(_, carry):
    token, cache = carry
    output, cache = apply(params, token[:, None], cache)
    return sampling.arg_max(output.logits[:, 0]), cache

  return jax.lax.fori_loop(0, steps, step, (token, cache))[0]


def _joined(parts: Sequence[estimates.Estimate]) -> estimates.Estimate:
  """All units of several texts as one sample."""
  return estimates.Estimate(
    np.concatenate([part.sums for part in parts]),
    np.concatenate([part.counts for part in parts]),
  )
