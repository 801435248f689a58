"""A run's copy in object storage: how it gets there, and how a fresh machine gets it back.

URL/checkpoints/step-00001000/...   as in the run's folder; manifest.json is written last and removed first, so that
                                    what has one is whole
    final/...
    metrics.jsonl, config.yaml, ... as they were when the newest checkpoint was copied
    before-1/                       what was there when a start began at an earlier step than it had
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import runs
from ..data.storage import Retry, Storage
from ..files import sha256, whole_file

logger = logging.getLogger(__name__)

LINKS = ".mirror.writing"  # in the run's folder, while one is copied; a name that the next start clears away

SAY_EVERY_S = 5.0
AT_START = Retry(give_up=120.0)


@dataclass(frozen=True)
class Keep:
    """Which checkpoints stay there: as in `CheckpointSection`."""

    keep_last: int
    keep_every: int
    keep_best: bool


class Copy:
    """A run's copy in a storage, as the process sees it that makes it.

    Args:
        keep: deletes checkpoints there that need not be kept; None deletes none.
        start_step: of the start that is followed: what is there of later steps is of another course of the run, and is
            moved aside. None leaves everything where it is.
    """

    def __init__(self, run: Path, storage: Storage, keep: Keep | None = None, start_step: int | None = None):
        self.run, self.storage, self.keep = run, storage, keep
        self.names = set(storage.find())
        self._manifests: dict[str, bytes | None] = {}  # of folders there, by name, as far as looked at
        self._written: set[tuple[str, str]] = set()  # files and their hashes: a second try begins where one failed
        self._damaged: set[tuple[str, bytes]] = set()
        self._all_there: list[Any] = []
        self._rewound_at = _mtime(run / runs.REWIND)
        if start_step is not None:
            self._set_aside(start_step)

    def left(self) -> list[str]:
        """Folders of the run that are whole and not there, in the order in which they are copied."""
        if (rewound_at := _mtime(self.run / runs.REWIND)) != self._rewound_at:
            # What came after that step led to where the run could not go on.
            with suppress(OSError, ValueError, LookupError, TypeError):
                self._set_aside(int(json.loads((self.run / runs.REWIND).read_text())["step"]))
            self._rewound_at, self._all_there = rewound_at, []
        saved = runs.saved_steps(self.run / "checkpoints")
        seen = [(folder, _mtime(folder / runs.MANIFEST)) for folder in (*saved.values(), self.run / "final")]
        if seen == self._all_there:
            return []  # without a look at what is there and what is best: this is asked every other second
        not_kept = set(self._surplus({*saved, *steps_there(self.names)}))
        checkpoints = [saved[step] for step in sorted(saved, reverse=True) if step not in not_kept]
        final = [self.run / "final"] if (self.run / "final").is_dir() else []
        folders = [*checkpoints[:1], *final, *checkpoints[1:]]
        found = [folder.relative_to(self.run).as_posix() for folder in folders if self._is_new(folder)]
        self._all_there = [] if found else seen
        return found

    def there(self) -> list[str]:
        """Folders that are known to be there."""
        return [name for name, manifest in self._manifests.items() if manifest is not None]

    def add(self, name: str) -> None:
        """Copy one folder, and delete what is surplus there. Raises OSError or ShardError."""
        links = self.run / LINKS
        try:
            manifest = runs.link_folder(self.run / name, links)
        except FileNotFoundError:
            return  # no longer kept
        logger.info("copying %s, %.3g MB", name, sum(entry["bytes"] for entry in manifest.values()) / 1e6)
        self._remove([f"{name}/{runs.MANIFEST}"])
        for file, entry in manifest.items():
            self._write(f"{name}/{file}", links / file, entry["sha256"])
        for record in runs.RECORDS:
            if (self.run / record).is_file():
                self._write(record, self.run / record, None)
        self._write(f"{name}/{runs.MANIFEST}", links / runs.MANIFEST, None)
        self._manifests[name] = (links / runs.MANIFEST).read_bytes()
        shutil.rmtree(links, ignore_errors=True)
        logger.info("copied %s", name)
        self._prune()

    def _is_new(self, folder: Path) -> bool:
        name = folder.relative_to(self.run).as_posix()
        try:
            manifest = (folder / runs.MANIFEST).read_bytes()
        except OSError:
            return False
        if manifest == self._manifest(name) or (name, manifest) in self._damaged:
            return False
        if reason := runs.damage(folder) if name == "final" else runs.problem(folder):
            logger.warning("%s is damaged and not copied: %s", name, reason)
            self._damaged.add((name, manifest))
        return reason is None

    def _manifest(self, name: str) -> bytes | None:
        if name not in self._manifests:
            path = f"{name}/{runs.MANIFEST}"
            self._manifests[name] = self.storage.read_file(path) if path in self.names else None
        return self._manifests[name]

    def _write(self, name: str, file: Path, content_hash: str | None) -> None:
        if content_hash is None or (name, content_hash) not in self._written:
            self.storage.write(name, file)
            self.names.add(name)
        if content_hash is not None:
            self._written.add((name, content_hash))

    def _remove(self, names: list[str]) -> None:
        for name in names:
            if name in self.names:
                self.storage.remove(name)
                self.names.discard(name)
            self._written = {(other, mark) for other, mark in self._written if other != name}

    def _below(self, folder: str) -> list[str]:
        """Files in a folder there, its manifest first."""
        found = [name for name in self.names if name.startswith(f"{folder}/")]
        return sorted(found, key=lambda name: (name != f"{folder}/{runs.MANIFEST}", name))

    def _surplus(self, steps: Iterable[int]) -> list[int]:
        if self.keep is None:
            return []
        steps = set(steps)
        best = runs.best_step(self.run, steps) if self.keep.keep_best else None
        return runs.surplus(steps, lambda _: True, self.keep.keep_last, self.keep.keep_every, best)

    def _prune(self) -> None:
        if self.keep is None:
            return
        whole = steps_there(self.names)
        folders = {name.rpartition("/")[0].split("/")[1] for name in self.names if name.startswith("checkpoints/step-")}
        broken_off = folders - {runs.step_name(step) for step in whole}  # by a kill: all are copied that are here
        for folder in [*map(runs.step_name, self._surplus(whole)), *sorted(broken_off)]:
            logger.info("deleting %s", folder)
            self._remove(self._below(f"checkpoints/{folder}"))
            self._manifests.pop(f"checkpoints/{folder}", None)

    def _set_aside(self, start_step: int) -> None:
        later = [f"checkpoints/{runs.step_name(step)}" for step in steps_there(self.names) if step > start_step]
        stale = [*later, "final"] if later or not start_step else []
        stale = [folder for folder in stale if self._below(folder)]
        if not stale:
            return
        number = 1
        while any(name.startswith(f"before-{number}/") for name in self.names):
            number += 1
        logger.warning("moving what is later than step %d to before-%d: %s", start_step, number, ", ".join(stale))
        for folder in stale:
            files = self._below(folder)
            for name in reversed(files):  # the manifest last
                self.storage.copy(name, f"before-{number}/{name}")
                self.names.add(f"before-{number}/{name}")
            self._remove(files)
            self._manifests.pop(folder, None)
        if "metrics.jsonl" in self.names:
            self.storage.copy("metrics.jsonl", f"before-{number}/metrics.jsonl")


def _mtime(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


def steps_there(names: set[str]) -> list[int]:
    """Steps of the checkpoints that are whole by the names of a storage's files, the newest first."""
    parts = [name.split("/") for name in names]
    folders = [p[1] for p in parts if len(p) == 3 and p[0] == "checkpoints" and p[2] == runs.MANIFEST]
    steps = [int(match[1]) for folder in folders if (match := runs.STEP_FOLDER.fullmatch(folder))]
    return sorted((step for step in steps if runs.step_name(step) in folders), reverse=True)


# A start on a fresh machine


def read_record(url: str, name: str) -> bytes | None:
    """A record in a run's mirror; None where it has none. Raises ShardError or ImportError, in one line."""
    storage = Storage.open(url, AT_START)
    return storage.read_file(name) if name in storage.find() else None


def fetch_newest(
    run: Path, url: str, accept: Callable[[dict[str, Any], str], None], only: int | None = None
) -> Path | None:
    """Bring the newest whole checkpoint from a run's mirror; where there is none, ``final``; None: there is neither.

    With it come the records that the run has not. Damaged ones are named and passed over.

    Args:
        accept: called with the ``state.json`` of a checkpoint and its URL before the rest of it is fetched; raises what
            speaks against it.
        only: this step, and no other.

    Raises:
        ShardError, ImportError: in one line, when the storage cannot be asked.
    """
    storage = Storage.open(url, AT_START)
    names = storage.find()
    steps = [step for step in steps_there(set(names)) if only in (None, step)]
    folders = [f"checkpoints/{runs.step_name(step)}" for step in steps]
    folders += ["final"] if not steps and only is None and f"final/{runs.MANIFEST}" in names else []
    for folder in folders:
        where = f"{storage.location}/{folder}"
        try:
            manifest = _parsed(runs.parse_manifest, storage.read_file(f"{folder}/{runs.MANIFEST}"))
            for name, entry in manifest.items():
                found = names.get(f"{folder}/{name}")
                if found is None:
                    raise _Damaged(f"{name} is missing")
                if found.size not in (None, entry["bytes"]):
                    raise _Damaged(f"{name} has {found.size} bytes instead of {entry['bytes']}")
            if folder != "final":
                if runs.STATE not in manifest:
                    raise _Damaged(f"{runs.STATE} is missing")
                state = _parsed(json.loads, storage.read_file(f"{folder}/{runs.STATE}"))
                if not isinstance(step := state.get("step"), int) or not folder.endswith(runs.step_name(step)):
                    raise _Damaged(f"it says that it is the checkpoint of step {step}")
                accept(state, where)
            _fetch(storage, folder, manifest, run / folder)
            for record in runs.RECORDS:
                if record in names and not (run / record).exists():
                    content = storage.read_file(record)
                    with whole_file(run / record) as file:
                        file.write(content)
            return run / folder
        except _Damaged as error:
            print(f"{where} is damaged and not used: {error}", flush=True)
    return None


class _Damaged(Exception):
    pass


def _parsed(parse: Callable[[bytes], dict[str, Any]], text: bytes) -> dict[str, Any]:
    try:
        if isinstance(found := parse(text), dict):
            return found
    except (ValueError, RecursionError) as error:
        raise _Damaged(str(error)) from None
    raise _Damaged(f"{found!r:.60} stands for what it says of itself")


def _fetch(storage: Storage, folder: str, manifest: dict[str, dict[str, Any]], place: Path) -> None:
    total, done, next_line = sum(entry["bytes"] for entry in manifest.values()), 0, time.monotonic() + SAY_EVERY_S
    print(f"fetching {storage.location}/{folder}, {total / 1e6:.3g} MB", flush=True)

    def write(temporary: Path) -> None:
        nonlocal done, next_line
        for name, entry in manifest.items():
            path = temporary / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                for piece in storage.read(f"{folder}/{name}", 0, entry["bytes"]):
                    file.write(piece)
                    done += len(piece)
                    if time.monotonic() > next_line:
                        print(f"fetched {done / max(total, 1):.0%} of {folder}", flush=True)
                        next_line = time.monotonic() + SAY_EVERY_S
            if sha256(path) != entry["sha256"]:
                raise _Damaged(f"{name} is not what its {runs.MANIFEST} says")

    runs.write_folder(place, write)
