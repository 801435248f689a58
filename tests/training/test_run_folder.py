"""A run's folder: one writer, its records, and what a start that ends early leaves and says."""

import errno
import fcntl
import io
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from test_train import ROOT, TORCHRUN, losses, run, tiny, with_steps
from test_train import clean_state as clean_state
from test_train import data as data

from gpt2_hf import runs
from gpt2_hf.files import lock_folder, mask
from gpt2_hf.knobs import ConfigError
from gpt2_hf.runs import read_rows
from gpt2_hf.training import build, checkpoint, run_folder
from gpt2_hf.training import loop as training
from gpt2_hf.training.distributed import Host
from gpt2_hf.training.loop import train, train_step
from gpt2_hf.training.metrics import RunLog
from gpt2_hf.training.run_folder import RECORDS, FolderGone, RowFile, RunFolder


def before_step(monkeypatch, at: int, act) -> None:
    """Call ``act()`` before step ``at`` of the next run."""

    def step(accelerator, model, optimizers, batch, number, *rest):
        if number + 1 == at:
            act()
        return train_step(accelerator, model, optimizers, batch, number, *rest)

    monkeypatch.setattr(training, "train_step", step)


def interrupt():
    raise KeyboardInterrupt


def test_the_folder_is_held_from_first_to_last(data, tmp_path, monkeypatch):
    tried = []

    def is_held() -> None:
        with pytest.raises(BlockingIOError, match=f"^process {os.getpid()} on "):
            lock_folder(tmp_path / "run")
        tried.append(True)

    for module, name in ((training, "open_data"), (build, "build_model"), (checkpoint, "write_settings")):
        made = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, made=made, **k: is_held() or made(*a, **k))
    run(tiny(data, tmp_path / "run", train__steps=2, checkpoint__save_every=0))
    assert len(tried) == 3
    lock_folder(tmp_path / "run").close()


def test_a_file_system_without_locks_is_no_obstacle(data, tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert len(losses(run(tiny(data, tmp_path / "run", train__steps=2)))) == 2
    assert "cannot be locked (No locks available): take care" in capsys.readouterr().out


def at_steps(monkeypatch, acts: dict[int, object]) -> None:
    """Call ``acts[step]()`` before each of these steps of the next run."""

    def step(accelerator, model, optimizers, batch, number, *rest):
        acts.get(number + 1, lambda: None)()
        return train_step(accelerator, model, optimizers, batch, number, *rest)

    monkeypatch.setattr(training, "train_step", step)


def remove(path: Path) -> None:
    while path.exists():  # a checkpoint that gets its name just then ends a removal half-way
        shutil.rmtree(path, ignore_errors=True)


def replace(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.mkdir(exist_ok=True)  # what was just being saved may have made it again


@pytest.mark.parametrize("act", [remove, lambda path: path.rename(path.with_name("elsewhere")), replace])
@pytest.mark.parametrize("at", [3, 6])
def test_a_run_whose_folder_is_taken_away_goes_on_in_another(data, tmp_path, monkeypatch, act, at):
    def config(name: str):
        return tiny(data, tmp_path / name, train__steps=6, checkpoint__save_every=2, train__log_every=2)

    straight = run(config("straight"))
    with monkeypatch.context() as patched:
        before_step(patched, at, lambda: act(tmp_path / "run"))
        words = rf"replaced at step {at} of its run; the state is saved in {tmp_path}/run-rescued/check.*-rescued$"
        with pytest.raises(FolderGone, match=words):
            train(config("run"))
    AcceleratorState._reset_state(reset_partial_state=True)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert losses(run(config("run-rescued"))) == losses(straight)


def test_what_is_left_when_the_folder_is_gone_has_a_place_beside_it(tmp_path):
    with RunFolder(tmp_path / "run", Host(PartialState(cpu=True))) as folder:
        folder.record("train:\n  steps: 3\n", {"device": "cpu"}, 0)
        folder.rows = RowFile(tmp_path / "run" / "metrics.jsonl", [{"step": 1}])
        folder.rows.write({"step": 2})
        shutil.rmtree(tmp_path / "run")
        (tmp_path / "run-rescued").mkdir()
        assert folder.is_gone()
        folder.move_elsewhere()
        rescued = folder.path
        assert rescued == tmp_path / "run-rescued-2" and folder.checkpoints == rescued / "checkpoints"
        assert not folder.is_gone()
        with pytest.raises(BlockingIOError):
            lock_folder(rescued)
        assert read_rows(rescued / "metrics.jsonl") == [{"step": 1}, {"step": 2}]
        assert (rescued / "config.yaml").read_text() == "train:\n  steps: 3\n"
        assert [row["device"] for row in read_rows(rescued / "starts.jsonl")] == ["cpu"]
        folder.rows.close()
    assert not (tmp_path / "run").exists()


def test_a_full_disk_costs_no_row_and_no_record(data, tmp_path, monkeypatch, capsys):
    """Files that may not grow fail as on a full disk, first for all that a start writes down, then for its rows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    config = tiny(data, tmp_path / "run", train__steps=9, checkpoint__save_every=0, train__log_every=1)

    def no_space() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))

    def space() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    monkeypatch.setattr(run_folder, "RETRY_S", 0.0)
    monkeypatch.setattr(training, "build", lambda *arguments: no_space() or build.build(*arguments))
    at_steps(monkeypatch, {3: space, 5: no_space, 8: space})
    try:
        train(config)
    finally:
        space()
    assert [row["step"] for row in read_rows(tmp_path / "run" / "metrics.jsonl")] == list(range(1, 10))
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["train"]["steps"] == 9
    assert len(read_rows(tmp_path / "run" / "starts.jsonl")) == 1
    said = capsys.readouterr().out
    assert said.count("config.yaml cannot be written (File too large): it is tried again") == 1
    assert said.count("metrics.jsonl cannot be written (File too large): its rows are kept") == 2
    assert said.count("metrics.jsonl is written again, and lacks no row") == 2


def test_rows_that_could_never_be_written_are_said_to_be_lost(tmp_path):
    said = []
    rows = RowFile(tmp_path / "run" / "metrics.jsonl", [{"step": 1}], said.append)
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").write_text("")  # in the way of any folder
    rows.write({"step": 2})
    assert not said and rows.content() == b'{"step": 1}\n{"step": 2}\n'  # the open file outlives its name
    other = RowFile(tmp_path / "run" / "metrics.jsonl", [], said.append)
    other.write({"step": 1})
    other.close()
    assert len(said) == 2 and "cannot be written (File exists)" in said[0] and "last 1 rows" in said[1]


def test_ctrl_c_says_what_there_is_to_go_on_from(data, tmp_path, monkeypatch):
    config = tiny(data, tmp_path / "deep" / "run", train__steps=6, checkpoint__save_every=2)

    def stopped() -> str:
        with pytest.raises(KeyboardInterrupt) as stop:
            train(config)
        AcceleratorState._reset_state(reset_partial_state=True)
        return str(stop.value)

    monkeypatch.setattr(training, "open_data", lambda _: interrupt())
    assert stopped() == "stopped before training began"
    assert not (tmp_path / "deep").exists()  # nothing was measured in what this start made
    monkeypatch.undo()
    before_step(monkeypatch, 2, interrupt)
    assert stopped() == "stopped at step 1; nothing was saved yet, so the next start begins at step 0"
    before_step(monkeypatch, 6, interrupt)
    assert (
        stopped() == f"stopped at step 5; the next start goes on from {config.train.run_dir}/checkpoints/step-00000004"
    )
    monkeypatch.undo()
    monkeypatch.setattr(Accelerator, "end_training", lambda _: interrupt())
    assert stopped() == f"stopped; the run is finished, its model is in {config.train.run_dir}/final"
    assert runs.damage(Path(config.train.run_dir) / "final") is None


def test_an_early_error_leaves_what_was_there(data, tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes").write_text("mine")
    with pytest.raises(ConfigError):
        train(tiny(data, tmp_path / "run", model__vocab_size=100))
    assert (tmp_path / "run" / "notes").read_text() == "mine"
    AcceleratorState._reset_state(reset_partial_state=True)
    before_step(monkeypatch, 1, lambda: 1 / 0)  # as late as can be
    with pytest.raises(ZeroDivisionError):
        train(tiny(data, tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_a_run_dir_that_cannot_be_is_one_line(data, tmp_path):
    (tmp_path / "file").write_text("")
    for name in ("file", "file/run"):
        with pytest.raises(ConfigError, match=rf"train\.run_dir .*{name} cannot be used: .*choose another"):
            train(tiny(data, tmp_path / name))
        AcceleratorState._reset_state(reset_partial_state=True)


def test_each_start_is_recorded(data, tmp_path, capsys):
    config = tiny(data, tmp_path / "run", train__steps=2, checkpoint__save_every=2)
    run(config)
    for number, content in enumerate((b"", b"{garbled", b"\xff\xfe", b"- list", b"text"), 1):
        (tmp_path / "run" / "config.yaml").write_bytes(content)
        capsys.readouterr()
        run(with_steps(config, 2 + number))
        assert (
            "config.yaml cannot be read: what has changed since the last start is not shown" in capsys.readouterr().out
        )
    run(with_steps(config, 10))
    assert "changed since the last start: train.steps was 7, now 10" in capsys.readouterr().out
    starts = read_rows(tmp_path / "run" / "starts.jsonl")
    assert [(row["step"], row["config"]["train"]["steps"]) for row in starts] == [
        (0, 2), (2, 3), (3, 4), (4, 5), (5, 6), (6, 7), (7, 10),
    ]  # fmt: skip
    assert starts[-1].items() >= json.loads((tmp_path / "run" / "environment.json").read_text()).items()


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("s3://user:pa:ss@host/x", "s3://***@host/x"),
        ("https://token@host/x?y=1", "https://***@host/x?y=1"),
        ("https://h/x?X-Amz-Signature=a1b2&n=2#f", "https://h/x?X-Amz-Signature=***&n=2#f"),
        ("https://h/x?n=2&access_token=abc&API_KEY=d", "https://h/x?n=2&access_token=***&API_KEY=***"),
        ("s3://bucket/me@home/file", "s3://bucket/me@home/file"),
        ("data/mine?x=1 and a@b", "data/mine?x=1 and a@b"),
    ],
)
def test_secrets_of_urls_are_masked(text, masked):
    assert mask(text) == masked
    assert yaml.safe_load(mask(yaml.safe_dump({"path": text}))) == {"path": masked}
    assert json.loads(mask(json.dumps(["--data.path", text, f"--data.path={text}"])))[2] == f"--data.path={masked}"


def test_no_secret_is_written_down(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["pretrain.py", "--data.path", "s3://me:hunter2@bucket/x"])
    config = "data:\n  path: s3://me:hunter2@bucket/x\n"
    with RunFolder(tmp_path / "run", Host(PartialState(cpu=True))) as folder:
        folder.record("data:\n  path: s3://me:hunter2@other/x\n", {"command": sys.argv}, 0)
        folder.record(config, {"command": sys.argv}, 5)
    said = capsys.readouterr().out
    assert "data.path was s3://***@other/x, now s3://***@bucket/x" in said
    for path in (tmp_path / "run").iterdir():
        assert "hunter2" not in path.read_text(), path
    assert {path.name for path in (tmp_path / "run").iterdir()} <= set(RECORDS)


def test_fewer_steps_than_there_are_is_one_true_line(data, tmp_path):
    config = tiny(data, tmp_path / "run", train__steps=4, checkpoint__save_every=4)
    run(config)
    with pytest.raises(ConfigError, match=r"train\.steps is 2, and .*step-00000004 is 4 steps along already: raise"):
        train(with_steps(config, 2))


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_console_that_lacks_a_character(tmp_path, monkeypatch, encoding):
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    run_dir = tmp_path / "läuft ✓"
    run_dir.mkdir()
    log = RunLog(run_dir, 0, 10, lambda step: 100 * step, enabled=True)
    log.write(1, {"samples": ["naïve 你好 \U0001f600"]})
    log.close()
    out.flush()
    assert b"\\u4f60\\u597d" in out.buffer.getvalue() and b"\\U0001f600" in out.buffer.getvalue()
    assert read_rows(run_dir / "metrics.jsonl")[0]["samples"] == ["naïve 你好 \U0001f600"]


def test_an_error_of_one_rank_is_said_by_that_rank(data, tmp_path):
    """Rank 1 alone meets a token that is none; then both meet a setting that cannot be."""
    config = tiny(data, tmp_path / "run", train__micro_batch_size=2, train__steps=3)
    program = (
        "import os, sys; from gpt2_hf.training import loop as training; from gpt2_hf.cli import parse_cli\n"
        "from gpt2_hf.config import RunConfig; from gpt2_hf.program import program\n"
        "import torch; step = training.train_step\n"
        "def broken(*arguments):\n"
        "    if os.environ['RANK'] == '1': raise torch.OutOfMemoryError('no more')\n"
        "    return step(*arguments)\n"
        "training.train_step = broken\n"
        "program(lambda: training.train(parse_cli(RunConfig)))()\n"
    )
    script, recipe = tmp_path / "script.py", tmp_path / "recipe.yaml"
    script.write_text(program)
    recipe.write_text(config.to_yaml())
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [*TORCHRUN, "--nproc_per_node", "2", str(script), "--config", str(recipe)]

    def errors(*arguments) -> list[str]:
        result = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, timeout=120)
        assert result.returncode != 0
        return [line for line in result.stderr.splitlines() if "error: " in line]

    found = errors()
    assert [line for line in found if "[rank 1] error: out of memory with micro_batch_size 2; try --" in line]
    assert [line for line in errors("--model.vocab_size", "100") if "vocabulary" in line] == [
        f"error: {data} has a vocabulary of 251, the model has 100 rows for it; leave out model.vocab_size, or prepare "
        f"the data with the model's tokenizer"
    ]
