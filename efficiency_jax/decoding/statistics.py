"""What a generation did, row by row, in separately named numbers.

Definitions differ between papers and tools by whether the bonus token counts
and by what the denominator is, so nothing here is called just "acceptance". All
numbers stop at a row's end token or budget.
"""

from collections.abc import Sequence
import dataclasses

import numpy as np

from efficiency_jax.decoding.speculative import Counters


@dataclasses.dataclass(frozen=True, kw_only=True)
class Statistics:
  """Counts of one row, or of several added up.

  Attributes:
    generated: Tokens committed, the sum of the lecture's k_i.
    runs: Passes of the target, m.
    drafted: Draft tokens put to the target.
    accepted: Draft tokens kept.
    tested_at: For every draft position, runs that reached it.
    accepted_at: For every draft position, runs that kept its token.
  """

  generated: int
  runs: int
  drafted: int
  accepted: int
  tested_at: tuple[int, ...] = ()
  accepted_at: tuple[int, ...] = ()

  @property
  def tokens_per_run(self) -> float:
    """TAR = sum k_i / m, the bonus token included; 1 for plain decoding."""
    return self.generated / self.runs if self.runs else float('nan')

  @property
  def accepted_drafts_per_run(self) -> float:
    """Draft tokens kept a run, the bonus token not included."""
    return self.accepted / self.runs if self.runs else float('nan')

  @property
  def acceptance_rate(self) -> float:
    """accepted / drafted: the fate of a drafted token, tested or not."""
    return self.accepted / self.drafted if self.drafted else float('nan')

  @property
  def conditional_acceptance(self) -> tuple[float, ...]:
    """At each draft position, kept given that all before it were kept."""
    return tuple(
      kept / tested if tested else float('nan')
      for kept, tested in zip(self.accepted_at, self.tested_at, strict=True)
    )

  @property
  def alpha(self) -> float:
    """Kept given tested, over all positions: the paper's alpha (maximum
    likelihood under its assumption that positions are alike)."""
    tested = sum(self.tested_at)
    return sum(self.accepted_at) / tested if tested else float('nan')


def of_rows(counters: Counters, generated: np.ndarray) -> list[Statistics]:
  """One `Statistics` a row; `generated` [B] is the number of new tokens."""
  host = [np.asarray(leaf) for leaf in counters]
  runs, drafted, accepted, tested_at, accepted_at = host
  return [
    Statistics(
      generated=int(generated[row]),
      runs=int(runs[row]),
      drafted=int(drafted[row]),
      accepted=int(accepted[row]),
      tested_at=tuple(tested_at[row].tolist()),
      accepted_at=tuple(accepted_at[row].tolist()),
    )
    for row in range(len(runs))
  ]


def total(parts: Sequence[Statistics]) -> Statistics:
  """Adds counts up; rates of the sum weigh every run alike."""
  if not parts:
    raise ValueError('total needs at least one Statistics.')
  width = max(len(part.tested_at) for part in parts)

  def positions(name):
    padded = [
      getattr(part, name) + (0,) * (width - len(getattr(part, name)))
      for part in parts
    ]
    return tuple(map(sum, zip(*padded, strict=True)))

  return Statistics(
    generated=sum(part.generated for part in parts),
    runs=sum(part.runs for part in parts),
    drafted=sum(part.drafted for part in parts),
    accepted=sum(part.accepted for part in parts),
    tested_at=positions('tested_at'),
    accepted_at=positions('accepted_at'),
  )
