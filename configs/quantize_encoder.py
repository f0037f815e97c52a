"""all-MiniLM-L6-v2 in fewer bits: its embeddings, and sentiment told by them.

    python -m experiments.quantize_encoder \
      --config=configs/quantize_encoder.py --workdir=runs/quantize_encoder

Three parts. As released: how far embeddings of the 872 sentences of SST-2 move,
and how often a head fitted on the float embeddings of Rotten Tomatoes (without
snippets that give a test sentence away) is right. Fine-tuned: the encoder is
trained with its head, and then rounded, or trained on as rounded
(quantization-aware training) for as long as the float model was. Bits by
Hessian (Q-BERT): some layers in many bits and some in few, against all in
the same, rounded and trained likewise. Two CPU cores and 3 GB of memory; half
an hour for the rest and 20 to 40 minutes for the last part.

GOBO's paper loses at most a point at 3 bits (on MNLI); here 1.7 of 81.5, with a
standard error of 1.3. Training as rounded wins back 2.0 of 3.3 points of int4
per channel. Bits by Hessian, trained, are level with as many for all.

`:mpnet` after the file's name is the first part of all-mpnet-base-v2, `:tiny` a
check of the machinery on random weights.

Fields:
  model: Of io.pretrained_encoder; 'untrained' is a random tiny one.
  inline: Sentences and whether they are positive, in place of the released
    sets where the model is untrained.
  methods: Names of quantization.recipes without calibration.
  kmeans: Bits for which GOBO's clustering is held against k-means.
  fit: Sentences that the head is fitted on; 0 is all.
  seeds: Runs of fine-tuning; 0 leaves the second and third part out.
  sentences: To train on in one epoch, drawn by the seed.
  length: Tokens of a sentence in training; longer ones are cut.
  batch, learning_rate: Of training (AdamW, warm-up of a tenth, cosine).
  trained_methods: Recipes that training learns to live with.
  hessian: Bits `few` and `many` with their `mean`; `batches` of `batch`
    sentences and power `iterations` for the eigenvalues.
"""

import ml_collections


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  """The settings; `variant` may be 'mpnet' or 'tiny'."""
  if variant not in ('', 'mpnet', 'tiny'):
    raise ValueError(f"variants are 'mpnet' and 'tiny', got {variant!r}.")
  config = ml_collections.ConfigDict()
  config.model = 'minilm-l6'
  config.methods = (
    'bf16',
    'int8 per tensor',
    'int8',
    'W8A8',
    'LLM.int8',
    'int4 per channel',
    'int4',
    'FP4',
    'NF4',
    'GOBO 4 bits',
    'GOBO 3 bits',
    'int3',
    'int2',
  )
  config.inline = ()
  config.kmeans = (3, 4)
  config.fit = 0
  config.seeds = 3
  config.sentences = 3000
  config.length = 48
  config.batch = 32
  config.learning_rate = 5e-5
  config.trained_methods = ('int4 per channel', 'int3')
  config.hessian = ml_collections.ConfigDict(
    {
      'few': 2,
      'many': 4,
      'mean': 3.0,
      'batches': 2,
      'batch': 16,
      'iterations': 8,
    }
  )
  config.seed = 0
  if variant == 'mpnet':
    config.model = 'mpnet-base'
    config.kmeans = ()
    config.seeds = 0
  if variant == 'tiny':
    config.model = 'untrained'
    config.methods = ('W8A8', 'GOBO 3 bits')
    config.inline = (
      ('a warm and funny film', True),
      ('dull from start to end', False),
      ('the best of its year', True),
      ('a waste of two hours', False),
    ) * 4
    config.kmeans = (3,)
    config.seeds = 1
    config.sentences = 16
    config.length = 16
    config.batch = 8
    config.trained_methods = ('int3',)
    config.hessian.batch = 4
    config.hessian.iterations = 2
  return config
