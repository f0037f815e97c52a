"""The rows of results that the records of `decode` add up to."""

from efficiency_jax.evaluation import decoding

COLUMNS = {
  'method': 'method',
  'prompts': 'prompts',
  'batch': 'batch',
  'nodes': 'nodes',
  'tokens_per_second': 'tokens/s',
  'speedup': 'speed-up',
  'predicted_speedup': 'predicted',
  'tokens_per_run': 'tokens/run',
  'acceptance_rate': 'acceptance',
  'exact': 'exact',
  'guarantee': 'guarantee',
  'peak_megabytes': 'peak MB',
}


def summarize(methods, records, config) -> list[dict]:
  """A row for each method, prompt set and batch, and for each category."""
  rows = []
  for name in config.prompts:
    for batch in config.batches:
      mine = [r for r in records if r[:2] == (name, batch)]
      every = set().union(*(categories for _, _, categories, _ in mine))
      parts = [(name, mine)]
      if batch == 1 and len(every) > 1:
        parts += [
          (f'{name}/{category}', [r for r in mine if category in r[2]])
          for category in sorted(every)
        ]
      rows += [
        row(method, part, batch, [r for *_, r in group], config)
        for part, group in parts
        for method in methods
      ]
  return rows


def groups(prompts, batch: int, config):
  """The prompts of each case: a batch, and a queue that waits for its places.

  A prompt that is decoded alone is a case alone.
  """
  if config.queue < 0:
    raise ValueError(f'--config.queue must be >= 0, got {config.queue}.')
  waiting = config.queue if batch > 1 else 0
  return decoding.batches(prompts, batch + waiting)


def turns_beside(prompts: int, group: int) -> int:
  """Turns of rounds to time beside each case: two where it is alone."""
  return 1 if prompts // group > 1 else 2


def row(method, part, batch, records, config) -> dict:
  """One method on one set of prompts."""
  turns = [turn for record in records for turn in record['turns']]
  seconds = decoding.round_seconds(turns)

  def predicted(record):
    """Of one case, by the rounds that were timed beside it."""
    beside = decoding.round_seconds(record['turns'])
    return decoding.predicted_speedup(
      [record['methods'][method.name]],
      [record['methods'][decoding.BASELINE]],
      beside[method.name],
      beside[decoding.BASELINE][0],
    )

  peak = records[0]['peak_bytes'][method.name]
  lengths = method.engine.decoder.schedule.lengths
  length = lengths[0] if len(lengths) == 1 else method.force_length
  return {
    'method': method.name,
    'baseline': decoding.BASELINE,
    'prompts': part,
    'batch': batch,
    'draft_length': method.force_length,
    # Tokens that the target reads in a round; none where that is adaptive.
    'nodes': None if length is None else length + 1,
    **decoding.summarize(
      [r['methods'][method.name] for r in records],
      [r['methods'][decoding.BASELINE] for r in records],
      seconds[method.name],
      seconds[decoding.BASELINE][0],
    ),
    'predicted_minimum': min(map(predicted, records)),
    'round_milliseconds': {
      str(g): 1e3 * s for g, s in seconds[method.name].items()
    },
    'peak_bytes': peak,
    'peak_megabytes': None if peak is None else round(peak / 1e6),
    'temperature': config.sampling.temperature,
    'seed': config.seed,
  }
