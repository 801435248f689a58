"""Curves of a run as a picture: loss, HellaSwag and learning rate against tokens seen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from ..program import UserError
from ..runs import read_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
    "tokens_seen",
    "train_loss",
    "val_loss",
    "hellaswag_lecture_acc",
    "hellaswag_acc_norm",
    "hellaswag_items",
    "lr",
)

COLORS = ("#2563a8", "#c4541a", "#3f8f4f", "#8b4fa3", "#b08a1e", "#4a9aa5", "#a03a52", "#5f6670")
VALIDATION_COLOR = COLORS[1]
MARK_COLOR = "#555555"
ERROR_COLOR = "#b3261e"


class ReportError(UserError):
    """There is nothing to draw; the message is one line that says what is missing."""


@dataclass(frozen=True)
class Run:
    """What the picture needs of a run."""

    name: str
    rows: list[dict[str, Any]]
    preset: str | None  # None when the model's shape is not one of OpenAI's
    corpus: str | None  # "fineweb" or "fineweb_edu", None for other data

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Tokens seen and values of one measurement, by tokens; where steps were made twice, the later row counts."""
        rows = [row for row in self.rows if "tokens_seen" in row and row.get(key) is not None]
        points = {row["tokens_seen"]: row[key] for row in rows}
        tokens = sorted(points)
        return np.array(tokens, dtype=float), np.array([points[token] for token in tokens], dtype=float)


def _is_number(value: object) -> bool:
    return isinstance(value, float) or (type(value) is int and abs(value) < 2**63)


def read_run(run_dir: str | Path) -> Run:
    """Read RUN/metrics.jsonl and, where there is one, RUN/config.yaml. Raises ReportError when there are no rows."""
    folder = Path(run_dir)
    rows = read_rows(folder / "metrics.jsonl")
    if not all(isinstance(row, dict) for row in rows):
        raise ReportError(f"{folder / 'metrics.jsonl'} has a line that is no row of a run: remove it")
    if not any("tokens_seen" in row for row in rows):
        raise ReportError(f"no rows in {folder / 'metrics.jsonl'}: give the folder of a run that has trained a step")
    for row in rows:
        if not all(value is None or _is_number(value) for key, value in row.items() if key in DRAWN) or (
            row.get("tokens_seen", 0) is None
        ):
            raise ReportError(
                f"{folder / 'metrics.jsonl'} has a row that no run writes, of step {row.get('step')!r:.50}"
            )
    config = folder / "config.yaml"
    settings = (yaml.safe_load(config.read_text(encoding="utf-8")) if config.is_file() else None) or {}
    model, data = settings.get("model") or {}, settings.get("data") or {}
    shape = ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")
    is_preset = all(model.get(name) is None for name in shape)
    path = str(data.get("path", "")).lower().replace("-", "_")
    return Run(
        name=folder.resolve().name,
        rows=rows,
        preset=model.get("preset") if is_preset else None,
        corpus="fineweb_edu" if "fineweb_edu" in path else "fineweb" if "fineweb" in path else None,
    )


def show_run(run_dir: str | Path) -> None:
    """Draw the curves of a finished run as far as that can be done here, and print its figures."""
    try:
        plot_curves(run_dir)
    except (ImportError, ReportError) as error:
        print(error)
    print(summarize(run_dir))


def plot_curves(run_dir: str | Path) -> Path:
    """Draw RUN/curves.png from RUN/metrics.jsonl; returns its path. A running or killed run is fine too.

    Raises ReportError when the run has no rows, ImportError without matplotlib.
    """
    return plot_runs([run_dir], Path(run_dir) / "curves.png")


def plot_runs(run_dirs: Sequence[str | Path], out: str | Path) -> Path:
    """Draw one or several runs over each other into `out`, in the format that its ending names; returns its path.

    Raises as `plot_curves`, and ReportError for an ending that matplotlib cannot write.
    """
    figure = build_figure([read_run(run_dir) for run_dir in run_dirs])
    path = Path(out)
    formats = figure.canvas.get_supported_filetypes().keys() - {"pgf"}  # which asks for LaTeX
    if path.suffix[1:].lower() not in formats:
        endings = ", ".join(f".{name}" for name in sorted(formats))
        raise ReportError(f"{path} ends in {path.suffix or 'nothing'}: a picture's name ends in one of {endings}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path


def build_figure(runs: Sequence[Run]) -> Figure:
    """The picture as a matplotlib Figure, a panel for each kind of measurement that any of the runs has."""
    try:
        from matplotlib.figure import Figure  # without pyplot: no global state, no window system
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError:
        raise ImportError("drawing curves needs matplotlib: pip install matplotlib") from None

    panels = [
        (draw, height)
        for draw, height, keys in (
            (_draw_loss, 3.6, ("train_loss", "val_loss")),
            (_draw_hellaswag, 2.9, ("hellaswag_lecture_acc", "hellaswag_acc_norm")),
            (_draw_lr, 1.6, ("lr",)),
        )
        if any(len(run.series(key)[0]) for run in runs for key in keys)
    ]
    if not panels:
        raise ReportError(f"nothing to draw in {', '.join(run.name for run in runs)}: no loss, HellaSwag or lr rows")
    heights = [height for _, height in panels]
    layout = ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.12, hspace=0.04)
    figure = Figure(figsize=(9, sum(heights) + 0.7 * len(panels)), layout=layout)
    figure.suptitle(_title(runs), fontsize=13, fontweight="bold")
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    furthest = max(row["tokens_seen"] for run in runs for row in run.rows if "tokens_seen" in row)
    for axis, (draw, _) in zip(axes, panels, strict=True):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.set_axisbelow(True)
        axis.tick_params(labelsize=9)
        draw(axis, runs)
        _legend(axis)
    margin = 0.015 * furthest or 1
    axes[0].set_xlim(-margin, furthest + margin)
    if not furthest:
        axes[0].set_xticks([0])
    axes[0].xaxis.set_major_formatter(lambda tokens, _: format_tokens(tokens))
    axes[-1].set_xlabel("tokens seen")
    return figure


def format_tokens(tokens: float) -> str:
    """1500000 -> "1.5M"."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(tokens) >= size:
            return f"{tokens / size:.4g}{unit}"
    return f"{tokens:.4g}"


def summarize(run_dir: str | Path) -> str:
    """What a finished run came to, in a few lines for a terminal, and how to use its model."""
    run_dir = Path(run_dir)
    last: dict[str, Any] = {}
    for row in read_rows(run_dir / "metrics.jsonl"):
        last |= row
    lines = [f"{run_dir}: {last.get('step', 0):,} steps, {format_tokens(last.get('tokens_seen', 0))} tokens"]
    if "val_loss" in last:
        lines.append(f"validation loss    {last['val_loss']:.4f} nats per token, {last['val_bpb']:.4f} bits per byte")
    if "hellaswag_items" in last:
        n_items, error = last["hellaswag_items"], last["hellaswag_stderr"]
        some = "" if n_items == HELLASWAG_ITEMS else f", a fixed subset of {HELLASWAG_ITEMS:,}"
        lines.append(
            f"HellaSwag          {last['hellaswag_lecture_acc']:.4f} the lecture's way, {last['hellaswag_acc']:.4f} "
            f"lm-eval acc, {last['hellaswag_acc_norm']:.4f} acc_norm"
        )
        lines.append(f"                   {n_items:,} items{some}; standard error {error:.4f}, chance 0.25")
    lines += [f"sample             {text!r}" for text in last.get("samples", ())[:1]]
    if (run_dir / "curves.png").exists():
        lines.append(f"curves             {run_dir / 'curves.png'}")
    lines.append("in stock transformers:")
    lines.append(f"  transformers.pipeline('text-generation', '{run_dir / 'final'}')('Once', max_new_tokens=40)")
    return "\n".join(lines)


def _title(runs: Sequence[Run]) -> str:
    if len(runs) > 1:
        return f"{len(runs)} runs"
    (run,) = runs
    tokens = max(row["tokens_seen"] for row in run.rows if "tokens_seen" in row)
    size = f"GPT-2 {SIZES[run.preset]}, " if run.preset in SIZES else ""
    return f"{run.name}: {size}{format_tokens(float(f'{tokens:.3g}'))} tokens"


def _draw_loss(axis: Axes, runs: Sequence[Run]) -> None:
    alone = len(runs) == 1
    finite, broken = [], []
    for run, color in zip(runs, _cycle(runs), strict=True):
        tokens, loss = run.series("train_loss")
        if len(tokens):
            axis.plot(tokens, loss, color=color, alpha=0.22, linewidth=0.8)
            label = "training (smoothed)" if alone else run.name
            axis.plot(tokens, _smooth(loss), color=color, linewidth=1.4, label=label, **_points(tokens, False))
        val_tokens, val_loss = run.series("val_loss")
        if len(val_tokens):
            color, line = (VALIDATION_COLOR, "-") if alone else (color, "--")
            val_label = "validation" if alone else None if len(tokens) else run.name
            points = _points(val_tokens, alone)
            axis.plot(val_tokens, val_loss, line, color=color, linewidth=1.4, label=val_label, **points)
        for at, values in ((tokens, loss), (val_tokens, val_loss)):
            finite.append(values[np.isfinite(values)])
            broken.append(at[~np.isfinite(values)])
    marks = {
        f"GPT-2 {SIZES[run.preset]}": VAL_LOSS_MARKS[run.preset][run.corpus]
        for run in runs
        if run.preset in VAL_LOSS_MARKS and run.corpus in VAL_LOSS_MARKS[run.preset]
    }
    if len({run.corpus for run in runs}) > 1:
        marks = {}  # a loss on one corpus says nothing about a run on another
    _draw_marks(axis, marks, "{:.4f}")
    values = np.concatenate(finite)
    if len(values):
        # The first steps fall from 11: shown whole they would flatten everything that comes later.
        top = np.quantile(values, 0.98) if len(values) > 100 else values.max()
        bottom = min([values.min(), *marks.values()])
        margin = 0.05 * (top - bottom) or 0.1
        axis.set_ylim(bottom - margin, top + margin)
    at = np.concatenate(broken)
    if len(at):
        label = f"not finite ({len(at)} row{'s' if len(at) > 1 else ''})"
        axis.plot(at, np.full(len(at), 0.02), "x", transform=axis.get_xaxis_transform(), color=ERROR_COLOR, label=label)
    axis.set_ylabel("loss (nats per token)" if alone else "loss (dashed: validation)")


def _draw_hellaswag(axis: Axes, runs: Sequence[Run]) -> None:
    alone = len(runs) == 1
    sizes = set()
    for run, color in zip(runs, _cycle(runs), strict=True):
        tokens, accuracy = run.series("hellaswag_lecture_acc")
        items = run.series("hellaswag_items")[1]
        n_items = int(items[-1]) if len(items) else HELLASWAG_ITEMS
        if len(tokens):
            sizes.add(n_items)
            label = "the lecture's way" if alone else run.name
            axis.plot(tokens, accuracy, color=color, linewidth=1.4, label=label, **_points(tokens, alone))
        if len(tokens) > 1 and n_items < HELLASWAG_ITEMS:
            error = np.sqrt(accuracy * (1 - accuracy) / n_items)
            name = "± 1 standard error" if alone else None
            axis.fill_between(
                tokens, accuracy - error, accuracy + error, color=color, alpha=0.15, linewidth=0, label=name
            )
        tokens, accuracy = run.series("hellaswag_acc_norm")
        if len(tokens) and alone:
            sizes.add(n_items)
            style = _points(tokens, alone)
            axis.plot(tokens, accuracy, color=COLORS[2], linewidth=1.2, label="lm-eval acc_norm", **style)
    presets = {run.preset for run in runs if run.preset in HELLASWAG_MARKS}
    marks = {name: value for preset in sorted(presets) for name, value in HELLASWAG_MARKS[preset].items()}
    _draw_marks(axis, {"chance": 0.25, **marks}, "{:.2%}")
    axis.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g}%")
    subset = f"\n{sizes.pop()} items" if len(sizes) == 1 and sizes != {HELLASWAG_ITEMS} else ""
    axis.set_ylabel(f"HellaSwag accuracy{subset}")


def _draw_lr(axis: Axes, runs: Sequence[Run]) -> None:
    for run, color in zip(runs, _cycle(runs), strict=True):
        tokens, lr = run.series("lr")
        axis.plot(tokens, lr, color=color, linewidth=1.4, **_points(tokens, len(runs) == 1))
    axis.set_ylim(bottom=0)
    axis.ticklabel_format(axis="y", style="sci", scilimits=(-3, 3))
    axis.set_ylabel("learning rate")


def _draw_marks(axis: Axes, marks: dict[str, float], value_format: str) -> None:
    """Dashed lines across the panel, named in the right margin, where no curve runs."""
    for name, value in marks.items():
        axis.axhline(value, color=MARK_COLOR, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
        axis.annotate(
            f"{name}\n{value_format.format(value)}",
            (1, value),
            xycoords=("axes fraction", "data"),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=MARK_COLOR,
        )


def _legend(axis: Axes) -> None:
    """Above the panel, so that it never covers a curve."""
    handles, labels = axis.get_legend_handles_labels()
    if handles:
        axis.legend(
            handles,
            labels,
            loc="lower left",
            bbox_to_anchor=(0, 1),
            ncols=max(1, min(len(labels), 100 // (max(map(len, labels)) + 6))),
            frameon=False,
            fontsize=9,
            borderaxespad=0.2,
            handlelength=1.6,
            columnspacing=1.4,
        )


def _points(tokens: np.ndarray, alone: bool) -> dict[str, Any]:
    """Rare measurements of a run alone show as points; and any single one, of which there is no line."""
    return {"marker": "o", "markersize": 3.5} if len(tokens) <= (50 if alone else 1) else {}


def _cycle(runs: Sequence[Run]) -> list[str]:
    return [COLORS[i % len(COLORS)] for i in range(len(runs))]


def _smooth(values: np.ndarray) -> np.ndarray:
    """Mean over a window of about a fiftieth of the curve, centred; values that are not finite are left out of it."""
    finite = np.isfinite(values)
    total = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    count = np.concatenate([[0], np.cumsum(finite)])
    at = np.arange(len(values))
    reach = np.minimum(math.ceil(len(values) / 100), at)  # narrower where the loss falls steeply, at the start
    first, last = at - reach, np.minimum(at + reach + 1, len(values))
    with np.errstate(invalid="ignore"):
        return np.where(finite, (total[last] - total[first]) / (count[last] - count[first]), np.nan)
