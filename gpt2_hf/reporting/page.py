"""Runs -> one HTML page that holds all it needs: plots, samples, settings, what happened and on what machine."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Sequence
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..files import mask, whole_file
from .measured import CIRCUMSTANCES, Run, differences, flat, format_tokens, read_run
from .plots import N_COLORS, Axes, Plot, build_plots

# The browser refuses the page whatever is not in it.
POLICY = "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; img-src data: blob:"
MOST_SAMPLED_STEPS = 24  # of a run: the first, the last, and some between

PLUS_MINUS = "\xa0±\xa0"  # on one line with what it is of
# Figure of an evaluation -> its heading, how it is written, and the figure that is its standard error.
FIGURES = {
    "val_loss": ("validation loss", "{:.4f}", "val_loss_stderr"),
    "val_bpb": ("bits per byte", "{:.4f}", ""),
    "val_ppl": ("perplexity", "{:.2f}", ""),
    "hellaswag_lecture_acc": ("HellaSwag, the lecture's way", "{:.4f}", "hellaswag_lecture_acc_stderr"),
    "hellaswag_acc": ("lm-eval acc", "{:.4f}", "hellaswag_acc_stderr"),
    "hellaswag_acc_norm": ("acc_norm", "{:.4f}", "hellaswag_acc_norm_stderr"),
    "hellaswag_items": ("items", "{:,.0f}", ""),
}
# Counts of a row that say what went wrong -> in words.
EVENTS = {
    "skipped_steps": "{} updates skipped: loss or gradients were not finite",
    "loss_spikes": "{} steps with a loss far above those before",
    "rewound_from": "went back to this step from step {}",
}


def write_page(
    run_dirs: Sequence[str | Path], out: str | Path, price: float | None = None, refresh_s: int | None = None
) -> Path:
    """Write the page of one run, or of several over each other, to ``out``; returns its path.

    Args:
        price: dollars per GPU-hour, for an axis of cost.
        refresh_s: seconds after which the page loads itself again; None: never.

    Raises:
        ReportError: when a run has nothing to draw. ImportError: without bokeh.
    """
    page = build_page([read_run(run_dir) for run_dir in run_dirs], price, refresh_s)
    with whole_file(Path(out)) as file:
        file.write(page.encode())
    return Path(out)


def build_page(runs: Sequence[Run], price: float | None = None, refresh_s: int | None = None) -> str:
    """The page's HTML; arguments and errors as of ``write_page``."""
    plots = build_plots(runs, price)
    from bokeh.embed import components
    from bokeh.resources import Resources

    axes = Axes(runs, price)
    script, places = components([plot.figure for plot in plots])
    drawn = "".join(_plot(plot, place) for plot, place in zip(plots, places, strict=True))
    data = {"ends": axes.ends, "labels": axes.labels, "refresh_s": refresh_s}
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs: {', '.join(run.name for run in runs)}"
    sections = (
        _section("What differs", _what_differs(runs)),
        _section("On track", _on_track(runs)),
        _section("Evaluations", _evaluations(runs)),
        _section("Samples", _samples(runs)),
        _section("Starts and events", _starts(runs)),
        _section("Settings and environment", _settings(runs)),
    )
    assets = files("gpt2_hf") / "assets" / "report"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{_text(title)}</title>
<style>{(assets / "page.css").read_text()}</style>
{Resources(mode="inline", components=["bokeh"]).render_js()}
</head>
<body>
<h1>{_text(title)}</h1>
{_summary(runs, price)}
{_bar(runs, axes)}
<div class="plots">{drawn}</div>
{_how_measured(axes, price)}
{"".join(sections)}
<div id="values" hidden></div>
<script type="application/json" id="page">{_json(data)}</script>
{script}
<script>{(assets / "page.js").read_text()}</script>
</body>
</html>
"""


def _text(value: object) -> str:
    """Anything as text of the page, without the passwords of URLs."""
    return html.escape(mask(str(value)))


def _json(value: object) -> str:
    return json.dumps(value).replace("<", "\\u003c")


def _section(title: str, content: str) -> str:
    return f"<h2>{title}</h2>{content}" if content else ""


def _table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """Cells are text, whatever is in them."""
    lines = "".join(
        f"<tr><th scope='row'>{_text(first)}</th>"
        + "".join(
            f"<td data-head='{_text(name)}'>{_text(cell)}</td>" for name, cell in zip(head[1:], rest, strict=True)
        )
        + "</tr>"
        for first, *rest in rows
    )
    headings = "".join(f"<th scope='col'>{_text(cell)}</th>" for cell in head)
    return f"<div class='table'><table><thead><tr>{headings}</tr></thead><tbody>{lines}</tbody></table></div>"


def _when(moment: object) -> str:
    """A record's time, to the minute."""
    try:
        return f"{datetime.fromisoformat(str(moment)):%Y-%m-%d %H:%M %z}".strip()
    except ValueError:
        return "" if moment is None else str(moment)


def _of_run(runs: Sequence[Run], run: Run) -> str:
    return f"<h3>{_text(run.name)}</h3>" if len(runs) > 1 else ""


def _summary(runs: Sequence[Run], price: float | None) -> str:
    """The newest figures, as tiles of a run alone, else as a table."""
    found = [_key_figures(run, price) for run in runs]
    if len(runs) == 1:
        tiles = "".join(f"<div><b>{_text(value)}</b>{_text(name)}</div>" for name, value in found[0].items())
        return f"<div class='figures'>{tiles}</div>"
    names = list(dict.fromkeys(name for figures in found for name in figures))
    rows = [(run.name, *(figures.get(name, "") for name in names)) for run, figures in zip(runs, found, strict=True)]
    return _table(("run", *names), rows)


def _key_figures(run: Run, price: float | None) -> dict[str, str]:
    last, figures = run.last, {}
    for key, (name, form, _) in FIGURES.items():
        if key in last and key in ("val_loss", "val_bpb", "hellaswag_lecture_acc"):
            figures[name] = form.format(last[key])
    if "train_loss" in last and "val_loss" not in last:
        figures["training loss"] = f"{last['train_loss']:.4f}"
    total = run.settings.get("train.steps")
    if "step" in last:
        figures["steps"] = f"{last['step']:,}" + (f" of {total:,}" if type(total) is int else "")
    figures["tokens"] = format_tokens(run.tokens_seen)
    end = run.series("tokens_seen")[0][-1:]
    if (hours := float(run.hours(end)[0])) == hours:
        figures["of training"] = f"{hours:.2f} h" if hours >= 1 else f"{60 * hours:.1f} min"
        if price is not None:
            figures[f"at ${price:g} per GPU-hour"] = f"${price * float(run.hours(end, of_devices=True)[0]):,.2f}"
    if "off_track" in last:
        figures["against the reference"] = _verdict(last)
    if "tokens_per_sec" in last:
        figures["tokens per second"] = f"{last['tokens_per_sec']:,.0f}"
    if "mfu" in last:
        figures["MFU"] = f"{last['mfu']:.1%}"
    return figures


def _bar(runs: Sequence[Run], axes: Axes) -> str:
    switch = "".join(
        f"<button type='button' data-axis='{name}' aria-pressed='false'>{_text(label)}</button>"
        for name, label in axes.labels.items()
    )
    shown = "".join(
        f"<button type='button' data-run='{number}' aria-pressed='true'>"
        f"<span class='swatch' data-color='{number % N_COLORS}'></span>{_text(run.name)}</button>"
        for number, run in enumerate(runs)
    )
    shown = f"<div role='group' aria-label='runs shown'>{shown}</div>" if len(runs) > 1 else ""
    return f"<div class='bar'><div role='group' aria-label='against'>against {switch}</div>{shown}</div>"


def _plot(plot: Plot, place: str) -> str:
    keys = "".join(
        f"<span class='key'><span class='swatch {dash}'{'' if color is None else f' data-color={color}'}></span>"
        f"{_text(label)}</span>"
        for label, color, dash in plot.keys
    )
    size = " class='main'" if plot.is_main else ""
    return f"<section{size}><h3>{_text(plot.title)}</h3><p class='soft'>{_text(plot.note)}</p>{keys}{place}</section>"


def _how_measured(axes: Axes, price: float | None) -> str:
    if "hours" not in axes.ends:
        return ""
    cost = f" Cost is GPU-hours of that, by each start's processes, at ${price:g}." if price is not None else ""
    return (
        "<p class='soft'>Hours are of training alone, added up from the rows' tokens per second: compiling, "
        f"evaluating, saving, and steps lost by a kill and made again, are not in them.{cost}</p>"
    )


def _verdict(row: dict[str, Any]) -> str:
    return "off track" if row["off_track"] else "on track"


def _on_track(runs: Sequence[Run]) -> str:
    """How the runs compared themselves with their references: the first time, when that changed, and the last."""
    parts = []
    for run in runs:
        rows = [row for row in run.rows if row.get("off_track") is not None and row.get("reference_loss") is not None]
        told = [
            row for before, row in zip([None, *rows], rows, strict=False) if before is None or _changed(before, row)
        ]
        told += rows[-1:] if rows and told[-1] is not rows[-1] else []
        lines = []
        for row in told:
            key, name = ("val_loss", "validation") if "val_loss" in row else ("train_loss", "training")
            band = f"{PLUS_MINUS}{row['reference_band']:.3f}" if row.get("reference_band") is not None else ""
            measured = f"{name} {row[key]:.4f}" if key in row else ""
            lines.append((f"step {row.get('step')}", _verdict(row), measured, f"{row['reference_loss']:.4f}{band}"))
        if lines:
            parts.append(_of_run(runs, run) + _table(("", "", "loss", "reference"), lines))
    return "".join(parts)


def _changed(before: dict[str, Any], row: dict[str, Any]) -> bool:
    return _verdict(before) != _verdict(row)


def _evaluations(runs: Sequence[Run]) -> str:
    parts = []
    for run in runs:
        rows = [(row, figures) for row in run.evaluations if (figures := _section_of(row, "figures"))]
        shown = [key for key in FIGURES if any(key in figures for _, figures in rows)]
        if rows:
            head = ("model", *(FIGURES[key][0] for key in shown), "data", "date", "command")
            lines = [
                (
                    f"{run.name}/{row.get('model')}" if row.get("of_run") else row.get("model"),
                    *(_figure(key, figures) for key in shown),
                    _scored(_section_of(row, "data")),
                    _when(row.get("date")),
                    row.get("command", ""),
                )
                for row, figures in rows
            ]
            parts.append(_of_run(runs, run) + _table(head, lines))
        tasks = [
            (row.get("model"), task, *_harness(figures))
            for row in run.evaluations
            for task, figures in _section_of(row, "harness").items()
            if isinstance(figures, dict)
        ]
        if tasks:
            parts.append(_table(("model", "lm-evaluation-harness task", "figures", "items"), tasks))
    return "".join(parts)


def _section_of(row: dict[str, Any], name: str) -> dict[str, Any]:
    """What a record says below ``name``; nothing where that is no mapping."""
    found = row.get(name)
    return found if isinstance(found, dict) else {}


def _figure(key: str, figures: dict[str, Any]) -> str:
    _, form, error = FIGURES[key]
    value, spread = figures.get(key), figures.get(error)
    if not isinstance(value, int | float):
        return ""
    return form.format(value) + (f"{PLUS_MINUS}{spread:.4f}" if isinstance(spread, float) else "")


def _scored(data: dict[str, Any]) -> str:
    return "" if not data else f"{data.get('path')}: {data.get('windows')} windows of {data.get('seq_len')}"


def _harness(figures: dict[str, Any]) -> tuple[str, str]:
    names = [name for name, value in figures.items() if isinstance(value, float) and not name.endswith("_stderr")]
    texts = [
        f"{name} {figures[name]:.4f}"
        + (f"{PLUS_MINUS}{e:.4f}" if isinstance(e := figures.get(f"{name}_stderr"), float) else "")
        for name in names
    ]
    return ", ".join(texts), str(figures.get("n", ""))


def _what_differs(runs: Sequence[Run]) -> str:
    if len(runs) == 1:
        return ""
    everything = [{**run.settings, **_circumstances(run.environment)} for run in runs]
    names = [name for name in differences(everything) if name != "train.run_dir"]
    if not names:
        return "<p>Nothing: settings, versions, data and machine are the same.</p>"
    return _table(
        ("", *(run.name for run in runs)),
        [(name, *(of_run.get(name, "not set") for of_run in everything)) for name in names],
    )


def _circumstances(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in CIRCUMSTANCES if name in row}


def _samples(runs: Sequence[Run]) -> str:
    parts = []
    for run in runs:
        rows = [row for row in run.rows if isinstance(row.get("samples"), list) and row["samples"]]
        rows = list({row.get("step"): row for row in rows}.values())
        kept = sorted({round(i * (len(rows) - 1) / (MOST_SAMPLED_STEPS - 1)) for i in range(MOST_SAMPLED_STEPS)})
        rows = rows if len(rows) <= MOST_SAMPLED_STEPS else [rows[i] for i in kept]
        texts = [
            f"<p class='soft'>step {_text(row.get('step'))}, {format_tokens(row.get('tokens_seen', 0))} tokens</p>"
            + "".join(f"<pre>{html.escape(str(text))}</pre>" for text in row["samples"])
            for row in reversed(rows)
        ]
        if texts:
            earlier = f"<details><summary>Earlier samples</summary>{''.join(texts[1:])}</details>" if texts[1:] else ""
            parts.append(_of_run(runs, run) + texts[0] + earlier)
    return "".join(parts)


def _starts(runs: Sequence[Run]) -> str:
    parts = []
    for run in runs:
        lines = []
        records = [{**flat(_section_of(start, "config")), **_circumstances(start)} for start in run.starts]
        for start, before, now in zip(run.starts, [None, *records], records, strict=False):
            changed = differences([before, now]) if before else []
            what = "; ".join(f"{name}: {before.get(name)} -> {now.get(name)}" for name in changed if before)
            command = " ".join(map(str, start.get("command") or ()))
            on = f"{start.get('processes', '')} x {start.get('device', '')}"
            lines.append((_when(start.get("time")), f"step {start.get('step', '')}", on, command, what or "-"))
        events = [
            (f"step {row.get('step')}", text.format(row[key]))
            for row in run.rows
            for key, text in EVENTS.items()
            if row.get(key)
        ]
        content = _table(("time", "from", "on", "command", "otherwise than before"), lines) if lines else ""
        content += _table(("step", "what happened"), events) if events else ""
        parts.append(_of_run(runs, run) + content if content else "")
    return "".join(parts)


def _settings(runs: Sequence[Run]) -> str:
    parts = []
    for run in runs:
        rows = [*_circumstances(run.environment).items(), *run.settings.items()]
        if rows:
            fingerprint = run.environment.get("data_fingerprint")
            data = f"{run.settings.get('data.path', 'unknown')}" + (
                f", fingerprint {fingerprint}" if fingerprint else ""
            )
            parts.append(
                f"{_of_run(runs, run)}<p>Data: {_text(data)}</p>"
                f"<details><summary>All settings, versions and the machine</summary>{_table(('', ''), rows)}</details>"
            )
    return "".join(parts)
