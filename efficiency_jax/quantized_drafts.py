"""Trained drafts in few bits.

draft = drafts.load(drafts.shipped('smollm2-135m-eagle'), lm)
draft = quantized_drafts.quantize(draft, lm, 'W8A8')
generation.generate(lm, prompts, drafter='eagle', heads=draft)
"""

import dataclasses

import jax.numpy as jnp

from efficiency_jax import drafts
from efficiency_jax.decoding import draft_model
from efficiency_jax.decoding import draft_vocabulary
from efficiency_jax.decoding import medusa
from efficiency_jax.io.pretrained import LanguageModel
from efficiency_jax.quantization import recipes
from efficiency_jax.quantization import rules


def quantize(
  draft: drafts.Draft, lm: LanguageModel, recipe: str
) -> drafts.Draft:
  """A draft whose matrices are stored by one of `quantization.recipes`.

  With it goes its output head, if that is one of fewer tokens than the target
  has. A draft only proposes. Greedy and coupled text are the target's whatever
  it is, other sampled text keeps its distribution, and a rounded draft is right
  about as often and is read in a fraction of the time. The narrow factor of a
  Markov bias stays as it is: it is small, and fills no tile of a kernel for
  integers. The draft is used and not saved: `drafts.save` refuses it.

  Args:
    draft: With plain parameters.
    lm: Its target.
    recipe: One that needs no calibration text.

  Raises:
    ValueError: There is no such recipe, or it needs text.
  """
  if recipes.needs_text(recipe):
    raise ValueError(
      f'{recipe!r} needs calibration text, which drafts have none of: take a'
      " recipe without, such as 'int8' or 'W8A8'."
    )
  chosen = recipes.named(recipe)
  params, _ = rules.quantize(draft.params, (*_kept(draft), *chosen))
  draft = dataclasses.replace(draft, params=params)
  if draft.vocabulary is None or isinstance(draft, draft_model.TrainedDraft):
    return draft
  if isinstance(draft, medusa.TrainedHeads) and draft.form.own:
    return draft
  head = draft_vocabulary.head(lm.params, jnp.asarray(draft.vocabulary))
  head, _ = rules.quantize(rules.dequantize(head), chosen)
  return dataclasses.replace(draft, head=head)


def _kept(draft: drafts.Draft) -> tuple[rules.Rule, ...]:
  """Rules for what is not rounded."""
  return (('^markov/down/', None),) if 'markov' in draft.params else ()
