"""The model that a config names, stored as it says."""

import ml_collections
import pytest

from efficiency_jax import leaves
from experiments import inputs


def _config(**fields):
  return ml_collections.ConfigDict(
    {'model': 'untrained', 'dtype': 'float32', **fields}
  )


def test_weights_are_stored_by_a_recipe():
  plain = inputs.load_model(_config(weights=''))
  small = inputs.load_model(_config(weights='W8A8'))
  kernel = small.params['layers_0']['ffn']['down']['kernel']
  assert isinstance(kernel, leaves.QTensor)
  assert kernel.activation == leaves.Activation()
  assert small.name == f'{plain.name}, W8A8'


@pytest.mark.parametrize(
  ('recipe', 'message'),
  [
    ('int9', "there is no recipe 'int9'"),
    ('GPTQ int4', "--config.weights='GPTQ int4' needs calibration text"),
  ],
)
def test_what_cannot_be_stored_is_refused(recipe, message):
  with pytest.raises(ValueError, match=message):
    inputs.load_model(_config(weights=recipe))


def test_some_prompts_are_taken_from_all_over_a_set():
  config = _config(
    inline=tuple(f'{i} ' * (9 if i == 3 else 1) for i in range(11)),
    max_prompt_tokens=40,
    num_prompts=0,
  )
  lm = inputs.load_model(config)
  names = lambda: [p.name for p, _ in inputs.load_prompts(lm, config, 'inline')]
  fit = names()
  config.num_prompts = 5
  assert names() == fit[1:10:2]
  for config.num_prompts in (len(fit), 99):
    assert names() == fit


def test_losses_of_weight_zero_are_left_out():
  config = ml_collections.ConfigDict(
    {'some': {'token': 1.0, 'forward_kl': 0.0, 'tv': 0.5}, 'none': {'tv': 0.0}}
  )
  assert inputs.weights(config, 'some') == (('token', 1.0), ('tv', 0.5))
  with pytest.raises(ValueError, match='--config.none has no loss'):
    inputs.weights(config, 'none')
