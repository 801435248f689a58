"""Runs -> interactive plots of bokeh, a panel for each kind of measurement, all over one x axis that can be switched.

Every curve's source has a column for each thing that it can be drawn against, and one for its values. Which of them is
drawn, in what colours (a palette each for light and dark) and what the pointer is told, is up to assets/report/page.js;
it knows a curve by its glyph's tags: number in the palette, number of the run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .measured import HELLASWAG_ITEMS, Mark, ReportError, Run, hellaswag_marks, loss_limits, loss_marks
from .measured import smooth as smoothed

if TYPE_CHECKING:
    from bokeh.models import ColumnDataSource
    from bokeh.plotting import figure as Figure

MOST_POINTS = 24_000  # in a page, which they must not make larger than 3 MB
N_COLORS = 8


@dataclass(frozen=True)
class Curve:
    """How one figure of a run is drawn. ``color``: of a run alone; several have a colour each, and ``dash`` tells."""

    key: str
    label: str
    color: int = 0
    dash: str = "solid"
    is_noisy: bool = False  # drawn faintly, and its mean over it
    only_alone: bool = False


@dataclass(frozen=True)
class Panel:
    """A kind of measurement. ``limits``: bottom and top of it, from all finite values and the marks."""

    title: str
    unit: str
    hover: tuple[str, int]  # how a value under the pointer is written: kind, and digits after the point
    curves: tuple[Curve, ...]
    limits: Callable[[np.ndarray, Sequence[Mark]], tuple[float, float]]
    marks: Callable[[Sequence[Run]], list[Mark]] = lambda runs: []
    mark: str = "{:.4f}"  # how a mark's value is written
    is_main: bool = False


@dataclass(frozen=True)
class Plot:
    """A panel that was drawn; ``keys`` say of its curves a label, a colour (None: any run's) and a dash each."""

    title: str
    note: str
    keys: list[tuple[str, int | None, str]]
    figure: Figure
    is_main: bool


def _from_zero(values: np.ndarray, marks: Sequence[Mark]) -> tuple[float, float]:
    return 0.0, float(1.08 * values.max()) or 1.0


def _without_spikes(values: np.ndarray, marks: Sequence[Mark]) -> tuple[float, float]:
    return 0.0, float(1.3 * np.quantile(values, 0.98)) or 1.0


def _around(values: np.ndarray, marks: Sequence[Mark]) -> tuple[float, float]:
    every = [*values, *(mark.value for mark in marks)]
    margin = 0.1 * (max(every) - min(every)) or 0.01
    return float(min(every) - margin), float(max(every) + margin)


PANELS = (
    Panel(
        "Loss",
        "nats per token",
        ("fixed", 4),
        (
            Curve("train_loss", "training", 0, is_noisy=True),
            Curve("val_loss", "validation", 1, "dashed"),
            Curve("reference_loss", "reference", 3, "dotted"),
        ),
        loss_limits,
        loss_marks,
        is_main=True,
    ),
    Panel(
        "HellaSwag",
        "accuracy",
        ("percent", 2),
        (
            Curve("hellaswag_lecture_acc", "the lecture's way", 0),
            Curve("hellaswag_acc_norm", "lm-eval acc_norm", 2, only_alone=True),
            Curve("hellaswag_acc", "lm-eval acc", 4, only_alone=True),
        ),
        _around,
        hellaswag_marks,
        "{:.2%}",
        is_main=True,
    ),
    Panel("Learning rate", "as scheduled", ("exponent", 2), (Curve("lr", "learning rate"),), _from_zero),
    Panel(
        "Gradient norm", "before clipping", ("fixed", 3), (Curve("grad_norm", "norm", is_noisy=True),), _without_spikes
    ),
    Panel("Throughput", "tokens per second", ("fixed", 0), (Curve("tokens_per_sec", "tokens per second"),), _from_zero),
    Panel("MFU", "share of the devices' peak", ("percent", 1), (Curve("mfu", "MFU"),), _from_zero),
    Panel("Memory", "GB at most so far, first process", ("fixed", 2), (Curve("peak_memory", "GB"),), _from_zero),
)


class Axes:
    """What runs can be drawn against, "tokens" at least: ``labels`` and ``ends``, the furthest value, by name.

    Args:
        price: dollars per GPU-hour; None leaves cost out.
    """

    def __init__(self, runs: Sequence[Run], price: float | None = None):
        self.price = price
        columns = [self.columns(run, np.array([run.tokens_seen])) for run in runs]
        ends = {name: max(float(of_run[name][0]) for of_run in columns) for name in columns[0]}
        self.ends = {name: end for name, end in ends.items() if math.isfinite(end)}  # rows may have no rates
        labels = {"tokens": "tokens seen", "steps": "step", "hours": "hours of training", "dollars": "dollars"}
        self.labels = {name: labels[name] for name in self.ends}

    def columns(self, run: Run, tokens: np.ndarray) -> dict[str, np.ndarray]:
        """Where points after so many tokens lie."""
        columns = {"tokens": tokens, "steps": run.steps(tokens), "hours": run.hours(tokens).astype(np.float32)}
        if self.price is not None:
            columns["dollars"] = (self.price * run.hours(tokens, of_devices=True)).astype(np.float32)
        return columns


def build_plots(runs: Sequence[Run], price: float | None = None) -> list[Plot]:
    """The panels that any of the runs has figures for, drawn.

    Raises:
        ReportError: when there is none. ImportError: without bokeh.
    """
    try:
        from bokeh.models import Range1d
    except ImportError:
        raise ImportError("the page needs bokeh: pip install 'gpt2_hf[report]', or pip install bokeh") from None

    alone = len(runs) == 1
    axes = Axes(runs, price)
    chosen = [
        (panel, [curve for curve in panel.curves if alone or not curve.only_alone])
        for panel in PANELS
        if any(len(run.series(curve.key)[0]) for run in runs for curve in panel.curves)
    ]
    if not chosen:
        raise ReportError(f"nothing to draw in {', '.join(run.name for run in runs)}: no loss, HellaSwag or lr rows")
    x_range = Range1d(0, axes.ends["tokens"], name="x")
    n_curves = sum(1 + curve.is_noisy for _, curves in chosen for curve in curves) * len(runs)
    return [_draw(panel, curves, runs, x_range, axes, MOST_POINTS // n_curves) for panel, curves in chosen]


def _draw(panel: Panel, curves: Sequence[Curve], runs: Sequence[Run], x_range: Any, axes: Axes, most: int) -> Plot:
    from bokeh.models import Range1d

    marks = panel.marks(runs)
    values = np.concatenate([part for run in runs for curve in curves for part in _extent(run, curve)])
    finite = np.isfinite(values)
    limits = panel.limits(values[finite], marks) if finite.any() else (0.0, 1.0)
    plot = _empty(panel, x_range, Range1d(*limits))
    drawn: dict[Curve, None] = {}  # in order
    for number, run in enumerate(runs):
        for curve in curves:
            if len(run.series(curve.key)[0]):
                _draw_curve(plot, run, curve, axes, most, None if len(runs) == 1 else number)
                drawn[curve] = None
    _tell_pointer(plot, panel.hover)
    for mark in marks:
        _draw_mark(plot, mark, panel.mark)
    note = panel.unit
    if not finite.all():
        note += "; values that are not finite are left out"
    if panel.title == "HellaSwag":
        note += _items(runs)
    # One curve of one run needs no name, and of several the page has a button for each.
    keys = [_key(curve, len(runs) == 1) for curve in drawn] if len(curves) > 1 else []
    return Plot(panel.title, note, keys, plot, panel.is_main)


def _key(curve: Curve, alone: bool) -> tuple[str, int | None, str]:
    label = f"{curve.label}, smoothed over a faint line" if curve.is_noisy else curve.label
    return (label, curve.color, _dash(curve, alone)) if alone else (label, None, curve.dash)


def _dash(curve: Curve, alone: bool) -> str:
    return "solid" if alone and curve.dash == "dashed" else curve.dash  # a colour of its own tells it


def _draw_curve(plot: Figure, run: Run, curve: Curve, axes: Axes, most: int, number: int | None) -> None:
    """Draw a curve of a run alone, for which ``number`` is None, or of one of several."""
    alone = number is None
    tokens, values = run.series(curve.key)
    tags = [curve.color if number is None else number % N_COLORS, number or 0]
    name = curve.label if alone else f"{run.name}: {curve.label}"
    if curve.is_noisy:
        faint = _source(run, tokens, values, axes, most)
        told = name if alone else None  # of several, smoothed values are enough
        plot.line("tokens", "value", source=faint, line_alpha=0.3, line_width=1, name=told, tags=tags)
        name, values = f"{name}, smoothed", smoothed(values)
    source = _source(run, tokens, values, axes, most)
    dash = _dash(curve, alone)
    plot.line("tokens", "value", source=source, line_width=2, line_dash=dash, name=name, tags=tags)
    if len(tokens) <= (50 if alone else 1):
        plot.scatter("tokens", "value", source=source, size=6, tags=tags)
    _draw_band(plot, run, curve, axes, tags)


def _tell_pointer(plot: Figure, form: tuple[str, int]) -> None:
    from bokeh.events import MouseLeave, MouseMove, Tap
    from bokeh.models import CustomJS

    told = CustomJS(args={"plot": plot, "form": list(form)}, code="window.reportHover(plot, cb_obj, form)")
    plot.js_on_event(MouseMove, told)
    plot.js_on_event(Tap, told)
    plot.js_on_event(MouseLeave, CustomJS(code="window.reportHover(null)"))


def _empty(panel: Panel, x_range: Any, y_range: Any) -> Figure:
    from bokeh.models import CrosshairTool, CustomJSTickFormatter, NumeralTickFormatter
    from bokeh.plotting import figure

    plot = figure(
        height=380 if panel.is_main else 240,
        sizing_mode="stretch_width",
        x_range=x_range,
        y_range=y_range,
        tools="xpan,box_zoom,xwheel_zoom,reset,save",
        active_drag="box_zoom",
        active_scroll=None,
        background_fill_alpha=0,
        border_fill_alpha=0,
        outline_line_alpha=0,
        min_border_left=60,
        min_border_right=12,
    )
    plot.add_tools(CrosshairTool(dimensions="height", line_color="#808890", line_alpha=0.6))
    plot.toolbar.logo = None
    plot.toolbar.autohide = True
    plot.xaxis.formatter = CustomJSTickFormatter(code="return window.reportTick(tick)")
    plot.xaxis.axis_label = "tokens seen"
    plot.xaxis.ticker.desired_num_ticks = 5
    percent = NumeralTickFormatter(format="0.[0]%")
    short = CustomJSTickFormatter(code="return window.reportNumber(tick)")
    plot.yaxis.formatter = percent if panel.hover[0] == "percent" else short
    plot.axis.axis_label_text_font_style = "normal"
    plot.axis.minor_tick_line_alpha = 0
    plot.axis.major_label_text_font_size = "12px"
    return plot


def _source(run: Run, tokens: np.ndarray, values: np.ndarray, axes: Axes, most: int) -> ColumnDataSource:
    from bokeh.models import ColumnDataSource

    kept = thin(values, most)
    return ColumnDataSource({**axes.columns(run, tokens[kept]), "value": values[kept]})


def thin(values: np.ndarray, most: int) -> np.ndarray:
    """Which of ``values`` to draw, about ``most`` of them: the lowest and highest of each stretch, so peaks stay."""
    if len(values) <= most:
        return np.arange(len(values))
    kept = {0, len(values) - 1}
    for stretch in np.array_split(np.arange(len(values)), max(most // 2 - 1, 1)):
        finite = stretch[np.isfinite(values[stretch])]
        if len(finite):
            kept |= {int(finite[values[finite].argmin()]), int(finite[values[finite].argmax()])}
    return np.array(sorted(kept))


def _extent(run: Run, curve: Curve) -> list[np.ndarray]:
    """Values that must be in view."""
    values, band = run.series(curve.key)[1], _band(run, curve)
    return [values] if band is None else [values - band, values + band]


def _band(run: Run, curve: Curve) -> np.ndarray | None:
    """How far a curve's values may lie off, to be shaded; None where that is not known.

    Of an accuracy on some of the items that is a standard error; of a reference, what a healthy run keeps within.
    """
    tokens, values = run.series(curve.key)
    if curve.key == "reference_loss":
        bands = dict(zip(*(part.tolist() for part in run.series("reference_band")), strict=True))
        return np.array([bands.get(seen, 0.0) for seen in tokens]) if bands else None
    items = run.series("hellaswag_items")[1]
    if curve.key != "hellaswag_lecture_acc" or not len(items) or items[-1] >= HELLASWAG_ITEMS:
        return None
    return np.sqrt(values * (1 - values) / items[-1])


def _draw_band(plot: Figure, run: Run, curve: Curve, axes: Axes, tags: list[int]) -> None:
    from bokeh.models import ColumnDataSource

    band = _band(run, curve)
    if band is None:
        return
    tokens, values = run.series(curve.key)
    source = ColumnDataSource({**axes.columns(run, tokens), "low": values - band, "high": values + band})
    plot.varea("tokens", "low", "high", source=source, fill_alpha=0.15, tags=tags)
    if len(tokens) == 1:  # of which there is no area
        plot.segment("tokens", "low", "tokens", "high", source=source, line_width=2, line_alpha=0.5, tags=tags)


def _items(runs: Sequence[Run]) -> str:
    counts = {int(items[-1]) for run in runs if len(items := run.series("hellaswag_items")[1])}
    if not counts - {HELLASWAG_ITEMS}:
        return ""
    return (
        f" on {' or '.join(f'{n:,}' for n in sorted(counts))} of {HELLASWAG_ITEMS:,} items; shaded: ± 1 standard error"
    )


def _draw_mark(plot: Figure, mark: Mark, value_format: str) -> None:
    from bokeh.models import Label, Span

    text = f"{mark.name} {value_format.format(mark.value)} {mark.source}".strip()
    plot.add_layout(Span(location=mark.value, dimension="width", line_dash="dashed", line_width=1))
    place = {"x": 4, "x_units": "screen", "y": mark.value, "y_offset": 2}
    plot.add_layout(Label(text=text, text_font_size="11px", **place))
