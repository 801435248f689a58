"""Two runs that should be equal -> where they first differ, and what they had otherwise that may be why."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from .. import runs
from ..program import UserError
from ..runs import read_rows
from .measured import CIRCUMSTANCES, ReportError, differences, flat, read_environment, read_settings

# Of the machine and its hour, or of what a run was compared with, not of its training.
NOT_COMPARED = {"step", "tokens_per_sec", "mfu", "peak_memory", "reference_loss", "reference_band", "off_track"}
# Settings that may differ without changing a figure.
HARMLESS = ("train.run_dir", "train.log_every", "train.trackers", "checkpoint.", "resume.")
CLOSE = 1e-3  # relative; what is further apart is no matter of rounding
# Parts of a layer, and of the network, in the order in which they are applied.
PARTS = ("wte", "wpe", "ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj", "ln_f", "lm_head")


def compare_runs(a: Path, b: Path) -> tuple[bool, list[str]]:
    """Whether what both runs measured and saved is the same to the last bit, and lines that say so or where it is not.

    Raises:
        ReportError: when there are no rows, or no step that both have.
    """
    ours, theirs = _figures(a), _figures(b)
    shared = sorted(ours.keys() & theirs.keys())
    if not shared:
        raise ReportError(
            f"{a} and {b} have rows of no step in common ({_span(ours)} and {_span(theirs)}): nothing to compare"
        )
    found = [(step, names) for step in shared if (names := _differing(ours[step], theirs[step]))]
    n_figures = sum(len(ours[step].keys() & theirs[step].keys()) for step in shared)
    over = f"{len(shared)} steps that both have rows of ({shared[0]} to {shared[-1]})"
    if found:
        step, names = found[0]
        before = shared.index(step)
        lines = [f"the first difference is at step {step}, after {before} that are equal, of {over}"]
        lines += [f"  {name:<16} {_how_far(ours[step][name], theirs[step][name])}" for name in names]
        lines.append(f"  from there on {len(found)} of {len(shared) - before} differ")
    else:
        lines = [f"all {n_figures} figures are equal, over {over}"]
    lines += [
        f"  only {run} goes on, to step {last}"
        for run, steps in ((a, ours), (b, theirs))
        if (last := max(steps)) > shared[-1]
    ]
    weights_differ, weight_lines = _compare_weights(a, b)
    differ = bool(found) or weights_differ
    lines += weight_lines + _what_else_differs(a, b, "which may be why" if differ else "without consequence")
    return not differ, lines


def _figures(run: Path) -> dict[int, dict[str, Any]]:
    """Step -> what was measured after it; where a step was made twice, the later row counts."""
    found: dict[int, dict[str, Any]] = {}
    for row in read_rows(run / "metrics.jsonl"):
        if isinstance(row, dict) and type(row.get("step")) is int:
            kept = {key: value for key, value in row.items() if key not in NOT_COMPARED and value is not None}
            found.setdefault(row["step"], {}).update(kept)
    if not found:
        raise ReportError(f"no rows in {run / 'metrics.jsonl'}: give the folder of a run that has trained a step")
    return found


def _span(steps: dict[int, Any]) -> str:
    return f"{len(steps)} steps, {min(steps)} to {max(steps)}"


def _differing(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Names of figures that both have, and have otherwise; what only one has measured says nothing."""
    return [name for name in a if name in b and not _same(a[name], b[name])]


def _same(a: Any, b: Any) -> bool:
    return a == b or (isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b))


def _how_far(a: Any, b: Any) -> str:
    text = f"{a!r} against {b!r}"
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in (a, b)):
        return text
    relative = abs(a - b) / max(abs(a), abs(b))
    return f"{text}: {relative:.2g} relative" + (f", {_ulps(a, b)}" if relative < CLOSE else "")


def _ulps(a: float, b: float) -> str:
    """How many numbers lie between, of the kind that both are: a loss from a GPU is a float32 written as float64."""
    is_single = all(float(np.float32(value)) == value for value in (a, b))
    kind, whole = (np.float32, np.int32) if is_single else (np.float64, np.int64)
    bits = [int(np.array(value, kind).view(whole)) for value in (a, b)]
    lowest = int(np.iinfo(whole).min)
    first, second = (number if number >= 0 else lowest - number for number in bits)  # in the order of the numbers
    return f"{abs(first - second):,} ulp of {kind.__name__}"


def _what_else_differs(a: Path, b: Path, why: str) -> list[str]:
    lines = []
    settings = [flat(read_settings(run)) for run in (a, b)]
    for run, found in zip((a, b), settings, strict=True):
        if not found:
            lines.append(f"{run} has no config.yaml: its settings are not compared")
    if all(settings):
        names = [name for name in differences(settings) if not name.startswith(HARMLESS)]
        lines += [f"  setting {name}: {_pair(settings, name)}" for name in names]
    records = [read_environment(run) for run in (a, b)]
    for run, record in zip((a, b), records, strict=True):
        if not record:
            lines.append(f"{run} has no environment.json: its versions, machine and data are not compared")
    if all(records):
        names = [name for name in differences(records) if name in CIRCUMSTANCES]
        lines += [f"  {name}: {_pair(records, name)}" for name in names]
    starts = [_starts(run) for run in (a, b)]
    if starts[0] != starts[1]:
        lines.append(f"  started at steps: {starts[0]} against {starts[1]}")
    if any(line.startswith(" ") for line in lines):
        return [f"otherwise, {why}:", *lines]
    return [*lines, "settings, versions, machine and data are the same, as far as they are recorded"]


def _pair(records: Sequence[dict[str, Any]], name: str) -> str:
    return " against ".join(str(record.get(name, "not set")) for record in records)


def _starts(run: Path) -> list[Any]:
    return [row.get("step") for row in read_rows(run / "starts.jsonl") if isinstance(row, dict)]


def _compare_weights(a: Path, b: Path) -> tuple[bool, list[str]]:
    """Whether any model that both have saved differs, and where first."""
    saved = [_models(run) for run in (a, b)]
    shared = [name for name in saved[0] if name in saved[1]]
    if not shared:
        return False, ["no checkpoint of the same step in both: weights are not compared"]
    equal: list[str] = []
    lines = []
    for name in shared:
        first, second = saved[0][name], saved[1][name]
        try:
            found = None if runs.same_weights(first, second) else _first_tensor(first, second)
        except (OSError, UserError) as error:
            lines.append(f"{name} cannot be compared: {error}")
            continue
        if found is not None:
            same_before = f"; equal are {', '.join(equal)}" if equal else ""
            return True, [*lines, f"{name} is the first model of both that differs{same_before}", f"  {found}"]
        equal.append(name)
    if equal:
        lines.append(f"the weights are equal in all that both have saved: {', '.join(equal)}")
    return False, lines


def _models(run: Path) -> dict[str, Path]:
    """Name -> folder of what was saved, in the order of steps; the final model comes last."""
    checkpoints = run / "checkpoints"
    found = {folder.name: folder for folder in runs.saved_steps(checkpoints).values()} if checkpoints.is_dir() else {}
    return found | ({"final": run / "final"} if (run / "final").is_dir() else {})


def _first_tensor(a: Path, b: Path) -> str | None:
    """The first tensor, in the order of the network, that is not the same in two folders; None when all are."""
    with ExitStack() as stack:
        ours, theirs = _tensors(a, stack), _tensors(b, stack)
        n_differ, first = 0, ""
        for name in sorted(ours.keys() | theirs.keys(), key=_place):
            if name not in ours or name not in theirs:
                text = f"{name} is only in {a if name in ours else b}"
            else:
                text = _compare_tensors(name, ours[name].get_tensor(name), theirs[name].get_tensor(name)) or ""
            if text:
                n_differ, first = n_differ + 1, first or text
        if not first:
            return None
        return f"{first}; {n_differ} of {len(ours.keys() | theirs.keys())} tensors differ"


def _tensors(folder: Path, stack: ExitStack) -> dict[str, Any]:
    """Name -> the open file that has the tensor."""
    from safetensors import SafetensorError, safe_open

    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise UserError(f"{folder} holds no weights")
    try:
        opened = [stack.enter_context(safe_open(path, framework="pt")) for path in files]
    except SafetensorError as error:
        raise UserError(f"the weights in {folder} cannot be read ({error})") from None
    return {name: file for file in opened for name in file.keys()}  # noqa: SIM118


def _compare_tensors(name: str, a: Any, b: Any) -> str | None:
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"{name} is {a.dtype} of {tuple(a.shape)} against {b.dtype} of {tuple(b.shape)}"
    differs = (a != b) & ~(a.isnan() & b.isnan())
    if not (n := int(differs.sum())):
        return None
    furthest = float((a.double() - b.double()).abs()[differs].max())
    return f"{name}: {n:,} of {a.numel():,} numbers differ, by at most {furthest:.3g}"


def _place(name: str) -> tuple[int, int, int, str]:
    """Where in the network a tensor stands: embeddings, layers in order, what comes after them."""
    layer = re.search(r"\bh\.(\d+)\.", name)
    part = next((i for i, part in enumerate(PARTS) if f"{part}." in name), len(PARTS))
    stage = 1 if layer else 0 if part < 2 else 2
    return stage, int(layer[1]) if layer else 0, part, name.replace("weight", "0")  # a weight before its bias
