"""Signals: the last finished step is saved, and the run goes on as if nothing had been."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from test_rewind import quick_to_save as quick_to_save
from test_train import TORCHRUN, launch, losses, run, tiny
from test_train import clean_state as clean_state
from test_train import data as data

from gpt2_hf import runs
from gpt2_hf.files import lock_folder
from gpt2_hf.runs import read_rows
from gpt2_hf.training import loop as training
from gpt2_hf.training import stop
from gpt2_hf.training.loop import train, train_step
from gpt2_hf.training.measures import Measures
from gpt2_hf.training.stop import MARKER, REQUEUE

TIMED = {"tokens_per_sec", "mfu", "peak_memory"}


def read_marker(folder: Path) -> dict | None:
    """What RUN/requeue says; None where no start is asked for."""
    return json.loads((folder / MARKER).read_text()) if (folder / MARKER).exists() else None


def send(number: int) -> None:
    """Signal this process, and wait until that is heard."""
    assert signal.getsignal(number) not in (signal.SIG_DFL, None), "it would end the tests"
    os.kill(os.getpid(), number)
    time.sleep(0.2)


@pytest.fixture(autouse=True)
def default_handlers():
    """A run leaves the handlers of whoever calls it alone, and other tests' packages have some."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, signal.SIG_DFL if handler is None else handler)


def without_times(rows: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if key not in TIMED} for row in rows]


def stopped(config, kind: type[BaseException] = SystemExit) -> BaseException:
    with pytest.raises(kind) as stop:
        train(config)
    AcceleratorState._reset_state(reset_partial_state=True)
    return stop.value


def signal_in_step(monkeypatch, at: int, number: int) -> None:
    def step(accelerator, model, optimizers, batch, step, *rest):
        if step + 1 == at:
            send(number)
        return train_step(accelerator, model, optimizers, batch, step, *rest)

    monkeypatch.setattr(training, "train_step", step)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=["SIGTERM", "SIGUSR1"])
def test_a_signal_in_a_step_saves_the_last_finished_one(data, tmp_path, monkeypatch, capsys, number):
    changes = {"train__steps": 9, "checkpoint__save_every": 100, "train__micro_batch_size": 4}
    straight = run(tiny(data, tmp_path / "straight", **changes))
    config = tiny(data, tmp_path / "run", **changes)
    signal_in_step(monkeypatch, 6, number)
    assert stopped(config).code == REQUEUE
    # Heard between micro-steps: the step is given up.
    place = tmp_path / "run" / "checkpoints" / "step-00000005"
    assert runs.newest_whole(place.parent) == place and losses(read_rows(tmp_path / "run" / "metrics.jsonl"))
    asked = read_marker(tmp_path / "run")
    assert (asked["signal"], asked["step"], asked["checkpoint"]) == (number.name, 5, str(place)) and asked["time"]
    assert capsys.readouterr().err.splitlines()[-1] == f"terminated at step 5; the next start goes on from {place}"
    monkeypatch.undo()
    assert without_times(run(config)) == without_times(straight)
    assert read_marker(tmp_path / "run") is None
    assert signal.getsignal(number) == signal.SIG_DFL


@pytest.mark.parametrize("kind", ["validation", "hellaswag", "samples"])
def test_a_signal_in_a_measurement_loses_neither_step_nor_figures(data, make_shards, tmp_path, monkeypatch, kind):
    """In the measurement after step 4, which is made again by the next start."""
    documents = [[(start + 3 * i) % 250 for i in range(120)] for start in range(40)]
    shards = make_shards({"train": [documents], "val": [documents[:4]]}, "stock")
    changes = {
        "model__vocab_size": None,
        "train__steps": 5,
        "train__micro_batch_size": 4,
        "checkpoint__save_every": 0,
        "eval__val_every": 2,
        "eval__hellaswag_every": 4,
        "eval__hellaswag_items": 6,
        "eval__sample_every": 4,
        "eval__sample_tokens": 3,
    }
    straight = run(tiny(shards, tmp_path / "straight", **changes))
    config = tiny(shards, tmp_path / "run", **changes)
    asked_at = []
    take = Measures.take

    def signalled(self, step):
        if step == 4:
            point, n = self._safe_point, 0

            def counted():
                nonlocal n
                n += 1
                if n == {"validation": 2, "hellaswag": 4, "samples": 10}[kind]:
                    send(signal.SIGTERM)
                    asked_at.append(n)
                point()

            self._safe_point = counted
        return take(self, step)

    monkeypatch.setattr(Measures, "take", signalled)
    assert stopped(config).code == REQUEUE and asked_at
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert rows[-1]["step"] == 3 and read_marker(tmp_path / "run")["step"] == 4
    monkeypatch.undo()
    assert without_times(run(config)) == without_times(straight)


def test_ctrl_c_says_what_comes_and_saves(data, tmp_path, monkeypatch, capsys):
    config = tiny(data, tmp_path / "run", train__steps=9, checkpoint__save_every=100)
    signal_in_step(monkeypatch, 3, signal.SIGINT)
    place = tmp_path / "run" / "checkpoints" / "step-00000002"
    assert str(stopped(config, KeyboardInterrupt)) == f"stopped at step 2; the next start goes on from {place}"
    assert (
        "saving step 2, or the one that is being made; press again to end at once (then all, as nothing was saved yet, "
        "is lost)"
    ) in capsys.readouterr().err
    assert runs.newest_whole(place.parent) == place and read_marker(tmp_path / "run") is None
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_with_nothing_to_save_is_what_it_always_was(data, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "open_data", lambda _: send(signal.SIGINT))
    assert str(stopped(tiny(data, tmp_path / "run"), KeyboardInterrupt)) == "stopped before training began"
    assert not (tmp_path / "run").exists()


def test_a_handler_of_the_caller_stays(data, tmp_path, monkeypatch):
    heard = []
    before = signal.signal(signal.SIGUSR1, lambda *_: heard.append(1))
    try:
        signal_in_step(monkeypatch, 2, signal.SIGUSR1)
        assert len(losses(run(tiny(data, tmp_path / "run", train__steps=3)))) == 3 and heard
    finally:
        signal.signal(signal.SIGUSR1, before)


def wait_for(path: Path, step: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not (rows := read_rows(path)) or rows[-1]["step"] < step:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def endless(data, tmp_path, **changes):
    return tiny(data, tmp_path / "run", train__steps=100_000, checkpoint__save_every=100_000, **changes)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGUSR1, REQUEUE), (signal.SIGINT, 130)])
def test_signals_end_a_run_with_one_true_line(data, tmp_path, number, status):
    process = launch(endless(data, tmp_path), tmp_path)
    wait_for(tmp_path / "run" / "metrics.jsonl", 8, process)
    (worker,) = (tmp_path / "run" / stop.WORKERS).iterdir()
    assert int(worker.read_text()) == process.pid
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == status and "Traceback" not in output
    assert len(re.findall(rf"^process: \S+ {process.pid}$", output, re.M)) == 1
    step, saved = re.fullmatch(
        rf"(?:stopped|terminated) at step (\d+); the next start goes on from {tmp_path}/run/checkpoints/step-(\d+)",
        output.splitlines()[-1],
    ).groups()
    assert runs.newest_whole(tmp_path / "run" / "checkpoints").name == f"step-{saved}" and int(saved) == int(step) >= 8
    assert (tmp_path / "run" / MARKER).exists() == (number == signal.SIGUSR1)
    assert not (tmp_path / "run" / stop.WORKERS).exists()


# Stands still in the third step, where Python runs no signal's handler.
STANDSTILL = """
import runpy, signal, sys, time
from gpt2_hf.training import loop, stop

make = loop.train_step

def step(*arguments):
    if arguments[4] == 2:
        signal.pthread_sigmask(signal.SIG_BLOCK, stop.SIGNALS)
        time.sleep(100)
    return make(*arguments)

loop.train_step, stop.GRACE = step, 1.0
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, REQUEUE), (signal.SIGINT, 130)])
def test_where_no_step_ends_a_run_ends_all_the_same(data, tmp_path, number, status):
    """After a time; at the second Ctrl-C before that."""
    (tmp_path / "standstill.py").write_text(STANDSTILL)
    process = launch(tiny(data, tmp_path / "run"), tmp_path, sys.executable, str(tmp_path / "standstill.py"))
    wait_for(tmp_path / "run" / "metrics.jsonl", 2, process)
    process.send_signal(number)
    if number == signal.SIGINT:
        while "press again to end at once" not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(number)
    last = process.communicate(timeout=60)[0].splitlines()[-1]
    assert process.returncode == status
    way_on = "at step 2; nothing was saved yet, so the next start begins at step 0"
    assert last == f"{'stopped' if number == signal.SIGINT else 'terminated'} {way_on}"
    assert bool(read_marker(tmp_path / "run")) == (number == signal.SIGTERM)


def test_a_signal_while_the_step_is_compiled_is_obeyed_at_once(data, tmp_path):
    process = launch(tiny(data, tmp_path / "run", train__compile="on"), tmp_path)
    while "compiling" not in (line := process.stdout.readline()):
        assert line or process.poll() is None
    process.send_signal(signal.SIGTERM)
    last = process.communicate(timeout=60)[0].splitlines()[-1]
    assert process.returncode == REQUEUE
    assert last in (
        "terminated before training began",
        "terminated at step 0; nothing was saved yet, so the next start begins at step 0",
    )
    assert read_marker(tmp_path / "run")["checkpoint"] is None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells a process that its parent is gone")
@pytest.mark.parametrize("launcher", [("-m", "accelerate.commands.launch", "--cpu"), TORCHRUN[1:]])
def test_a_killed_launcher_ends_training_and_nothing_is_lost(data, tmp_path, launcher):
    """One process under the launcher of one, which forwards nothing; two under torchrun."""
    several = ("--nproc_per_node", "2") if launcher == TORCHRUN[1:] else ()
    config = endless(data, tmp_path, train__micro_batch_size=4)
    process = launch(config, tmp_path, sys.executable, *launcher, *several)
    wait_for(tmp_path / "run" / "metrics.jsonl", 8, process)
    workers = [int(path.read_text()) for path in (tmp_path / "run" / stop.WORKERS).iterdir()]
    assert len(workers) == (2 if several else 1) and process.pid not in workers
    process.kill()
    last = process.communicate(timeout=60)[0].splitlines()[-1]
    deadline = time.monotonic() + 30
    while any(map(is_alive, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    lock_folder(tmp_path / "run").close()
    place = runs.newest_whole(tmp_path / "run" / "checkpoints")
    asked = read_marker(tmp_path / "run")
    assert asked["checkpoint"] == str(place) and place.name == f"step-{asked['step']:08d}" and asked["step"] >= 8
    assert last == f"terminated at step {asked['step']}; the next start goes on from {place}"
