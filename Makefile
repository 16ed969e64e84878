# make train   train a small GPT with fusedopt.AdamW and compare with torch.optim   (ARGS="--steps 50" passes options on)
# make test    lint and tests
# make bench   the CPU benchmark
# make mutants planted bugs, each of which a test must notice   (ARGS="Lion norm" takes those whose names contain a word)
#
# Needs python3 >= 3.10 and a C++ compiler. Makes .venv; uses the torch that python3 already has, else installs $(TORCH).

PYTHON ?= python3
TORCH ?= torch==2.13.0
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py $(shell find csrc -type f)

.PHONY: train test lint bench mutants clean

train: $(VENV)/built
	$(BIN)/python examples/train_gpt.py $(ARGS)

test: lint
	$(BIN)/python -m pytest -q $(ARGS)

lint: $(VENV)/built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(VENV)/built
	$(BIN)/python -m bench cpu $(ARGS)

mutants: $(VENV)/built
	$(BIN)/python -m tests.mutants $(ARGS)

$(VENV)/made: Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "fusedopt needs Python 3.10 or newer: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	$(PYTHON) -m venv --clear $$($(PYTHON) -c 'import torch' 2>/dev/null && echo --system-site-packages) $(VENV)
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet "setuptools>=77" "pybind11>=3" wheel
	@touch $@

$(VENV)/built: $(VENV)/made $(SOURCES)
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[test]"
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info fusedopt/*.so runs
