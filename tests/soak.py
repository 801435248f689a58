"""Train for half an hour while the run is killed every minute or so, beside one that is left alone: same weights?

    python tests/soak.py --minutes 35 --out runs/soak        (or: make soak)

Two runs of one recipe, each in processes of one thread: one goes through, the other is killed (SIGKILL, and every
fourth time SIGTERM, of one process chosen by chance) at random moments, every other one while a checkpoint is written,
and started again by the same command. Memory, threads and open files of the first are sampled all along. At the end the
two models must be equal to the last bit. Exit status 0 means so.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[1]
SMALL = {
    "model.n_layer": 2,
    "model.n_head": 2,
    "model.n_embd": 64,
    "model.n_positions": 128,
    "data.seq_len": 128,
    "optim.decay_ratio": 1e-9,  # a rate that doesn't depend on how many steps there are to be
    "train.global_batch_tokens": 1024,
    "train.micro_batch_size": 4,
    "train.log_every": 20,
    "eval.val_every": 100,
    "eval.val_tokens": 10240,
    "eval.hellaswag_every": 500,
    "eval.hellaswag_items": 20,
    "eval.sample_every": 500,
    "checkpoint.save_every": 50,
}


def command(run: Path, data: str, steps: int, n_processes: int) -> list[str]:
    settings = SMALL | {"data.path": data, "train.run_dir": str(run), "train.steps": steps, "model.dropout": 0.1}
    arguments = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    recipe = ["--config", str(ROOT / "recipes" / "demo.yaml")]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n_processes)]
    script = str(ROOT / "scripts" / "pretrain.py")
    return [sys.executable, *(launcher if n_processes > 1 else []), script, *recipe, *arguments]


def start(run: Path, data: str, steps: int, n_processes: int) -> subprocess.Popen:
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with (run.parent / f"{run.name}.log").open("a") as log:
        return subprocess.Popen(command(run, data, steps, n_processes), env=environment, stdout=log, stderr=log)


def step_of(run: Path) -> int:
    try:
        return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    except (OSError, IndexError, ValueError):
        return 0


def workers(process: subprocess.Popen, n_processes: int) -> list[psutil.Process]:
    """The processes that train."""
    try:
        found = psutil.Process(process.pid)
        children = [child for child in found.children() if "pretrain.py" in " ".join(child.cmdline())]
        return children if n_processes > 1 else [found]
    except psutil.Error:
        return []


def wait_for_a_save(run: Path, process: subprocess.Popen, seconds: float = 30) -> None:
    """Return in the middle of one, at a moment chosen by how long looking takes; or after some time without."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None and not is_saving(run):
        time.sleep(0.001)


def is_saving(run: Path) -> bool:
    return any(run.glob("checkpoints/.*.writing"))


def sample(process: subprocess.Popen, n_processes: int) -> dict[str, float] | None:
    try:
        of = workers(process, n_processes)[0]
        return {"mb": of.memory_info().rss / 1e6, "threads": of.num_threads(), "files": of.num_fds()}
    except (psutil.Error, IndexError):
        return None


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=35)
    parser.add_argument("--out", type=Path, default=Path("runs/soak"))
    parser.add_argument("--data", default="data/shakespeare", help="a folder that scripts/prepare_data.py made")
    parser.add_argument("--every", type=float, nargs=2, default=(40, 110), help="seconds between kills, from and to")
    parser.add_argument("--processes", type=int, default=1, help="of each run")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    chance = random.Random(options.seed)
    straight, harmed = options.out / "straight", options.out / "harmed"

    steps = 10**6  # more than there is time for
    n = options.processes
    whole, other = start(straight, options.data, steps, n), start(harmed, options.data, steps, n)
    begin = time.monotonic()
    samples: list[dict[str, float]] = []
    kills: list[dict[str, Any]] = []
    next_kill = begin + chance.uniform(*options.every)
    end = begin + 60 * options.minutes
    while time.monotonic() < end:
        time.sleep(1)
        if whole.poll() is not None:
            sys.exit(f"the run that was left alone ended with status {whole.returncode}: see {options.out}")
        if (found := sample(whole, n)) is not None:
            samples.append({"at": round(time.monotonic() - begin), "step": step_of(straight), **found})
        if other.poll() is not None or time.monotonic() > next_kill:
            if other.poll() is None:
                number = signal.SIGTERM if len(kills) % 4 == 3 else signal.SIGKILL
                victims = workers(other, n) or [psutil.Process(other.pid)]
                victim = chance.choice(victims)
                if len(kills) % 2:
                    wait_for_a_save(harmed, other)
                    time.sleep(chance.choice((0, 0.005, 0.02, 0.1)))
                kills.append({"signal": number.name, "step": step_of(harmed), "while_saving": is_saving(harmed)})
                with suppress(psutil.Error):  # it may have ended by itself
                    victim.send_signal(number)
                other.wait(180)
            elif other.returncode not in (0, 85):
                sys.exit(f"the harmed run ended by itself with status {other.returncode}: see {options.out}")
            other = start(harmed, options.data, steps, n)
            next_kill = time.monotonic() + chance.uniform(*options.every)
    # Both stop, and go on to the same step without harm.
    for process in (whole, other):
        for worker in workers(process, n):
            worker.send_signal(signal.SIGTERM)
        process.wait(180)
    steps_at = max(step_of(straight), step_of(harmed)) // 100 * 100 + 100
    (options.out / "samples.json").write_text(json.dumps({"samples": samples, "kills": kills, "steps": steps_at}))
    for run in (straight, harmed):
        if start(run, options.data, steps_at, n).wait() != 0:
            sys.exit(f"{run} could not be finished: see {options.out}")
    weights = [(run / "final" / "model.safetensors").read_bytes() for run in (straight, harmed)]
    late = [s for s in samples if s["at"] > 300 and s["step"] > 0] or samples
    n_saving = sum(kill["while_saving"] for kill in kills)
    print(f"{options.minutes:g} minutes, {steps_at} steps; killed {len(kills)} times, {n_saving} of them while saving")
    for name in ("mb", "threads", "files"):
        values = [s[name] for s in late]
        print(f"{name}: {values[0]:.0f} after five minutes, {values[-1]:.0f} at the end, at most {max(values):.0f}")
    print("final weights are", "equal to the last bit" if weights[0] == weights[1] else "DIFFERENT")
    return weights[0] != weights[1]


if __name__ == "__main__":
    sys.exit(main())
