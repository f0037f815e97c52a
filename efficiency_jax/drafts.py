"""Trained drafts as files: parameters, shape, whose draft it is, and a card.

    drafts.save('eagle.safetensors', draft, lm=lm, card={'data': '...'})
    draft = drafts.load('eagle.safetensors', lm)
    generation.generate(lm, prompts, drafter='eagle', heads=draft)

One safetensors file holds the parameters in float16, the form of the draft, its
trees, a card for people, facts about the target and a sha256 over all of it.
Matrices may be in int8 with a scale a column: a draft that will be stored in
W8A8 anyway then loses nothing by its file.

A draft is useless beside another model, though it never changes a text, so the
target is known again by its tokenizer, its config and its weights. Of the
weights a few rows of the embedding table are kept and compared with room for
error, and no hash of them, because a model loaded in another dtype, quantized
or fine-tuned has other bits and keeps its draft; a model trained from another
beginning has rows that have nothing to do with these.
"""

from collections.abc import Callable, Mapping
import dataclasses
import hashlib
import importlib.resources
import json
import os
import pathlib
from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from efficiency_jax import trees
from efficiency_jax.decoding import draft_model
from efficiency_jax.decoding import draft_vocabulary
from efficiency_jax.decoding import eagle
from efficiency_jax.decoding import medusa
from efficiency_jax.decoding import token_tree
from efficiency_jax.io import arrays
from efficiency_jax.io import errors
from efficiency_jax.io.pretrained import LanguageModel
from efficiency_jax.leaves import QTensor
from efficiency_jax.linear import embed
from efficiency_jax.models import transformer
from efficiency_jax.types import Params
from pallas_kernels.int8_matmul import api as int8_matmul

Draft = medusa.TrainedHeads | eagle.TrainedDraft | draft_model.TrainedDraft


@dataclasses.dataclass(frozen=True)
class _Kind:
  """What there is to know of the drafts of one drafter.

  Attributes:
    draft: Class of the draft.
    form: Class of its form.
    init: Parameters that a form has for a target; their shapes are read.
  """

  draft: type
  form: type
  init: Callable[[Any, LanguageModel], Params]


def _medusa_init(form: medusa.Heads, lm: LanguageModel) -> Params:
  transformer.check_layers(lm.config, form.layers)
  tokens = None
  if form.vocabulary is not None:
    tokens = jnp.zeros((form.vocabulary,), jnp.int32)
  table = draft_vocabulary.head(lm.params, tokens)
  width, size = lm.config.width, lm.config.vocab_size
  return medusa.init(form, jax.random.key(0), width, size, table)


_KINDS = {
  'medusa': _Kind(medusa.TrainedHeads, medusa.Heads, _medusa_init),
  'eagle': _Kind(
    eagle.TrainedDraft,
    eagle.Form,
    lambda form, lm: eagle.init(form, jax.random.key(0), lm.params),
  ),
  'draft model': _Kind(
    draft_model.TrainedDraft,
    draft_model.Form,
    lambda form, lm: draft_model.init(form, lm.params),
  ),
}
_FACTS = {'kind', 'form', 'trees', 'target', 'card'}
_PACKAGE = pathlib.Path(str(importlib.resources.files('efficiency_jax')))
_SHIPPED = _PACKAGE / 'shipped'

_REMEDY = 'update efficiency_jax, or take another file'

# Rows of the embedding table that are kept, and how far those of the target may
# be from them, relative to their norm. Rounding to 4 bits moves them by about
# 0.1, and independently trained rows are sqrt(2) apart.
_ROWS = 16
# Factors of a low rank stay in float16: they are small.
_LEAST_SIDE = 64
_FARTHEST = 0.5


def save(
  path: str | os.PathLike[str],
  draft: Draft,
  *,
  lm: LanguageModel,
  card: Mapping[str, str],
  bits: int = 16,
) -> None:
  """Writes a draft of `lm`, replacing the file in one step.

  Args:
    path: By convention it ends in `.safetensors`.
    draft: The parameters are rounded to float16.
    lm: The target that it was trained for.
    card: What people should know: data, command, numbers, licence.
    bits: 16, or 8 for matrices of 64 rows and columns or more.

  Raises:
    ValueError: The draft is quantized; a parameter is not finite in float16, or
      not one that the form has for this target; the draft is for another
      config; one of its trees has no fixed shape; the card holds something else
      than strings; or there is no such number of bits. The file is as it was.
  """
  if bits not in (8, 16):
    raise ValueError(f'bits must be 8 or 16, got {bits}.')
  narrow = lambda leaf: isinstance(leaf, QTensor)
  params = jax.tree.leaves(draft.params, is_leaf=narrow)
  if getattr(draft, 'head', None) is not None or any(map(narrow, params)):
    raise ValueError(
      'the draft is quantized: save the one that it was made of, and quantize'
      ' it when it is loaded.'
    )
  form = {
    field.name: getattr(draft.form, field.name)
    for field in dataclasses.fields(draft.form)
  }
  # Where a form has a target, the facts below say which.
  if form.pop('target', lm.config) != lm.config:
    raise ValueError(
      f'the draft is for another config than that of {lm.name}: save it with'
      ' the model that it was trained for.'
    )
  known = _KINDS[kind(draft)]
  problem = _mismatch(known, draft.form, draft.params, lm)
  if problem:
    raise ValueError(
      f'{problem}: save the draft with the model that it was trained for, and'
      ' with its own form.'
    )
  if not all(isinstance(x, str) for pair in card.items() for x in pair):
    raise ValueError(f'card must map strings to strings, got {dict(card)}.')
  values = {}
  for name, leaf in trees.leaves(draft.params):
    half = _half(name, leaf)
    values[f'params/{name}'] = half
    if bits == 8 and leaf.ndim == 2 and min(leaf.shape) >= _LEAST_SIDE:
      rows, scales = int8_matmul.quantize_rows(jnp.asarray(half.T, jnp.float32))
      values[f'params/{name}'] = np.asarray(rows).T
      values[f'scales/{name}'] = np.asarray(scales)
  if draft.vocabulary is not None:
    values['vocabulary'] = np.asarray(draft.vocabulary, np.int32)
  values['target/embedding'] = _rows(lm).astype(np.float16)
  facts = {
    'kind': kind(draft),
    'form': form,
    'trees': _parents(draft),
    'target': {
      'name': lm.name,
      'tokenizer': lm.tokenizer.fingerprint,
      'config': dataclasses.asdict(lm.config),
    },
    'card': dict(card),
  }
  metadata = {name: json.dumps(fact) for name, fact in facts.items()}
  metadata['sha256'] = _digest(values, metadata)
  arrays.save(path, values, metadata)


def load(path: str | os.PathLike[str], lm: LanguageModel) -> Draft:
  """The draft of a file, its parameters in the dtype of those of `lm`.

  Raises:
    ValueError: It is for a model of another tokenizer, config or weights.
    FileFormatError: The file is damaged, or no draft that is known here.
  """
  values, facts = _read(path)
  if facts['kind'] not in _KINDS:
    raise errors.FileFormatError(
      path,
      f'holds a draft of kind {facts["kind"]!r}, which is unknown here',
      _REMEDY,
    )
  _check_target(path, facts['target'], values.pop('target/embedding'), lm)
  with errors.as_format_error(path, 'making the draft', _REMEDY):
    known = _KINDS[facts['kind']]
    form = _form(known, facts['form'], lm)
    vocabulary = values.pop('vocabulary', None)
    if vocabulary is not None:
      vocabulary = jnp.asarray(vocabulary)
    for name in [name for name in values if name.startswith('scales/')]:
      matrix = name.replace('scales/', 'params/', 1)
      values[matrix] = values[matrix] * values.pop(name)
    dtype = lm.params['embedding']['table'].dtype
    params = traverse_util.unflatten_dict(
      {k: jnp.asarray(v, dtype) for k, v in values.items()}, sep='/'
    )
    params = params['params']
    problem = _mismatch(known, form, params, lm)
    if problem:
      raise errors.FileFormatError(path, problem, _REMEDY)
    return known.draft(
      form=form,
      params=params,
      vocabulary=vocabulary,
      trees=tuple(token_tree.TokenTree(tuple(t)) for t in facts['trees']),
    )


def kind(draft: Draft) -> str:
  """The drafter that a draft is for: 'medusa', 'eagle' or 'draft model'."""
  return next(n for n, k in _KINDS.items() if isinstance(draft, k.draft))


def _form(known: _Kind, fields: dict[str, Any], lm: LanguageModel) -> Any:
  """The form of a file, whose tuples became lists and whose target is `lm`."""
  values = {
    k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()
  }
  if 'target' in {field.name for field in dataclasses.fields(known.form)}:
    values['target'] = lm.config
  return known.form(**values)


def _mismatch(
  known: _Kind, form: Any, params: Params, lm: LanguageModel
) -> str | None:
  """What is wrong with the parameters of a form for this target, or None."""
  needed = dict(trees.leaves(jax.eval_shape(lambda: known.init(form, lm))))
  found = dict(trees.leaves(params))
  for name in sorted(needed.keys() | found.keys()):
    if name not in found:
      return f'parameter {name} is missing'
    if name not in needed:
      return f'parameter {name} is not one of its form'
    if found[name].shape != needed[name].shape:
      return (
        f'parameter {name} has shape {found[name].shape}, its form needs'
        f' {needed[name].shape}'
      )
  return None


def card(path: str | os.PathLike[str]) -> dict[str, str]:
  """What the file says to people.

  Raises:
    FileFormatError: As `load` does.
  """
  return _read(path)[1]['card']


def shipped(name: str) -> pathlib.Path:
  """The file of a draft that is part of this package.

  Raises:
    ValueError: There is none of that name; the message lists those there are.
  """
  found = {path.stem: path for path in sorted(_SHIPPED.glob('*.safetensors'))}
  if name not in found:
    there = f'there are {", ".join(found)}' if found else 'none is shipped'
    raise ValueError(f'no draft {name!r} is shipped: {there}.')
  return found[name]


def _read(
  path: str | os.PathLike[str],
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  """The arrays and the facts of a file, once it is known to be whole."""
  values, metadata = arrays.load(path)
  seal = metadata.pop('sha256', None)
  if metadata.keys() != _FACTS:
    raise errors.FileFormatError(
      path, 'is not a draft', 'pass a file that drafts.save wrote'
    )
  if seal != _digest(values, metadata):
    raise errors.FileFormatError(path, 'is damaged', 'get it again')
  return values, {name: json.loads(fact) for name, fact in metadata.items()}


def _check_target(
  path: str | os.PathLike[str],
  target: Mapping[str, Any],
  rows: np.ndarray,
  lm: LanguageModel,
) -> None:
  here = json.loads(json.dumps(dataclasses.asdict(lm.config)))
  # Fields that a config did not have when the file was made are not compared.
  different = [k for k, v in target['config'].items() if here.get(k) != v]
  if target['tokenizer'] != lm.tokenizer.fingerprint:
    why = 'their tokenizers differ'
  elif different:
    name = different[0]
    why = f'{name} is {target["config"][name]} there, {here.get(name)} here'
  elif _distance(_rows(lm), rows) > _FARTHEST:
    why = 'their weights have nothing in common'
  else:
    return
  raise ValueError(
    f'{os.fspath(path)} is a draft for {target["name"]!r}, not for'
    f' {lm.name!r} ({why}): take one that was trained for {lm.name!r}.'
  )


def _rows(lm: LanguageModel) -> np.ndarray:
  """A few rows of the embedding table, from all over it: [16, D] float32."""
  tokens = np.linspace(0, lm.config.vocab_size - 1, _ROWS).astype(np.int32)
  return np.asarray(embed(tokens, lm.params['embedding']['table']), np.float32)


def _distance(here: np.ndarray, there: np.ndarray) -> float:
  there = there.astype(np.float32)
  return np.linalg.norm(here - there) / max(np.linalg.norm(there), 1e-30)


def _parents(draft: Draft) -> list[tuple[int, ...]]:
  if not all(isinstance(t, token_tree.TokenTree) for t in draft.trees):
    raise ValueError(
      'trees that grow are not saved: replace them with trees of a fixed shape,'
      ' and set them again after loading.'
    )
  return [tree.parents for tree in draft.trees]


def _half(name: str, leaf: jax.Array) -> np.ndarray:
  with np.errstate(over='ignore'):
    half = np.asarray(leaf).astype(np.float16)
  if not np.isfinite(half).all():
    raise ValueError(
      f'parameter {name} is not finite in float16, which ends at 65504: take'
      ' a checkpoint from before the training diverged.'
    )
  return half


def _digest(
  values: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> str:
  """sha256 over all that a file says."""
  digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
  for name, array in sorted(values.items()):
    digest.update(f'{name} {array.dtype} {array.shape}'.encode())
    digest.update(array.tobytes())
  return digest.hexdigest()
