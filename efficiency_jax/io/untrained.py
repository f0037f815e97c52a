"""Models with random weights and a tokenizer of bytes, to try things out."""

import jax
import tokenizers
from tokenizers import decoders
from tokenizers import models
from tokenizers import pre_tokenizers

from efficiency_jax.io.pretrained import LanguageModel
from efficiency_jax.io.pretrained_encoder import TextEncoder
from efficiency_jax.io.tokenizer import Tokenizer
from efficiency_jax.models import encoder
from efficiency_jax.models import transformer
from efficiency_jax.models.config import DecoderConfig
from efficiency_jax.models.encoder_config import EncoderConfig

_CHAT = (
  '{% for message in messages %}{{ message.role }}: {{ message.content }}\n'
  '{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}'
)


def language_model(
  config: DecoderConfig | None = None, seed: int = 0
) -> LanguageModel:
  """Builds one; `config.vocab_size` must be at least the 257 of the tokenizer.

  The default is 2 layers, 64 wide. Every byte is a token, and token 256 stops.
  """
  if config is None:
    config = DecoderConfig(
      vocab_size=257,
      width=64,
      ffn_width=128,
      num_layers=2,
      num_heads=4,
      num_kv_heads=2,
      head_dim=16,
      max_positions=4096,
    )
  if config.vocab_size < 257:
    raise ValueError(
      f'vocab_size must be >= 257 for bytes, got {config.vocab_size}.'
    )
  return LanguageModel(
    name=f'untrained-{seed}',
    config=config,
    params=transformer.init(config, jax.random.key(seed)),
    tokenizer=_bytes(),
  )


def text_encoder(seed: int = 0) -> TextEncoder:
  """Builds an encoder of 2 layers, 64 wide, that reads bytes."""
  config = EncoderConfig(
    vocab_size=257,
    width=64,
    ffn_width=128,
    num_layers=2,
    num_heads=4,
    max_positions=128,
  )
  return TextEncoder(
    name=f'untrained-encoder-{seed}',
    config=config,
    params=encoder.init(config, jax.random.key(seed)),
    tokenizer=_bytes(),
    max_length=config.max_positions,
  )


def _bytes() -> Tokenizer:
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  vocabulary = {symbol: place for place, symbol in enumerate(alphabet)}
  backend = tokenizers.Tokenizer(models.BPE(vocabulary, []))
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = decoders.ByteLevel()
  backend.add_special_tokens(['<|end|>'])
  return Tokenizer(
    backend=backend, eos_id=256, stop_ids=(256,), chat_template=_CHAT
  )
