"""Reference curves: what the loss of a recipe looks like when all is well.

A curve is a few points (step, loss) and the recipe that they were made with. Between points the logarithm of the loss
is linear in the logarithm of the step: of the public 124M curve's points, 250 apart and more, one that is left out is
found again to 0.055 nats (root mean square; over the step itself 0.057).

Known curves are files in ``assets/reference``; the metrics.jsonl of any run is one too. The files:

    name, source        what it is, and where it was read
    recipe              dotted names and values, as in config.yaml; the shape of the model is the key
    data                texts (part of the data folder's name, the most special first) and what their loss lies above
                        the curve's own
    points              figure -> [step, loss] pairs
    spread              figure -> nats by which equal runs with other seeds differ
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from .config import ModelSection, RunConfig, flat
from .knobs import ConfigError
from .runs import read_rows

CURVES = Path(__file__).parent / "assets" / "reference"
FIGURES = ("val_loss", "train_loss")
# Without these equal, losses cannot be compared: another model, or another task.
SAME = ("n_layer", "n_embd", "n_head", "vocab_size")
# So must these be, which older recipes don't name.
LATER: dict[str, Any] = {
    "data.seq_len_ramp": [],
    "data.seq_len_ramp_steps": 0,
    "data.document_starts": False,
    "train.batch_ramp": [],
    "train.batch_ramp_steps": 0,
}
# Steps over which a training loss is averaged: that of one batch says little.
WINDOW = 50
# A run on track may be so much of its steps ahead of the reference, or behind: rates are never quite alike.
LAG = 0.05
# Of a run whose seeds nobody has compared: two of the demo's were up to 0.04 apart in validation.
UNKNOWN_SPREAD = {"val_loss": 0.06, "train_loss": 0.12}


@dataclass(frozen=True)
class Curve:
    """Losses of one recipe over its steps.

    Attributes:
        recipe: dotted names and values; empty where nobody wrote it down.
        points: figure ("val_loss", "train_loss", "grad_norm") -> (step, value) pairs in the order of steps, from 1 on.
        spread: figure -> nats that a run on track may lie off.
        remark: what else to say where the curve is named.
    """

    name: str
    recipe: Mapping[str, Any]
    points: Mapping[str, list[tuple[float, float]]]
    spread: Mapping[str, float] = field(default_factory=lambda: dict(UNKNOWN_SPREAD))
    remark: str = ""

    def at(self, figure: str, step: float) -> float | None:
        """The figure at a step, which need not be whole; None outside the points."""
        points = self.points.get(figure, [])
        right = bisect_left(points, (step, -math.inf))
        if right == len(points) or (right == 0 and points[0][0] > step):
            return None
        (after, last) = points[right]
        if after == step:
            return last
        before, first = points[right - 1]
        share = math.log(step / before) / math.log(after / before)
        return math.exp(math.log(first) * (1 - share) + math.log(last) * share)

    def band(self, figure: str, step: float) -> float:
        """How far off a run on track may be at a step, in nats: the spread, and what the curve moves in ``LAG``."""
        here = self.at(figure, step)
        near = self.at(figure, step * (1 + LAG)) or self.at(figure, step / (1 + LAG))
        moves = abs(near - here) if here is not None and near is not None else 0.0
        return self.spread.get(figure, 0.0) + moves


def find_curve(config: RunConfig) -> tuple[Curve | None, str]:
    """The curve that a run is to be compared with, by ``eval.reference``; without one, why there is none.

    Raises:
        ConfigError: when ``eval.reference`` names a run that cannot be compared with.
    """
    wanted = config.eval.reference
    if wanted == "none":
        return None, ""
    if wanted != "auto":
        path = Path(wanted)
        if path.is_dir() and path.resolve() == Path(config.train.run_dir).resolve():
            raise ConfigError(f"eval.reference {wanted} is this run itself: name an earlier one")
        curve = read_run(path)
        if other := _incomparable(config, curve.recipe):
            raise ConfigError(f"eval.reference {wanted} has another {other}: its losses say nothing of this run's")
        return curve, ""
    if config.model.init_from is not None:
        return None, "the run begins with the weights of another"
    reasons = []
    for file in sorted(CURVES.glob("*.json")):
        content = json.loads(file.read_text())
        other = _incomparable(config, content["recipe"])
        texts: dict[str, float] = content["data"]
        name = Path(config.data.path).name.lower().replace("-", "_")
        text = next((text for text in texts if all(part in name for part in text.split())), None)
        if other is None and text is not None:
            return _known(content, text), ""
        if other is None:
            reasons.append(f"{config.data.path} is other text than that of {content['name']}")
    return None, "; ".join(reasons) or "none is known for this model"


def read_run(path: Path) -> Curve:
    """The curve of a run: its folder, or its metrics.jsonl, beside which the recipe lies.

    Raises:
        ConfigError: when there is no loss in it.
    """
    file = path / "metrics.jsonl" if path.is_dir() else path
    try:
        rows = [row for row in read_rows(file) if isinstance(row, dict)]
        recipe = flat((file.parent / "config.yaml").read_text()) if rows else {}
    except FileNotFoundError:
        recipe = {}
    except (OSError, ValueError, AttributeError, yaml.YAMLError) as error:
        raise ConfigError(f"eval.reference {path} cannot be read ({error})") from None
    points: dict[str, list[tuple[float, float]]] = {}
    for figure in (*FIGURES, "grad_norm"):
        found = {float(row["step"]): float(row[figure]) for row in rows if _is_point(row, figure)}
        points[figure] = sorted(found.items())
    for figure in ("train_loss", "grad_norm"):
        points[figure] = _smooth(points[figure])
    if not (points["val_loss"] or points["train_loss"]):
        raise ConfigError(
            f"eval.reference {path} has no losses to compare with: name the folder of a run, or its metrics.jsonl"
        )
    if not recipe:
        batches = [row["tokens_seen"] // row["step"] for row in rows if row.get("step") and row.get("tokens_seen")]
        recipe = {"train.global_batch_tokens": batches[-1]} if batches else {}
    return Curve(str(path), recipe, points)


def _known(content: dict[str, Any], text: str) -> Curve:
    """A curve from its file, moved to the level of another text where the data is that."""
    points = {name: [(float(x), float(y)) for x, y in pairs] for name, pairs in content["points"].items()}
    curve = Curve(content["name"], content["recipe"], points, content["spread"])
    level = content["data"][text]
    if not level:
        return curve
    moved = {name: [(x, y + level) for x, y in pairs] if name in FIGURES else pairs for name, pairs in points.items()}
    # How far apart two texts are depends on the model: a public healthy run of the lecture on FineWeb-Edu lies 0.01
    # below the curve of FineWeb at step 250, and 0.19 at 1250.
    spread = {name: nats + 0.5 * abs(level) for name, nats in curve.spread.items()}
    return replace(curve, points=moved, spread=spread, remark=content["remark"].format(level=level))


def _incomparable(config: RunConfig, recipe: Mapping[str, Any]) -> str | None:
    """What makes the losses of a config and of a recipe those of different things; None: nothing."""
    ours, shape = flat(config.to_yaml()), config.model.gpt_config()
    for name in SAME if "model.preset" in recipe else ():
        if _shape(recipe, name) != getattr(shape, name):
            return f"model.{name} ({_shape(recipe, name)}, here {getattr(shape, name)})"
    for name in ("data.seq_len", "data.document_mask", "model.dropout"):
        if name in recipe and ours[name] != recipe[name]:
            return f"{name} ({recipe[name]}, here {ours[name]})"
    for name, default in LATER.items():
        if ours[name] != (theirs := recipe.get(name, default)):
            return f"{name} ({theirs}, here {ours[name]})"
    return None


def _shape(recipe: Mapping[str, Any], name: str) -> Any:
    keys = ("preset", *SAME, "n_positions")
    given = {key: recipe[f"model.{key}"] for key in keys if recipe.get(f"model.{key}") is not None}
    return getattr(ModelSection(**given).gpt_config(), name)


def _is_point(row: dict[str, Any], figure: str) -> bool:
    step, value = row.get("step"), row.get(figure)
    return isinstance(step, int) and step > 0 and isinstance(value, float) and 0 < value < math.inf


def _smooth(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The mean of the values in the ``WINDOW`` steps around each of its multiples, at the mean of their steps."""
    windows: dict[int, list[tuple[float, float]]] = {}
    for step, value in points:
        windows.setdefault(round(step / WINDOW), []).append((step, value))
    middles = (np.mean(window, axis=0).tolist() for number, window in sorted(windows.items()) if number)
    return [(step, value) for step, value in middles]
