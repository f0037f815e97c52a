"""Where `answer_chats` leaves its answers, and how they are read."""

from collections.abc import Iterator, Mapping
import functools
import pathlib

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from efficiency_jax import answers
from efficiency_jax.data import rows as data_rows
from efficiency_jax.decoding import draft_vocabulary
from efficiency_jax.io import arrays
from efficiency_jax.io import pretrained
from efficiency_jax.models import transformer
from efficiency_jax.training import objectives
from efficiency_jax.types import ApplyFn
from efficiency_jax.types import Params

FOLDER = 'answers'


def load(workdir: str | pathlib.Path, split: str) -> answers.Answers:
  """All answers of a split, in the order in which they were made.

  `workdir` may be several folders with commas between them, one after another.

  Raises:
    ValueError: There are none.
  """
  parts = []
  folders = [pathlib.Path(one) / FOLDER for one in str(workdir).split(',')]
  for path in [p for f in folders for p in sorted(f.glob('*.safetensors'))]:
    if arrays.metadata(path).get('split') == split:
      parts.append(answers.Answers(**{'hidden': None, **arrays.load(path)[0]}))
  if not parts:
    raise ValueError(
      f'{workdir} holds no {split} answers: make them with python -m'
      f' experiments.answer_chats --workdir={workdir}.'
    )
  if any(part.hidden is None for part in parts):
    parts = [part._replace(hidden=None) for part in parts]
  joined = [
    None if fields[0] is None else np.concatenate(fields)
    for fields in zip(*parts, strict=True)
  ]
  return answers.Answers(*joined)


def training_arrays(made: answers.Answers) -> dict[str, np.ndarray]:
  """What losses of drafts read: the tokens of answers are to be learnt.

  `tokens` [R, N] int32, `loss_mask` [R, N], 1 where the next token is one of
  the answer, and `hidden` [R, N, D] float16 if it was kept.
  """
  place = np.arange(made.tokens.shape[1])
  learnt = place >= made.start[:, None] - 1
  learnt &= place < made.length[:, None] - 1
  found = {'tokens': made.tokens, 'loss_mask': learnt.astype(np.float32)}
  return found if made.hidden is None else {**found, 'hidden': made.hidden}


def texts(workdir: str | pathlib.Path, split: str) -> list[np.ndarray]:
  """The tokens of each answer of a split, without its question."""
  made = load(workdir, split)
  return [
    tokens[start:length]
    for tokens, start, length in zip(
      made.tokens, made.start, made.length, strict=True
    )
  ]


def load_splits(
  lm: pretrained.LanguageModel,
  workdir: str | pathlib.Path,
  layers: tuple[int, ...] = (),
) -> dict[str, dict[str, np.ndarray]]:
  """`training_arrays` of the splits 'train' and 'validation'.

  With `layers` they are without `hidden`, which does not hold what those read.

  Raises:
    ValueError: There are none, or they are answers of another model than `lm`.
  """
  splits = {
    split: training_arrays(load(workdir, split))
    for split in ('train', 'validation')
  }
  if 'hidden' not in splits['train']:
    return splits
  width = splits['train']['hidden'].shape[-1]
  if width != lm.config.width:
    raise ValueError(
      f'--config.answers={workdir} holds states of width {width}, those of'
      f' {lm.name} have {lm.config.width}: take the answers of this model.'
    )
  if layers:
    for arrays_of_split in splits.values():
      arrays_of_split.pop('hidden', None)
  return splits


def for_drafts(
  lm: pretrained.LanguageModel,
  config: ml_collections.ConfigDict,
  layers: tuple[int, ...] = (),
) -> tuple[dict[str, dict[str, np.ndarray]], np.ndarray | None]:
  """Arrays to train and to judge a draft on, and the tokens it may draft.

  Args:
    lm: The target, whose answers they are.
    config: `answers`, their folder, and `vocabulary`, how many of the most
      frequent tokens of the training answers; 0 is all tokens.
    layers: Blocks of the target whose inputs the draft sees too.

  Returns:
    `training_arrays` of 'train' and 'validation', the latter with `hidden` and
    `coverage`, and the vocabulary [R] or None. Where `hidden` was not kept, or
    lacks what the draft sees, training has to compute it.
  """
  splits = load_splits(lm, config.answers, layers)
  held_out = splits['validation']
  if 'hidden' not in held_out:
    held_out['hidden'] = states(lm, held_out['tokens'], layers)
  if not config.vocabulary:
    return splits, None
  vocabulary = draft_vocabulary.by_frequency(
    texts(config.answers, 'train'),
    config.vocabulary,
    lm.config.vocab_size,
    always=lm.tokenizer.stop_ids,
  )
  held_out['coverage'] = coverage(lm, held_out['hidden'], vocabulary)
  return splits, vocabulary


def counts(
  workdir: str | pathlib.Path, split: str, vocab_size: int
) -> np.ndarray:
  """How often each token stands in the answers of a split: [V] int64."""
  return np.bincount(
    np.concatenate(texts(workdir, split)), minlength=vocab_size
  )


def states(
  lm: pretrained.LanguageModel,
  tokens: np.ndarray,
  layers: tuple[int, ...] = (),
) -> np.ndarray:
  """States of a model: [R, N, (1 + len(layers)) D] float32.

  Args:
    lm: The model.
    tokens: [R, N] int32, texts from their beginning.
    layers: Blocks whose inputs follow the states after the final norm.
  """
  apply = transformer.apply_fn(lm.config, layers=layers)
  of_row = jax.jit(lambda params, row: apply(params, row)[0].hidden)
  return np.concatenate(
    [np.asarray(of_row(lm.params, row[None]), np.float32) for row in tokens]
  )


def batches_with_states(
  rows: Mapping[str, np.ndarray], count: int, apply: ApplyFn, target: Params
) -> Iterator[Mapping[str, jax.Array]]:
  """The first rows in batches of 16, with the target's states."""
  complete = jax.jit(functools.partial(objectives.completed, apply))
  rows = {name: array[:count] for name, array in rows.items()}
  for batch in data_rows.batches(rows, batch_size=16, seed=0, epochs=1):
    yield complete(target, batch)


def coverage(
  lm: pretrained.LanguageModel, hidden: np.ndarray, vocabulary: np.ndarray
) -> np.ndarray:
  """Probability that the model gives to a vocabulary: [R, N] float32.

  Args:
    lm: The model.
    hidden: [R, N, D...], its states after the final norm; others may follow.
    vocabulary: [R'] int32, tokens.
  """
  head = transformer.head_fn(lm.config)

  @jax.jit
  def of_row(params, states):
    states = states[..., : lm.config.width]
    p = jax.nn.softmax(head(params, states.astype(jnp.float32)))
    return p[..., vocabulary].sum(-1)

  return np.stack([np.asarray(of_row(lm.params, row)) for row in hidden])
