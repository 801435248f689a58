"""The loop: one run, one curve, whatever the topology and however often it is killed."""

import dataclasses
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, AutoTokenizer

from gpt2_hf.config import RunConfig
from gpt2_hf.data.shards import ShardError
from gpt2_hf.data.stream import TokenStream
from gpt2_hf.files import lock_folder
from gpt2_hf.knobs import ConfigError
from gpt2_hf.model.loss import LossKernels
from gpt2_hf.runs import read_rows
from gpt2_hf.training import build
from gpt2_hf.training import loop as training
from gpt2_hf.training.loop import train, train_step
from gpt2_hf.training.metrics import Throughput
from gpt2_hf.training.watch import advice_on_memory

ROOT = Path(__file__).parents[2]
VOCAB = 251
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone")


@pytest.fixture(autouse=True)
def clean_state():
    """Accelerate's state and PyTorch's switches belong to the process; each run here begins anew."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.use_deterministic_algorithms(False)
    LossKernels.reset()


@pytest.fixture
def data(make_shards):
    """Documents of a noisy arithmetic pattern, which a small model can learn, over a small vocabulary."""
    rng = np.random.Generator(np.random.Philox(7))

    def document() -> list[int]:
        step, start, n = rng.integers(1, 5), rng.integers(0, VOCAB), rng.integers(20, 200)
        noise = rng.random(n) < 0.1
        return [int(t) for t in np.where(noise, rng.integers(0, VOCAB, n), (start + step * np.arange(n)) % VOCAB)]

    path = make_shards({"train": [[document() for _ in range(60)] for _ in range(3)], "val": [[document()] * 6]})
    for file in [*path.glob("*/*.ds")]:  # <|endoftext|> of the small vocabulary
        tokens = np.fromfile(file, "<u2")
        tokens[tokens == 50256] = VOCAB - 1
        tokens.tofile(file)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"vocab_size": VOCAB, "eot": VOCAB - 1}))
    return path


def tiny(data: Path, run_dir: Path, **changes) -> RunConfig:
    """A run of 16 samples of 32 tokens a step; ``changes`` are dotted names with __ for the dot."""
    settings = {
        "model": {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 64, "vocab_size": VOCAB},
        "data": {"path": str(data), "seq_len": 32},
        "optim": {"lr": 6e-4, "warmup_steps": 10},
        "train": {
            "run_dir": str(run_dir),
            "steps": 20,
            "global_batch_tokens": 16 * 32,
            "micro_batch_size": 8,
            "precision": "fp32",
            "compile": "off",
            "log_every": 1,
        },
        "eval": {"val_every": 0, "val_tokens": 320, "hellaswag_every": 0, "sample_every": 0},
        "checkpoint": {"save_every": 1000},
    }
    for name, value in changes.items():
        section, key = name.split("__")
        settings[section][key] = value
    config = RunConfig()
    sections = {name: dataclasses.replace(getattr(config, name), **values) for name, values in settings.items()}
    return dataclasses.replace(config, **sections)


def run(config: RunConfig) -> list[dict]:
    train(config)
    AcceleratorState._reset_state(reset_partial_state=True)
    return read_rows(Path(config.train.run_dir) / "metrics.jsonl")


def losses(rows: list[dict]) -> list[float]:
    return [row["train_loss"] for row in rows if "train_loss" in row]


def with_steps(config: RunConfig, steps: int) -> RunConfig:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps))


def compile_once(make_shards, run_dir: Path, monkeypatch, **changes) -> None:
    """Train, validate, score HellaSwag, sample, save; resume, and all again: nothing is compiled after its first use.

    A new run is measured before its first step, a resumed one after step 6. No graph is broken.
    """
    pattern = [[(start + 3 * i) % 250 for i in range(120)] for start in range(60)]
    data = make_shards({"train": [pattern], "val": [pattern[:4]]}, run_dir.name + "-data")
    measured = {"eval__val_every": 2, "eval__hellaswag_every": 2, "eval__hellaswag_items": 2, "eval__sample_every": 2}
    kept = {"eval__sample_tokens": 3, "checkpoint__save_every": 2, "model__vocab_size": None, "train__compile": "on"}
    graphs: list[int] = []

    def counted_step(*arguments):
        result = train_step(*arguments)
        graphs.append(counters["stats"]["unique_graphs"])
        return result

    monkeypatch.setattr(training, "train_step", counted_step)
    for steps in (4, 8):
        torch._dynamo.reset()
        counters.clear()
        graphs.clear()
        run(tiny(data, run_dir, train__steps=steps, **measured, **kept, **changes))
        # A graph of a block in training, on a GPU another in validation, and the loss's kernel.
        assert graphs[0] == graphs[1] and 2 <= graphs[2] == graphs[3] == counters["stats"]["unique_graphs"], graphs
        assert not counters["graph_break"]
    torch._dynamo.reset()


def launch(config: RunConfig, tmp_path: Path, *launcher: str) -> subprocess.Popen:
    recipe = tmp_path / f"{Path(config.train.run_dir).name}.yaml"
    recipe.write_text(config.to_yaml())
    threads = "1" if launcher else "2"  # two processes of two threads would fight over two cores
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": threads}
    command = [*(launcher or [sys.executable]), str(ROOT / "scripts" / "pretrain.py"), "--config", str(recipe)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def test_run_folder_has_what_it_promises(data, tmp_path):
    config = tiny(
        data,
        tmp_path / "run",
        eval__val_every=10,
        eval__hellaswag_every=0,
        checkpoint__save_every=5,
        checkpoint__keep_every=10,
        checkpoint__keep_last=1,
        optim__lr=5e-3,
        train__trackers=[],
    )
    rows = run(config)
    folder = tmp_path / "run"
    files = {path.relative_to(folder).as_posix() for path in folder.iterdir()}
    assert files >= {"config.yaml", "metrics.jsonl", "environment.json", "checkpoints", "final"}
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == ["step-00000010", "step-00000020"]
    assert json.loads((folder / "environment.json").read_text())["torch"] == torch.__version__

    assert [row["step"] for row in rows] == list(range(21))
    assert all(row["tokens_seen"] == row["step"] * 512 for row in rows)
    assert {"train_loss", "lr", "grad_norm", "tokens_per_sec", "mfu", "peak_memory"} <= rows[-1].keys()
    assert [row["step"] for row in rows if "val_loss" in row] == [0, 10, 20]
    assert rows[0]["val_loss"] == pytest.approx(np.log(VOCAB), rel=0.02)
    assert rows[20]["val_loss"] < rows[0]["val_loss"] - 0.3

    stock = AutoModelForCausalLM.from_pretrained(folder / "final")
    assert type(stock).__name__ == "GPT2LMHeadModel"
    assert AutoTokenizer.from_pretrained(folder / "final")("Hello")["input_ids"] == [15496]
    # The loss that we wrote down is the loss that stock transformers finds in the file.
    from gpt2_hf.data.shards import open_split

    windows = TokenStream(open_split(data, "val"), 32, seed=0, shuffle=False).batch(0, 10).astype(np.int64)
    with torch.no_grad():
        found = stock(torch.from_numpy(windows), labels=torch.from_numpy(windows)).loss.item()
    assert rows[20]["val_loss"] == pytest.approx(found, rel=1e-5)


def test_losses_equal_a_plain_loop_of_stock_transformers(data, tmp_path):
    """Against nothing of ours but the initial weights and the order of the data: AdamW, clip, warm-up, cosine."""
    config = tiny(data, tmp_path / "run", train__steps=8, train__precision="fp64", checkpoint__save_every=1)
    config = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, keep_every=1))
    ours = losses(run(config))

    from gpt2_hf.data.shards import open_split
    from gpt2_hf.model import GPTForCausalLM

    torch.manual_seed(config.train.seed)
    start = GPTForCausalLM(config.model.gpt_config())
    start.save_pretrained(tmp_path / "start")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "start").double().train()
    decays = [p for p in stock.parameters() if p.ndim == 2]
    plain = [p for p in stock.parameters() if p.ndim < 2]
    groups = [{"params": decays, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    stream = TokenStream(open_split(data, "train"), 32, config.train.seed)
    expected = []
    for step in range(8):
        windows = torch.from_numpy(stream.batch(step * 16, 16).astype(np.int64))
        loss = stock(windows, labels=windows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(stock.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 6e-4 * (step + 1) / 10
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    # Stock computes its loss in fp32 whatever the model's precision.
    assert ours == pytest.approx(expected, rel=2e-6)


@pytest.mark.parametrize(("precision", "steps", "tolerance"), [("fp64", 60, 1e-9), ("fp32", 20, 1e-6)])
def test_curve_does_not_depend_on_topology(data, tmp_path, precision, steps, tolerance):
    def config(name: str, micro_batch_size: int, samples: int) -> RunConfig:
        return tiny(
            data,
            tmp_path / name,
            train__precision=precision,
            train__steps=steps,
            train__global_batch_tokens=samples * 32,
            train__micro_batch_size=micro_batch_size,
            eval__val_every=steps,
        )

    finish(launch(config("two", 2, 8), tmp_path, *TORCHRUN, "--nproc_per_node", "2"))
    rows = {size: run(config(f"one{size}", size, 8)) for size in (1, 2, 8)}
    rows["two"] = read_rows(tmp_path / "two" / "metrics.jsonl")
    reference = losses(rows[8])
    assert len(reference) == steps
    for name in (1, 2, "two"):
        assert losses(rows[name]) == pytest.approx(reference, rel=tolerance, abs=0), name
        assert rows[name][-1]["val_loss"] == pytest.approx(rows[8][-1]["val_loss"], rel=tolerance)
        assert rows[name][-1]["grad_norm"] == pytest.approx(rows[8][-1]["grad_norm"], rel=100 * tolerance)


@pytest.mark.slow
def test_killed_and_resumed_equals_straight_bit_for_bit(make_shards, tmp_path):
    """60 steps straight, and 60 with a SIGKILL on the way: dropout, bf16, torch.compile, evaluation, Muon all on."""
    rng = np.random.Generator(np.random.Philox(8))
    documents = [rng.integers(0, 50256, 300).tolist() for _ in range(40)]
    data = make_shards({"train": [documents], "val": [documents[:3]]})

    def config(name: str) -> RunConfig:
        return tiny(
            data,
            tmp_path / name,
            model__vocab_size=None,
            model__dropout=0.1,
            optim__name="muon",
            train__steps=60,
            train__precision="bf16",
            train__compile="auto",
            eval__val_every=7,
            eval__hellaswag_every=25,
            eval__hellaswag_items=8,
            eval__sample_every=20,
            eval__sample_tokens=4,
            checkpoint__save_every=10,
        )

    finish(launch(config("straight"), tmp_path))
    process = launch(config("killed"), tmp_path)
    metrics = tmp_path / "killed" / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not (rows := read_rows(metrics)) or rows[-1]["step"] < 33:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "final").exists()

    output = finish(launch(config("killed"), tmp_path))
    assert "resuming from" in output and "step-00000030" in output
    straight, killed = (read_rows(tmp_path / name / "metrics.jsonl") for name in ("straight", "killed"))
    timed = {"tokens_per_sec", "mfu", "peak_memory"}
    strip = [[{k: v for k, v in row.items() if k not in timed} for row in rows] for rows in (straight, killed)]
    assert strip[0] == strip[1]
    a, b = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("straight", "killed"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)

    assert "is finished" in finish(launch(config("killed"), tmp_path))


def test_resume_continues_extends_and_survives_damage(data, tmp_path, capsys):
    # The schedule depends on the number of steps; a flat one is the same for 20 and for 30.
    flat = {"optim__min_lr_ratio": 1.0}
    straight = losses(run(tiny(data, tmp_path / "flat", train__steps=30, checkpoint__save_every=10, **flat)))
    short = tiny(data, tmp_path / "run", train__steps=20, checkpoint__save_every=10, **flat)
    run(short)
    capsys.readouterr()
    run(short)
    said = capsys.readouterr().out
    assert "is finished" in said and "raise --train.steps" in said

    # A kill between the last checkpoint and the new final: the old final must not pass for it.
    final = tmp_path / "run" / "final"
    finished, stale = (final / "model.safetensors").read_bytes(), tmp_path / "run" / "checkpoints" / "step-00000010"
    shutil.rmtree(final)
    shutil.copytree(stale, final)
    run(short)
    assert (final / "model.safetensors").read_bytes() == finished
    capsys.readouterr()

    weights = tmp_path / "run" / "checkpoints" / "step-00000020" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    longer = tiny(data, tmp_path / "run", train__steps=30, checkpoint__save_every=10, **flat)
    rows = run(longer)
    said = capsys.readouterr().out
    assert "step-00000020 is damaged and not used" in said
    assert "train.steps was 20, now 30" in said
    assert losses(rows) == straight
    assert [row["step"] for row in rows] == list(range(1, 31))  # none twice

    shutil.rmtree(tmp_path / "run" / "checkpoints")  # to free the disk; the result must survive another start
    run(longer)
    assert "is finished" in capsys.readouterr().out
    assert losses(read_rows(tmp_path / "run" / "metrics.jsonl")) == straight


def test_without_checkpoints_and_validation(data, tmp_path):
    manifest = json.loads((data / "manifest.json").read_text())
    del manifest["splits"]["val"]
    (data / "manifest.json").write_text(json.dumps(manifest))
    rows = run(tiny(data, tmp_path / "run", train__steps=3, checkpoint__save_every=0))
    assert len(losses(rows)) == 3
    assert (tmp_path / "run" / "final").exists() and not (tmp_path / "run" / "checkpoints").exists()
    with pytest.raises(ShardError, match="no split 'val'"):
        train(tiny(data, tmp_path / "other", eval__val_every=1))


def test_nothing_holds_the_model_when_the_process_group_ends(data, tmp_path, monkeypatch):
    """DDP, freed after its process group, now and then waited for ever: gloo's thread wants the lock that it holds."""
    models, alive = [], []
    build_model, end_training = build.build_model, Accelerator.end_training

    def built(*arguments):
        model = build_model(*arguments)
        models.append(weakref.ref(model))
        return model

    def ended(accelerator):
        alive.extend(ref() is not None for ref in models)
        end_training(accelerator)

    monkeypatch.setattr(build, "build_model", built)
    monkeypatch.setattr(Accelerator, "end_training", ended)
    train(tiny(data, tmp_path / "run", train__steps=2, eval__val_every=2, checkpoint__save_every=2))
    assert alive == [False]


@pytest.mark.slow
def test_two_ranks_compiled_killed_and_resumed_equal_straight(data, tmp_path):
    def config(name: str, **changes) -> RunConfig:
        return tiny(
            data,
            tmp_path / name,
            train__micro_batch_size=4,
            train__compile="auto",
            train__steps=8,
            optim__name="muon",
            optim__muon_lr=1e-3,
            optim__min_lr_ratio=1.0,
            eval__val_every=4,
            **changes,
        )

    launcher = (*TORCHRUN, "--nproc_per_node", "2")
    finish(launch(config("straight"), tmp_path, *launcher))
    finish(launch(with_steps(config("parts"), 4), tmp_path, *launcher))
    assert "resuming from" in finish(launch(config("parts"), tmp_path, *launcher))
    straight, parts = (read_rows(tmp_path / name / "metrics.jsonl") for name in ("straight", "parts"))
    assert losses(straight) == losses(parts) and len(losses(parts)) == 8
    one = losses(run(config("one")))
    assert losses(straight)[:4] == pytest.approx(one[:4], rel=1e-6)


def test_a_run_is_not_continued_with_other_data_or_another_model(data, tmp_path):
    run(tiny(data, tmp_path / "run", train__steps=2))
    for name, value in (("model__n_layer", 3), ("train__seed", 1), ("data__seq_len", 16), ("optim__name", "muon")):
        with pytest.raises(ConfigError, match=r"holds a run with another .*choose another --train\.run_dir"):
            train(tiny(data, tmp_path / "run", train__steps=4, **{name: value}))
        AcceleratorState._reset_state(reset_partial_state=True)


def test_overfit_batch_goes_to_zero(data, tmp_path):
    config = tiny(
        data,
        tmp_path / "run",
        train__overfit_batch=True,
        train__steps=150,
        train__global_batch_tokens=4 * 32,
        train__micro_batch_size=4,
        optim__lr=1e-2,
    )
    assert losses(run(config))[-1] < 0.05


def test_gradient_checkpointing_and_muon_run_through_the_loop(data, tmp_path):
    muon = {"optim__name": "muon", "optim__lr": 1e-2, "optim__muon_lr": 1e-2}
    plain = losses(run(tiny(data, tmp_path / "a", **muon)))
    checkpointed = losses(run(tiny(data, tmp_path / "b", train__gradient_checkpointing=True, **muon)))
    assert checkpointed[:10] == pytest.approx(plain[:10], rel=1e-5)
    assert plain[-1] < plain[0] - 0.5


@pytest.mark.parametrize("document_mask", [False, True])
def test_each_mode_compiles_once(make_shards, tmp_path, monkeypatch, document_mask):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))  # no C++ to build
    compile_once(make_shards, tmp_path / "run", monkeypatch, data__document_mask=document_mask, model__dropout=0.1)


def test_refusals_come_before_anything_is_made(data, tmp_path):
    for changes, error, words in (
        ({"train__global_batch_tokens": 500}, ConfigError, "nearest that work"),
        ({"data__path": str(tmp_path / "no")}, ShardError, "prepare_data"),
        ({"model__vocab_size": 100}, ConfigError, "vocabulary of 251"),
        ({"train__precision": "fp16"}, ConfigError, "needs CUDA"),
        ({"train__compile": "tuned"}, ConfigError, "tuned is for CUDA"),
        ({"train__trackers": ["nosuch"]}, ConfigError, "nosuch is unknown"),
        ({"model__attn_implementation": "flash_attention_2"}, ConfigError, "flash_attention_2 needs CUDA"),
    ):
        with pytest.raises(error, match=words):
            train(tiny(data, tmp_path / "run", **changes))
        AcceleratorState._reset_state(reset_partial_state=True)
    assert not (tmp_path / "run").exists()


def test_scripts_errors_are_one_line(tmp_path):
    for arguments, words in ((["--data.path", "nowhere"], "prepare_data"), (["--train.stepz", "1"], "did you mean")):
        command = [sys.executable, str(ROOT / "scripts" / "pretrain.py"), *arguments]
        result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert result.returncode == 2
        assert result.stderr.startswith("error: ") and words in result.stderr and result.stderr.count("\n") == 1


def test_not_a_number_stops_the_run(data, tmp_path):
    config = tiny(data, tmp_path / "run", optim__lr=1e20, optim__warmup_steps=0, train__log_every=5)
    words = r"not finite in 10 steps on end, up to step 11, so this is not saved; no checkpoint was saved: .*--optim.lr"
    with pytest.raises(FloatingPointError, match=words):
        train(config)
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [(row["step"], row["skipped_steps"]) for row in rows] == [(5, 4), (10, 5)] and losses(rows) == []


def test_out_of_memory_names_the_next_micro_batch(data, tmp_path):
    config = tiny(data, tmp_path, train__global_batch_tokens=48 * 32, train__micro_batch_size=16)
    for error in (torch.OutOfMemoryError("CUDA"), RuntimeError("DefaultCPUAllocator: can't allocate memory")):
        with pytest.raises(ConfigError, match=r"--train\.micro_batch_size 12"), advice_on_memory(config, 1):
            raise error
    with pytest.raises(ConfigError, match=r"--train\.micro_batch_size 12"), advice_on_memory(config, 2):
        raise torch.OutOfMemoryError("CUDA")
    with pytest.raises(RuntimeError, match="other"), advice_on_memory(config, 1):
        raise RuntimeError("other")


def test_a_run_has_one_writer(data, tmp_path):
    config = tiny(data, tmp_path / "run", train__steps=2)
    (tmp_path / "run").mkdir()
    lock = lock_folder(tmp_path / "run")
    with pytest.raises(ConfigError, match=f"written by process {os.getpid()} on .*end that one"):
        train(config)
    AcceleratorState._reset_state(reset_partial_state=True)
    lock.close()
    assert len(losses(run(config))) == 2
    lock_folder(tmp_path / "run").close()  # and it lets go


def test_accumulation_from_the_environment_is_refused(data, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(ConfigError, match="unset it"):
        train(tiny(data, tmp_path / "run"))


def test_throughput_counts_training_only(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    meter = Throughput(lambda step: 100 * step, flops_per_token=lambda step: 6.0, peak=6000)
    assert meter.measure(1) == {}  # holds compilation
    now[0] = 2.0
    assert meter.measure(5) == {"tokens_per_sec": 200.0, "mfu": 0.2}
    now[0] = 50.0
    meter.restart(5)  # an evaluation
    now[0] = 51.0
    assert meter.measure(6)["tokens_per_sec"] == 100.0


def test_mfu_never_exceeds_one(monkeypatch):
    """A peak measured in a bad moment gives way to what training reaches, for all steps to come."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    meter = Throughput(lambda step: 100 * step, flops_per_token=lambda step: 6.0, peak=300)
    meter.restart(0)
    mfus = []
    for step, now[0] in enumerate((1.0, 1.5, 2.5, 12.5), 1):  # 100, 200, 100 and 10 tokens/s
        mfus.append(meter.measure(step)["mfu"])
    assert mfus == [1.0, 1.0, 0.5, 0.05]
