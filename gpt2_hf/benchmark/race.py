"""The benchmark: every variant warm in its own process, taking turns, measured together with the machine's limits."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm.auto import tqdm

from ..program import UserError
from .limits import measure_limits
from .variants import Shape, Variant

CONTENDED = 1.25  # a step is, when it takes so many times the median of its variant


class RaceError(UserError):
    """The benchmark cannot run, or its result is worthless; the message is one line."""


@dataclass
class Row:
    """What was measured of one variant."""

    variant: Variant
    losses: list[float] = field(default_factory=list)  # of the first steps, all variants seeing the same tokens
    first_step_s: float = 0.0
    micro_batch_size: int = 0
    rounds: list[list[float]] = field(default_factory=list)  # seconds of each step, by round
    loads: list[float] = field(default_factory=list)  # processor seconds per second, by round
    peak_memory_gb: float = 0.0
    error: str = ""

    def tokens_per_sec(self, shape: Shape) -> list[float]:
        """Of each step, in order of speed."""
        return sorted(shape.tokens / seconds for one in self.rounds for seconds in one)

    def contended(self) -> int:
        """How many steps took much longer than the median one: the machine did something else as well."""
        steps = [seconds for one in self.rounds for seconds in one]
        return sum(seconds > CONTENDED * median(steps) for seconds in steps)

    def ratio_to(self, other: Row) -> float:
        """How many times as fast: the median over rounds, each with the medians of neighbouring turns."""
        pairs = zip(self.rounds, other.rounds, strict=True)
        return median(median(theirs) / median(mine) for mine, theirs in pairs)


@dataclass(frozen=True)
class Result:
    rows: list[Row]
    limits: dict[str, float]  # best over the rounds, see measure_limits
    breakdown: dict[str, float]  # milliseconds of our own step by part


def race(
    variants: Sequence[Variant], shape: Shape, device: torch.device, rounds: int, seconds: float, logs: Path
) -> Result:
    """Measure; what the processes print goes to files in `logs`.

    A peer that cannot run has its error in its row.

    Raises:
        RaceError: when our own step cannot run.
    """
    rows = [Row(variant) for variant in variants]
    workers: dict[int, Worker] = {}
    limits: dict[str, float] = {}
    breakdown: dict[str, float] = {}
    try:
        with tqdm(total=len(rows) * (1 + rounds), unit="turn", desc="benchmark", dynamic_ncols=True) as bar:
            for number, row in enumerate(rows):
                bar.set_postfix_str(f"compiling {row.variant.label}")
                workers[number] = Worker(row.variant, shape, device, logs)
                vars(row).update(workers[number].answer())
                if row.error:
                    workers.pop(number).close()
                    bar.write(f"{row.variant.label}: {row.error}", file=sys.stderr)
                    if row.variant.model == "ours":
                        raise RaceError(f"our own step fails: {row.error}")
                bar.update(1 + rounds * bool(row.error))
            for turn in range(rounds):
                for name, value in measure_limits(device, min(seconds, 2.0)).items():
                    limits[name] = max(limits.get(name, 0.0), value)
                for number, worker in workers.items():
                    row = rows[number]
                    bar.set_postfix_str(row.variant.label)
                    measured = worker.ask(f"run {seconds}")
                    row.rounds.append(measured["seconds"])
                    row.loads.append(measured["load"])
                    row.peak_memory_gb = measured["peak_memory_gb"]
                    if turn == rounds - 1 and row.variant.model == "ours":
                        breakdown = worker.ask("profile")
                    bar.update()
    finally:
        for worker in workers.values():
            worker.close()
    return Result(rows, limits, breakdown)


class Worker:
    """A process with one variant in it; see worker.py for what it understands.

    Args:
        settings: environment variables for it; None takes one away.
    """

    def __init__(
        self,
        variant: Variant,
        shape: Shape,
        device: torch.device,
        logs: Path,
        settings: Mapping[str, str | None] | None = None,
    ):
        logs.mkdir(parents=True, exist_ok=True)
        self._log = logs / (re.sub(r"\W+", "_", variant.label) + ".log")
        request = json.dumps({"variant": asdict(variant), "shape": asdict(shape), "device": str(device)})
        command = [sys.executable, "-m", "gpt2_hf.benchmark.worker", request]
        # Where the package is not installed, the processes find it as this one did.
        path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", **(settings or {})}
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={name: value for name, value in environment.items() if value is not None},
            )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._questions, self._answers = self._process.stdin, self._process.stdout

    def ask(self, question: str) -> dict[str, Any]:
        self._questions.write(f"{question}\n")
        self._questions.flush()
        return self.answer()

    def answer(self) -> dict[str, Any]:
        line = self._answers.readline()
        if not line:
            code = self._process.wait()
            last = (self._log.read_text().strip().splitlines() or [""])[-1]
            raise RaceError(f"a process ended with {code}, see {self._log}: {last[:200]}")
        return json.loads(line)

    def close(self) -> None:
        self._questions.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
