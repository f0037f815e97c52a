"""A draft model cut from its target, to be distilled from it.

It is some blocks of the target, perhaps with fewer units in their feed-forward,
and a final norm. Embedding and output head are the target's own, so the draft
is these blocks alone, in memory, in training and in a file. It begins where the
target's own layers stand (DistilBERT, arXiv 1910.01108) and learns the target's
distribution (DistillSpec, arXiv 2310.08461): see `draft_model_training`.

The head may score the most frequent tokens alone (`draft_vocabulary`); its
logits are spread over the whole vocabulary again, so that a verifier is told
the q that tokens were drawn from.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from efficiency_jax.decoding import draft_trees
from efficiency_jax.decoding import draft_vocabulary
from efficiency_jax.models import layers as model_layers
from efficiency_jax.models import transformer
from efficiency_jax.models.config import DecoderConfig
from efficiency_jax.types import ApplyFn
from efficiency_jax.types import Params

# What the draft reads of the target's parameters and does not own.
_SHARED = ('embedding', 'head')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
  """The form of the draft; hashable.

  Attributes:
    target: Config of the model that it is cut from and drafts for.
    layers: Blocks of the target that it begins as, in this order.
    vocabulary: R, tokens that it may draft; None is all.
    ffn_width: Hidden width of its feed-forward; None is the target's.
  """

  target: DecoderConfig
  layers: tuple[int, ...]
  vocabulary: int | None = None
  ffn_width: int | None = None

  def __post_init__(self):
    model_layers.shallow(self.target, self.layers)
    for name, most in (
      ('vocabulary', self.target.vocab_size),
      ('ffn_width', self.target.ffn_width),
    ):
      value = getattr(self, name)
      if value is not None and not 1 <= value <= most:
        raise ValueError(f'{name} must be in 1..{most} or None, got {value}.')

  @property
  def config(self) -> DecoderConfig:
    """Of the draft as a model; a reduced head is never the embedding."""
    config = model_layers.shallow(self.target, self.layers)
    return dataclasses.replace(
      config,
      ffn_width=self.ffn_width or config.ffn_width,
      tie_embeddings=config.tie_embeddings and self.vocabulary is None,
    )


def init(form: Form, target: Params) -> Params:
  """Float32 copies of the blocks and the final norm of the target."""
  config, params = model_layers.select(form.target, target, form.layers)
  if form.ffn_width is not None:
    _, params = model_layers.narrow(config, params, form.ffn_width)
  own = {k: v for k, v in params.items() if k not in _SHARED}
  return jax.tree.map(lambda x: jnp.array(x, jnp.float32), own)


def weights(
  form: Form,
  params: Params,
  target: Params,
  vocabulary: jax.Array | None = None,  # [R] int32
) -> Params:
  """What a model of `form.config`, and `apply_fn(form)`, read.

  Args:
    form: Of the draft.
    params: Its own, as of `init`.
    target: The target's: its tables are shared, or rows taken of its head.
    vocabulary: The tokens that it may draft, if the form has a vocabulary.

  Raises:
    ValueError: `vocabulary` is not what the form says.
  """
  draft_vocabulary.check(vocabulary, form.vocabulary)
  if vocabulary is None:
    return {**params, **{k: target[k] for k in _SHARED if k in target}}
  table = draft_vocabulary.table(target)
  return {
    **params,
    'embedding': target['embedding'],
    'head': {'table': draft_vocabulary.sub_table(table, vocabulary)},
    'columns': draft_vocabulary.columns(vocabulary, form.target.vocab_size),
    'vocabulary': vocabulary,
  }


@functools.cache
def apply_fn(form: Form) -> ApplyFn:
  """The draft on `weights`; its logits are those of all V tokens.

  A token outside the vocabulary has the logit -inf.
  """
  model = transformer.apply_fn(form.config)
  if form.vocabulary is None:
    return model

  def apply(params, tokens, cache=None, **places):
    output, cache = model(params, tokens, cache, **places)
    logits = draft_vocabulary.spread(output.logits, params['columns'])
    return output._replace(logits=logits), cache

  return apply


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedDraft:
  """A draft of one target, ready to use.

  Attributes:
    form: Of the draft.
    params: Its trained parameters.
    vocabulary: [R] tokens that it may draft, if the form has a vocabulary.
    trees: Shapes of drafts, if not chains alone.
  """

  form: Form
  params: Params
  vocabulary: jax.Array | None = None
  trees: tuple[draft_trees.Shape, ...] = ()

  def __post_init__(self):
    draft_vocabulary.check(self.vocabulary, self.form.vocabulary)
    size = self.form.vocabulary or self.form.target.vocab_size
    draft_trees.check(self.trees, size)

  def weights(self, target: Params) -> Params:
    """What `drafters.Weights.draft` holds beside this target."""
    vocabulary = self.vocabulary
    if vocabulary is not None:
      vocabulary = jnp.asarray(vocabulary, jnp.int32)
    return weights(self.form, self.params, target, vocabulary)
