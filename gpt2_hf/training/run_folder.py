"""A run's folder while one start of the run has it: its lock, its records, and what is left when the start ends early.

RUN/.lock              held by the process that writes here, with its number
    config.yaml        the resolved recipe of the last start
    environment.json   what its figures must be read with: versions, code, data and machine
    starts.jsonl       both, one row for each start
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import IO, Any, BinaryIO, Self

import yaml

from .. import runs
from ..config import RunConfig, flat
from ..files import lock_folder, mask, whole_file
from ..knobs import ConfigError
from ..program import UserError
from .distributed import Host

# Settings of which no change shows: where one start begins, and the shape, which is the checkpoint's own however it is
# written (a preset, or each number).
NOT_CHANGES = ("resume.", "model.preset", "model.n_", "model.vocab_size")

RECORDS = (*runs.RECORDS, "mirror.log", "publish.log", "published.jsonl", ".lock")
RETRY_S = 10.0  # between two tries to write records on a full disk


class FolderGone(UserError):
    """The run's folder was deleted, renamed or replaced: what is written there now is lost, or goes elsewhere."""


class RunFolder:
    """The folder ``path`` as this start's own, from entering to leaving; only the first rank touches it.

    ``step`` and ``newest`` follow the run, so that whoever stops it hears what the next start goes on from. A folder
    that this start made and in which nothing was measured is removed again when it ends with an error. Records that
    a full disk does not take are written when it does; training goes on meanwhile.

    Raises:
        ConfigError: on entering, on all ranks, when another process has the folder, or none can.
    """

    def __init__(self, path: Path, host: Host):
        self.path = path
        self.step: int | None = None  # None until training begins
        self.newest: Path | None = None  # the newest checkpoint that is known to be good
        self.is_finished = False
        self._host = host
        self._made: list[Path] = []
        self._lock: IO[str] | None = None
        self._records: dict[str, bytes] = {}  # of this start, by file name
        self._unwritten: dict[str, bytes] = {}  # those that the disk has not taken yet
        self._next_try = 0.0
        self.rows: RowFile | None = None  # metrics.jsonl, once it is open

    def __enter__(self) -> Self:
        self._host.first(self._take)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if self._lock is not None:
            if error is not None:
                self._remove_unused()
            self._lock.close()
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(f"stopped{self.way_on()}") from None

    def _take(self) -> None:
        missing = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = lock_folder(self.path)
        except BlockingIOError as holder:
            raise ConfigError(
                f"{self.path} is being written by {holder}, perhaps one whose launcher was stopped; end that one, or "
                f"choose another --train.run_dir"
            ) from None
        except OSError as error:
            raise ConfigError(f"train.run_dir {self.path} cannot be used: {error.strerror}; choose another") from None
        finally:
            self._made = [folder for folder in missing if folder.is_dir()]
        self._identity, self._place = self.path.stat(), self.path.absolute()
        runs.remove_leftovers(self.path)

    def _remove_unused(self) -> None:
        rows = self.path / "metrics.jsonl"
        has_measured = self.checkpoints.exists() or (rows.exists() and rows.stat().st_size)
        if not self._made or not self._is_here() or has_measured:
            return
        for name in RECORDS:
            (self.path / name).unlink(missing_ok=True)
        for folder in self._made:
            with suppress(OSError):  # where others put something, it stays
                folder.rmdir()

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def final(self) -> Path:
        return self.path / "final"

    def already_finished(self) -> str:
        """What to say when there is nothing left to train."""
        return (
            f"{self.path} is finished, its model is in {self.final}. To start over, delete {self.path} or choose "
            f"another --train.run_dir; to train longer, raise --train.steps (from a checkpoint, if one was kept)."
        )

    def last_words(self) -> str:
        """What to say when the process is told to end."""
        below_the_bar = "" if self.step is None else "\n"
        return f"{below_the_bar}terminated{self.way_on()}"

    def way_on(self) -> str:
        """What there is for the next start, as the end of a sentence."""
        if self.is_finished:
            return f"; the run is finished, its model is in {self.path / 'final'}"
        if self.step is None:
            return " before training began"
        if self.newest is None:
            return f" at step {self.step}; nothing was saved yet, so the next start begins at step 0"
        return f" at step {self.step}; the next start goes on from {self.newest}"

    def has_saved(self, step: int) -> bool:
        """Whether nothing was done up to ``step`` that a checkpoint lacks."""
        return step == 0 if self.newest is None else self.newest.name == f"step-{step:08d}"

    def is_gone(self) -> bool:
        """Whether the folder was taken away; if not, what a full disk has not taken so far is written.

        Only the first rank looks. ``move_elsewhere`` then gives a place for what must not be lost.
        """
        if self._lock is None:
            return False
        if not self._is_here():
            return True
        if self._unwritten and time.monotonic() > self._next_try:
            self._write_records()
        return False

    def move_elsewhere(self) -> None:
        """Go on in a new folder beside the one that was taken away. Every rank must call it.

        That is RUN-rescued (or -rescued-2, ...), with the records and rows of this start; from now on ``path``,
        ``checkpoints`` and ``final`` are there. A later start goes on from it by ``--train.run_dir RUN-rescued``.
        """
        self._taken_away = self.path
        self.path, self.newest = self._host.first(self._make_elsewhere), None

    def what_was_saved_elsewhere(self) -> str:
        """After ``move_elsewhere``: what happened, and how to go on."""
        where = (
            f"nothing could be saved in {self.path}" if self.newest is None else f"the state is saved in {self.newest}"
        )
        return (
            f"{self._taken_away} was deleted, renamed or replaced at step {self.step} of its run; {where}: "
            f"go on from there with --train.run_dir {self.path}"
        )

    def _make_elsewhere(self) -> Path:
        for number in count(1):
            folder = self._place.with_name(f"{self._place.name}-rescued{f'-{number}' if number > 1 else ''}")
            try:
                folder.mkdir(parents=True)
                break
            except FileExistsError:
                continue
        lock, self._lock = self._lock, lock_folder(folder)
        if lock is not None:
            lock.close()
        self.path, self._place, self._identity = folder, folder, folder.stat()  # this rank's: what follows writes there
        self._unwritten = dict(self._records)
        if self.rows is not None:
            self._unwritten["metrics.jsonl"] = self.rows.content()
        self._write_records()
        return folder

    def _is_here(self) -> bool:
        try:
            return os.path.samestat(self._identity, self.path.stat())
        except OSError as error:
            # Another one may pass: looked at again after the next step.
            return error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)

    def record(self, config: str, environment: dict[str, Any], start_step: int) -> None:
        """Write down how this start was asked for; print what a resumed run's last start had otherwise.

        Passwords and keys in URLs are left out. A disk that does not take it is warned of, once.
        """
        if self._lock is None:
            return
        config, environment = mask(config), json.loads(mask(json.dumps(environment)))
        if start_step:
            for line in changes(self.path / "config.yaml", config):
                print(line)
        when = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        row = {"time": when, "step": start_step, **environment, "config": yaml.safe_load(config)}
        starts = self.path / "starts.jsonl"
        before = starts.read_bytes() if starts.is_file() else b""
        before += b"\n" if before and not before.endswith(b"\n") else b""  # a kill has cut the last one off
        self._records = {
            "config.yaml": config.encode(),
            "environment.json": json.dumps(environment, indent=1).encode(),
            "starts.jsonl": before + json.dumps(row).encode() + b"\n",
        }
        self._unwritten = dict(self._records)
        self._write_records()

    def _write_records(self) -> None:
        for name, content in list(self._unwritten.items()):
            try:
                with whole_file(self.path / name) as file:
                    file.write(content)
            except OSError as error:
                if not self._next_try:
                    print(f"{self.path / name} cannot be written ({error.strerror}): it is tried again on the way")
                self._next_try = time.monotonic() + RETRY_S
                return
            del self._unwritten[name]


class RowFile:
    """The rows of metrics.jsonl. What a full disk does not take is kept, and written before the next row when it does.

    Args:
        path: the file, which is replaced.
        rows: what it begins with.
        say: hears when writing begins to fail, and when it works again.
    """

    def __init__(self, path: Path, rows: Iterable[dict[str, Any]] = (), say: Callable[[str], None] = print):
        self._path, self._say = path, say
        self._file: BinaryIO | None = None
        self._is_failing = False
        self._waiting = [json.dumps(row) + "\n" for row in rows]
        self._flush()

    def replace(self, rows: Iterable[dict[str, Any]]) -> None:
        """Begin anew, with these rows."""
        if self._file is not None:
            self._file.close()
        self._file, self._waiting = None, [json.dumps(row) + "\n" for row in rows]
        self._flush()

    def write(self, row: dict[str, Any]) -> None:
        self._waiting.append(json.dumps(row) + "\n")
        self._flush()

    def content(self) -> bytes:
        """All rows, also when the file has lost its name or its folder."""
        written = b""
        if self._file is not None:
            self._file.seek(0)
            written = self._file.read()
        return written + "".join(self._waiting).encode()

    def close(self) -> None:
        if self._waiting:
            self._flush()
        if self._waiting:
            self._say(f"the last {len(self._waiting)} rows of {self._path} could not be written and are lost")
        if self._file is not None:
            self._file.close()

    def _flush(self) -> None:
        content = "".join(self._waiting).encode()
        try:
            if self._file is None:
                with whole_file(self._path) as file:
                    file.write(content)
                self._file = self._path.open("rb+", buffering=0)  # a raw file: no row waits in it
            else:
                self._append(content)
        except OSError as error:
            if not self._is_failing:
                self._say(f"{self._path} cannot be written ({error.strerror}): its rows are kept until it can")
            self._is_failing = True
            return
        if self._is_failing:
            self._say(f"{self._path} is written again, and lacks no row")
        self._is_failing = False
        self._waiting.clear()

    def _append(self, content: bytes) -> None:
        assert self._file is not None
        end, left = self._file.seek(0, os.SEEK_END), memoryview(content)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError:
            with suppress(OSError):
                self._file.truncate(end)  # half a row
            raise


def changes(recorded: Path, config: str) -> list[str]:
    """A line for each setting that differs from the file that the last start left."""
    try:
        old = flat(recorded.read_text())
    except FileNotFoundError:
        return []
    except (OSError, ValueError, AttributeError, yaml.YAMLError):
        return [f"{recorded} cannot be read: what has changed since the last start is not shown"]
    old, new = flat(RunConfig().to_yaml()) | old, flat(config)  # what an older version did not know, it had by default
    names = [name for name in new if old[name] != new[name] and not name.startswith(NOT_CHANGES)]
    return [f"changed since the last start: {name} was {old[name]}, now {new[name]}" for name in names]
