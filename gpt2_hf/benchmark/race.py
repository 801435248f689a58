"""The benchmark: every variant warm in its own process, taking turns, measured together with the machine's limits."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, median_high
from typing import Any

import torch
from tqdm.auto import tqdm

from .card import card_at_work
from .limits import measure_limits
from .processes import RaceError, Worker
from .variants import Shape, Variant

CONTENDED = 1.25  # a step is, when it takes so many times the median of its variant


@dataclass
class Row:
    """What was measured of one variant."""

    variant: Variant
    losses: list[float] = field(default_factory=list)  # of the first steps, all variants seeing the same tokens
    first_step_s: float = 0.0
    micro_batch_size: int = 0
    rounds: list[list[float]] = field(default_factory=list)  # seconds of each step, by round
    steps_together: int = 1  # of which one of those seconds is the mean
    loads: list[float] = field(default_factory=list)  # processor seconds per second, by round
    peak_memory_gb: float = 0.0
    error: str = ""

    @property
    def is_ours(self) -> bool:
        return self.variant.model == "ours"

    def add_round(self, measured: dict[str, Any]) -> None:
        """Take in what a worker answered to "run"."""
        self.rounds.append(measured["seconds"])
        self.loads.append(measured["load"])
        self.steps_together = measured.get("steps_together", 1)
        self.peak_memory_gb = measured["peak_memory_gb"]

    def seconds(self) -> list[float]:
        """Of each step."""
        return [seconds for one in self.rounds for seconds in one]

    def tokens_per_sec(self, shape: Shape) -> list[float]:
        """Of each step, in order of speed."""
        return sorted(shape.tokens / seconds for seconds in self.seconds())

    def median_speed(self, shape: Shape) -> float:
        """Tokens per second of the median step."""
        return median_high(self.tokens_per_sec(shape))

    def contended(self) -> int:
        """How many steps took much longer than the median one: the machine did something else as well."""
        limit = CONTENDED * median(self.seconds())
        return sum(seconds > limit for seconds in self.seconds())

    def ratio_to(self, other: Row) -> float:
        """How many times as fast: the median over rounds, each with the medians of neighbouring turns."""
        pairs = zip(self.rounds, other.rounds, strict=True)
        return median(median(theirs) / median(mine) for mine, theirs in pairs)


@dataclass(frozen=True)
class Result:
    rows: list[Row]
    limits: dict[str, float]  # best over the rounds, see measure_limits
    breakdown: dict[str, float]  # milliseconds of our own step by part
    card: dict[str, Any] = field(default_factory=dict)  # see card_at_work


def race(
    variants: Sequence[Variant], shape: Shape, device: torch.device, rounds: int, seconds: float, logs: Path
) -> Result:
    """Measure; what the processes print goes to files in `logs`.

    A peer that cannot run has its error in its row.

    Raises:
        RaceError: when our own step cannot run.
    """
    rows = [Row(variant) for variant in variants]
    limits: dict[str, float] = {}
    turns = tqdm(total=len(rows) * (1 + rounds), unit="turn", desc="benchmark", dynamic_ncols=True)
    with turns, ExitStack() as workers:
        running: list[tuple[Row, Worker]] = []
        for row in rows:
            turns.set_postfix_str(f"compiling {row.variant.label}")
            worker = workers.enter_context(closing(Worker(row.variant, shape, device, logs)))
            vars(row).update(worker.answer())  # the losses and what else is known of the first steps, or the error
            if row.error and row.is_ours:
                raise RaceError(f"our own step fails: {row.error}")
            if row.error:
                worker.close()
                turns.write(f"{row.variant.label}: {row.error}", file=sys.stderr)
            else:
                running.append((row, worker))
            turns.update(1 + rounds if row.error else 1)
        for _ in range(rounds):
            for name, value in measure_limits(shape, device, min(seconds, 2.0)).items():
                limits[name] = max(limits.get(name, 0.0), value)
            if device.type == "cuda":
                torch.cuda.empty_cache()  # the workers may need it
            for row, worker in running:
                turns.set_postfix_str(row.variant.label)
                row.add_round(worker.ask(f"run {seconds}"))
                turns.update()
        breakdown = next((worker.ask("profile") for row, worker in running if row.is_ours), {})
    return Result(rows, limits, breakdown, card_at_work(device))
