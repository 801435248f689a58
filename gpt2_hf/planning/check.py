"""Predictions beside measurements, on this machine: python scripts/plan.py --check

Each shape trains in a process of its own for some seconds, in turns with the measurement of the rates that its time is
predicted from. One shape in one process: python -m gpt2_hf.planning.check JSON.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

from .. import hardware
from ..config import DataSection, ModelSection, OptimSection, RunConfig, TrainSection
from ..program import UserError
from ..training.memory import Parameters, memory_of
from ..training.metrics import flops_per_token, peak_memory_gb
from .cards import card_here
from .plan import way_here
from .smoke import training_step
from .speed import cpu_step_seconds, gpu_step_seconds, measure_rates

WARM_UP_STEPS, ROUNDS, SECONDS = 3, 3, 4.0
# Of a step's time on a quiet machine so much is processor time of all threads: 0.90 to 0.96 in the cases below.
BUSY = 0.93


@dataclass(frozen=True)
class Case:
    """A model and a batch. Two of five have shapes that the constants were not fitted to."""

    name: str
    n_layer: int
    n_embd: int
    n_head: int
    seq_len: int
    micro_batch_size: int
    micro_steps: int = 1
    optimizer: str = "adamw"

    def config(self) -> RunConfig:
        tokens = self.micro_batch_size * self.seq_len * self.micro_steps
        return RunConfig(
            model=ModelSection("gpt2", self.n_layer, self.n_head, self.n_embd, self.seq_len),
            data=DataSection(seq_len=self.seq_len),
            optim=OptimSection(name=self.optimizer),  # type: ignore[arg-type]  # checked there
            train=TrainSection(global_batch_tokens=tokens, micro_batch_size=self.micro_batch_size),
        )


CASES = {
    "cpu": (
        Case("demo, 4 x 128", 4, 128, 4, 256, 8, optimizer="muon"),
        Case("4 x 256", 4, 256, 4, 256, 8),
        Case("3 x 320, accumulated", 3, 320, 5, 512, 4, 2),
        Case("6 x 512", 6, 512, 8, 768, 2),
        Case("124M, one window", 12, 768, 12, 1024, 1),
    ),
    "cuda": (
        Case("124M, 8 windows", 12, 768, 12, 1024, 8),
        Case("124M, 64 windows", 12, 768, 12, 1024, 64),
        Case("124M, 32 accumulated", 12, 768, 12, 1024, 32, 2),
        Case("350M, 16 windows", 24, 1024, 16, 1024, 16),
    ),
}


def check(say: Callable[[str], None] = print) -> str:
    """Measure all cases here, one after another; a table of predicted and measured, in Markdown.

    Raises:
        UserError: when a process fails.
    """
    device = hardware.pick_device("auto")
    rows = [
        f"{hardware.describe(device)}, torch {torch.__version__}",
        "",
        "| | memory, predicted | measured | ratio | tokens/s, predicted | measured | ratio of times |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in CASES["cuda" if device.type == "cuda" else "cpu"]:
        say(f"measuring {case.name}")
        found = _in_a_process(case)
        rows.append(
            f"| {case.name} | {found['memory'] / 1e6:,.0f} MB | {found['measured_memory'] / 1e6:,.0f} MB | "
            f"{found['memory'] / found['measured_memory']:.2f} | {found['tokens_per_sec']:,.0f} | "
            f"{found['measured_tokens_per_sec']:,.0f} | {found['time_ratio']:.2f} |"
        )
    rows += ["", "Memory is that of tensors on a GPU, and the growth of the process on a CPU, by peaks of both."]
    return "\n".join(rows)


def _in_a_process(case: Case) -> dict[str, float]:
    command = [sys.executable, "-m", "gpt2_hf.planning.check", json.dumps(vars(case))]
    path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "passive")}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode:
        last = (result.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise UserError(f"{case.name} could not be measured: its process ended with {result.returncode}: {last[:200]}")
    return json.loads(result.stdout.splitlines()[-1])


def measure(case: Case) -> dict[str, float]:
    """Both of one case, in this process, which should be a new one: memory is that of its peak."""
    device = hardware.pick_device("auto")
    config = case.config()
    before = psutil.Process().memory_info().rss
    shape = (case.micro_steps, case.micro_batch_size, case.seq_len + 1)
    batch = torch.randint(config.model.gpt_config().vocab_size, shape, generator=torch.Generator().manual_seed(0))
    step = partial(training_step(config, device, 1e-3), batch)
    for _ in range(WARM_UP_STEPS):
        step()
    on_cpu = device.type == "cpu"
    peak = (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before if on_cpu else 1e9 * peak_memory_gb(device)
    )
    way, n = way_here(config, device), Parameters.of(config)
    memory = memory_of(config, way, n, case.micro_batch_size, case.micro_steps > 1)
    predicted, measured = [], []
    for _ in range(ROUNDS):
        predicted.append(_predicted_seconds(case, config, device))
        measured.append(statistics.median(_times(step, device)))
    ratios = [a / b for a, b in zip(predicted, measured, strict=True)]
    tokens = config.train.global_batch_tokens
    return {
        "memory": memory.total - (0 if on_cpu else memory.rest),
        "measured_memory": peak,
        "tokens_per_sec": tokens / statistics.median(predicted),
        "measured_tokens_per_sec": tokens / statistics.median(measured),
        "time_ratio": statistics.median(ratios),
    }


def _predicted_seconds(case: Case, config: RunConfig, device: torch.device) -> float:
    way, n = way_here(config, device), Parameters.of(config)
    if device.type == "cpu":
        return cpu_step_seconds(config, way, n, measure_rates(way.precision), case.micro_batch_size, case.micro_steps)
    flops = flops_per_token(n.total, config.model.gpt_config(), config.data.seq_len)
    return gpu_step_seconds(config, card_here(device), n, flops, 1, case.micro_steps)


def _times(step: Callable[[], Any], device: torch.device) -> list[float]:
    """Seconds of each step, for a while; on a CPU in processor time where other programs hold the threads up."""
    n_threads = torch.get_num_threads()
    step()
    times: list[float] = []
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end or len(times) < 2:
        wall, busy = time.perf_counter(), time.process_time()
        step()
        wall, busy = time.perf_counter() - wall, (time.process_time() - busy) / n_threads
        times.append(wall if device.type != "cpu" else min(wall, busy / BUSY))
    return times


if __name__ == "__main__":
    print(json.dumps(measure(Case(**json.loads(sys.argv[1])))))
