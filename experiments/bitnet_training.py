"""The decoder, the text and the training of `train_bitnet`."""

from efficiency_jax.data import documents
from efficiency_jax.data import held_out
from efficiency_jax.data import splits
from efficiency_jax.io import untrained
from efficiency_jax.models import transformer
from efficiency_jax.models.config import DecoderConfig
from efficiency_jax.quantization import qat
from efficiency_jax.training import objectives
from efficiency_jax.training import optimizers
from experiments import short_training

_HEAD = 32
_SENTENCE = 'the quick brown fox jumps over the lazy dog and runs away. '


def model(config):
  """A decoder of bytes with random weights."""
  if config.width % _HEAD:
    raise ValueError(
      f'--config.width must be a multiple of {_HEAD}, got {config.width}.'
    )
  heads = config.width // _HEAD
  shape = DecoderConfig(
    vocab_size=257,
    width=config.width,
    ffn_width=3 * config.width,
    num_layers=config.layers,
    num_heads=heads,
    num_kv_heads=heads,
    head_dim=_HEAD,
    max_positions=max(config.length, 128),
  )
  return untrained.language_model(shape, config.seed)


def texts(config) -> tuple[list[str], list[str]]:
  """Documents to train on, and others to measure on."""
  if config.text == 'inline':
    return [_SENTENCE] * 40, [_SENTENCE] * 10
  parts = [], []
  for text in documents.load(config.text):
    parts[splits.is_validation(text, share=held_out.SHARE)].append(text)
  return parts


def trained(lm, chosen, rows, config):
  """Parameters after training, with `FakeTensor`s where a rule applies."""
  total = short_training.num_steps(rows, config.batch, config.epochs)
  optimizer = optimizers.make(
    optimizers.OptimizerConfig(
      learning_rate=config.learning_rate, steps=total, warmup_steps=total // 10
    )
  )
  params = qat.prepare(lm.params, chosen) if chosen else lm.params
  return short_training.fit(
    objectives.next_token(transformer.apply_fn(lm.config)),
    optimizer,
    params,
    rows,
    batch=config.batch,
    seed=config.seed,
    epochs=config.epochs,
  )
