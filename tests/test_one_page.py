"""docs/one_page.py is small enough to be read, and right: it gives the losses of the package, digit by digit."""

import ast
import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import write_shards
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "one_page.py"
VOCAB, SEQ_LEN, BATCH, STEPS = 97, 16, 12, 20
SETTINGS = {
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 32,
    "seq_len": SEQ_LEN,
    "steps": STEPS,
    "batch_size": BATCH,
    "micro_batch_size": 3,  # four micro-batches a step, two for each of two processes
    "lr": 1e-2,
    "warmup_steps": 5,
    "val_every": 10,
    "val_windows": 10,
    "save_every": 8,
    "dtype": "float64",
}


@pytest.fixture(scope="module")
def page() -> ModuleType:
    spec = importlib.util.spec_from_file_location("one_page", PAGE)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """13 shards, so two groups, one of them shorter than a window; about 90 windows, so 240 are more than two epochs."""
    rng = np.random.Generator(np.random.Philox(11))

    def document() -> list[int]:
        start, step, n = rng.integers(0, VOCAB), rng.integers(1, 4), rng.integers(2, 50)
        return [int(token) for token in (start + step * np.arange(n)) % (VOCAB - 1)]

    train = [[document() for _ in range(rng.integers(2, 7))] for _ in range(12)] + [[[5, 6, 7]]]
    folder = write_shards(
        tmp_path_factory.mktemp("one_page"), {"train": train, "val": [[document() for _ in range(12)]]}
    )
    for file in folder.glob("*/*.ds"):
        tokens = np.fromfile(file, "<u2")
        tokens[tokens == 50256] = VOCAB - 1
        tokens.tofile(file)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"vocab_size": VOCAB, "eot": VOCAB - 1}))
    return folder


def arguments(data: Path, out: Path, *more: str) -> list[str]:
    return [str(data), "--out", str(out), *(f"--{name}={value}" for name, value in SETTINGS.items()), *more]


@pytest.fixture(scope="module")
def run(page: ModuleType, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], Path]:
    """The losses of a run in one process, and its folder."""
    out = tmp_path_factory.mktemp("run")
    return page.train(page.read_settings(arguments(data, out))), out


@pytest.fixture
def clean_state():
    """What a run of the package sets for its process."""
    threads = torch.get_num_threads()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


def test_losses_equal_those_of_the_package(run, data, tmp_path, monkeypatch, clean_state, capsys):
    """The first weights, the order of several epochs, accumulation, clipping, AdamW, the learning rate: all of it."""
    settings = {
        "model": {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": SEQ_LEN, "vocab_size": VOCAB},
        "data": {"path": data, "seq_len": SEQ_LEN},
        "optim": {"lr": 1e-2, "warmup_steps": 5},
        "train": {
            "run_dir": tmp_path / "run",
            "steps": STEPS,
            "global_batch_tokens": BATCH * SEQ_LEN,
            "micro_batch_size": 6,
            "precision": "fp64",
            "compile": "off",
            "log_every": 1,
        },
        "eval": {"val_every": STEPS, "val_tokens": 10 * SEQ_LEN, "hellaswag_every": 0, "sample_every": 0},
        "checkpoint": {"save_every": 0},
    }
    words = [f"--{room}.{name}={value}" for room, knobs in settings.items() for name, value in knobs.items()]
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *words])
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "scripts" / "pretrain.py"), run_name="__main__")
    assert stop.value.code in (0, None)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses, out = run
    ours = [row for row in rows if "train_loss" in row]
    assert losses == pytest.approx([row["train_loss"] for row in ours], rel=1e-9, abs=0)
    assert losses[-1] < losses[0] - 1  # it learns, so the later losses depend on the updates
    assert sum(row["grad_norm"] > 1 for row in ours) > 2  # clipping has something to do
