"""The one description of a decoder language model.

Families differ in a handful of choices, and the choices are fields here: there
is one module (`transformer.DecoderLM`) and no file per family.
"""

import dataclasses
import math


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
  """How a family stretches its rotary frequencies to longer contexts.

  `linear` divides every frequency by `factor`. `llama3` leaves wavelengths
  shorter than `original_context / high_frequency_factor` alone, divides those
  longer than `original_context / low_frequency_factor`, and blends between.
  """

  kind: str  # 'linear' or 'llama3'
  factor: float
  low_frequency_factor: float = 1.0
  high_frequency_factor: float = 4.0
  original_context: int = 8192

  def __post_init__(self):
    if self.kind not in ('linear', 'llama3'):
      raise ValueError(
        f'rope scaling {self.kind!r} is not supported: linear and llama3 are.'
      )
    if self.kind == 'llama3' and not (
      0 < self.low_frequency_factor < self.high_frequency_factor
    ):
      raise ValueError(
        'rope scaling needs 0 < low_frequency_factor < high_frequency_factor,'
        f' got {self.low_frequency_factor} and {self.high_frequency_factor}.'
      )
    if not self.factor > 0:
      raise ValueError(f'rope scaling factor must be > 0, got {self.factor}.')


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
  """Shape and choices of a decoder; hashable, so it can be a static argument.

  Attributes:
    vocab_size: V, rows of the embedding table.
    width: D, the residual stream.
    ffn_width: F, the hidden width of the gated feed-forward.
    num_layers: Decoder blocks.
    num_heads: H, query heads.
    num_kv_heads: K, key and value heads; divides H (grouped-query attention).
    head_dim: Width of one head.
    max_positions: Longest context the model was trained for.
    activation: 'silu' (Llama, Mistral, Qwen, Phi) or 'gelu_tanh' (Gemma).
    norm_epsilon: Added to the mean square in RMSNorm.
    norm_plus_one: RMSNorm multiplies by `1 + scale` (Gemma).
    post_norms: A second norm after attention and after the feed-forward, before
      the residual sum (Gemma 2 and 3).
    qk_norm: RMSNorm over each head of queries and keys (Qwen3, Gemma 3).
    qkv_bias: Bias on the query, key and value projections (Qwen2).
    output_bias: Bias on the attention output projection.
    mlp_bias: Bias on the feed-forward projections.
    tie_embeddings: The head is the embedding table.
    scale_embeddings: Embeddings are multiplied by sqrt(D) (Gemma).
    query_scale: Multiplies queries; None means `head_dim ** -0.5`.
    attention_softcap: c of `c * tanh(scores / c)` (Gemma 2), or None.
    final_softcap: The same for the logits (Gemma 2), or None.
    rope_theta: Base of the rotary frequencies.
    local_rope_theta: Base on sliding-window layers (Gemma 3); they are never
      scaled. None means that all layers share `rope_theta`.
    rope_scaling: Long-context scaling of the global layers, or None.
    windows: For every layer the number of keys a query may see, itself
      included (sliding-window attention), or None for all. An empty tuple
      means no window anywhere.
    family: The Hugging Face `model_type` it was read from; names the exporter.
  """

  vocab_size: int
  width: int
  ffn_width: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  max_positions: int = 2048
  activation: str = 'silu'
  norm_epsilon: float = 1e-5
  norm_plus_one: bool = False
  post_norms: bool = False
  qk_norm: bool = False
  qkv_bias: bool = False
  output_bias: bool = False
  mlp_bias: bool = False
  tie_embeddings: bool = True
  scale_embeddings: bool = False
  query_scale: float | None = None
  attention_softcap: float | None = None
  final_softcap: float | None = None
  rope_theta: float = 10_000.0
  local_rope_theta: float | None = None
  rope_scaling: RopeScaling | None = None
  windows: tuple[int | None, ...] = ()
  family: str = 'llama'

  def __post_init__(self):
    for name in (
      'vocab_size',
      'width',
      'ffn_width',
      'num_layers',
      'num_heads',
      'num_kv_heads',
      'head_dim',
      'max_positions',
    ):
      value = getattr(self, name)
      if not isinstance(value, int) or value < 1:
        raise ValueError(f'{name} must be a whole number >= 1, got {value!r}.')
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
        f'num_kv_heads must divide num_heads = {self.num_heads}, got'
        f' {self.num_kv_heads}.'
      )
    if self.head_dim % 2:
      raise ValueError(
        f'head_dim must be even for rotary positions, got {self.head_dim}.'
      )
    if self.activation not in ('silu', 'gelu_tanh'):
      raise ValueError(
        f'activation {self.activation!r} is not supported: silu and gelu_tanh'
        ' are.'
      )
    if self.windows and len(self.windows) != self.num_layers:
      raise ValueError(
        f'windows must name all {self.num_layers} layers or none, got'
        f' {len(self.windows)}.'
      )
    for window in self.windows:
      if window is not None and window < 1:
        raise ValueError(f'windows must be >= 1 or None, got {window}.')
    for name in ('attention_softcap', 'final_softcap'):
      value = getattr(self, name)
      if value is not None and not (math.isfinite(value) and value > 0):
        raise ValueError(f'{name} must be > 0 or None, got {value}.')
    for name in ('norm_epsilon', 'rope_theta'):
      value = getattr(self, name)
      if not (math.isfinite(value) and value > 0):
        raise ValueError(f'{name} must be finite and > 0, got {value}.')

  def window(self, layer: int) -> int | None:
    """Keys that a query of `layer` may see, or None for all."""
    return self.windows[layer] if self.windows else None

  def truncated(self, num_layers: int) -> 'DecoderConfig':
    """The same model with only its first `num_layers` blocks.

    Parameters of the whole model fit it: unused blocks are ignored.
    """
    if not 1 <= num_layers <= self.num_layers:
      raise ValueError(
        f'num_layers must be in 1..{self.num_layers}, got {num_layers}.'
      )
    return dataclasses.replace(
      self, num_layers=num_layers, windows=self.windows[:num_layers]
    )
