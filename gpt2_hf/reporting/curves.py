"""Curves of a run as a picture: loss, HellaSwag and learning rate against tokens seen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..runs import read_rows
from .measured import (
    HELLASWAG_ITEMS,
    SIZES,
    Mark,
    ReportError,
    Run,
    format_tokens,
    hellaswag_marks,
    loss_limits,
    loss_marks,
    read_run,
    smooth,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#2563a8", "#c4541a", "#3f8f4f", "#8b4fa3", "#b08a1e", "#4a9aa5", "#a03a52", "#5f6670")
VALIDATION_COLOR = COLORS[1]
MARK_COLOR = "#555555"
ERROR_COLOR = "#b3261e"


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
            axis.plot(tokens, smooth(loss), color=color, linewidth=1.4, label=label, **_points(tokens, False))
        val_tokens, val_loss = run.series("val_loss")
        if len(val_tokens):
            color, line = (VALIDATION_COLOR, "-") if alone else (color, "--")
            val_label = "validation" if alone else None if len(tokens) else run.name
            points = _points(val_tokens, alone)
            axis.plot(val_tokens, val_loss, line, color=color, linewidth=1.4, label=val_label, **points)
        reference = run.series("reference_loss")
        if len(reference[0]):
            axis.plot(*reference, ":", color=MARK_COLOR, linewidth=1.6, label="reference" if alone else None)
    marks = loss_marks(runs)
    _draw_marks(axis, marks, "{:.4f}")
    series = [run.series(key) for run in runs for key in ("train_loss", "val_loss")]
    tokens, losses = (np.concatenate(parts) for parts in zip(*series, strict=True))
    finite = np.isfinite(losses)
    if finite.any():
        axis.set_ylim(*loss_limits(losses[finite], marks))
    if not finite.all():
        _draw_not_finite(axis, tokens[~finite])
    axis.set_ylabel("loss (nats per token)" if alone else "loss (dashed: validation)")


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
    _draw_marks(axis, hellaswag_marks(runs), "{:.2%}")
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


def _draw_marks(axis: Axes, marks: Sequence[Mark], value_format: str) -> None:
    """Dashed lines across the panel, named in the right margin, where no curve runs."""
    for name, value, source in marks:
        axis.axhline(value, color=MARK_COLOR, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
        axis.annotate(
            f"{name}\n{value_format.format(value)} {source}".strip(),
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
