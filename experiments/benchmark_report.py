"""The tables of `benchmark_decode`."""

from collections.abc import Sequence

from experiments import display
from experiments import workdir as workdirs

SPEEDS = {
  'method': 'method',
  'batch': 'batch',
  'tokens_per_second': 'tokens/s',
  'tokens_per_second_spread': 'spread',
  'speedup': 'speed-up',
  'speedup_spread': 'spread',
  'own_speedup': 'over own plain',
  'milliseconds_per_step': 'ms/step',
  'tokens_per_step': 'tokens/step',
  'roofline_fraction': 'of roofline',
  'weight_bytes': 'weight bytes',
  'prefill_seconds': 'prefill s',
  'texts_equal': 'equal texts',
  'texts': 'of',
  'note': 'note',
}
SHOWN = (
  'method',
  'batch',
  'tokens_per_second',
  'speedup',
  'own_speedup',
  'milliseconds_per_step',
  'tokens_per_step',
  'roofline_fraction',
  'note',
)
PROGRAMS = {
  'method': 'method',
  'batch': 'batch',
  'cache_copies_in_loop': 'cache copies in loop',
  'weight_converts_in_loop': 'weight converts in loop',
  'temporary_bytes': 'temporary bytes',
}
ROUNDS = {
  'drafter': 'method',
  'batch': 'batch',
  'draft_length': 'draft length',
  'milliseconds_per_round': 'ms/round',
  'relative_cost': 'cost over plain',
}


def of_methods(rows: Sequence[workdirs.Row]) -> list[workdirs.Row]:
  """Rows of ways of decoding, measured or not."""
  return [row for row in rows if 'texts' in row or 'note' in row]


def report(config, rows: Sequence[workdirs.Row], image: str) -> str:
  """The tables that a person reads."""
  read = rows[0]['bytes_per_second'] / 1e9
  load = rows[0]['load_average'] or 0.0
  pick = lambda field: [row for row in rows if field in row]
  speeds = of_methods(rows)
  return f"""
![tokens per second]({image})

{display.table(speeds, SPEEDS).markdown()}

Medians of {config.repeats} turns and interquartile ranges; {config.new_tokens}
new tokens after each prompt, {config.single} prompts one by one at batch 1. A
speed-up is over our plain decoding of the same batch; that over own plain is
over the plain decoding of the same tool. Equal texts have the tokens of our
plain decoding, all of them. Tokens a step of one prompt are those that a pass
of the target gives: 1 without a draft. The roofline is one read of the method's
own weights a step, with one token a prompt, at the speed that a compiled sum
reads just before or after each sample, the faster one: drafting may pass it.
Before all samples the sum read {read:.1f} GB/s, and the load average was
{load:.1f}; a machine at rest has one near 0.

{display.table(pick('temporary_bytes'), PROGRAMS).markdown()}

Counted in the text of the compiled program, in its while loops and in all that
they call: 0 copies of the shape of a layer's cache and 0 converts of the shape
of a weight mean that a step neither moves the cache nor widens the weights.

{display.table(pick('relative_cost'), ROUNDS).markdown()}
"""
