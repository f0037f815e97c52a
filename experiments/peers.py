"""Other tools that decode the same model, timed as ours is.

torch, transformers and llama.cpp are peers, not dependencies: they are imported
here alone, when a row needs them, and a tool that is not installed is a remark
in the table (`make test-peers` installs them).
"""

from collections.abc import Callable, Sequence
import importlib.util
import os
import pathlib
import time

from experiments import candidates

Prompts = Sequence[Sequence[int]]
Decode = Callable[[Prompts, int], candidates.Sample]


TRANSFORMERS, LOOKUP = 'transformers', 'transformers, prompt lookup'
ASSISTED = 'transformers, assistant'
LLAMA_CPP = 'llama.cpp'
_PACKAGES = {
  TRANSFORMERS: ('torch', 'transformers'),
  LOOKUP: ('torch', 'transformers'),
  ASSISTED: ('torch', 'transformers'),
  LLAMA_CPP: ('llama_cpp',),
}
NAMES = tuple(_PACKAGES)
# The plain decoding of each tool, which its speculative one should outrun.
PLAIN = {
  TRANSFORMERS: TRANSFORMERS,
  LOOKUP: TRANSFORMERS,
  ASSISTED: TRANSFORMERS,
  LLAMA_CPP: LLAMA_CPP,
}


def missing(name: str) -> str | None:
  """Why a peer cannot run here, or None if it can."""
  if name not in _PACKAGES:
    raise ValueError(f'peer {name!r} is unknown; there are {", ".join(NAMES)}.')
  absent = [p for p in _PACKAGES[name] if importlib.util.find_spec(p) is None]
  if absent:
    return f'{" and ".join(absent)} not installed: make test-peers'
  return None


def transformers(
  directory: pathlib.Path,
  drafted: int | None = None,
  assistant: pathlib.Path | None = None,
) -> Decode:
  """Greedy decoding by transformers on PyTorch, in float32 on all cores.

  Args:
    directory: A model in the layout of Hugging Face.
    drafted: Tokens drafted before each pass; None decodes plainly.
    assistant: The model that drafts them, in the same layout; None is prompt
      lookup.
  """
  import torch
  import transformers as hf

  torch.set_num_threads(_cores())
  hf.utils.logging.set_verbosity_error()
  hf.utils.logging.disable_progress_bar()

  def load(directory: pathlib.Path) -> hf.PreTrainedModel:
    model = hf.AutoModelForCausalLM.from_pretrained(
      directory, dtype=torch.float32
    ).eval()
    # Every candidate writes the same number of tokens.
    model.generation_config.eos_token_id = None
    return model

  model, options = load(directory), {}
  if drafted and assistant:
    helper = load(assistant)
    # As many tokens every time, however unsure it is of them.
    helper.generation_config.num_assistant_tokens = drafted
    helper.generation_config.num_assistant_tokens_schedule = 'constant'
    helper.generation_config.assistant_confidence_threshold = 0.0
    options = {'assistant_model': helper}
  elif drafted:
    options = {'prompt_lookup_num_tokens': drafted}

  def one(prompt: Sequence[int], budget: int) -> candidates.Sample:
    ends = []
    # Called after every pass, whichever way transformers decodes.
    clock = lambda ids, scores, **_: (
      ends.append((time.perf_counter(), ids.shape[1]))
      or torch.zeros(len(ids), dtype=torch.bool)
    )
    ids = torch.tensor([prompt])
    begin = time.perf_counter()
    with torch.inference_mode():
      output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=budget,
        do_sample=False,
        pad_token_id=0,
        stopping_criteria=hf.StoppingCriteriaList([clock]),
        **options,
      )
    return _sample(output[0, len(prompt) :].tolist(), begin, ends)

  return lambda prompts, budget: candidates.total(
    [one(p, budget) for p in prompts]
  )


def llama_cpp(path: pathlib.Path, context: int) -> Decode:
  """Greedy decoding by llama.cpp, of the file's own weights on all cores."""
  import llama_cpp as llama

  model = llama.Llama(
    str(path),
    n_ctx=context,
    n_threads=_cores(),
    n_threads_batch=_cores(),
    verbose=False,
  )

  def one(prompt: Sequence[int], budget: int) -> candidates.Sample:
    model.reset()  # else it would keep what the last call read
    tokens, ends = [], []
    begin = time.perf_counter()
    for token in model.generate(list(prompt), temp=0.0):
      tokens.append(int(token))
      ends.append((time.perf_counter(), len(prompt) + len(tokens)))
      if len(tokens) == budget:
        break
    return _sample(tokens, begin, ends)

  return lambda prompts, budget: candidates.total(
    [one(p, budget) for p in prompts]
  )


def _sample(
  tokens: list[int], begin: float, ends: Sequence[tuple[float, int]]
) -> candidates.Sample:
  """From the time and the length of the text after every pass."""
  (first, start), (last, end) = ends[0], ends[-1]
  return candidates.Sample(
    tokens=[tokens],
    prefill_seconds=first - begin,
    decode_seconds=last - first,
    decoded=end - start,
    steps=len(ends) - 1,
  )


def _cores() -> int:
  if hasattr(os, 'sched_getaffinity'):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1
