"""What papers say should come out, held against what came out here."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from experiments import display

Row = Mapping[str, Any]


def claim(says: str, holds: bool, measured: str) -> dict[str, Any]:
  """One row of a table of claims.

  Args:
    says: The claim, with its paper.
    holds: Whether the numbers agree with it.
    measured: The numbers.
  """
  return {'claim': says, 'holds': bool(holds), 'measured': measured}


def ladder(rows: Iterable[Row]) -> list[dict[str, Any]]:
  """Claims on a decoder's perplexity, of those methods that were measured.

  A method is worse than another here if the interval of its loss over float32
  lies above the other's; "as good as" allows 2 %.
  """
  by_name = {row['method']: row for row in rows}
  found = []

  def add(says, needed, holds, field='perplexity_ratio'):
    if all(name in by_name for name in needed):
      some = [by_name[name] for name in needed]
      values = ', '.join(f'{r["method"]} {r[field]:.4g}' for r in some)
      found.append(claim(says, holds(*some), values))

  add(
    'a scale for the tensor >> one for each channel (LLM.int8(), table 1)',
    ('W8A8 per tensor', 'W8A8'),
    _worse,
  )
  add(
    'without outliers apart >= with them (LLM.int8(), table 1)',
    ('W8A8', 'LLM.int8'),
    _not_better,
  )
  add(
    'LLM.int8() is as good as floats (LLM.int8(), table 1)',
    ('LLM.int8',),
    lambda row: row['perplexity_ratio'] <= 1.02,
  )
  add(
    'SmoothQuant is better than plain W8A8 (SmoothQuant)',
    ('W8A8', 'SmoothQuant'),
    _worse,
  )
  add('int4 is worse than FP4 (QLoRA, table 2)', ('int4', 'FP4'), _worse)
  add('FP4 is worse than NF4 (QLoRA, table 2)', ('FP4', 'NF4'), _worse)
  add(
    "GPTQ's weights are further from the original than rounded ones ...",
    ('GPTQ int4', 'int4'),
    lambda a, b: a['weight_error'] > b['weight_error'],
    field='weight_error',
  )
  add(
    '... and its outputs nearer (GPTQ)',
    ('int4', 'GPTQ int4'),
    lambda a, b: a['kl'] > b['kl'],
    field='kl',
  )
  add('AWQ is better than rounding (AWQ)', ('int4', 'AWQ int4'), _worse)
  return found


def encoder(
  released: Sequence[Row],
  clusterings: Sequence[Row],
  tuned: Sequence[Row],
  shared: Sequence[Row],
) -> list[dict[str, Any]]:
  """Claims on an encoder, of the parts that were measured.

  Args:
    released: Rows of methods applied to the encoder as released.
    clusterings: Of GOBO and of k-means.
    tuned: Of the fine-tuned encoder, means over seeds.
    shared: Of bits shared out among layers, means over seeds: alike, by the
      Hessian and against it, each after and within training.
  """
  found = []
  for gobo, kmeans in zip(clusterings[::2], clusterings[1::2], strict=True):
    found.append(
      claim(
        f'{gobo["method"]}: stops within 10 iterations, k-means within no less'
        ' than 50 (GOBO)',
        gobo['most'] <= 10 and kmeans['iterations'] >= 50,
        f'GOBO {gobo["iterations"]:.3g} ({gobo["most"]} at most), k-means'
        f' {kmeans["iterations"]:.3g}',
      )
    )
  by_name = {row['method']: row for row in (*released, *tuned)}
  if {'float32', 'GOBO 3 bits'} <= set(by_name):
    before, after = by_name['float32'], by_name['GOBO 3 bits']
    lost = 100 * (before['accuracy'] - after['accuracy'])
    says = 'GOBO in 3 bits loses at most one point (GOBO)'
    found.append(claim(says, lost <= 1, f'{lost:.2f} points'))
  for name in by_name:
    method = name.removesuffix(', trained')
    if method == name:
      continue
    whole, rounded, trained = (
      100 * by_name[key]['accuracy']
      for key in ('fine-tuned', f'{method}, rounded', name)
    )
    found.append(
      claim(
        f'{method}: training wins back most of what rounding loses',
        trained - rounded > (whole - rounded) / 2 > 0,
        f'rounded {rounded - whole:+.2f} points, trained'
        f' {trained - whole:+.2f}',
      )
    )
  for when in ('rounded', 'trained') if shared else ():
    some = [row for row in shared if row['method'].endswith(when)]
    uniform, better, _ = some
    found.append(
      claim(
        f'{when}: bits by Hessian are at least as good as uniform ones'
        ' (Q-BERT)',
        better['loss'] <= uniform['loss'],
        ', '.join(f'{row["method"]} {row["loss"]:.4g} nats' for row in some),
      )
    )
  return found


def table(claims: Iterable[Row]) -> display.Table:
  """A row a claim."""
  headings = {'claim': 'claim', 'holds': 'holds', 'measured': 'measured'}
  return display.table(list(claims), headings)


def _worse(a: Row, b: Row) -> bool:
  return a['perplexity_ratio_low'] > b['perplexity_ratio_high']


def _not_better(a: Row, b: Row) -> bool:
  return a['perplexity_ratio'] >= b['perplexity_ratio']
