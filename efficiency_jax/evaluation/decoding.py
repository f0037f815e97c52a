"""Measures ways of decoding against plain decoding, on the same prompts."""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import statistics as means
from typing import Any

import numpy as np

from efficiency_jax import engine as engine_lib
from efficiency_jax import generation
from efficiency_jax.decoding import cost_model
from efficiency_jax.decoding import cost_table
from efficiency_jax.decoding import sampling
from efficiency_jax.decoding import statistics
from efficiency_jax.engine import Engine
from efficiency_jax.generation import Generation

BASELINE = 'plain'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
  """A way of decoding: an engine, and perhaps one of its draft lengths."""

  name: str
  engine: Engine
  force_length: int | None = None


def measure(
  methods: Sequence[Method],
  prompts: Sequence[Sequence[int]],
  *,
  max_new_tokens: int,
  slots: int,
  settings: Mapping[str, Any],
  batch: int | None = None,
  seed: int = 0,
  repeats: int = 1,
  backwards: bool = False,
) -> dict[str, Generation]:
  """Decodes the prompts with every method in turn; the median run of each.

  With a `batch` that many are decoded at a time, and the others wait.

  The methods take turns, forwards and backwards, so that a machine that slows
  down slows all of them; the first turn may be one `backwards`. Compile first
  (`warm_up`): nothing here tells compilation from decoding.
  """
  runs: dict[str, list[Generation]] = {method.name: [] for method in methods}
  for repeat in range(repeats):
    turned = (repeat + backwards) % 2
    for method in reversed(methods) if turned else methods:
      runs[method.name].append(
        generation.generate(
          method.engine,
          prompts,
          max_new_tokens=max_new_tokens,
          slots=slots,
          batch=batch,
          force_length=method.force_length,
          seed=seed,
          **settings,
        )
      )
  middle = lambda several: sorted(several, key=lambda run: run.decode_seconds)[
    (len(several) - 1) // 2
  ]
  return {name: middle(several) for name, several in runs.items()}


def warm_up(
  methods: Sequence[Method],
  batch: int,
  slots: int,
  settings: Mapping[str, Any],
  *,
  waiting: bool = False,
) -> dict[str, int | None]:
  """Compiles all that `measure` and `time_rounds` will run for a batch size.

  What puts a prompt in a used place is compiled too, if prompts are `waiting`.

  Returns:
    For each method its peak bytes: weights, cache and scratch of the compiled
    loop; None where the compiler does not tell.
  """
  peaks = {}
  made = sampling.make(batch, **settings)
  for method in methods:
    prompts = [[0]] * (batch + waiting)
    generation.generate(
      method.engine,
      prompts,
      batch=batch,
      max_new_tokens=1,
      slots=slots,
      costs=np.ones(len(method.engine.decoder.schedule.lengths)),
      **settings,
    )
    memory = engine_lib.compiled(
      method.engine, made, batch, slots
    ).memory_analysis()
    peaks[method.name] = None
    if memory is not None:
      peaks[method.name] = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
      )
  return peaks


def time_rounds(
  methods: Sequence[Method],
  batch: int,
  slots: int,
  settings: Mapping[str, Any],
  *,
  turns: int = 1,
) -> list[dict[str, dict[int, float]]]:
  """Seconds of a round of each draft length of each method, in each turn.

  What a round costs over a plain step moves with the machine, so turns belong
  beside the decoding that they are to predict. They also go into the table that
  schedules decide by.
  """
  made = sampling.make(batch, **settings)
  engines = {id(method.engine): method.engine for method in methods}

  def turn():
    tables = {
      key: engine_lib.measure_costs(engine, made, batch, slots, repeats=1)
      for key, engine in engines.items()
    }
    named = lambda engine: dict(
      zip(
        engine.decoder.schedule.lengths,
        tables[id(engine)].tolist(),
        strict=True,
      )
    )
    return {method.name: named(method.engine) for method in methods}

  return [turn() for _ in range(turns)]


def round_seconds(
  turns: Sequence[Mapping[str, Mapping[int | str, float]]],
) -> dict[str, dict[int, float]]:
  """One table of those of several turns; methods are compared within a turn."""
  every = [(name, g) for name, table in turns[0].items() for g in table]
  costs = cost_table.combined(
    [[turn[name][g] for name, g in every] for turn in turns]
  )
  found = {name: {} for name, _ in every}
  for (name, g), seconds in zip(every, costs.tolist(), strict=True):
    found[name][int(g)] = seconds
  return found


def records(measured: Mapping[str, Generation]) -> dict[str, dict[str, Any]]:
  """The `record` of each method."""
  plain = measured[BASELINE]
  return {name: record(result, plain) for name, result in measured.items()}


def record(result: Generation, baseline: Generation) -> dict[str, Any]:
  """The measured facts of one case, as plain values that add up."""
  total = statistics.total(result.statistics)
  same = [
    np.array_equal(mine.tokens, plain.tokens)
    for mine, plain in zip(result.rows, baseline.rows, strict=True)
  ]
  return {
    **dataclasses.asdict(total),
    'rounds': sum(result.rounds.values()),
    'rounds_by_length': {str(k): v for k, v in result.rounds.items()},
    'seconds': result.decode_seconds,
    'prefill_seconds': result.prefill_seconds,
    'same_rows': sum(same),
    'num_rows': len(same),
    'guarantee': result.guarantee,
  }


def summarize(
  records: Sequence[Mapping[str, Any]],
  baseline: Sequence[Mapping[str, Any]],
  round_seconds: Mapping[int, float] | None = None,
  plain_seconds: float | None = None,
) -> dict[str, Any]:
  """One row of results from the records of several cases.

  The predicted speed-up is what the measured cost of each round and of a plain
  step make of the rounds that were run; `leviathan_speedup` is theorem 3.8 with
  the measured acceptance and the effective cost ratio of a fixed length.
  """
  fields = [field.name for field in dataclasses.fields(statistics.Statistics)]
  total = statistics.total(
    [
      statistics.Statistics(
        **{
          name: tuple(r[name]) if isinstance(r[name], list) else r[name]
          for name in fields
        }
      )
      for r in records
    ]
  )
  seconds = sum(r['seconds'] for r in records)
  plain = sum(r['seconds'] for r in baseline)
  ratios = [
    b['seconds'] / b['generated'] / (r['seconds'] / r['generated'])
    for r, b in zip(records, baseline, strict=True)
  ]
  plain_rate = sum(b['generated'] for b in baseline) / plain
  rate = total.generated / seconds
  same = sum(r['same_rows'] for r in records)
  row = {
    'tokens_per_second': rate,
    'speedup': rate / plain_rate,
    'speedup_minimum': min(ratios),
    'speedup_median': means.median(ratios),
    'speedup_maximum': max(ratios),
    'tokens_per_run': total.tokens_per_run,
    'accepted_drafts_per_run': total.accepted_drafts_per_run,
    'acceptance_rate': total.acceptance_rate,
    'alpha': total.alpha,
    'conditional_acceptance': list(total.conditional_acceptance),
    'generated_tokens': total.generated,
    'target_runs': total.runs,
    'exact': same == sum(r['num_rows'] for r in records),
    'exact_rows': same,
    'num_rows': sum(r['num_rows'] for r in records),
    'guarantee': records[0]['guarantee'],
    'seconds': seconds,
    'prefill_seconds': sum(r['prefill_seconds'] for r in records),
  }
  rounds = _rounds_by_length(records)
  row['rounds_by_length'] = {str(k): v for k, v in sorted(rounds.items())}
  if round_seconds and plain_seconds:
    row['predicted_speedup'] = predicted_speedup(
      records, baseline, round_seconds, plain_seconds
    )
    used = [g for g, count in rounds.items() if count]
    if len(used) == 1 and used[0] > 0 and total.tested_at:
      ratio = cost_model.effective_cost_ratio(
        round_seconds[used[0]], plain_seconds, used[0]
      )
      row['effective_cost_ratio'] = ratio
      row['leviathan_speedup'] = cost_model.improvement(
        total.alpha, used[0], ratio
      )
  return row


def predicted_speedup(
  records: Sequence[Mapping[str, Any]],
  baseline: Sequence[Mapping[str, Any]],
  round_seconds: Mapping[int, float],
  plain_seconds: float,
) -> float:
  """What the cost of each round makes of the rounds of some records."""
  rounds = _rounds_by_length(records)
  expected = sum(count * round_seconds[g] for g, count in rounds.items())
  plain_rounds = sum(b['rounds'] for b in baseline)
  return plain_rounds * plain_seconds / expected


def _rounds_by_length(records: Sequence[Mapping[str, Any]]) -> dict[int, int]:
  rounds: dict[int, int] = {}
  for one in records:
    for length, count in one['rounds_by_length'].items():
      rounds[int(length)] = rounds.get(int(length), 0) + count
  return rounds


def batches(items: Sequence[Any], size: int) -> Iterable[Sequence[Any]]:
  """Consecutive groups of `size`; a shorter last group is left out, unless it
  is the only one."""
  groups = [items[i : i + size] for i in range(0, len(items), size)]
  return [group for group in groups if len(group) == size] or groups[:1]
