"""Curves of a run as a picture: loss, HellaSwag and learning rate against tokens seen."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
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

    @property
    def tokens_seen(self) -> float:
        """In all, up to the last row."""
        return max(row["tokens_seen"] for row in self.rows if "tokens_seen" in row)

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Tokens seen and values of one measurement, by tokens; where steps were made twice, the later row counts."""
        rows = [row for row in self.rows if "tokens_seen" in row and row.get(key) is not None]
        points = {row["tokens_seen"]: row[key] for row in rows}
        tokens = sorted(points)
        return np.array(tokens, dtype=float), np.array([points[token] for token in tokens], dtype=float)


def read_run(run_dir: str | Path) -> Run:
    """Read RUN/metrics.jsonl and, where there is one, RUN/config.yaml. Raises ReportError when there are no rows."""
    folder = Path(run_dir)
    config = folder / "config.yaml"
    settings = (yaml.safe_load(config.read_text(encoding="utf-8")) if config.is_file() else None) or {}
    return Run(
        name=folder.resolve().name,
        rows=_read_checked(folder / "metrics.jsonl"),
        preset=_preset_of(settings.get("model") or {}),
        corpus=_corpus_of(settings.get("data") or {}),
    )


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


def _preset_of(model: dict[str, Any]) -> str | None:
    shape = ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")
    return model.get("preset") if all(model.get(name) is None for name in shape) else None


def _corpus_of(data: dict[str, Any]) -> str | None:
    path = str(data.get("path", "")).lower().replace("-", "_")
    return next((name for name in ("fineweb_edu", "fineweb") if name in path), None)


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
    runs = [read_run(run_dir) for run_dir in run_dirs]
    figure, path = build_figure(runs), Path(out)
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

    panels = [panel for panel in PANELS if any(len(run.series(key)[0]) for run in runs for key in panel.keys)]
    if not panels:
        raise ReportError(f"nothing to draw in {', '.join(run.name for run in runs)}: no loss, HellaSwag or lr rows")
    heights = [panel.height for panel in panels]
    layout = ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.12, hspace=0.04)
    figure = Figure(figsize=(9, sum(heights) + 0.7 * len(panels)), layout=layout)
    figure.suptitle(_title(runs), fontsize=13, fontweight="bold")
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axis, panel in zip(axes, panels, strict=True):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.set_axisbelow(True)
        axis.tick_params(labelsize=9)
        panel.draw(axis, runs)
        _legend(axis)
    furthest = max(run.tokens_seen for run in runs)
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
    size = f"GPT-2 {SIZES[run.preset]}, " if run.preset in SIZES else ""
    return f"{run.name}: {size}{format_tokens(float(f'{run.tokens_seen:.3g}'))} tokens"


def _draw_loss(axis: Axes, runs: Sequence[Run]) -> None:
    alone = len(runs) == 1
    for run, color in _colored(runs):
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
    marks = _loss_marks(runs)
    _draw_marks(axis, marks, "{:.4f}")
    series = [run.series(key) for run in runs for key in ("train_loss", "val_loss")]
    tokens, losses = (np.concatenate(parts) for parts in zip(*series, strict=True))
    finite = np.isfinite(losses)
    if finite.any():
        axis.set_ylim(*_loss_limits(losses[finite], marks))
    if not finite.all():
        _draw_not_finite(axis, tokens[~finite])
    axis.set_ylabel("loss (nats per token)" if alone else "loss (dashed: validation)")


def _loss_marks(runs: Sequence[Run]) -> dict[str, float]:
    """OpenAI's weights of the runs' sizes on the runs' corpus: a loss on another corpus says nothing."""
    if len({run.corpus for run in runs}) > 1:
        return {}
    return {
        f"GPT-2 {SIZES[run.preset]}": VAL_LOSS_MARKS[run.preset][run.corpus]
        for run in runs
        if run.preset in VAL_LOSS_MARKS and run.corpus in VAL_LOSS_MARKS[run.preset]
    }


def _loss_limits(losses: np.ndarray, marks: dict[str, float]) -> tuple[float, float]:
    # The first steps fall from 11: shown whole they would flatten everything that comes later.
    top = np.quantile(losses, 0.98) if len(losses) > 100 else losses.max()
    bottom = min([losses.min(), *marks.values()])
    margin = 0.05 * (top - bottom) or 0.1
    return bottom - margin, top + margin


def _draw_not_finite(axis: Axes, tokens: np.ndarray) -> None:
    label = f"not finite ({len(tokens)} row{'s' if len(tokens) > 1 else ''})"
    low = np.full(len(tokens), 0.02)  # of the panel's height
    axis.plot(tokens, low, "x", transform=axis.get_xaxis_transform(), color=ERROR_COLOR, label=label)


def _draw_hellaswag(axis: Axes, runs: Sequence[Run]) -> None:
    alone = len(runs) == 1
    sizes = set()
    for run, color in _colored(runs):
        items = run.series("hellaswag_items")[1]
        n_items = int(items[-1]) if len(items) else HELLASWAG_ITEMS
        tokens, accuracy = run.series("hellaswag_lecture_acc")
        if len(tokens):
            sizes.add(n_items)
            label = "the lecture's way" if alone else run.name
            axis.plot(tokens, accuracy, color=color, linewidth=1.4, label=label, **_points(tokens, alone))
        if len(tokens) > 1 and n_items < HELLASWAG_ITEMS:
            error = np.sqrt(accuracy * (1 - accuracy) / n_items)
            band = accuracy - error, accuracy + error
            band_label = "± 1 standard error" if alone else None
            axis.fill_between(tokens, *band, color=color, alpha=0.15, linewidth=0, label=band_label)
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
    for run, color in _colored(runs):
        tokens, lr = run.series("lr")
        axis.plot(tokens, lr, color=color, linewidth=1.4, **_points(tokens, len(runs) == 1))
    axis.set_ylim(bottom=0)
    axis.ticklabel_format(axis="y", style="sci", scilimits=(-3, 3))
    axis.set_ylabel("learning rate")


@dataclass(frozen=True)
class Panel:
    """A kind of measurement: drawn when any run has one of its keys."""

    keys: tuple[str, ...]
    height: float  # in inches
    draw: Callable[[Axes, Sequence[Run]], None]


PANELS = (
    Panel(("train_loss", "val_loss"), 3.6, _draw_loss),
    Panel(("hellaswag_lecture_acc", "hellaswag_acc_norm"), 2.9, _draw_hellaswag),
    Panel(("lr",), 1.6, _draw_lr),
)


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


def _colored(runs: Sequence[Run]) -> Iterator[tuple[Run, str]]:
    return zip(runs, cycle(COLORS), strict=False)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Mean over a window of about a fiftieth of the curve, centred; values that are not finite are left out of it."""
    widest = math.ceil(len(values) / 100)
    smooth = np.full(len(values), np.nan)
    for at, value in enumerate(values):
        if np.isfinite(value):
            reach = min(widest, at)  # narrower where the loss falls steeply, at the start
            window = values[at - reach : at + reach + 1]
            smooth[at] = window[np.isfinite(window)].mean()
    return smooth
