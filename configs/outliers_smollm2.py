"""Outlying activations of SmolLM2-135M, and what they cost and save.

    python -m experiments.outliers --config=configs/outliers_smollm2.py \
      --workdir=runs/outliers

Where |x| reaches LLM.int8()'s 6.0 (arXiv 2208.07339): in which dimensions, of
how many layers and tokens; perplexity against the threshold; and how the
errors of weights are distributed by method. Two CPU cores, four minutes.
`:tiny` after the file's name is a check of the machinery on random weights.

Fields:
  model, dtype: As those of configs/decode_smollm2.py.
  texts, inline, length, batch: As those of configs/quantize_smollm2.py.
  tokens: To look at, and to predict, all texts together.
  threshold: From where on an activation is an outlier.
  layers_share, tokens_share: A dimension is an outlier if it is one in so much
    of the layers and of the tokens: 25 % and 6 % in the paper.
  thresholds: To measure perplexity with; inf takes no column out, 0 all.
  most: Columns of one product that are taken out at most.
  methods: Names of quantization.recipes, whose errors are drawn.
  layer: Whose `ffn/gate_up` kernel they are drawn of.
"""

import math

import ml_collections


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  """The settings; `variant` may be 'tiny'."""
  if variant not in ('', 'tiny'):
    raise ValueError(f"variant {variant!r} is unknown; there is 'tiny'.")
  config = ml_collections.ConfigDict()
  config.model = 'smollm2-135m'
  config.dtype = 'float32'
  config.texts = ('lambada', 'brown', 'python-manual')
  config.inline = ()
  config.tokens = 3000
  config.length = 512
  config.batch = 7
  config.threshold = 6.0
  config.layers_share = 0.25
  config.tokens_share = 0.06
  config.thresholds = (0.0, 1.0, 3.0, 6.0, 12.0, 50.0, math.inf)
  config.most = 1536
  config.methods = ('int8', 'int4', 'FP4', 'NF4', 'GOBO 4 bits', 'GOBO 3 bits')
  config.layer = 15
  config.seed = 0
  if variant == 'tiny':
    config.model = 'untrained'
    config.inline = ('to be or not to be that is the question ' * 20,) * 2
    config.tokens = 128
    config.length = 32
    config.batch = 2
    config.threshold = 2.0
    config.thresholds = (0.0, 2.0, math.inf)
    config.methods = ('int4', 'NF4')
    config.layer = 0
  return config
