"""A run's folder, for whoever writes or reads one: which models it holds, whether they are whole, what was measured.

    RUN/checkpoints/step-00001000/      a stock gpt2 folder: config.json, model.safetensors, tokenizer, ...
                      trainer_state/    what only a resumed run needs: the optimizers' state, state.json
                      manifest.json     name, size and sha256 of every file above
        final/                          the same, without trainer_state, when the run is finished
        metrics.jsonl                   a row for each measurement
        before-1/, before-2/, ...       what was there when a start was told to begin anew, or at an earlier step

A model's folder is written beside its place under a temporary name, flushed to the disk, and renamed: whatever happens,
a folder with its final name is complete. Its manifest tells a file that was damaged later. What else someone put into
a folder (a README.md in ``final``) is not ours to delete: it stays when the folder is replaced.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable
from pathlib import Path, PurePath
from typing import Any

from .files import sha256, to_disk

MANIFEST = "manifest.json"
LAST_WEIGHTS = "last_weights"  # in a manifest, of a file with averaged weights: the hash of those it ended at
TRAINER_STATE = "trainer_state"
STATE = f"{TRAINER_STATE}/state.json"  # the step, and what run it is
REWIND = "rewind.json"  # the last time that the run went back to a checkpoint
TAKEN = "resumed_from.json"  # the checkpoint that `resume.from` named and the run has gone on from
TRACKER = "tracker.json"  # by what name trackers know the run
EVALUATIONS = "evaluations.jsonl"  # a row for each model that was evaluated after training, or beside the run's own
# Small files beside the models: what was measured, and how the run was started.
RECORDS = ("metrics.jsonl", "config.yaml", "environment.json", "starts.jsonl", EVALUATIONS, REWIND, TAKEN, TRACKER)
NOT_SAVED = "so this is not saved"  # in the error, and in no other, of training that has diverged
# Beside the weights and a README.md, all that a gpt2 folder has had since 2019.
STOCK_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
STEP_FOLDER = re.compile(r"step-(\d{8,})")


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Make ``folder`` with the files that ``write(temporary_folder)`` puts there, all of it or nothing.

    An older folder of that name is replaced, but for files in it that are not a model's. An error in ``write`` leaves
    no trace, nor does an earlier kill.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = begin_folder(folder)
    try:
        write(temporary)
        finish_folder(folder, temporary, describe_files(temporary))
    except BaseException:
        drop_unfinished(folder)
        raise


def begin_folder(folder: Path) -> Path:
    """Where to write what is to become ``folder``: an empty one beside it. Raises OSError."""
    drop_unfinished(folder)
    shutil.rmtree(_doomed(folder), ignore_errors=True)
    _unfinished(folder).mkdir()
    return _unfinished(folder)


def drop_unfinished(folder: Path) -> None:
    """Delete what was being written to become ``folder``."""
    shutil.rmtree(_unfinished(folder), ignore_errors=True)


def describe_files(folder: Path, names: Iterable[str] | None = None) -> dict[str, dict[str, Any]]:
    """These files' part of a manifest (all that ``folder`` has by default), when they have reached the disk."""
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    entries = {}
    for name in sorted(found if names is None else names):
        path = folder / name
        entries[name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
        to_disk(path)
    return entries


def finish_folder(folder: Path, temporary: Path, entries: dict[str, dict[str, Any]]) -> None:
    """Give a folder that is complete but for its manifest the name that promises a whole one."""
    (temporary / MANIFEST).write_text(json.dumps(entries, indent=1))
    described = {temporary / name for name in entries}
    if folder.is_dir() and not folder.is_symlink():
        _keep_foreign(folder, temporary)
    for path in (*temporary.rglob("*"), temporary):
        if path not in described and not path.is_symlink():
            to_disk(path)
    if os.path.lexists(folder):
        delete(folder)
    os.replace(temporary, folder)
    _known_whole.add(_stamp(folder))
    to_disk(folder.parent)


def is_stock(name: str) -> bool:
    """Whether a file of this name directly in a gpt2 folder is part of the model as transformers saves it."""
    return name in STOCK_FILES or _WEIGHTS.fullmatch(name) is not None


def damage(folder: Path) -> str | None:
    """What is wrong with a folder made by ``write_folder``, or None when every file is as it was written."""
    try:
        entries = read_manifest(folder)
    except (OSError, ValueError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    for name, entry in entries.items():
        path = folder / name
        try:
            if not path.is_file():
                return f"{name} is missing"
            if (size := path.stat().st_size) != entry["bytes"]:
                return f"{name} has {size} bytes instead of {entry['bytes']}"
            if sha256(path) != entry["sha256"]:
                return f"{name} has changed since it was written"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def problem(checkpoint: Path) -> str | None:
    """Why what has a checkpoint's name is not a whole one, or None: ``damage``, or that it is none of ours."""
    try:
        if checkpoint.is_symlink():
            return "it is a symbolic link"
        if not checkpoint.is_dir():
            return "it is not a folder" if checkpoint.exists() else "it is not there"
        listed = read_manifest(checkpoint)
        if not any(_WEIGHTS.fullmatch(name) for name in listed):
            return f"{MANIFEST} lists no weights"
        for path in checkpoint.rglob("*"):
            name, mode = path.relative_to(checkpoint).as_posix(), path.stat(follow_symlinks=False).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode)):
                return f"{name} is no file"  # a pipe: who opened it would wait for ever
            is_loaded = _WEIGHTS.fullmatch(name) or name.startswith(f"{TRAINER_STATE}/")
            if is_loaded and name not in listed and not stat.S_ISDIR(mode):
                return f"{name} is not in {MANIFEST}"
    except (OSError, ValueError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    return damage(checkpoint) or _state_problem(checkpoint)


def _state_problem(checkpoint: Path) -> str | None:
    """What is wrong with what an undamaged checkpoint says of itself, or None."""
    path = checkpoint / STATE
    if not path.is_file():
        return None  # no run can go on from it, and its model is whole
    try:
        state = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        return f"{STATE} cannot be read ({error})"
    step = state.get("step") if isinstance(state, dict) else None
    if type(step) is not int:
        return f"{STATE} names no step"
    if STEP_FOLDER.fullmatch(checkpoint.name) and checkpoint.name != step_name(step):
        return f"it is the checkpoint of step {step}"
    return None


def same_weights(a: Path, b: Path) -> bool:
    """Whether two folders were written with the same weights, by their manifests; not when one cannot be read."""
    return bool(weights := _weights_of(a)) and weights == _weights_of(b)


def is_final_of(checkpoint: Path, final: Path) -> bool:
    """Whether ``final`` was written with a checkpoint's weights, or with the average that ended at them."""
    return bool(weights := _weights_of(checkpoint)) and weights == _weights_of(final, of_last=True)


def _weights_of(folder: Path, of_last: bool = False) -> dict[str, str]:
    """Weight file -> its hash by the manifest, or of an average the last weights'; nothing when it cannot be read."""
    try:
        entries = read_manifest(folder)
    except (OSError, ValueError):
        return {}
    files = {name: entry for name, entry in entries.items() if name.endswith(".safetensors")}
    return {name: entry.get(LAST_WEIGHTS if of_last else "sha256", entry["sha256"]) for name, entry in files.items()}


def weights_hash(folder: Path) -> str:
    """64 hex digits that a gpt2 folder's weight files have alone, read anew: figures are of these and of no others.

    Raises OSError, or FileNotFoundError when there are none.
    """
    files = sorted(path for path in folder.iterdir() if _WEIGHTS.fullmatch(path.name))
    if not files:
        raise FileNotFoundError(f"{folder} holds no weights")
    return hashlib.sha256(json.dumps([[path.name, sha256(path)] for path in files]).encode()).hexdigest()


def saved_steps(root: Path) -> dict[int, Path]:
    """Step -> folder of the checkpoints under ``root``, in order, whole or not. Raises OSError when it is no folder."""
    found = {int(m[1]): path for path in _named_as_steps(root) if (m := STEP_FOLDER.fullmatch(path.name))}
    return {step: found[step] for step in sorted(found) if found[step].name == step_name(step)}


def step_name(step: int) -> str:
    """The name of a checkpoint's folder."""
    return f"step-{step:08d}"


def newest_whole(
    root: Path, warn: Callable[[str], None] = print, also: Callable[[Path], str | None] = lambda _: None
) -> Path | None:
    """The newest undamaged checkpoint under ``root``; damaged ones are named to ``warn`` and passed over.

    Args:
        also: another look at a whole one, which says what makes it of no use, or None.
    """
    for path in odd_names(root):
        warn(f"{path} is not used: no checkpoint of a run is called so")
    for path in reversed(saved_steps(root).values()):
        if (reason := problem(path)) is not None:
            warn(f"checkpoint {path} is damaged and not used: {reason}")
        elif (reason := also(path)) is not None:
            warn(f"checkpoint {path} is not used: {reason}")
        else:
            return path
    return None


def odd_names(root: Path) -> list[Path]:
    """What is called step-... under ``root``, and not as a run calls it: ``step-0000001000``, ``step-00001000.old``."""
    ours = set(saved_steps(root).values())
    return sorted(path for path in _named_as_steps(root) if path not in ours)


def _named_as_steps(root: Path) -> list[Path]:
    # Not by glob, which finds nothing in a folder that may not be read: a run would begin anew.
    names = os.listdir(root) if os.path.lexists(root) else []
    return [root / name for name in names if name.startswith("step-")]


def final_problem(run: Path, newest: Path | None) -> str | None:
    """Why ``RUN/final`` is not the model that the run has come to, or None when it is.

    Args:
        newest: the run's newest whole checkpoint; None where none was kept. A run that was trained on after its end
            has checkpoints that are newer than ``final``.
    """
    final = run / "final"
    if not final.is_dir():
        return "final is not there"
    if problem := damage(final):
        return f"final is damaged: {problem}"
    if newest is not None and not is_final_of(newest, final):
        return f"final has other weights than {newest.name}"
    return None


def find_model(folder: Path, say: Callable[[str], None] = print) -> Path:
    """The gpt2 folder meant by ``folder``: itself, or of a run the model that it has come to.

    That is ``final``, or the newest whole checkpoint where ``final`` is missing, damaged or older; ``say`` hears which.

    Raises:
        FileNotFoundError: when there is none.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    if (folder / "config.json").is_file():
        return folder
    newest = newest_whole(folder / "checkpoints", say)
    problem = final_problem(folder, newest)
    found = newest if problem else folder / "final"
    if found is None:
        raise FileNotFoundError(f"{folder} holds no model: no config.json, no whole checkpoint, and {problem}")
    say(f"{folder} is a run: taking {found}" + (f", as {problem}" if problem else ""))
    return found


def run_of(path: Path) -> Path | None:
    """The run's folder that ``path`` is, or that the model at ``path`` lies in; None: it is no run's."""
    inside = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    if any((path / name).is_dir() for name in ("checkpoints", "final")):
        return path
    is_model = path.parent.name == "checkpoints" or path.name == "final"
    return inside if is_model and (inside / "metrics.jsonl").is_file() else None


def step_of(folder: Path) -> int | None:
    """After how many steps a run had the model in one of its folders; None where nobody knows."""
    if match := STEP_FOLDER.fullmatch(folder.name):
        return int(match[1])
    run = run_of(folder)
    if run is None or folder.name != "final":
        return None
    kept = saved_steps(run / "checkpoints") if (run / "checkpoints").is_dir() else {}
    if kept:
        return max((step for step, path in kept.items() if is_final_of(path, folder)), default=None)
    steps = [row["step"] for row in read_rows(run / "metrics.jsonl") if isinstance(row.get("step"), int)]
    return max(steps, default=None)


def newest_run(runs: str | Path = "runs") -> Path | None:
    """The checkpoint folder written last under `runs`: a run's `final`, or one of its `checkpoints/step-*`."""
    found = [*Path(runs).glob("*/final"), *Path(runs).glob("*/checkpoints/step-*")]
    # Ours are renamed into place when complete; a folder copied here may not be.
    whole = [
        folder for folder in found if (folder / "config.json").is_file() and any(folder.glob("model*.safetensors"))
    ]
    return max(whole, key=lambda folder: (folder / "config.json").stat().st_mtime, default=None)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All whole rows; a last line cut off by a kill is left out."""
    rows = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError):
            continue
    return rows


def best_step(run: Path, steps: Iterable[int] | None = None) -> int | None:
    """The step with the lowest validation loss by metrics.jsonl; None: there is none.

    Args:
        steps: those to choose from; by default those of which the run has a whole checkpoint.
    """
    saved = saved_steps(run / "checkpoints")
    kept = set(saved if steps is None else steps)
    measured = {}
    for row in read_rows(run / "metrics.jsonl"):
        if not isinstance(row, dict):
            continue  # none that a run writes
        step, loss = row.get("step"), row.get("val_loss_raw", row.get("val_loss"))  # the second of an average
        if isinstance(step, int) and step in kept and isinstance(loss, float) and math.isfinite(loss):
            measured[step] = loss
    from_best = sorted(measured, key=measured.__getitem__)
    return next((step for step in from_best if steps is not None or is_whole(saved[step])), None)


def prune(
    root: Path, keep_last: int, keep_every: int, best: int | None = None, warn: Callable[[str], None] = print
) -> None:
    """Delete the checkpoints that ``surplus`` names; one that cannot be deleted is named to ``warn`` and stays."""
    saved = saved_steps(root)
    for step in surplus(saved, lambda step: is_whole(saved[step]), keep_last, keep_every, best):
        try:
            delete(saved[step])
        except OSError as error:
            warn(f"{saved[step]} is no longer needed and cannot be deleted: {error.strerror}")


def surplus(
    steps: Iterable[int], is_whole: Callable[[int], bool], keep_last: int, keep_every: int, best: int | None
) -> list[int]:
    """The checkpoints that need not be kept, newest first.

    Those are all that are older than the newest ``keep_last`` whole ones, but for multiples of ``keep_every`` (0: none)
    and ``best``. A damaged checkpoint counts for nothing: it must not push out one that a run can go on from.
    """
    n_whole, found = 0, []
    for step in sorted(steps, reverse=True):
        if n_whole < keep_last:
            n_whole += is_whole(step)
        elif step != best and not (keep_every and step % keep_every == 0):
            found.append(step)
    return found


def set_aside(run: Path, later_than: int | None = None) -> Path | None:
    """Move what a start must not mix with its own into a new RUN/before-N, and return that; None: there is nothing.

    Args:
        later_than: only the checkpoints after this step go, and ``final``; metrics.jsonl is copied, as its earlier rows
            belong to both. None: all checkpoints, ``final`` and metrics.jsonl.
    """
    checkpoints, final, rows = run / "checkpoints", run / "final", run / "metrics.jsonl"
    if later_than is None:
        moved = [path for path in (final, rows, checkpoints) if os.path.lexists(path)]
    else:
        moved = [path for step, path in saved_steps(checkpoints).items() if step > later_than]
        moved += [final] if os.path.lexists(final) else []
    if not moved:
        return None
    number = 1
    while os.path.lexists(aside := run / f"before-{number}"):
        number += 1
    aside.mkdir()
    if later_than is not None and rows.is_file():
        shutil.copy2(rows, aside)
    for path in moved:
        place = aside / path.relative_to(run)
        place.parent.mkdir(exist_ok=True)
        shutil.move(path, place)
    to_disk(aside)
    to_disk(run)
    return aside


def remove_leftovers(run: Path) -> None:
    """Delete what a kill left of folders that were being written or deleted."""
    for folder in (run, run / "checkpoints"):
        for path in (*folder.glob(".*.writing"), *folder.glob(".*.deleting")):
            shutil.rmtree(path, ignore_errors=True)


def link_folder(folder: Path, place: Path) -> dict[str, dict[str, Any]]:
    """Make ``place`` the same files under other names, which stay when ``folder`` is deleted; returns the manifest.

    They take no space, or are copies where the file system has no links. Raises OSError or ValueError.
    """
    shutil.rmtree(place, ignore_errors=True)
    manifest = read_manifest(folder)
    for name in (*manifest, MANIFEST):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(folder / name, place / name)
        except FileNotFoundError:
            raise
        except OSError:
            shutil.copy2(folder / name, place / name)
    return manifest


# Stamps of folders that this process wrote or read to the end: at every save, gigabytes would be read again.
_known_whole: set[tuple[Any, ...]] = set()


def _stamp(folder: Path) -> tuple[Any, ...]:
    found = sorted((path, path.stat(follow_symlinks=False)) for path in (folder.absolute(), *folder.rglob("*")))
    return tuple((path, info.st_mode, info.st_size, info.st_mtime_ns) for path, info in found)


def is_whole(checkpoint: Path) -> bool:
    """Whether ``problem`` finds none; what has not changed since it was read is not read again."""
    try:
        stamp = _stamp(checkpoint)
    except OSError:
        return False
    if stamp not in _known_whole and problem(checkpoint) is None:
        _known_whole.add(stamp)
    return stamp in _known_whole


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """File name -> its size and hash. Raises OSError, or ValueError when it is no list of files in the folder."""
    path = folder / MANIFEST
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise ValueError("it is not a file")
    return parse_manifest(path.read_bytes())


def parse_manifest(text: bytes) -> dict[str, dict[str, Any]]:
    """File name -> its size ("bytes") and hash ("sha256"). Raises ValueError when that is not what the text says."""
    try:
        entries = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(entries, dict) or not entries:
        raise ValueError("it lists no files")
    for name, entry in entries.items():
        if not isinstance(entry, dict) or type(entry.get("bytes")) is not int or type(entry.get("sha256")) is not str:
            raise ValueError(f"{name} has no size or no hash")
        if PurePath(name).is_absolute() or ".." in PurePath(name).parts or "\0" in name or not PurePath(name).parts:
            raise ValueError(f"{name!r} leads out of the folder")
    return entries


def _keep_foreign(old: Path, new: Path) -> None:
    """Copy to ``new`` what the folder that it replaces has beside the files that we wrote."""
    try:
        ours = {PurePath(name).parts[0] for name in read_manifest(old)}
    except (OSError, ValueError):
        ours = set()
    for path in old.iterdir():
        if path.name in ours or path.name in (MANIFEST, TRAINER_STATE) or is_stock(path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, new / path.name, symlinks=True, dirs_exist_ok=True)
        elif not os.path.lexists(new / path.name):
            shutil.copy2(path, new / path.name, follow_symlinks=False)


def _unfinished(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.writing")


def _doomed(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.deleting")


def delete(folder: Path) -> None:
    """Delete a model's folder, or what stands in its place."""
    if folder.is_symlink() or not folder.is_dir():
        folder.unlink()
        return
    # Renamed first: a kill in the middle must not leave half a folder under a name that promises a whole one.
    shutil.rmtree(_doomed(folder), ignore_errors=True)
    os.replace(folder, _doomed(folder))
    shutil.rmtree(_doomed(folder))
