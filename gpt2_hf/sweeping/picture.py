"""A sweep as a picture: mean curves of its candidates, and their final losses beside each other or over a knob."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..knobs import NUMBER
from ..reporting.curves import COLORS, ERROR_COLOR, MARK_COLOR
from ..reporting.measured import format_tokens
from .candidates import Candidate, Sweep
from .compare import mean_curve
from .outcomes import Outcome
from .results import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHOWN_FROM = 0.3  # of the tokens: what comes before would flatten the rest
OTHER_COLOR = "#a9aeb4"  # when there are more lines than colours
AT_TOP = 0.98  # of a panel's height


def draw(sweep: Sweep, rows: Sequence[Row], outcomes: Mapping[str, Mapping[int, Outcome]], path: Path) -> None:
    """Write the picture. Raises ImportError without matplotlib."""
    build_figure(sweep, rows, outcomes).savefig(path, dpi=130)


def build_figure(sweep: Sweep, rows: Sequence[Row], outcomes: Mapping[str, Mapping[int, Outcome]]) -> Figure:
    """The picture as a matplotlib Figure: mean curves on the left, final losses on the right."""
    try:
        from matplotlib.figure import Figure  # without pyplot: no global state, no window system
    except ImportError:
        raise ImportError("drawing a sweep needs matplotlib: pip install matplotlib") from None
    knob = numeric_knob(sweep)
    height = 4.8 if knob else max(4.8, 1.6 + 0.3 * len(rows))
    figure = Figure(figsize=(13, height), layout="constrained")
    curves, finals = figure.subplots(1, 2)
    for axis in (curves, finals):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.set_axisbelow(True)
        axis.tick_params(labelsize=9)
    lines = lines_of(sweep, knob)
    colors = _colors(sweep, rows, lines)
    _draw_curves(curves, sweep, rows, outcomes, lines, colors)
    if knob:
        _draw_over_knob(finals, sweep, rows, knob, lines, colors)
    else:
        _draw_finals(finals, sweep, rows, colors)
    return figure


def numeric_knob(sweep: Sweep) -> str | None:
    """The first knob of the grid that has several values, all of them numbers."""
    for name in sweep.candidates[0].varied:
        values = {candidate.varied[name] for candidate in sweep.candidates}
        if len(values) > 1 and all(NUMBER.fullmatch(value) for value in values):
            return name
    return None


def lines_of(sweep: Sweep, knob: str | None) -> dict[str, str]:
    """Candidate's name -> the name of its line over ``knob``: what it has beside that; its own name without a knob."""
    several_recipes = len({candidate.recipe for candidate in sweep.candidates}) > 1

    def line(candidate: Candidate) -> str:
        rest = [f"{name.rpartition('.')[2]}={value}" for name, value in candidate.varied.items() if name != knob]
        return ", ".join([*([Path(candidate.recipe).stem] if several_recipes else []), *rest])

    return {candidate.name: line(candidate) if knob else candidate.name for candidate in sweep.candidates}


def _colors(sweep: Sweep, rows: Sequence[Row], lines: Mapping[str, str]) -> dict[str, str]:
    """Candidate's name -> colour of its line, or its own where all are on one line; the best come first."""
    alone = len(set(lines.values())) == 1
    ranked = [sweep.candidates[0].name, *(row.candidate.name for row in rows)]
    keys = list(dict.fromkeys(name if alone else lines[name] for name in ranked))
    colored = dict(zip(keys, COLORS, strict=False))
    return {name: colored.get(name if alone else line, OTHER_COLOR) for name, line in lines.items()}


def _draw_curves(
    axis: Axes,
    sweep: Sweep,
    rows: Sequence[Row],
    outcomes: Mapping[str, Mapping[int, Outcome]],
    lines: Mapping[str, str],
    colors: Mapping[str, str],
) -> None:
    """Of each colour the best candidate, and the baseline."""
    baseline = sweep.candidates[0]
    finished = [row for row in rows if row.losses and not row.diverged]
    best: dict[str, str] = {}
    for row in finished:
        best.setdefault(colors[row.candidate.name], row.candidate.name)
    best.pop(OTHER_COLOR, None)
    shown = [row for row in finished if row.candidate == baseline or row.candidate.name in best.values()]
    inside, lowest, highest = _worth_showing(rows, baseline), math.inf, -math.inf
    for row in shown:
        found, name = outcomes[row.candidate.name], row.candidate.name
        tokens, mean, spread = mean_curve([(found[seed].tokens, found[seed].losses) for seed in row.losses])
        is_baseline = row.candidate == baseline
        style, label = ("--", f"{name} (baseline)") if is_baseline else ("-", name)
        axis.plot(tokens, mean, style, color=colors[name], linewidth=1.5, label=label)
        axis.fill_between(tokens, mean - spread, mean + spread, color=colors[name], alpha=0.15, linewidth=0)
        if inside.issuperset(row.losses.values()):
            late = tokens >= SHOWN_FROM * tokens[-1]
            lowest, highest = min(lowest, (mean - spread).min()), max(highest, (mean + spread)[late].max())
    if lowest < highest:
        margin = 0.04 * (highest - lowest) or 0.1
        axis.set_ylim(lowest - margin, highest + margin)
    if shown:
        axis.legend(fontsize=8, frameon=False, loc="upper right")
    left_out = f"; {n} left out" if (n := len(finished) - len(shown)) else ""
    axis.set_title(f"mean over seeds, ± standard deviation{left_out}", fontsize=10)
    axis.xaxis.set_major_formatter(lambda tokens, _: format_tokens(tokens))
    axis.set_xlabel("tokens seen")
    axis.set_ylabel("val_loss (nats per token)")


def _draw_over_knob(
    axis: Axes,
    sweep: Sweep,
    rows: Sequence[Row],
    knob: str,
    lines: Mapping[str, str],
    colors: Mapping[str, str],
) -> None:
    """Final losses over the knob's values, a line for each setting of everything else."""
    inside = _worth_showing(rows, sweep.candidates[0])
    alone = len(set(lines.values())) == 1
    by_value = sorted(rows, key=lambda row: float(row.candidate.varied[knob]))
    for line in dict.fromkeys(lines.values()):
        members = [row for row in by_value if lines[row.candidate.name] == line]
        at = [float(row.candidate.varied[knob]) for row in members]
        means = [row.mean if math.isfinite(row.mean) else math.nan for row in members]
        color = MARK_COLOR if alone else colors[members[0].candidate.name]
        axis.plot(at, means, "-", color=color, linewidth=1.2, label=line or None, zorder=1.5)
        for x, row in zip(at, members, strict=True):
            own, losses = colors[row.candidate.name], list(row.losses.values())
            shown = [loss for loss in losses if loss in inside]
            axis.plot([x] * len(shown), shown, "o", color=own, markersize=5, alpha=0.75)
            at_edge: dict[str, Any] = {"transform": axis.get_xaxis_transform(), "clip_on": False}
            if len(shown) < len(losses):
                axis.plot([x], [AT_TOP], "^", color=own, markersize=7, **at_edge)
            if row.diverged:
                axis.plot([x], [AT_TOP], "x", color=own, markersize=8, markeredgewidth=2, **at_edge)
    values = sorted({row.candidate.varied[knob] for row in rows}, key=float)
    if float(values[0]) > 0:
        axis.set_xscale("log")
    axis.set_xticks([float(value) for value in values], values)
    axis.minorticks_off()
    if inside:
        axis.set_ylim(*_limits(inside))
    marks = ["; x: diverged"] if any(row.diverged for row in rows) else []
    marks += ["; triangle: above"] if any(loss not in inside for row in rows for loss in row.losses.values()) else []
    axis.set_title("final losses: seeds, and a line through their means" + "".join(marks), fontsize=10)
    axis.set_xlabel(knob)
    axis.set_ylabel("final val_loss (nats per token)")
    if not alone:
        axis.legend(fontsize=8, frameon=False)


def _draw_finals(axis: Axes, sweep: Sweep, rows: Sequence[Row], colors: Mapping[str, str]) -> None:
    """Final losses with their standard errors, a line for each candidate, the best above."""
    baseline = sweep.candidates[0]
    inside = _worth_showing(rows, baseline)
    for i, row in enumerate(rows):
        color = colors[row.candidate.name]
        losses = [loss for loss in row.losses.values() if loss in inside]
        axis.plot(losses, [i] * len(losses), "o", color=color, markersize=4, alpha=0.4)
        is_inside = len(losses) == len(row.losses) and losses and not row.diverged
        if is_inside:
            error = row.stderr if math.isfinite(row.stderr) else None
            axis.errorbar(row.mean, i, xerr=error, fmt="D", color=color, markersize=6, capsize=4)
        else:
            words = "diverged" if row.diverged else f"{row.mean:.2f} >" if row.losses else "no run has finished"
            where: dict[str, Any] = {"ha": "right", "va": "center", "transform": axis.get_yaxis_transform()}
            axis.text(0.99, i, words, color=ERROR_COLOR, fontsize=8, **where)
        if row.candidate == baseline and is_inside:
            axis.axvline(row.mean, color=MARK_COLOR, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
    names = [row.candidate.name + (" (baseline)" if row.candidate == baseline else "") for row in rows]
    axis.set_yticks(range(len(rows)), names)
    axis.set_ylim(len(rows) - 0.4, -0.6)
    if inside:
        axis.set_xlim(*_limits(inside))
    axis.set_xlabel("final val_loss (nats per token)")
    axis.set_title("final losses: seeds, and their mean ± standard error", fontsize=10)


def _worth_showing(rows: Sequence[Row], baseline: Candidate) -> set[float]:
    """The final losses without those far above, which would flatten all differences; the baseline's stay."""
    losses = [loss for row in rows for loss in row.losses.values()]
    if not losses:
        return set()
    lowest, middle = min(losses), float(np.median(losses))
    own = {loss for row in rows if row.candidate == baseline for loss in row.losses.values()}
    return own | {loss for loss in losses if loss <= lowest + 5 * (middle - lowest)}


def _limits(losses: set[float]) -> tuple[float, float]:
    margin = 0.08 * (max(losses) - min(losses)) or 0.01
    return min(losses) - margin, max(losses) + 1.5 * margin
