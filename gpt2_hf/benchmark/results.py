"""What the benchmark found: checked, as text, as JSON and as a picture."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from .. import hardware
from ..training.metrics import flops_per_token
from .limits import floor_seconds, peak_of, products
from .processes import RaceError
from .race import CONTENDED, Result, Row
from .variants import OURS, Shape, initial_model

# First losses agree with those in fp32 within this, in nats: bf16 moves them by about 1e-4, a wrong label by far more.
LOSS_TOLERANCE = 5e-3


def check(result: Result) -> str:
    """Compare our first losses, before and after updates, with those of stock GPT-2 in fp32; what was found, in words.

    Raises:
        RaceError: when they differ, because then the speeds mean nothing.
    """
    ours = next(row for row in result.rows if row.is_ours)
    plain = [row for row in result.rows if row.variant.model == "stock" and not row.error and not row.variant.padded]
    if not plain:
        return "no stock GPT-2 ran, so our losses were not checked"
    reference = min(plain, key=lambda row: row.variant.bf16)
    worst = float(np.max(np.abs(np.subtract(ours.losses, reference.losses))))  # NaN if one is
    found = f"largest difference of our first {len(ours.losses)} losses to {reference.variant.label}: {worst:.1e}"
    if not worst <= LOSS_TOLERANCE:
        raise RaceError(f"{found}, more than {LOSS_TOLERANCE}: our step is wrong here, its speed means nothing")
    return found


def summarize(result: Result, shape: Shape, device: torch.device) -> dict[str, Any]:
    """Everything as plain values, ready for JSON."""
    model = initial_model(shape)
    flops = flops_per_token(model.num_parameters(), model.config, shape.seq_len)
    ran = [row for row in result.rows if row.rounds]
    peak, peak_source = peak_of(device, result.limits, flops * max(row.median_speed(shape) for row in ran))
    best = _best_peer(ran, shape)
    floor = floor_seconds(shape, result.limits)
    return {
        "date": date.today().isoformat(),
        "machine": hardware.describe(device),
        "card": result.card,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "shape": asdict(shape) | {"parameters": model.num_parameters()},
        "flops_per_token": flops,
        "peak_flops": peak,
        "peak_source": peak_source,
        "best_peer": best.variant.label,
        "check": check(result),
        "table": [_measured(row, best, shape, flops / peak) for row in ran],
        "failed": {row.variant.label: row.error for row in result.rows if row.error},
        "precision": hardware.default_precision(device),
        "limits": result.limits,
        "floor_ms": {name: 1e3 * seconds for name, seconds in floor.items()},
        "breakdown_ms": result.breakdown,
    }


def _best_peer(ran: list[Row], shape: Shape) -> Row:
    """The fastest peer as its users run it, without our allocator; ours, where no peer ran."""
    peers = [row for row in ran if not row.is_ours and not row.variant.allocator]
    return max(peers, key=lambda row: row.median_speed(shape), default=ran[0])


def _measured(row: Row, best: Row, shape: Shape, mfu_per_speed: float) -> dict[str, Any]:
    speeds = row.tokens_per_sec(shape)
    return {
        "label": row.variant.label,
        "tokens_per_sec": row.median_speed(shape),
        "slowest": speeds[0],
        "fastest": speeds[-1],
        "ratio": row.ratio_to(best),
        "mfu": row.median_speed(shape) * mfu_per_speed,
        "peak_memory_gb": row.peak_memory_gb,
        "steps": len(speeds) * row.steps_together,
        "steps_together": row.steps_together,
        "contended": row.contended(),
        "load": sum(row.loads) / len(row.loads),
        "first_step_s": row.first_step_s,
        "micro_batch_size": row.micro_batch_size,
        "losses": row.losses,
    }


def as_text(found: dict[str, Any]) -> str:
    """A Markdown table and a few lines around it."""
    lines = [_headline(found), "", *_table(found), "", *_speed_lines(found)]
    if ours := next((row for row in found["table"] if row["label"] == OURS.label), None):
        lines.append(_floor_line(found, ours["tokens_per_sec"]))
    if found["breakdown_ms"]:
        lines.append(f"Our step under the profiler, ms: {_listed(found['breakdown_ms'])}.")
    return "\n".join([*lines, f"Check: {found['check']}.", ""])


def _headline(found: dict[str, Any]) -> str:
    shape = found["shape"]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    card = f" ({_card(found['card'])})" if found["card"] else ""
    return (
        f"{shape['parameters']:,} parameters ({shape['n_layer']} layers, {shape['n_embd']} wide), "
        f"{shape['micro_batch_size']} x {shape['seq_len']} tokens x {shape['grad_accum_steps']} a step; "
        f"{found['date']}, {found['machine']}{card}; {versions}"
    )


def _card(card: dict[str, Any]) -> str:
    """Its form and driver, and its clocks at work."""
    figures = {"sm_mhz": "MHz", "memory_mhz": "MHz memory", "power_limit_w": "W"}
    told = [f"{card[key]:,.0f} {unit}" for key, unit in figures.items() if card[key] is not None]
    return ", ".join([*filter(None, [card["form"]]), f"driver {card['driver']}", *told])


def _table(found: dict[str, Any]) -> list[str]:
    lines = [
        "| variant | tokens/s, median | slowest to fastest step | to the best peer | MFU | peak memory | contended |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found["table"]:
        size = row["micro_batch_size"]
        less = "" if size == found["shape"]["micro_batch_size"] else f" (micro-batch {size})"
        lines.append(
            f"| {row['label']}{less} | {row['tokens_per_sec']:,.0f} | {row['slowest']:,.0f} to {row['fastest']:,.0f} | "
            f"{row['ratio']:.2f} | {row['mfu']:.1%} | {row['peak_memory_gb']:.2f} GB | "
            f"{row['contended']} of {row['steps'] // row['steps_together']} |"
        )
    return lines + [f"| {label} | failed: {error} | | | | | |" for label, error in found["failed"].items()]


def _speed_lines(found: dict[str, Any]) -> list[str]:
    best, limits = found["best_peer"], found["limits"]
    gemms = "".join(f"{name} product {value / 1e12:.3g} TFLOP/s, " for name, value in products(limits).items())
    lines = [
        f"MFU is (6 N + 12 L C T) x tokens/s over {found['peak_flops'] / 1e12:.3g} TFLOP/s ({found['peak_source']}). "
        f"Contended: steps of over {CONTENDED} times their variant's median. "
        + ("No peer ran." if best == OURS.label else f"The best peer is {best}."),
        f"Limits, the best of each round: {gemms}copy {limits['copy'] / 1e9:.3g} GB/s.",
    ]
    if (most := max(row["steps_together"] for row in found["table"])) > 1:
        lines.append(f"Steps are timed together, {most} at most, and waited for at their end.")
    if found["precision"] != "bf16":
        lines.append(f"No peer in bf16: this machine only emulates it. Ours trains in {found['precision']}.")
    return lines


def _floor_line(found: dict[str, Any], tokens_per_sec: float) -> str:
    shape, floor = found["shape"], found["floor_ms"]
    tokens = shape["micro_batch_size"] * shape["seq_len"] * shape["grad_accum_steps"]
    step, least = 1e3 * tokens / tokens_per_sec, sum(floor.values())
    how = (
        "products and attention at the rates of their own shapes, and the least traffic between them"
        if "between" in floor
        else "attention at the rate of matrix products, normalisation and GELU for nothing"
    )
    meaning = (
        f"so at least {least / step:.0%} of it is unavoidable here: a floor, with {how}"
        if least <= step
        else "so the limits were measured while the machine was busy, and say nothing"
    )
    return f"Floor of a step from these: {least:,.1f} ms ({_listed(floor)}); ours takes {step:,.1f} ms, {meaning}."


def _listed(milliseconds: dict[str, float]) -> str:
    return ", ".join(f"{name} {ms:,.1f}" for name, ms in milliseconds.items())


def write(found: dict[str, Any], out: Path) -> list[Path]:
    """benchmark.json, benchmark.md and, where matplotlib is installed, benchmark.png."""
    (out / "benchmark.json").write_text(json.dumps(found, indent=1))
    (out / "benchmark.md").write_text(as_text(found))
    written = [out / "benchmark.json", out / "benchmark.md"]
    try:
        draw(found, out / "benchmark.png")
    except ImportError:
        print("no picture: it needs pip install matplotlib")
        return written
    return [*written, out / "benchmark.png"]


def draw(found: dict[str, Any], path: Path) -> None:
    """Bars of tokens per second, with each variant's spread and peak memory."""
    from matplotlib.figure import Figure  # without pyplot: no global state, no window system

    rows = found["table"][::-1]
    figure = Figure(figsize=(8, 0.9 + 0.42 * len(rows)), layout="constrained")
    axes = figure.subplots()
    speeds = [row["tokens_per_sec"] for row in rows]
    spread = [
        [row["tokens_per_sec"] - row["slowest"] for row in rows],
        [row["fastest"] - row["tokens_per_sec"] for row in rows],
    ]
    colors = ["#2563a8" if row["label"] == OURS.label else "#b9c0c8" for row in rows]
    axes.barh(
        [row["label"] for row in rows], speeds, color=colors, xerr=spread, error_kw={"ecolor": "#5f6670", "lw": 1}
    )
    right = max(row["fastest"] for row in rows)
    for place, row in enumerate(rows):
        text = f"{row['tokens_per_sec']:,.0f}   {row['ratio']:.2f}x   {row['peak_memory_gb']:.1f} GB"
        axes.text(right * 1.03, place, text, va="center", fontsize=9)
    axes.set_xlim(0, right * 1.42)
    shape = found["shape"]
    figure.suptitle(
        f"Training tokens per second, {shape['parameters'] / 1e6:.0f}M parameters, {shape['seq_len']} positions, "
        f"{found['machine']}\nbars: median of steps, lines: slowest to fastest; then ratio to the best peer and peak"
        " memory",
        x=0.01,
        ha="left",
        fontsize=9,
    )
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
