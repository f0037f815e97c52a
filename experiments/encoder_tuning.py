"""Fine-tunes an encoder, then rounds it, or trains it on as rounded."""

from collections.abc import Sequence
import dataclasses
import functools

import ml_collections
import numpy as np

from efficiency_jax.data import sentiment
from efficiency_jax.data.sentiment import Sentence
from efficiency_jax.evaluation.encoders import SentimentHead
from efficiency_jax.io.pretrained_encoder import TextEncoder
from efficiency_jax.models import encoder as encoder_lib
from efficiency_jax.quantization import qat
from efficiency_jax.quantization import rules
from efficiency_jax.training import objectives
from efficiency_jax.training import optimizers
from experiments import encoder_bits
from experiments import encoder_rows as rows_of
from experiments import short_training
from experiments import workdir as workdirs
from experiments.encoder_rows import Row


@dataclasses.dataclass(frozen=True, eq=False)
class Tuning:
  """Fine-tuning with one seed: what is trained is trained when it is needed."""

  encoder: TextEncoder
  head: SentimentHead
  data: sentiment.Splits
  config: ml_collections.ConfigDict
  seed: int
  workdir: workdirs.Workdir

  @functools.cached_property
  def sentences(self) -> Row:
    """Drawn by the seed."""
    order = np.random.default_rng(self.seed).permutation(len(self.data.train))
    chosen = [self.data.train[n] for n in order[: self.config.sentences]]
    return arrays(self.encoder, chosen, self.config.length)

  def trained(self, params, epoch: int):
    """One more epoch."""
    seed = 1000 * epoch + self.seed
    return train(self.encoder, params, self.sentences, self.config, seed)

  @functools.cached_property
  def begun(self):
    """After one epoch, in floats: what float and rounded training share."""
    start = {'encoder': self.encoder.params, 'head': self.head}
    return self.trained(start, 0)

  @functools.cached_property
  def whole(self):
    """After two epochs in floats."""
    return self.trained(self.begun, 1)

  def as_rounded(self, chosen: Sequence[rules.Rule]):
    """After one epoch in floats and one as rounded, stored."""
    fake = qat.prepare(self.begun['encoder'], chosen)
    params = self.trained({**self.begun, 'encoder': fake}, 1)
    return {**params, 'encoder': qat.freeze(params['encoder'])}

  def rounded(self, chosen: Sequence[rules.Rule]):
    """Two epochs in floats, rounded afterwards."""
    stored, _ = rules.quantize(self.whole['encoder'], chosen)
    return {**self.whole, 'encoder': stored}

  def model(self, params) -> TextEncoder:
    """The encoder with trained parameters."""
    return dataclasses.replace(self.encoder, params=params['encoder'])

  def rows(self) -> list[Row]:
    """The fine-tuned model, and each method after and within training."""
    rows = [self._row('fine-tuned', lambda: self.whole)]
    for method in self.config.trained_methods:
      rows += self._both(method, rows_of.rules_for(self.encoder, method))
    return rows

  def sensitivities(self) -> dict[str, float]:
    """How much the fine-tuned model minds rounding, part by part."""
    make = lambda: encoder_bits.sensitivities(
      *(self.model(self.whole), self.whole['head'], self.sentences),
      self.config.hessian,
    )
    return self.workdir.row('sensitivities', make)

  def shared(self, shares: dict[str, dict[str, int]]) -> list[Row]:
    """Rows of each way to share bits out, after and within training."""
    rows = []
    for name, bits in shares.items():
      name = f'{name} {self.config.hessian.mean:g} bits'
      rows += self._both(name, encoder_bits.by_bits(self.encoder, bits))
    return rows

  def _both(self, name: str, chosen: Sequence[rules.Rule]) -> list[Row]:
    return [
      self._row(f'{name}, rounded', lambda: self.rounded(chosen)),
      self._row(f'{name}, trained', lambda: self.as_rounded(chosen)),
    ]

  def _row(self, name: str, params) -> Row:
    def make():
      of = params()
      row = rows_of.measure(self.model(of), of['head'], self.data.test)
      bits = encoder_bits.bits_per_weight(of['encoder'])
      return {'method': name, 'seed': self.seed, 'bits': bits, **row}

    return self.workdir.row(f'{name}, seed {self.seed}', make)


def run(encoder, head, data, config, workdir):
  """Rows of all seeds, the sensitivities of the first, and bits by them."""
  tuned, shared, sensitivities, shares = [], [], {}, {}
  for seed in range(config.seed, config.seed + config.seeds):
    one = Tuning(encoder, head, data, config, seed, workdir)
    tuned += one.rows()
    if not shares:
      sensitivities = one.sensitivities()
      shares = encoder_bits.allocations(encoder, sensitivities, config.hessian)
    shared += one.shared(shares)
  return tuned, shared, sensitivities, shares


def arrays(encoder: TextEncoder, of: Sequence[Sentence], length: int) -> Row:
  """Sentences as rows for `objectives.classification`, cut to `length`."""
  cut = dataclasses.replace(encoder, max_length=length)
  tokens, mask = cut.batch([s.text for s in of], multiple=length)
  return {'tokens': tokens, 'mask': mask, 'positive': rows_of.labels(of)}


def train(encoder: TextEncoder, params: Row, rows: Row, config, seed: int):
  """One epoch over the rows: `encoder` and `head` of `params`, trained."""
  total = short_training.num_steps(rows, config.batch, 1)
  optimizer = optimizers.make(
    optimizers.OptimizerConfig(
      learning_rate=config.learning_rate,
      steps=total,
      warmup_steps=total // 10,
      weight_decay=0.01,
      beta2=0.999,
    )
  )
  loss = objectives.classification(encoder_lib.apply_fn(encoder.config))
  return short_training.fit(
    loss, optimizer, params, rows, batch=config.batch, seed=seed
  )
