"""figures.json: what is known of a model that is published, for the card to show and for anyone to compute again.

Every number is read from the model's files, its run's records, or the prepared data; what nobody wrote down is left
out. Nothing of the machine comes along: no path, no name of a user or host, no environment variable.

    {"format": 1, "weights": runs.weights_hash, "parameters": n, "shape": {...},
     "run": null or {"model": "final", "step": n, "steps": n, "tokens": n, "recipe": the text of a recipe,
                     "begun_from": null or {"name": of a folder or model of the Hub, "version": which weights},
                     "last": {"figures": {...}, "settings": {...}},         metrics.jsonl's last of these weights
                     "evaluations": [rows of evaluations.jsonl, of these weights; the best of each measurement],
                     "machine": {...}, "time": {...}, "cost": null or {...}, "data": null or {...}}}
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterable
from pathlib import Path, PurePath
from typing import Any

import yaml

from .. import runs
from ..data.shards import ShardError, open_split
from ..files import mask
from ..runs import read_rows, weights_hash
from .privacy import PublishError
from .verify import Folder

FIGURES = "figures.json"
FORMAT = 1
MEASURED = ("val_loss", "val_bpb", "hellaswag_acc", "hellaswag_acc_norm", "hellaswag_lecture_acc", "hellaswag_items")
# Sections of a recipe, and settings, that say where and how often and not what was trained.
_NOT_OF_THE_MODEL = ("checkpoint", "resume", "publish")
_NOT_OF_THE_RECIPE = {
    "data": ("cache_dir", "cache_gb", "verify"),
    "train": ("run_dir", "timeout_s", "trackers", "log_every"),
}
_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}
_ENVIRONMENT = ("device", "processes", "precision", "python", "torch", "transformers", "accelerate", "git_commit")


def gather(path: Path, staged: Path, price: float | None = None, data: Path | None = None) -> dict[str, Any]:
    """The content of figures.json.

    Args:
        path: where the model lies; its run is told by the folder above.
        staged: its copy, of which the weights are read.
        price: dollars for an hour of one device.
        data: the prepared data, where it is not at the recipe's ``data.path``.

    Raises:
        PublishError: when ``data`` is not what the run was trained on.
    """
    path = path.resolve()
    folder = Folder(staged)
    c = folder.stock_config
    return {
        "format": FORMAT,
        "weights": weights_hash(staged),
        "parameters": count_parameters(folder),
        "shape": {"n_layer": c.n_layer, "n_embd": c.n_embd, "n_head": c.n_head, "n_positions": c.n_positions}
        | {"vocab_size": c.vocab_size},
        "run": _of_run(path, weights_hash(staged), price, data),
    }


def count_parameters(folder: Folder) -> int:
    """Numbers in a folder's weight files, without mask buffers; a tied head is there once."""
    return sum(math.prod(folder.shapes[name]) for name in folder.names.values())


def _of_run(path: Path, weights: str, price: float | None, data: Path | None) -> dict[str, Any] | None:
    run, step = runs.run_of(path), runs.step_of(path)
    if run is None or step is None:
        return None
    rows = [row for row in _rows(run / "metrics.jsonl") if row.get("step", math.inf) <= step]
    if not rows:
        return None
    config = _yaml(run / "config.yaml")
    starts = [row for row in _rows(run / "starts.jsonl") if row.get("step", math.inf) <= rows[-1]["step"]]
    latest = {key: value for row in rows for key, value in row.items()}
    if path.name != "final" and "val_loss_raw" in latest:  # of the average, which final/ has, are the others
        latest = {key: value for key, value in latest.items() if key not in MEASURED}
        latest["val_loss"] = latest["val_loss_raw"]
    evaluations = [row for row in _rows(run / runs.EVALUATIONS) if row.get("of_run") and row.get("weights") == weights]
    time = _time(rows, starts)
    return {
        "model": path.relative_to(run).as_posix(),
        "step": latest["step"],
        "steps": config.get("train", {}).get("steps"),
        "tokens": latest.get("tokens_seen"),
        "batch_tokens": config.get("train", {}).get("global_batch_tokens"),
        **{name: value for name in ("batch_ramp", "batch_ramp_steps") if (value := config.get("train", {}).get(name))},
        "recipe": _recipe(config),
        "last": _last(latest, config, starts),
        "begun_from": _begun_from(starts),
        "evaluations": [_evaluation(row) for row in _best(evaluations)],
        "machine": {key: starts[-1][key] for key in _ENVIRONMENT if starts and starts[-1].get(key) is not None},
        "time": time,
        "cost": {"price": price, "dollars": round(price * time["device_hours"], 4)} if price and time else None,
        "data": _data(config, starts, data),
    }


# Records, as far as they are there


def _rows(path: Path) -> list[dict[str, Any]]:
    """A record's rows; none of a link, which may lead anywhere."""
    if path.is_symlink() or not path.is_file():
        return []
    return [row for row in read_rows(path) if isinstance(row, dict)]


def _yaml(path: Path) -> dict[str, Any]:
    if path.is_symlink() or not path.is_file():
        return {}
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    return found if isinstance(found, dict) else {}


def _json(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_bytes()) if path.is_file() and not path.is_symlink() else {}
    return found if isinstance(found, dict) else {}


# Parts


def _last(latest: dict[str, Any], config: dict[str, Any], starts: list[dict[str, Any]]) -> dict[str, Any] | None:
    """What was measured last while training, and with what."""
    figures = {key: latest[key] for key in (*MEASURED, "hellaswag_stderr") if key in latest}
    if not figures:
        return None
    settings = {
        "seq_len": config.get("data", {}).get("seq_len"),
        "val_tokens": config.get("eval", {}).get("val_tokens"),
        "document_mask": config.get("data", {}).get("document_mask"),
        "dtype": _DTYPES.get(starts[-1].get("precision", "")) if starts else None,
        "data_fingerprint": starts[-1].get("data_fingerprint") if starts else None,
    }
    return {"figures": figures, "settings": {key: value for key, value in settings.items() if value is not None}}


def _begun_from(starts: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The weights that the run began with, and which of them; None for random ones."""
    initial = starts[0].get("init_from") if starts else None
    if not isinstance(initial, dict):
        return None
    return {"name": public_path(str(initial.get("source", ""))), "version": initial.get("version")}


def _best(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each measurement the one on most windows or items, and of several such the newest."""
    best: dict[str, tuple[int, int]] = {}
    for number, row in enumerate(rows):
        sizes = {f"task {task}": scores.get("n") for task, scores in (row.get("harness") or {}).items()}
        if "val_loss" in (row.get("figures") or {}):
            sizes["val"] = (row.get("data") or {}).get("windows")
        sizes["hellaswag"] = (row.get("figures") or {}).get("hellaswag_items")
        for name, size in sizes.items():
            if isinstance(size, int) and size >= best.get(name, (0, 0))[0]:
                best[name] = (size, number)
    found = []
    for number, row in enumerate(rows):
        names = {name for name, (_, at) in best.items() if at == number}
        figures = {key: value for key, value in (row.get("figures") or {}).items() if key.partition("_")[0] in names}
        tasks = {task: scores for task, scores in (row.get("harness") or {}).items() if f"task {task}" in names}
        if figures or tasks:
            found.append(row | {"figures": figures, "harness": tasks or None})
    return found


def _evaluation(row: dict[str, Any]) -> dict[str, Any]:
    """A row of evaluations.jsonl, without places of this machine."""
    kept = ("date", "settings", "device", "versions", "figures", "harness")
    made: dict[str, Any] = {key: row[key] for key in kept if row.get(key) is not None}
    if isinstance(row.get("command"), str):
        made["command"] = public_command(row["command"])
    if isinstance(row.get("data"), dict):
        made["data"] = row["data"] | {"path": public_path(str(row["data"].get("path", "")))}
    return made


def public_path(path: str) -> str:
    """A path as others may read it: as it is when it begins where a command was given, or else its last part."""
    path = mask(path)
    leads_out = PurePath(path).is_absolute() or path.startswith("~") or ".." in PurePath(path).parts or ":" in path
    return PurePath(path).name if leads_out else path


def public_command(command: str) -> str:
    """A command line whose words name no place of this machine, also as ``--flag=/place``."""
    try:
        words = shlex.split(command)
    except ValueError:
        return ""
    return shlex.join("=".join(public_path(part) for part in word.split("=")) for word in words)


def _recipe(config: dict[str, Any]) -> str | None:
    """The run's settings as a recipe, without what belongs to one machine, or is not set."""
    kept: dict[str, Any] = {}
    for section, settings in config.items():
        if section in _NOT_OF_THE_MODEL or not isinstance(settings, dict):
            continue
        left_out = _NOT_OF_THE_RECIPE.get(section, ())
        kept[section] = {key: value for key, value in settings.items() if key not in left_out and value is not None}
    for name in ("path", "tokenizer"):
        if name in kept.get("data", {}):
            kept["data"][name] = public_path(str(kept["data"][name]))
    return yaml.safe_dump(kept, sort_keys=False, allow_unicode=True) if kept else None


def _time(rows: list[dict[str, Any]], starts: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Seconds of the steps by their measured speeds: not those of compiling, measuring, saving, or work that was lost.

    Each row's speed counts for the tokens since the row before it that has one, on the devices of its start.
    """
    seconds = device_seconds = 0.0
    seen = 0
    for row in rows:
        speed, tokens = row.get("tokens_per_sec"), row.get("tokens_seen")
        if not speed or not tokens:
            continue
        since: dict[str, Any] = next((s for s in reversed(starts) if s["step"] < row["step"]), {})
        took = (tokens - seen) / speed
        seconds, device_seconds, seen = seconds + took, device_seconds + took * since.get("processes", 1), tokens
    if not seconds:
        return None
    return {"hours": round(seconds / 3600, 5), "device_hours": round(device_seconds / 3600, 5), "starts": len(starts)}


def _data(config: dict[str, Any], starts: Iterable[dict[str, Any]], data: Path | None) -> dict[str, Any] | None:
    """What the manifest and the report of the prepared data say, when it is here and is what the run was trained on."""
    expected = {row.get("data_fingerprint") for row in starts} - {None}
    folder = data or Path(str(config.get("data", {}).get("path") or "nowhere"))
    if not (folder / "manifest.json").is_file():
        if data:
            raise PublishError(f"--data {data} holds no manifest.json: give the folder that prepare_data.py made")
        return None
    try:
        fingerprints = {
            split: open_split(folder, split).fingerprint for split in _json(folder / "manifest.json")["splits"]
        }
    except (ShardError, ValueError, KeyError) as error:
        if data:
            raise PublishError(f"--data {data} cannot be read ({error}): give what this run was trained on") from None
        return None
    if not expected & set(fingerprints.values()):
        if data:
            raise PublishError(f"--data {data} is not what this run was trained on: its fingerprint is another")
        return None
    manifest, report = _json(folder / "manifest.json"), _json(folder / "report.json")
    settings = manifest.get("config", {})
    counts = ("tokens", "documents", "bytes")
    return {
        "name": folder.resolve().name,
        "fingerprints": fingerprints,
        **({"tokenizer": public_path(str(own["name"]))} if isinstance(own := manifest["tokenizer"], dict) else {}),
        "splits": {name: {key: entry.get(key) for key in counts} for name, entry in manifest["splits"].items()},
        "source": {key: settings[key] for key in ("dataset", "name", "revision") if settings.get(key)},
        "dedup": settings.get("dedup"),
        "decontaminate": [public_path(str(name)) for name in settings.get("decontaminate") or ()],
        "decontaminate_ngram": settings.get("decontaminate_ngram"),
        "contaminated": settings.get("contaminated"),
        "dropped": {str(name): count for name, count in (manifest.get("dropped") or {}).items() if count},
        "reported": {name: entry["documents"] for name, entry in (report.get("reported") or {}).items()},
    }
