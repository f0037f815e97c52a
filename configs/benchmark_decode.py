"""How fast SmolLM2-135M-Instruct decodes here, and what limits it.

    python -m experiments.benchmark_decode \\
      --config=configs/benchmark_decode.py --workdir=runs/benchmark_decode

Two CPU cores and 8 GB of memory, about 10 minutes on a machine that does
nothing else. Expect plain decoding at 1.7x to 2.9x transformers, by the
processor, and at a third of llama.cpp, which reads a fifth of the bytes; with
--config.weights=packed, the same bytes, at 1.1x llama.cpp. Run it with the
Python of .venv-peers (make test-peers) to have transformers and llama.cpp
beside our rows. `:tiny` after the file's name runs every part of it in seconds,
on random weights and without peers.

Fields:
  model: An asset, a folder, a GGUF file or a Hub id; 'untrained' is a tiny
    model with random weights.
  dtype: Of the parameters.
  weights: A name of quantization.recipes that they are stored by; 'packed' for
    the blocks of the GGUF file as they are, with rows of 8 bits; or ''.
  cache: 'int8' for keys and values in 8 bits, or '' for the dtype.
  prompts: Sets to take prompts from in turns: mt-bench, humaneval, or inline
    (the messages in `inline`).
  num_prompts: Of a set that are looked at; 0 looks at all.
  max_prompt_tokens: Longer prompts are left out, so that all run one program.
  new_tokens: Tokens that every candidate writes after every prompt; the
    model's own stop tokens do not end a text here.
  single: Prompts that are decoded one after another at batch 1.
  batch: Prompts that are decoded together; 1 leaves that out.
  repeats: Timed samples of each candidate, in turns; one more is not counted.
  methods: Our ways of decoding beside plain, as configs/decode_smollm2.py has
    them.
  exit_layers, draft_every, trained: Drafts of these, likewise.
  peers: Other tools to compare with, at batch 1.
  prompt_lookup: Tokens that prompt lookup of transformers drafts.
  assistant_tokens: Tokens that the assistant model of transformers drafts; it
    is our draft model.
"""

import ml_collections


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  """The settings; `variant` may be 'tiny'."""
  config = ml_collections.ConfigDict()
  config.model = 'smollm2-135m'
  config.dtype = 'float32'
  config.weights = config.cache = ''
  config.prompts = ('humaneval', 'mt-bench')
  config.inline = ()
  config.num_prompts = 0
  config.max_prompt_tokens = 112
  config.new_tokens = 128
  config.single = 4
  config.batch = 8
  config.repeats = 5
  config.methods = ('n-gram', 'eagle chain')
  config.exit_layers = 10
  config.draft_every = 3
  config.trained = ml_collections.ConfigDict(
    {
      'medusa': 'smollm2-135m-medusa',
      'eagle': 'smollm2-135m-eagle',
      'draft_model': '',
      'weights': 'W8A8',  # as in configs/decode_smollm2.py
    }
  )
  config.peers = ('transformers', 'transformers, prompt lookup', 'llama.cpp')
  config.prompt_lookup = 10
  config.assistant_tokens = 3
  if variant == 'tiny':
    config.model = 'untrained'
    config.prompts = ('inline',)
    config.inline = ('a b a b a b', 'one two three one two')
    config.max_prompt_tokens = 120
    config.new_tokens = 24
    config.single = 2
    config.batch = 2
    config.repeats = 2
    config.draft_every = 2
    config.peers = ()
  elif variant:
    raise ValueError(f"variant {variant!r} is unknown; there is 'tiny'.")
  return config
