"""What ships to launch a run with: each configuration, and the batch script with a Slurm that is none."""

import math
import os
import shutil
import signal
import stat
import subprocess
import sys

import numpy as np
import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from test_stop import read_marker, wait_for, without_times
from test_train import ROOT, TORCHRUN, finish, launch, losses, run, tiny
from test_train import clean_state as clean_state
from test_train import data as data

from gpt2_hf.data.tokenizer import load_tokenizer
from gpt2_hf.evaluation.hellaswag import LENGTH_MULTIPLE, HellaSwag, load_hellaswag
from gpt2_hf.runs import read_rows
from gpt2_hf.training.distributed import group_sizes, wants_shards
from gpt2_hf.training.preflight import check_launcher
from gpt2_hf.training.stop import WORKERS

CONFIGS = ROOT / "accelerate_configs"

# Each task in its own process, as Slurm starts them, with Slurm's variables.
SRUN = """#!/bin/bash
for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & pids="$pids $!"; done
worst=0
for pid in $pids; do wait $pid; status=$?; [ $status -gt $worst ] && worst=$status; done
exit $worst
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo localhost; else echo "$@" >> "$REQUEUED"; fi
"""


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_configuration_says_what_it_is_named_for(path, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    arguments = launch_command_parser().parse_args(["--config_file", str(path), "scripts/pretrain.py"])
    arguments, *_ = _validate_launch_command(arguments)
    several = arguments.multi_gpu or arguments.use_fsdp
    environment = prepare_multi_gpu_env(arguments) if several else {}
    check_launcher(environment)
    assert wants_shards(environment) == (path.stem in ("fsdp2", "hsdp"))
    assert group_sizes(16, environment) == ((2, 8) if path.stem == "hsdp" else (1, 16))
    assert (arguments.num_machines, arguments.num_processes) == {
        "cpu": (1, 1), "single_gpu": (1, 1), "ddp": (1, 8), "fsdp2": (1, 8), "hsdp": (2, 16), "multi_node": (2, 16),
    }[path.stem]  # fmt: skip
    assert arguments.use_cpu == (path.stem == "cpu")


@pytest.mark.slow
def test_a_preempted_job_goes_back_to_the_queue_and_loses_nothing(data, tmp_path):
    changes = {"train__steps": 60, "train__micro_batch_size": 4, "checkpoint__save_every": 0, "eval__val_every": 20}
    finish(launch(tiny(data, tmp_path / "straight", **changes), tmp_path, *TORCHRUN, "--nproc_per_node", "2"))

    run_dir, recipe, requeued = tmp_path / "run", tmp_path / "recipe.yaml", tmp_path / "requeued"
    recipe.write_text(tiny(data, run_dir, **changes).to_yaml())
    for name, text in (
        ("srun", SRUN),
        ("scontrol", SCONTROL),
        ("python", f'#!/bin/bash\nexec {sys.executable} "$@"\n'),
    ):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(stat.S_IRWXU)
    job = {"SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "here", "SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS": "2"}
    machine = {"ACCELERATE_USE_CPU": "true", "REQUEUED": str(requeued), "RUN": str(run_dir), "SLURM_CPUS_PER_TASK": "1"}
    environment = os.environ | job | machine | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    environment |= {"PYTHONPATH": str(ROOT)}
    command = ["bash", str(CONFIGS / "slurm" / "pretrain.sbatch"), "--config", str(recipe)]

    for start, step in ((1, 10), (2, 30), (3, None)):
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if step is not None:
            wait_for(run_dir / "metrics.jsonl", step, process)
            for worker in (run_dir / WORKERS).iterdir():
                os.kill(int(worker.read_text()), signal.SIGUSR1)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
        asked = read_marker(run_dir)
        assert (asked is None) == (step is None)
        assert requeued.read_text().splitlines() == ["requeue 77"] * min(start, 2)
    rows = [without_times(read_rows(tmp_path / name / "metrics.jsonl")) for name in ("straight", "run")]
    assert rows[0] == rows[1]


@pytest.fixture(scope="module")
def hellaswag():
    return HellaSwag(load_hellaswag(), load_tokenizer())  # all 10,042 items


def test_all_of_hellaswag_has_few_shapes_on_a_gpu(hellaswag):
    """Of the 124M recipe's micro-batch of 65,536 tokens."""
    shapes = {
        kind: [fields.shape[1:] for fields, _ in hellaswag._batches(65_536, 0, 1, multiple)]
        for kind, multiple in LENGTH_MULTIPLE.items()
    }
    assert len({*shapes["cpu"]}) > 20 and len({*shapes["cuda"]}) <= 10
    tokens = {kind: sum(math.prod(shape) for shape in found) for kind, found in shapes.items()}
    assert tokens["cpu"] < tokens["cuda"] < 1.08 * tokens["cpu"]


@pytest.mark.parametrize(("world_size", "kind"), [(3, "cpu"), (4, "cuda")])
def test_every_hellaswag_ending_is_scored_by_one_rank(hellaswag, world_size, kind):
    """And every rank makes as many forward calls, of the same shapes."""
    shapes, scored = [], []
    for rank in range(world_size):
        batches = list(hellaswag._batches(16 * 1024, rank, world_size, LENGTH_MULTIPLE[kind]))
        shapes.append([fields.shape for fields, _ in batches])
        scored += [numbers[numbers < 2 * 10_042 * 4] for _, numbers in batches]
    assert all(found == shapes[0] for found in shapes)
    counts = np.bincount(np.concatenate(scored), minlength=2 * 10_042 * 4)
    assert len(counts) == 2 * 10_042 * 4 and (counts == 1).all()


def test_three_processes_measure_what_one_does(make_shards, tmp_path):
    """11 validation windows and 7 items, of which three ranks have unequal shares."""
    rng = np.random.Generator(np.random.Philox(5))
    shards = make_shards({s: [rng.integers(0, 50256, (n, 59)).tolist()] for s, n in (("train", 40), ("val", 6))})
    changes = {
        "model__vocab_size": None,
        "train__precision": "fp64",
        "train__steps": 3,
        "train__global_batch_tokens": 12 * 32,
        "train__micro_batch_size": 2,
        "eval__val_every": 1,
        "eval__val_tokens": 11 * 32,
        "eval__hellaswag_every": 3,
        "eval__hellaswag_items": 7,
        "eval__sample_every": 3,
        "eval__sample_tokens": 4,
    }
    finish(launch(tiny(shards, tmp_path / "three", **changes), tmp_path, *TORCHRUN, "--nproc_per_node", "3"))
    one = run(tiny(shards, tmp_path / "one", **changes))
    three = read_rows(tmp_path / "three" / "metrics.jsonl")
    assert losses(three) == pytest.approx(losses(one), rel=1e-9)
    for a, b in zip(one, three, strict=True):
        assert b["val_loss"] == pytest.approx(a["val_loss"], rel=1e-9)
    exact = [{k: v for k, v in rows[-1].items() if "hellaswag" in k or k == "samples"} for rows in (one, three)]
    assert exact[0] == exact[1] and exact[0]["hellaswag_items"] == 7


@pytest.fixture
def two_machines():
    """Two network namespaces joined by a cable: (name, address) of each. Skipped where they cannot be made."""
    names = [f"gpt2hf{os.getpid()}{letter}" for letter in "ab"]
    made = []

    def ip(*arguments: str) -> None:
        done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"network namespaces cannot be made here: ip {' '.join(arguments)}: {done.stderr.strip()}")

    if shutil.which("ip") is None:
        pytest.skip("network namespaces cannot be made here: there is no command ip")
    try:
        for name in names:
            ip("netns", "add", name)
            made.append(name)
        ip("link", "add", "cable0", "netns", names[0], "type", "veth", "peer", "name", "cable0", "netns", names[1])
        addresses = ["10.213.7.1", "10.213.7.2"]
        for name, address in zip(names, addresses, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "cable0")
            ip("-n", name, "link", "set", "cable0", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield list(zip(names, addresses, strict=True))
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "delete", name], check=False)


def test_two_machines_make_the_curve_of_one(data, tmp_path, two_machines):
    """A process on each, which find each other by c10d's rendezvous and see the same disk."""
    settings = {"train__precision": "fp64", "train__steps": 6, "checkpoint__save_every": 3, "eval__val_every": 3}
    config = tiny(data, tmp_path / "run", **settings)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(config.to_yaml())
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "cable0"}
    processes = []
    for rank, (name, address) in enumerate(two_machines):
        where = ["--nnodes", "2", "--node_rank", str(rank), "--nproc_per_node", "1", "--local_addr", address]
        meet = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"{two_machines[0][1]}:29533", "--rdzv_id", "run"]
        meet += ["--rdzv_conf", f"is_host={int(rank == 0)}"]
        command = ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run", *where, *meet]
        command += [str(ROOT / "scripts" / "pretrain.py"), "--config", str(recipe)]
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    for process in processes:
        finish(process)
    alone = run(tiny(data, tmp_path / "alone", **settings))
    together = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert losses(together) == pytest.approx(losses(alone), rel=1e-9, abs=0)
    assert together[-1]["val_loss"] == pytest.approx(alone[-1]["val_loss"], rel=1e-9)
