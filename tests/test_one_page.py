"""docs/one_page.py is small enough to be read, and right: it gives the losses of the package, digit by digit."""

import ast
import contextlib
import importlib.util
import io
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

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


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The model is so small that threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def page() -> ModuleType:
    spec = importlib.util.spec_from_file_location("one_page", PAGE)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """13 shards, so two groups; one shard is shorter than a window. 95 windows: 20 steps of 12 are 2.5 epochs."""
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
def run(page: ModuleType, data: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A run in one process: its losses, its folder, and what it printed."""
    folder, printed = tmp_path_factory.mktemp("run"), io.StringIO()
    with contextlib.redirect_stdout(printed):
        losses = page.train(page.read_settings(arguments(data, folder)))
    return SimpleNamespace(losses=losses, folder=folder, printed=printed.getvalue())


@pytest.fixture
def clean_state():
    """What a run of the package sets for its process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.use_deterministic_algorithms(False)


def test_losses_equal_those_of_the_package(run, data, tmp_path, monkeypatch, clean_state):
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
    runpy.run_path(str(ROOT / "scripts" / "pretrain.py"), run_name="__main__")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    ours = [row for row in rows if "train_loss" in row]
    assert run.losses == pytest.approx([row["train_loss"] for row in ours], rel=1e-9, abs=0)
    assert run.losses[-1] < run.losses[0] - 1  # it learns, so the later losses depend on the updates
    assert sum(row["grad_norm"] > 1 for row in ours) > 2  # clipping has something to do
    # What stock transformers finds in the page's last checkpoint is what the package measured with its own weights.
    stock = AutoModelForCausalLM.from_pretrained(run.folder / "step-000020", dtype=torch.float64)
    assert type(stock).__name__ == "GPT2LMHeadModel"
    tokens = np.fromfile(data / "val" / "00000.ds", "<u2").astype(np.int64)
    windows = torch.from_numpy(np.stack([tokens[i * SEQ_LEN : (i + 1) * SEQ_LEN + 1] for i in range(10)]))
    with torch.no_grad():
        logits = stock(windows[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item()
    assert loss == pytest.approx(rows[-1]["val_loss"], rel=1e-9, abs=0)
    assert f"validation loss {loss:.4f}" in run.printed


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_two_processes_end_with_the_weights_of_one(run, data, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(PAGE)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, *arguments(data, tmp_path)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    printed = [float(loss) for loss in re.findall(r"^step .* loss (\S+)", done.stdout, re.M)]
    assert printed == pytest.approx(run.losses, abs=1e-4)
    one, two = weights(run.folder / "step-000020"), weights(tmp_path / "step-000020")
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-8, atol=1e-10)


def test_a_resumed_run_goes_on_as_if_nothing_had_been(page, run, data, tmp_path):
    """From step 16, in the third epoch."""
    resumed = page.train(page.read_settings(arguments(data, tmp_path, f"--resume={run.folder / 'step-000016'}")))
    assert resumed == pytest.approx(run.losses[16:], rel=1e-12, abs=0)


def test_first_weights_are_those_of_gpt2(page):
    """Half the standard deviation for positions, and less by 1/sqrt(2 x 4 blocks) for what adds to the stream."""
    torch.manual_seed(0)
    state = page.GPT2(page.GPT2Config(n_layer=4, n_embd=256, n_head=4, n_positions=64, vocab_size=500)).state_dict()
    expected = {"wte": 0.02, "wpe": 0.01, "c_attn": 0.02, "c_fc": 0.02, "c_proj": 0.02 / 8**0.5}
    for name, tensor in state.items():
        layer = name.split(".")[-2]
        if tensor.ndim == 2:
            assert tensor.std().item() == pytest.approx(expected[layer], rel=0.05), name
        else:
            assert (tensor == (name.endswith("weight"))).all(), name


def test_small_and_self_contained():
    text = PAGE.read_text()
    assert len(text.splitlines()) <= 350
    imported = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(str(node.module).partition(".")[0])
    assert imported - sys.stdlib_module_names == {"torch", "transformers", "numpy", "safetensors"}


def test_settings(page, data, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        page.read_settings(["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert all(f"--{name}" in printed for name in SETTINGS)
    with pytest.raises(SystemExit, match="--micro_batch_size"):
        page.train(page.read_settings(arguments(data, tmp_path, "--batch_size=10")))
