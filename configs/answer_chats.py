"""SmolLM2-135M-Instruct answers ShareGPT questions, for drafts to learn from.

    python -m experiments.answer_chats --config=configs/answer_chats.py \
      --workdir=runs/answers

Chats in which an MT-bench question or a HumanEval problem occurs are left out.
Three batches of four are greedy, one is sampled. `configs/answer_chats.py:tiny`
is a check on random weights.

Hardware: two CPU cores, 5 GB of memory, 0.5 GB of disk; 40 minutes.
"""

import ml_collections


def get_config(size: str = 'full') -> ml_collections.ConfigDict:
  """The whole run, or a tiny one."""
  if size not in ('full', 'tiny'):
    raise ValueError(f'sizes are full and tiny, got {size!r}')
  tiny = size == 'tiny'
  config = ml_collections.ConfigDict()
  config.model = 'untrained' if tiny else 'smollm2-135m'
  config.dtype = 'float32'
  config.chats = 'inline' if tiny else 'sharegpt'
  config.inline = tuple(f'question {i} of many' for i in range(24))
  config.left_out = () if tiny else ('mt-bench', 'humaneval')
  config.first_only = True  # whether only what opens a chat is asked
  config.max_characters = 400  # of a question
  config.max_prompt_tokens = 80 if tiny else 128
  config.validation_share = 0.3 if tiny else 0.1  # of all questions
  config.num_validation = 4 if tiny else 64
  config.num_train = 8 if tiny else 1536
  config.batch = 4 if tiny else 32
  config.slots = 128 if tiny else 256  # tokens of question and answer
  config.temperatures = (0.0, 0.0, 0.0, 1.0)  # batch by batch, in turn
  config.seed = 0
  return config
