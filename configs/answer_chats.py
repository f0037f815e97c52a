"""SmolLM2-135M-Instruct answers ShareGPT questions, for drafts to learn from.

    python -m experiments.answer_chats --config=configs/answer_chats.py \
      --workdir=runs/answers

Chats in which an MT-bench question or a HumanEval problem occurs are left out.
Three batches of four are greedy, one is sampled.
`configs/answer_chats.py:large` asks whatever users wrote in any turn, in
batches of 2048 that keep no states, `--config.chats=own` asks what the model
asks itself, and `configs/answer_chats.py:tiny` is a check on random weights.

Hardware: two CPU cores, 5 GB of memory, 0.5 GB of disk; 40 minutes. `:large`:
one H200, 103 seconds while another process used it too.
"""

import ml_collections


def get_config(size: str = 'full') -> ml_collections.ConfigDict:
  """The whole run, a large one for a GPU, or a tiny one."""
  if size not in ('full', 'large', 'tiny'):
    raise ValueError(f'sizes are full, large and tiny, got {size!r}')
  tiny, large = size == 'tiny', size == 'large'
  config = ml_collections.ConfigDict()
  config.model = 'untrained' if tiny else 'smollm2-135m'
  config.dtype = 'bfloat16' if large else 'float32'
  # 'sharegpt', 'inline', or 'own': what the model asks itself.
  config.chats = 'inline' if tiny else 'sharegpt'
  config.num_own = 65536  # questions of the model, of which it answers some
  config.inline = tuple(f'question {i} of many' for i in range(24))
  config.left_out = () if tiny else ('mt-bench', 'humaneval')
  config.first_only = not large  # whether only what opens a chat is asked
  config.max_characters = 600 if large else 400  # of a question
  config.max_prompt_tokens = 80 if tiny else 128
  config.validation_share = 0.3 if tiny else 0.1  # of all questions
  config.num_validation = 4 if tiny else 512 if large else 64
  config.num_train = 8 if tiny else 24576 if large else 1536
  config.batch = 4 if tiny else 2048 if large else 32
  config.slots = 128 if tiny else 256  # tokens of question and answer
  config.temperatures = (0.0, 0.0, 0.0, 1.0)  # batch by batch, in turn
  config.keep_hidden = not large  # states of the model, or training makes them
  config.seed = 0
  return config
