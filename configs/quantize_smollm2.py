"""SmolLM2-135M-Instruct in fewer bits: the ladder from 16 to 2.

    python -m experiments.quantize --config=configs/quantize_smollm2.py \
      --workdir=runs/quantize

Its blocks are released in 4 bits (Q4_1), so "float32" here is what these stand
for and everything below is re-quantized: losses are those of a second rounding.
Perplexity is on three held-out texts together, in windows of 512 tokens; the
intervals are of 95 % over windows.

Two CPU cores and 4 GB of memory, some 70 minutes. After the file's name:
`:quick` is the same on 6,000 tokens and without questions, `:every` that for
every recipe there is, `:tiny` a check of the machinery on random weights.

Perplexity over float32's, measured: int8 weights 1.003, LLM.int8() 1.014,
SmoothQuant 1.018, W8A8 1.038, NF4 1.436, AWQ int4 1.484, int4 1.707. In the
paper on LLM.int8() a model of 125M has 25.83 against 25.65, 1.007.

Fields:
  model, dtype: As those of configs/decode_smollm2.py.
  methods: Names of quantization.recipes; none at all is every one there is.
  texts: Of data.held_out.
  tokens: To predict, all texts together.
  length, batch: Of windows. On a CPU one at a time is fastest: what lies
    between its products stays in a cache.
  tasks: Questions of each, drawn at random; 0 leaves a task out.
  questions: Of them at a time.
  calibration: Text, tokens and batch for recipes that need it.
  prompt, steps, repeats: Of the speeds: tokens read at once, tokens written,
    and timed samples.
"""

import ml_collections

# Integers, floats and codebooks; what text adds; the lecture's order of W8A8.
_LADDER = (
  'int8',
  'W8A8 per tensor',
  'W8A8',
  'SmoothQuant',
  'LLM.int8',
  'int4',
  'FP4',
  'NF4',
  'AWQ int4',
  'GPTQ int4',
  'GOBO 4 bits',
  'GOBO 3 bits',
)


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  """The settings; `variant` may be 'quick', 'every' or 'tiny'."""
  variants = ('', 'quick', 'every', 'tiny')
  if variant not in variants:
    raise ValueError(f'variants are {variants[1:]}, got {variant!r}.')
  config = ml_collections.ConfigDict()
  config.model = 'smollm2-135m'
  config.dtype = 'float32'
  config.methods = _LADDER
  config.texts = ('lambada', 'brown', 'python-manual')
  config.inline = ()
  config.tokens = 60_000
  config.length = 512
  config.batch = 1
  config.questions = 8
  config.tasks = ml_collections.ConfigDict(
    {'lambada': 100, 'hellaswag': 100, 'arc-easy': 100, 'piqa': 100}
  )
  config.calibration = ml_collections.ConfigDict(
    {'text': 'brown', 'tokens': 16_384, 'batch': 1}
  )
  config.prompt = 512
  config.steps = 32
  config.repeats = 3
  config.seed = 0
  if variant in ('quick', 'every'):
    config.tokens = 6000
    config.tasks = ml_collections.ConfigDict()
    config.calibration.tokens = 4096
    config.steps = 16
    config.repeats = 2
  if variant == 'every':
    config.methods = ()
  if variant == 'tiny':
    config.model = 'untrained'
    config.inline = ('to be or not to be that is the question ' * 20,) * 4
    config.methods = ('W8A8', 'GPTQ int4')
    config.tokens = 128
    config.length = 32
    config.batch = 2
    config.calibration.tokens = 1024
    config.prompt = 32
    config.steps = 4
    config.repeats = 1
  return config
