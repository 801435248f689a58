"""What a run's folder says of it: the rows, what they are drawn against, and the lines that they are compared with."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from ..files import mask
from ..program import UserError
from ..runs import EVALUATIONS, read_rows

# Validation loss of OpenAI's weights, by preset and corpus: the same weights differ by 0.13 between the two corpora.
VAL_LOSS_MARKS = {
    "gpt2": {"fineweb": 3.4250, "fineweb_edu": 3.2924},
    "gpt2-medium": {"fineweb": 3.0831},
    "gpt2-large": {"fineweb": 3.0006},
    "gpt2-xl": {"fineweb": 2.8313},
}
# HellaSwag accuracy the lecture's way (mean loss per token), all 10,042 items; GPT-3's is from its paper.
HELLASWAG_MARKS = {
    "gpt2": {"GPT-2 124M": 0.2955, "GPT-3 124M": 0.337},
    "gpt2-medium": {"GPT-2 355M": 0.3752},
    "gpt2-large": {"GPT-2 774M": 0.4320},
    "gpt2-xl": {"GPT-2 1.5B": 0.4893},
}
HELLASWAG_ITEMS = 10_042
SIZES = {"gpt2": "124M", "gpt2-medium": "355M", "gpt2-large": "774M", "gpt2-xl": "1.5B"}

DRAWN = (
    "step",
    "tokens_seen",
    "train_loss",
    "val_loss",
    "val_bpb",
    "reference_loss",
    "reference_band",
    "hellaswag_lecture_acc",
    "hellaswag_acc",
    "hellaswag_acc_norm",
    "hellaswag_items",
    "lr",
    "grad_norm",
    "tokens_per_sec",
    "mfu",
    "peak_memory",
)


# What two starts may have otherwise beside their settings, as environment.json names it.
CIRCUMSTANCES = (
    "git_commit",
    "python",
    "torch",
    "transformers",
    "accelerate",
    "platform",
    "device",
    "processes",
    "precision",
    "data_fingerprint",
)


class ReportError(UserError):
    """There is nothing to draw; the message is one line that says what is missing."""


class Mark(NamedTuple):
    """A model that curves are drawn beside: ``value`` of what the panel shows; ``source`` says whose figure it is."""

    name: str
    value: float
    source: str  # "measured", "published", or "" for what is known without either


@dataclass(frozen=True)
class Run:
    """What a report needs of a run.

    Attributes:
        rows: of metrics.jsonl, in the order in which they were written.
        preset: None when the model's shape is not one of OpenAI's.
        corpus: "fineweb" or "fineweb_edu", None for other data.
        settings: of config.yaml, by dotted name.
        environment, starts, evaluations: as the run's records of these names; empty where there are none.
    """

    folder: Path
    rows: list[dict[str, Any]]
    preset: str | None = None
    corpus: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    starts: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def tokens_seen(self) -> float:
        """In all, up to the last row."""
        return max(row["tokens_seen"] for row in self.rows if "tokens_seen" in row)

    @cached_property
    def last(self) -> dict[str, Any]:
        """The newest value of each figure."""
        return {key: value for row in self.rows for key, value in row.items() if value is not None}

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Tokens seen and values of one measurement, by tokens; where steps were made twice, the later row counts."""
        if key not in self._series:
            rows = [row for row in self.rows if "tokens_seen" in row and row.get(key) is not None]
            points = {row["tokens_seen"]: row[key] for row in rows}
            tokens = sorted(points)
            values = [points[token] for token in tokens]
            self._series[key] = np.array(tokens, dtype=float), np.array(values, dtype=float)
        return self._series[key]

    @cached_property
    def _series(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        return {}

    def steps(self, tokens: np.ndarray) -> np.ndarray:
        """The steps after which so many tokens were seen; NaN where no row has one."""
        known, steps = self.series("step")
        return np.interp(tokens, known, steps) if len(known) else tokens * np.nan

    def hours(self, tokens: np.ndarray, of_devices: bool = False) -> np.ndarray:
        """Hours of training up to so many tokens, or GPU-hours; NaN where no row has a rate.

        Each row's tokens_per_sec stands for the tokens since the one before. It is of training alone: compiling,
        evaluating, saving, and steps that were lost by a kill and made again, are not in it.
        """
        ends, rates = self.series("tokens_per_sec")
        usable = np.isfinite(rates) & (rates > 0)
        ends, rates = ends[usable], rates[usable]
        if not len(ends):
            return tokens * np.nan
        seconds = np.diff(ends, prepend=0) / rates
        rate_after = rates[-1]
        if of_devices:
            processes = self._processes(self.steps(ends))
            seconds, rate_after = seconds * processes, rate_after / processes[-1]
        known = np.interp(tokens, [0, *ends], [0, *np.cumsum(seconds)])
        return (known + np.maximum(tokens - ends[-1], 0) / rate_after) / 3600

    def _processes(self, steps: np.ndarray) -> np.ndarray:
        """How many processes, of a GPU each, made these steps: those of the last start before them."""
        counts = np.ones(len(steps))
        for start in self.starts:
            if type(start.get("step")) is int and type(start.get("processes")) is int:
                counts[steps > start["step"]] = start["processes"]
        return counts


def read_run(run_dir: str | Path) -> Run:
    """Read RUN/metrics.jsonl and the other records that are there. Raises ReportError when there are no rows."""
    folder = Path(run_dir)
    settings = read_settings(folder)
    return Run(
        folder=folder,
        rows=_read_checked(folder / "metrics.jsonl"),
        preset=_preset_of(settings.get("model")),
        corpus=_corpus_of(settings.get("data")),
        settings=flat(settings),
        environment=read_environment(folder),
        starts=_dicts(folder / "starts.jsonl"),
        evaluations=_dicts(folder / EVALUATIONS),
    )


def read_settings(folder: Path) -> dict[str, Any]:
    """RUN/config.yaml, empty where there is none. Raises ReportError when it cannot be read."""
    path = folder / "config.yaml"
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (yaml.YAMLError, ValueError) as error:
        raise ReportError(
            f"{path} cannot be read ({error}): put it back as the run wrote it, or move it away"
        ) from None
    return found if isinstance(found, dict) else {}


def read_environment(folder: Path) -> dict[str, Any]:
    """RUN/environment.json, empty where there is none that can be read."""
    try:
        found = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections by dotted name."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def differences(all_settings: Sequence[dict[str, Any]]) -> list[str]:
    """Names of which not all have the same value, or not all have one."""
    names = dict.fromkeys(name for settings in all_settings for name in settings)
    return [
        name for name in names if len({json.dumps(s.get(name, "(not set)"), default=str) for s in all_settings}) > 1
    ]


def _dicts(path: Path) -> list[dict[str, Any]]:
    return [row for row in read_rows(path) if isinstance(row, dict)]


def _read_checked(path: Path) -> list[dict[str, Any]]:
    """Rows of which everything that is drawn is a number."""
    rows = read_rows(path)
    if not all(isinstance(row, dict) for row in rows):
        raise ReportError(f"{path} has a line that is no row of a run: remove it")
    if not any("tokens_seen" in row for row in rows):
        raise ReportError(f"no rows in {path}: give the folder of a run that has trained a step")
    for row in rows:
        values = [row[key] for key in DRAWN if row.get(key) is not None]
        if not all(map(_is_number, values)) or row.get("tokens_seen", 0) is None:
            raise ReportError(f"{path} has a row that no run writes, of step {row.get('step')!r:.50}")
    return rows


def _is_number(value: object) -> bool:
    return isinstance(value, float) or (type(value) is int and abs(value) < 2**63)


def _preset_of(model: Any) -> str | None:
    shape = ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")
    is_stock = isinstance(model, dict) and all(model.get(name) is None for name in shape)
    return model.get("preset") if is_stock else None


def _corpus_of(data: Any) -> str | None:
    path = str(data.get("path", "") if isinstance(data, dict) else "").lower().replace("-", "_")
    return next((name for name in ("fineweb_edu", "fineweb") if name in path), None)


def loss_marks(runs: Sequence[Run]) -> list[Mark]:
    """Other models' validation loss on the runs' data: as measured beside them, else published for their size.

    None where the runs have different data: a loss on another corpus says nothing.
    """
    if len({(run.corpus, run.settings.get("data.path")) for run in runs}) > 1:
        return []
    published = {
        (preset, f"GPT-2 {SIZES[preset]}"): VAL_LOSS_MARKS[preset][corpus]
        for preset, corpus in ((run.preset, run.corpus) for run in runs)
        if preset in VAL_LOSS_MARKS and corpus in VAL_LOSS_MARKS[preset]
    }
    return _marks(runs, "val_loss", published)


def hellaswag_marks(runs: Sequence[Run]) -> list[Mark]:
    """Chance, and other models' accuracy the lecture's way: as measured beside the runs, else published."""
    presets = sorted({run.preset for run in runs if run.preset in HELLASWAG_MARKS})
    published = {(preset, name): value for preset in presets for name, value in HELLASWAG_MARKS[preset].items()}
    return [Mark("chance", 0.25, ""), *_marks(runs, "hellaswag_lecture_acc", published)]


def _marks(runs: Sequence[Run], key: str, published: dict[tuple[str, str], float]) -> list[Mark]:
    measured: dict[str, float] = {}
    for row in (row for run in runs for row in run.evaluations if not row.get("of_run")):
        figures, data = row.get("figures"), row.get("data")
        value = figures.get(key) if isinstance(figures, dict) else None
        elsewhere = (
            key == "val_loss" and isinstance(data, dict) and data.get("path") != runs[0].settings.get("data.path")
        )
        if isinstance(value, float) and math.isfinite(value) and not elsewhere:
            measured[mask(str(row.get("model")))] = value  # the newest of each
    known = {name.rpartition("/")[2] for name in measured}
    return [
        *(Mark(name, value, "measured") for name, value in measured.items()),
        *(
            Mark(name, value, "published")
            for (preset, name), value in published.items()
            if preset not in known or not name.startswith("GPT-2")
        ),
    ]


def smooth(values: np.ndarray) -> np.ndarray:
    """Mean over a window of about a fiftieth of the curve, centred; values that are not finite are left out of it."""
    at = np.arange(len(values))
    reach = np.minimum(at, math.ceil(len(values) / 100))  # narrower where the loss falls steeply, at the start
    first, past = at - reach, np.minimum(at + reach + 1, len(values))
    is_finite = np.isfinite(values)
    sums = np.cumsum([0, *np.where(is_finite, values, 0)])
    counts = np.cumsum([0, *is_finite])
    means = np.full(len(values), np.nan)
    np.divide(sums[past] - sums[first], counts[past] - counts[first], out=means, where=is_finite)
    return means


def loss_limits(losses: np.ndarray, marks: Sequence[Mark]) -> tuple[float, float]:
    """Bottom and top of a panel of losses, which are finite."""
    # The first steps fall from 11: shown whole they would flatten everything that comes later.
    top = np.quantile(losses, 0.98) if len(losses) > 100 else losses.max()
    bottom = min([losses.min(), *(mark.value for mark in marks)])
    margin = 0.05 * (top - bottom) or 0.1
    return float(bottom - margin), float(top + margin)


def format_tokens(tokens: float) -> str:
    """1500000 -> "1.5M"."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(tokens) >= size:
            return f"{tokens / size:.4g}{unit}"
    return f"{tokens:.4g}"
