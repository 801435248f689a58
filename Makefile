# Everything a new machine needs is Python >= 3.11, git and make. A C++ compiler makes training on the CPU faster.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: help setup demo test lint format clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    train a small GPT-2 on Shakespeare, evaluate it, sample from it (minutes on two cores)"
	@echo "make test    run the tests"
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
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
