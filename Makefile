# One command a job. Everything is installed into a folder of this checkout.

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
RUN := $(VENV)/bin/python
# Two processes, a file of tests in one of them.
PARALLEL := -n 2 --dist loadfile
RUN_PEERS := .venv-peers/bin/python
# `make test` compiles with little optimization, in two thirds of the time; not these.
FULLY := EFFICIENCY_JAX_TEST_OPTIMIZED=1
CODE := setup.py efficiency_jax pallas_kernels experiments configs tests

.PHONY: test short test-slow test-model test-peers test-aot test-gpu demo notebooks \
  lint format clean

test: $(VENV)/.installed  ## The tests that need neither weights nor network.
	$(RUN) -m pytest -q $(PARALLEL)

short: $(VENV)/.installed  ## The suite of the second python.
	$(FULLY) $(RUN) -m pytest -q $(PARALLEL) -m 'short and not (model or network or peers or slow)'

test-slow: $(VENV)/.installed  ## What takes long, and most properties at length.
	$(FULLY) EFFICIENCY_JAX_EXAMPLES=100 $(RUN) -m pytest -q $(PARALLEL) \
	  -m 'slow and not (model or network or peers)'
	$(FULLY) EFFICIENCY_JAX_EXAMPLES=100 $(RUN) -m pytest -q $(PARALLEL) \
	  -m 'hypothesis and not (slow or model or network or peers or aot)'

test-model: $(VENV)/.installed  ## The tests on the released model.
	$(FULLY) $(RUN) -m pytest -q -m 'model and not peers'

test-peers: .venv-peers/.installed  ## Our numbers beside those of other tools.
	$(FULLY) $(RUN_PEERS) -m pytest -q -m peers

test-aot: .venv-aot/.installed  ## Compiles all kernels; needs no TPU, no GPU.
	$(FULLY) JAX_PLATFORMS=cpu .venv-aot/bin/python -m pytest -q -s -m aot

# With the jax of that machine: pip install -e '.[cuda,test]' into $(VENV).
test-gpu:  ## The kernels for Hopper on an H100 or H200.
	EFFICIENCY_JAX_TEST_PLATFORM=cuda XLA_PYTHON_CLIENT_PREALLOCATE=false \
	  $(RUN) -m pytest -q -m gpu tests/pallas_kernels

demo: $(VENV)/.installed-demo  ## Fetches the model, then decodes it both ways.
	$(RUN) -m experiments.decode --config=configs/decode_smollm2.py:demo \
	  --workdir=runs/demo --show_tokens

notebooks: .venv-notebooks/.installed  ## Makes each .ipynb from its .py and runs it.
	.venv-notebooks/bin/jupytext --update --to ipynb experiments/notebooks/*.py
	.venv-notebooks/bin/jupyter execute --inplace experiments/notebooks/*.ipynb

lint: $(VENV)/.installed-dev
	$(RUN) -m ruff check $(wildcard $(CODE))
	$(RUN) -m ruff format --check $(wildcard $(CODE))

format: $(VENV)/.installed-dev
	$(RUN) -m ruff check --fix $(wildcard $(CODE))
	$(RUN) -m ruff format $(wildcard $(CODE))

clean:  ## Forgets what was installed and cached here; keeps runs/.
	rm -rf .venv .venv-* build dist *.egg-info .pytest_cache .ruff_cache \
	  .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp for each set of extras: installing again happens only when the metadata
# changed.
$(VENV)/.installed: setup.py pyproject.toml constraints.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q -e '.[cpu,test]' -c $(CONSTRAINTS)
	touch $(VENV)/.installed-demo $@

# Who waits for the demo waits for no tests and no bytecode of unused modules.
$(VENV)/.installed-demo: setup.py pyproject.toml constraints.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q --no-compile -e '.[cpu]' -c $(CONSTRAINTS)
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(RUN) -m pip install -q -e '.[dev]' -c $(CONSTRAINTS)
	touch $@

.venv-aot/.installed: setup.py pyproject.toml constraints.txt
	test -x .venv-aot/bin/python || $(PYTHON) -m venv .venv-aot
	.venv-aot/bin/python -m pip install -q -e '.[test,aot]' -c constraints.txt
	touch $@

.venv-notebooks/.installed: setup.py pyproject.toml constraints.txt
	test -x .venv-notebooks/bin/python || $(PYTHON) -m venv .venv-notebooks
	.venv-notebooks/bin/python -m pip install -q -e '.[cpu,notebooks]' \
	  -c constraints.txt
	touch $@

# torch comes first and by its pinned version: the CPU build is enough, and
# some indexes serve it under that version alone.
.venv-peers/.installed: setup.py pyproject.toml constraints.txt
	test -x $(RUN_PEERS) || $(PYTHON) -m venv .venv-peers
	$(RUN_PEERS) -m pip install -q "$$(grep '^torch==' constraints.txt)"
	$(RUN_PEERS) -m pip install -q -e '.[cpu,test,peers]' -c constraints.txt
	touch $@
