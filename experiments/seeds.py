"""Runs that differ in their seed alone, as one row."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def summary(
  rows: Sequence[Mapping[str, Any]], fields: Sequence[str], spread_of: str
) -> list[dict[str, Any]]:
  """A row a method: means over its seeds.

  Args:
    rows: Of one `method` and seed each.
    fields: To take the mean of, where a method has them; of truth values, that
      all are true.
    spread_of: The field whose standard deviation between single runs is
      `deviation`: None of one run, which says nothing of it.
  """
  found = []
  for method in dict.fromkeys(row['method'] for row in rows):
    some = [row for row in rows if row['method'] == method]
    spread = [row[spread_of] for row in some]
    row = {
      'method': method,
      'seeds': len(some),
      'deviation': float(np.std(spread, ddof=1)) if len(some) > 1 else None,
    }
    for field in fields:
      values = [one[field] for one in some if field in one]
      if values:
        truth = isinstance(values[0], bool)
        row[field] = all(values) if truth else float(np.mean(values))
    found.append(row)
  return found
