"""Ways to decode the same prompts, timed in turns and compared fairly."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import itertools
import math

import numpy as np

from experiments import display
from experiments import workdir as workdirs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
  """What one timed decoding of some prompts did.

  Attributes:
    tokens: New tokens of each prompt.
    prefill_seconds: Reading the prompts.
    decode_seconds: Writing after that.
    decoded: Tokens that were written in `decode_seconds`.
    steps: Passes of the model in `decode_seconds`.
    bytes_per_second: That memory could be read with just before or after.
  """

  tokens: list[list[int]]
  prefill_seconds: float
  decode_seconds: float
  decoded: int
  steps: int
  bytes_per_second: float = math.nan

  @property
  def tokens_per_second(self) -> float:
    """Of all rows of a batch together."""
    return self.decoded / self.decode_seconds

  @property
  def milliseconds_per_step(self) -> float:
    """Of one pass of the model and all that belongs to it."""
    return 1e3 * self.decode_seconds / self.steps


Candidate = Callable[[], Sample]


def total(samples: Sequence[Sample]) -> Sample:
  """Prompts that were decoded one after another, as one sample."""
  add = lambda field: sum(getattr(sample, field) for sample in samples)
  return Sample(
    tokens=[row for sample in samples for row in sample.tokens],
    prefill_seconds=add('prefill_seconds'),
    decode_seconds=add('decode_seconds'),
    decoded=add('decoded'),
    steps=add('steps'),
  )


def take_turns(
  candidates: Mapping[str, Candidate],
  *,
  repeats: int,
  workdir: workdirs.Workdir,
  label: str,
  read: Callable[[], float],
) -> dict[str, list[Sample]]:
  """Samples of every candidate, every other turn in the opposite order.

  A first turn, in which programs are compiled and memory is touched, is not
  among the `repeats` samples of each. Memory is shared with whatever else the
  machine does, so `read` measures its bytes a second between all samples.
  """
  samples = {name: [] for name in candidates}
  turns = [
    (turn, name)
    for turn in range(repeats + 1)
    for name in (list(candidates) if turn % 2 else reversed(candidates))
  ]
  before = read()
  for turn, name in display.track(turns, label):
    sample = candidates[name]()
    after = read()
    sample = dataclasses.replace(sample, bytes_per_second=max(before, after))
    before = after
    if turn:
      samples[name].append(sample)
      rate = sample.tokens_per_second
      entry = {'group': label, 'turn': turn, 'method': name}
      workdir.log(entry | {'tokens_per_second': rate})
  return samples


def summary(
  samples: Sequence[Sample], baseline: Sequence[Sample]
) -> workdirs.Row:
  """Medians over the turns, and the speed-up as the median of their ratios.

  A spread is an interquartile range. `texts_equal` counts the prompts after
  which both wrote the same tokens, `tokens_equal` is the mean number of tokens
  until they part.
  """
  rates = [sample.tokens_per_second for sample in samples]
  pairs = zip(samples, baseline, strict=True)
  gains = [s.tokens_per_second / b.tokens_per_second for s, b in pairs]
  texts = list(zip(samples[-1].tokens, baseline[-1].tokens, strict=True))
  alike = [
    len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*two))))
    for two in texts
  ]
  median = lambda field: float(np.median([getattr(s, field) for s in samples]))
  return {
    'tokens_per_second': float(np.median(rates)),
    'tokens_per_second_spread': _spread(rates),
    'speedup': float(np.median(gains)),
    'speedup_spread': _spread(gains),
    'milliseconds_per_step': median('milliseconds_per_step'),
    'tokens_per_byte': float(
      np.median([s.tokens_per_second / s.bytes_per_second for s in samples])
    ),
    'tokens_per_step': samples[-1].decoded / samples[-1].steps,
    'prefill_seconds': median('prefill_seconds'),
    'texts_equal': sum(a == b for a, b in texts),
    'texts': len(texts),
    'tokens_equal': float(np.mean(alike)),
  }


def _spread(values: Sequence[float]) -> float:
  return float(np.subtract(*np.percentile(values, (75, 25))))
