"""The one description of a text encoder of the BERT family."""

import dataclasses
import math

# Rows of the relative-position table: the model counts in 32 buckets.
RELATIVE_BUCKETS = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig:
  """Shape and choices of an encoder; hashable, so it can be a static argument.

  Attributes:
    vocab_size: V, rows of the embedding table.
    width: D, the residual stream.
    ffn_width: F, the hidden width of the feed-forward.
    num_layers: Encoder blocks.
    num_heads: H, attention heads; divides D.
    max_positions: Longest text in tokens.
    first_position: Row of the position table that belongs to the first token
      (BERT 0, MPNet 2); the rows before it are not used.
    token_types: Rows of the token-type table (BERT 2), or 0 for no such table.
      Texts are of type 0.
    relative_bias: Scores get a bias that depends on head and distance, shared
      over the layers (MPNet, arXiv 2004.09297; T5, arXiv 1910.10683).
    norm_epsilon: Added to the variance in layer normalization.
    family: The Hugging Face `model_type` it was read from.
  """

  vocab_size: int
  width: int
  ffn_width: int
  num_layers: int
  num_heads: int
  max_positions: int = 512
  first_position: int = 0
  token_types: int = 2
  relative_bias: bool = False
  norm_epsilon: float = 1e-12
  family: str = 'bert'

  def __post_init__(self):
    for name, least in (
      ('vocab_size', 1),
      ('width', 1),
      ('ffn_width', 1),
      ('num_layers', 1),
      ('num_heads', 1),
      ('max_positions', 1),
      ('first_position', 0),
      ('token_types', 0),
    ):
      value = getattr(self, name)
      if not isinstance(value, int) or value < least:
        raise ValueError(
          f'{name} must be a whole number >= {least}, got {value!r}.'
        )
    if self.width % self.num_heads:
      raise ValueError(
        f'num_heads must divide width = {self.width}, got {self.num_heads}.'
      )
    if not (math.isfinite(self.norm_epsilon) and self.norm_epsilon > 0):
      raise ValueError(
        f'norm_epsilon must be finite and > 0, got {self.norm_epsilon}.'
      )

  @property
  def head_dim(self) -> int:
    """Width of one head."""
    return self.width // self.num_heads
