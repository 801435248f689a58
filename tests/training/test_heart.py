"""Several processes, one of which dies or hangs: the others end soon, and say which it was."""

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
from test_stop import wait_for, without_times
from test_train import TORCHRUN, finish, launch, tiny
from test_train import clean_state as clean_state
from test_train import data as data

from gpt2_hf.runs import read_rows
from gpt2_hf.training.stop import WORKERS

TWO = (*TORCHRUN, "--nproc_per_node", "2")


def pid_of(rank: int, run_dir: Path) -> int:
    (path,) = (run_dir / WORKERS).glob(f"*.{rank}")
    return int(path.read_text())


def ended(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=100)
    assert process.returncode != 0
    return output


@pytest.mark.parametrize("rank", [0, 1])
def test_the_others_name_a_rank_that_died(data, tmp_path, rank):
    config = tiny(data, tmp_path / "run", train__steps=100_000, train__micro_batch_size=4)
    process = launch(config, tmp_path, *TWO)
    wait_for(tmp_path / "run" / "metrics.jsonl", 5, process)
    dead = pid_of(rank, tmp_path / "run")
    os.kill(dead, signal.SIGKILL)
    output = ended(process)
    assert re.search(rf"error: rank {rank} \(\S+, process {dead}\) ended, and so must this process", output), output


# Rank 1 ends where nobody knows the other's number yet.
EARLY = """
import os, runpy, signal, sys
from gpt2_hf.training.run_folder import RunFolder

enter = RunFolder.__enter__
RunFolder.__enter__ = lambda self: enter(self) if os.environ["RANK"] == "0" else os.kill(os.getpid(), signal.SIGKILL)
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_rank_that_dies_before_it_is_known_leaves_no_traceback_of_ours(data, tmp_path):
    (tmp_path / "early.py").write_text(EARLY)
    output = ended(launch(tiny(data, tmp_path / "run"), tmp_path, *TWO, str(tmp_path / "early.py")))
    assert output.count("error: another process of the run ended; its own message, if any, says why") == 1
    assert "[rank0]: Traceback" not in output and "run_folder.py" not in output


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_the_others_name_a_rank_that_hangs(data, tmp_path, rank):
    config = tiny(data, tmp_path / "run", train__steps=100_000, train__micro_batch_size=4, train__timeout_s=5)
    process = launch(config, tmp_path, *TWO)
    wait_for(tmp_path / "run" / "metrics.jsonl", 5, process)
    stuck = pid_of(rank, tmp_path / "run")
    os.kill(stuck, signal.SIGSTOP)
    words = rf"stood still for \d+ s, .*: rank {rank} \(\S+, process {stuck}\) gives no sign of life, having"
    assert re.search(words, ended(process))


def test_a_launcher_that_restarts_brings_the_run_back(data, tmp_path):
    changes = {"train__steps": 60, "train__micro_batch_size": 4, "checkpoint__save_every": 5}
    finish(launch(tiny(data, tmp_path / "straight", **changes), tmp_path, *TWO))
    process = launch(tiny(data, tmp_path / "run", **changes), tmp_path, *TWO, "--max-restarts", "2")
    wait_for(tmp_path / "run" / "metrics.jsonl", 12, process)  # when the checkpoint of step 5 is whole
    os.kill(pid_of(1, tmp_path / "run"), signal.SIGKILL)
    assert "resuming from" in finish(process)
    straight, restarted = (read_rows(tmp_path / name / "metrics.jsonl") for name in ("straight", "run"))
    assert without_times(straight) == without_times(restarted)
