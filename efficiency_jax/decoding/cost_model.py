"""What speculative decoding should gain (Leviathan et al., arXiv 2211.17192).

alpha is the probability that a draft token is accepted, taken as independent
from token to token; gamma the draft length; c the cost of drafting one token
over the cost of one pass of the target. Where verifying gamma + 1 tokens costs
more than one pass, as on a CPU, `effective_cost_ratio` folds that into c.
"""

import math

import jax


def expected_tokens(alpha: jax.Array | float, gamma: jax.Array | float):
  """Tokens a target run emits: (1 - a^(gamma + 1)) / (1 - a), equation 1.

  `alpha` must be below 1; takes numbers or arrays.
  """
  return (1.0 - alpha ** (gamma + 1.0)) / (1.0 - alpha)


def improvement(alpha: float, gamma: int, cost_ratio: float) -> float:
  """Wall-clock gain: E / (gamma c + 1), theorem 3.8."""
  _check(alpha, gamma)
  if alpha == 1:
    return (gamma + 1) / (gamma * cost_ratio + 1)
  return expected_tokens(alpha, gamma) / (gamma * cost_ratio + 1)


def operations_increase(alpha: float, gamma: int, cost_ratio: float) -> float:
  """Factor of arithmetic spent a token: (gamma c + gamma + 1) / E, thm 3.11.

  Here `cost_ratio` is the ratio of operations, the paper's c hat.
  """
  _check(alpha, gamma)
  tokens = gamma + 1 if alpha == 1 else expected_tokens(alpha, gamma)
  return (gamma * cost_ratio + gamma + 1) / tokens


def effective_cost_ratio(
  round_seconds: float, plain: float, gamma: int
) -> float:
  """The c that makes a measured round cost `gamma c + 1` plain steps."""
  if gamma < 1:
    raise ValueError(f'gamma must be >= 1, got {gamma}.')
  return (round_seconds / plain - 1.0) / gamma


def best_length(alpha: float, cost_ratio: float, longest: int = 64) -> int:
  """The draft length with the largest `improvement`; 0 when none gains."""
  gains = [improvement(alpha, g, cost_ratio) for g in range(longest + 1)]
  return gains.index(max(gains))


def _check(alpha: float, gamma: int) -> None:
  if not (math.isfinite(alpha) and 0 <= alpha <= 1):
    raise ValueError(f'alpha must be in [0, 1], got {alpha}.')
  if gamma < 0:
    raise ValueError(f'gamma must be >= 0, got {gamma}.')
