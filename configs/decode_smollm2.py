"""Greedy decoding of SmolLM2-135M-Instruct, plainly and with speculation.

    python -m experiments.decode --config=configs/decode_smollm2.py \
      --workdir=runs/decode

All 80 MT-bench questions and 80 of the 164 HumanEval problems, 64 new tokens,
batch 1, and batch 8 with 32 prompts that wait for its places.
`configs/decode_smollm2.py:demo` is what `make demo` runs: 8 problems, 40
tokens, n-grams and the trained drafts that come with the package.

Hardware: two CPU cores, 4 GB of memory. The demo takes 4 to 5 minutes with
compilation, the whole run 75 to 90 (an estimate: it was made without a queue,
--config.queue=0). Expect 1.3x to 1.6x plain on HumanEval and 1.1x on MT-bench
at batch 1 with n-grams, about plain's speed with them at batch 8, and every
row exact.
"""

import ml_collections


def get_config(size: str = 'full') -> ml_collections.ConfigDict:
  """The whole run, or the one of `make demo`."""
  if size not in ('full', 'demo'):
    raise ValueError(f'sizes are full and demo, got {size!r}')
  demo = size == 'demo'
  config = ml_collections.ConfigDict()
  config.model = 'smollm2-135m'  # an asset, a folder, a .gguf, a Hub id
  config.dtype = 'float32'
  # Weights: a name of quantization.recipes, or 'packed' as the GGUF file has
  # them. Cache: 'int8'. '' is the dtype.
  config.weights = config.cache = ''
  # Prompt sets: humaneval, mt-bench, or inline (the messages in `inline`).
  config.prompts = ('humaneval',) if demo else ('humaneval', 'mt-bench')
  config.inline = ()
  config.num_prompts = 8 if demo else 80  # a set; 0 takes all
  config.max_prompt_tokens = 256 if demo else 800  # longer ones are left out
  config.max_new_tokens = 40 if demo else 64
  config.batches = (1, 8)
  # Prompts of a case that wait until a row of the batch ends; at batch 8 what
  # does not fill such a case is left out.
  config.queue = 0 if demo else 32
  config.stop = True  # end a row at the model's stop tokens
  # Each is 'drafter' or 'drafter/verifier', with ', LENGTH' for a fixed draft:
  # of trees, the one of that many tokens; 'medusa chain, 3' is no tree.
  config.methods = ('n-gram', 'early exit, 3', 'draft model, 3')
  if demo:
    config.methods = ('n-gram', 'medusa dynamic, 7', 'eagle chain')
  # Of n-gram, beside the adaptive one.
  config.fixed_lengths = () if demo else (3, 7)
  config.exit_layers = 10
  config.draft_every = 3  # the draft model: every third layer, untrained
  # The name of a shipped draft, or a file; a draft model may be untrained.
  config.trained = ml_collections.ConfigDict(
    {
      'medusa': 'smollm2-135m-medusa',
      'eagle': 'smollm2-135m-eagle',
      'draft_model': '',
      'weights': 'W8A8',  # of quantization.recipes; '' keeps float32
    }
  )
  config.repeats = 1
  config.seed = 0
  config.sampling = ml_collections.ConfigDict(
    {'temperature': 0.0, 'top_k': 0, 'top_p': 1.0, 'min_p': 0.0}
  )
  return config
