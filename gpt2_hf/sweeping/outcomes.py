"""What became of a run, as its folder and what its process printed say."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .. import runs
from ..program import UserError
from ..reporting.measured import read_run
from .candidates import Sweep

STARTED = "--- started "  # begins what each start of a run has printed
State = Literal["finished", "diverged", "failed", "begun", "missing"]


@dataclass(frozen=True)
class Outcome:
    """What a run has come to.

    Attributes:
        state: failed with an error of its own, or begun and cut off (or still running).
        loss: val_loss after the last step; infinite if training diverged, nan before the end.
        tokens, losses: val_loss over tokens seen, (N,) each; empty before the first.
        error: the last one that its process has printed.
        n_rewinds: how often training went back and passed over data.
        settings: by dotted name.
    """

    state: State
    loss: float = math.nan
    tokens: np.ndarray = field(default_factory=lambda: np.array([]))
    losses: np.ndarray = field(default_factory=lambda: np.array([]))
    error: str = ""
    n_rewinds: int = 0
    settings: dict[str, Any] = field(default_factory=dict)


def read_outcome(run_dir: Path, log: Path) -> Outcome:
    """Raises ReportError when the run's records are not a run's."""
    error = last_error(log)
    diverged = runs.NOT_SAVED in error
    if not runs.read_rows(run_dir / "metrics.jsonl"):
        state: State = "diverged" if diverged else "failed" if error else "missing"
        return Outcome(state, math.inf if diverged else math.nan, error=error)
    run = read_run(run_dir)
    tokens, losses = run.series("val_loss")
    steps = run.settings.get("train.steps")
    is_last = bool(run.rows) and run.rows[-1].get("step") == steps and run.rows[-1].get("val_loss") is not None
    if is_last and (run_dir / "final").is_dir():
        loss = float(losses[-1])
        state = "finished" if math.isfinite(loss) else "diverged"
        loss = loss if math.isfinite(loss) else math.inf
    else:
        state = "diverged" if diverged else "failed" if error else "begun"
        loss = math.inf if diverged else math.nan
    n_rewinds = sum("rewound_from" in row for row in run.rows)
    return Outcome(state, loss, tokens, losses, error, n_rewinds, run.settings)


def last_error(log: Path) -> str:
    """The last line with which the newest start has said why it ended; "" when there is none."""
    text = log.read_text(errors="replace") if log.is_file() else ""
    lines = re.split(r"[\r\n]+", text.rpartition(STARTED)[2])
    return next((line.removeprefix("error: ") for line in reversed(lines) if line.startswith("error: ")), "")


def read_all(sweep: Sweep) -> dict[str, dict[int, Outcome]]:
    """Name of the candidate -> seed -> outcome.

    Raises:
        UserError: when two seeds of a candidate have the same losses: n runs would be one.
    """
    found = {}
    for candidate in sweep.candidates:
        outcomes = {
            seed: read_outcome(sweep.run_dir(candidate, seed), sweep.log(candidate, seed)) for seed in sweep.seeds
        }
        curves: dict[tuple[float, ...], int] = {}
        for seed, outcome in outcomes.items():
            if outcome.state != "finished":
                continue
            twin = curves.setdefault(tuple(outcome.losses), seed)
            if twin != seed:
                raise UserError(
                    f"{candidate.name}: the runs of seeds {twin} and {seed} have exactly the same losses, so they are "
                    f"one run twice and say nothing of chance: look at train.seed in the config.yaml of both"
                )
        found[candidate.name] = outcomes
    return found
