# Everything a new machine needs is Python >= 3.11, git and make. A C++ compiler makes training on the CPU faster.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_DISABLE_TELEMETRY := 1

# A process per core and a thread per process: more would fight over the cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal

# The oldest transformers that setup.cfg admits, with what it needs, is laid over $(VENV): not a second PyTorch.
LOWER := .venv-lower
LOWEST := $(shell sed -n 's/^ *transformers>=//p' setup.cfg).0

.PHONY: help setup demo test test-lower lint format clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    train a small GPT-2 on Shakespeare, evaluate it, sample from it (minutes on two cores)"
	@echo "make test    run the tests; TESTS='tests/test_model.py ...' for some of them"
	@echo "make test-lower  run them with transformers $(LOWEST), the oldest supported"
	@echo "make lint    check format, style and types"
	@echo "make setup   make the virtual environment $(VENV) only"

setup: $(VENV)/ready

$(VENV)/ready: setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than Python 3.11; name another with make PYTHON=python3.12"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[data,eval,report,dev]'
	@touch $@

demo: setup
	$(BIN)/python scripts/prepare_data.py --config recipes/data/shakespeare.yaml
	$(BIN)/accelerate launch --quiet --config_file accelerate_configs/$$($(BIN)/python -m gpt2_hf.hardware).yaml \
		scripts/pretrain.py --config recipes/demo.yaml

test: setup
	$(PYTEST) $(TESTS)

test-lower: $(LOWER)/ready
	PYTHONPATH=$(CURDIR)/$(LOWER) $(BIN)/python -c 'from transformers import __version__ as v; assert v == "$(LOWEST)", v'
	PYTHONPATH=$(CURDIR)/$(LOWER) $(PYTEST) $(TESTS)

$(LOWER)/ready: $(VENV)/ready
	rm -rf $(LOWER)
	grep -vE '^(transformers|huggingface_hub)==' constraints.txt > $(VENV)/constraints-lower.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(VENV)/constraints-lower.txt \
		--target $(LOWER) transformers==$(LOWEST)
	@touch $@

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) $(LOWER) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
