# Two commands do everything: `make demo` and `make test`. Each installs into .venv what it needs, once.
SHELL := bash
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
READY := $(VENV)/.demo-ready
TEST_READY := $(VENV)/.test-ready
# no bytecode of modules that are never imported; no second setuptools beside torch's to build qstar with
PIP := $(BIN)/python -m pip install --quiet --no-compile --constraint $(CONSTRAINTS)
QSTAR := --no-build-isolation --editable
export TIMEFORMAT := set-up: %R s
# with --no-compile the first import writes the bytecode, also where the environment forbids it
export PYTHONDONTWRITEBYTECODE :=

.PHONY: setup demo proof proof-real curves test test-all lint compat bench models look gpu clean

# what `make demo` needs; torch alone and first: its pin picks the build, every later package finds it there, and its
# bytecode is written while pip waits for the network
$(READY): setup.py pyproject.toml $(CONSTRAINTS)
	time ( set -e; test -x $(BIN)/python || $(PYTHON) -m venv $(VENV); \
		$(PIP) torch 'setuptools>=77'; \
		$(BIN)/python -W ignore -c 'import torch._dynamo, torch.distributed.tensor' & $(PIP) $(QSTAR) .; wait )
	touch $@

# the developers' tools and every extra on top
$(TEST_READY): $(READY)
	time $(PIP) $(QSTAR) '.[dev]'
	touch $@

setup: $(TEST_READY)

demo: $(READY)
	$(BIN)/qstar demo

# does a small model, made from scratch, learn to think on several kinds of text? make proof SEEDS='1 2 3 4 5'
SEEDS ?= 0
proof: $(READY)
	$(BIN)/python -m experiments.scratch_model --seeds $(SEEDS)

# does a real model think? make proof-real MODEL=FOLDER (of SmolLM2-135M): a built two-hop task on real facts; with
# TEXT=FILE (in GSM8K's format) also natural text
proof-real: $(READY)
	$(BIN)/python -m experiments.two_hop_facts --model '$(MODEL)' --seeds $(SEEDS)
ifdef TEXT
	$(BIN)/python -m experiments.gsm8k_text --model '$(MODEL)' --data '$(TEXT)'
endif

# docs/curves.md: how the demo's model learns, by one knob of the method at a time, five seeds each
curves: $(READY)
	$(BIN)/python -m experiments.curves

# on two workers, each of which takes tests from the other once its own half is done
PYTEST := -m pytest -n 2 --dist worksteal --durations=15

test: $(TEST_READY) lint
	$(BIN)/python $(PYTEST) -m 'not slow'

# and then the tests marked slow (pyproject.toml says which those are)
test-all: test
	$(BIN)/python $(PYTEST) -m slow

lint: $(TEST_READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# all tests on the oldest versions that setup.py allows, in an environment of their own
PYTHON312 ?= python3.12
COMPAT := VENV=.venv-compat PYTHON=$(PYTHON312) CONSTRAINTS=constraints-compat.txt
compat:
	$(MAKE) setup $(COMPAT)
	.venv-compat/bin/python -c 'import sys, torch, triton, transformers as t; \
		print("Python", sys.version, "torch", torch.__version__, "triton", triton.__version__, "transformers", t.__version__)'
	.venv-compat/bin/python $(PYTEST)

# the developers' suite, kept in .benchmarks and compared with its last run; or with REF=a git commit
SUITE := --benchmark-storage=.benchmarks --benchmark-autosave --benchmark-compare --benchmark-sort=name \
	--benchmark-group-by=name --benchmark-columns=median,iqr,rounds
bench: $(TEST_READY)
ifdef REF
	$(BIN)/python bench/suite/against.py $(REF)
else
	$(BIN)/python -m pytest -p no:cacheprovider bench/suite $(SUITE)
endif

# docs/models.md: which causal LMs of the installed transformers can think
models: $(READY)
	PYTHONPATH=tests/support $(BIN)/python -m all_models docs/models.md

# docs/look.png: `qstar look` at walks that the demo's model has never seen, in headless Chromium (after make demo)
look: $(TEST_READY)
	PYTHONPATH=tests/support $(BIN)/python -m look_picture outputs/demo docs/look.png

# on the machine's own python where its torch sees a GPU: nothing is installed then
GPU_JSON ?= gpu.json
gpu:
	if $(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then \
		PYTHONPATH=.:kernels:bench $(PYTHON) -m qstar.cli.main bench gpu --output $(GPU_JSON); \
	else \
		$(MAKE) setup && $(BIN)/qstar bench gpu --output $(GPU_JSON); \
	fi

clean:
	rm -rf $(VENV) .venv-compat build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
