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

# What has been released since constraints.txt was written is laid over $(VENV), PyTorch apart.
UPPER := .venv-upper

# The programs that read our folders, laid over $(VENV) without what $(VENV) has: half a gigabyte. LLAMA_CPP=1 builds
# llama.cpp too, with a C++ compiler and many minutes.
CONSUMERS := .venv-consumers
CONSUMER_PACKAGES := ctranslate2==4.8.5 onnxruntime==1.32.0 flatbuffers onnx==1.23.2 ml-dtypes onnxscript==0.7.2 onnx-ir \
	torchao==0.18.0
LLAMA_CPP_PYTHON := 0.3.36

# What writes a GPU's kernels, laid over $(VENV): two thirds of a gigabyte that only gpu-budget needs.
BUDGET_VENV := .venv-budget
TRITON := 3.7.1

# Where gpu-check writes what it found.
OUT ?= runs/gpu-check

.PHONY: help setup demo test test-lower test-upper test-consumers soak gpu-check gpu-budget test-budget lint format clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    train a small GPT-2 on Shakespeare, evaluate it, sample from it (minutes on two cores)"
	@echo "make test    run the tests; TESTS='tests/model/test_model.py ...' for some of them"
	@echo "make test-lower  run them with transformers $(LOWEST), the oldest supported"
	@echo "make test-upper  run them with the newest releases that setup.cfg admits, looked up now"
	@echo "make test-consumers  load a folder of ours in what people load it with; LLAMA_CPP=1 to build llama.cpp for that"
	@echo "make soak    half an hour of training under kills beside a run without; SOAK='--processes 2 --minutes 60' for more"
	@echo "make gpu-check   on a GPU, with \$$PYTHON as it is: the GPU's tests, then the benchmark; results in $(OUT)"
	@echo "make gpu-budget  without a GPU: what a training step launches on one; BUDGET='recipes/gpt2_350m.yaml --card A100'"
	@echo "make test-budget  test that"
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
	set -- $$($(BIN)/python -m gpt2_hf.hardware); $(BIN)/accelerate launch --quiet \
		--config_file accelerate_configs/$$1.yaml scripts/pretrain.py --config recipes/$$2.yaml

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

test-upper: setup
	rm -rf $(UPPER) && mkdir $(UPPER)
	grep -E '^torch==' constraints.txt > $(UPPER)/constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --dry-run --upgrade --upgrade-strategy eager \
		-c $(UPPER)/constraints.txt -e '.[data,eval,report,dev]' --report $(UPPER)/report.json
	$(BIN)/python -c 'import json, sys; [print(m["name"] + "==" + m["version"]) for p in json.load(sys.stdin)["install"] \
		if (m := p["metadata"])["name"] not in ("gpt2_hf", "gpt2-hf")]' < $(UPPER)/report.json | tee $(UPPER)/newer.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(UPPER) -r $(UPPER)/newer.txt
	PYTHONPATH=$(CURDIR)/$(UPPER) $(PYTEST) $(TESTS)

test-consumers: $(CONSUMERS)/ready $(LOWER)/ready $(if $(LLAMA_CPP),$(CONSUMERS)/llama.cpp/ready)
	OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR)/$(CONSUMERS)/packages $(BIN)/python -m pytest -n 0 -rs tests/test_consumers.py $(TESTS)

$(CONSUMERS)/ready: $(VENV)/ready
	rm -rf $(CONSUMERS)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(CONSUMERS)/packages \
		$(CONSUMER_PACKAGES)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(CONSUMERS)/transformers-4.57 \
		'transformers==4.57.*' 'huggingface_hub<1' 'tokenizers<0.23'
	@touch $@

# Its source holds llama.cpp with the script that makes GGUF files, which no wheel has.
$(CONSUMERS)/llama.cpp/ready: $(CONSUMERS)/ready
	rm -rf $(CONSUMERS)/llama.cpp && mkdir $(CONSUMERS)/llama.cpp
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps \
		--no-binary llama-cpp-python --dest $(CONSUMERS) llama-cpp-python==$(LLAMA_CPP_PYTHON)
	tar xzf $(CONSUMERS)/llama_cpp_python-$(LLAMA_CPP_PYTHON).tar.gz --strip-components 1 -C $(CONSUMERS)/llama.cpp
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(CONSUMERS)/packages diskcache
	CMAKE_ARGS="-DLLAVA_BUILD=OFF -DMTMD_BUILD=OFF" $(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--no-deps --target $(CONSUMERS)/packages $(CONSUMERS)/llama.cpp
	@touch $@

soak: setup
	$(BIN)/python scripts/prepare_data.py --config recipes/data/shakespeare.yaml
	$(BIN)/python tests/soak.py $(SOAK)

# The Python that has the GPU's PyTorch, transformers, accelerate and pytest; it needs no network, and no more packages.
gpu-check: export HF_HUB_OFFLINE := 1
gpu-check: export PYTHONPATH := $(CURDIR)
gpu-check: SHELL := /bin/bash
gpu-check:
	@$(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2> /dev/null || \
		{ echo "error: $(PYTHON) has no PyTorch that finds a CUDA device; name another with make gpu-check PYTHON=..."; exit 2; }
	@$(PYTHON) -c 'import importlib.util as i, sys; missing = [name for name in ("accelerate", "numpy", "psutil", "pytest", "tqdm", \
		"transformers", "yaml") if i.find_spec(name) is None]; sys.exit("error: make gpu-check needs in $(PYTHON) also: " + \
		", ".join(missing) if missing else 0)' || exit 2
	@set -euo pipefail; mkdir -p "$(OUT)"; \
	{ nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || true; git describe --always --dirty || true; \
		$(PYTHON) -c 'import platform, torch, transformers, accelerate, numpy; from gpt2_hf import hardware; \
		print("Python", platform.python_version(), *(f"{m.__name__} {m.__version__}" for m in (torch, transformers, \
		accelerate, numpy)), "cuDNN", torch.backends.cudnn.version()); \
		print("torch.compile:", hardware.compile_obstacle(torch.device("cuda")) or "works")'; \
	} 2>&1 | tee "$(OUT)/environment.txt"; \
	$(PYTHON) -m pytest -m gpu -p no:xdist -rs --durations=0 tests/test_gpu.py tests/model/test_parity.py 2>&1 | tee "$(OUT)/pytest.log" || failed=1; \
	$(PYTHON) scripts/benchmark.py --shape 124M --grad_accum_steps 8 --device cuda --out "$(OUT)" 2>&1 | tee "$(OUT)/benchmark.log"; \
	if $(PYTHON) -c 'import sys, torch; sys.exit(torch.cuda.get_device_properties(0).total_memory < 78e9)'; then \
		for shape in 355M 774M 1558M; do $(PYTHON) scripts/benchmark.py --shape $$shape --grad_accum_steps 8 --only gpt2_hf \
			--rounds 2 --device cuda --out "$(OUT)/$$shape" 2>&1 | tee "$(OUT)/benchmark-$$shape.log"; done; fi; \
	exit $${failed:-0}

gpu-budget: $(BUDGET_VENV)/ready
	@PYTHONPATH=$(CURDIR)/$(BUDGET_VENV) $(BIN)/python scripts/gpu_budget.py $(BUDGET)

test-budget: $(BUDGET_VENV)/ready
	OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR)/$(BUDGET_VENV) $(BIN)/python -m pytest -n 0 -rs tests/budget

$(BUDGET_VENV)/ready: $(VENV)/ready
	rm -rf $(BUDGET_VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(BUDGET_VENV) triton==$(TRITON)
	@touch $@

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) $(LOWER) $(UPPER) $(CONSUMERS) $(BUDGET_VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
