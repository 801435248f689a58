"""A run's folder while one start of the run has it: its lock, its records, and what is left when the start ends early.

RUN/.lock              held by the process that writes here, with its number
    config.yaml        the resolved recipe of the last start
    environment.json   what its figures must be read with: versions, code, data and machine
    starts.jsonl       both, one row for each start
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Self, TypeVar

import yaml
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from .. import runs
from ..files import lock_folder
from ..knobs import ConfigError
from ..program import UserError

T = TypeVar("T")

RECORDS = ("config.yaml", "environment.json", "starts.jsonl", "metrics.jsonl", ".metrics.jsonl.writing", ".lock")

# The part of a URL before its host, and the parts of its query that open doors.
_USER = re.compile(r"(://)[^/\s\"'?#]*@")
_KEY = re.compile(
    r"([?&][^=&\s\"']*(?:token|key|secret|passw|signature|credential|auth)[^=&\s\"']*=)[^&\s\"'#]+", re.IGNORECASE
)


class RunFolder:
    """The folder ``path`` as this start's own, from entering to leaving; only the first rank touches it.

    ``step`` and ``newest`` follow the run, so that whoever stops it hears what the next start goes on from. A folder
    that this start made and in which nothing was measured is removed again when it ends with an error.

    Raises:
        ConfigError: on entering, on all ranks, when another process has the folder, or none can.
    """

    def __init__(self, path: Path, state: PartialState):
        self.path = path
        self.step: int | None = None  # None until training begins
        self.newest: Path | None = None  # the newest checkpoint that is known to be good
        self.is_finished = False
        self._state = state
        self._made: list[Path] = []
        self._lock: IO[str] | None = None

    def __enter__(self) -> Self:
        agree(self._state, self._take)
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
        self._identity = self.path.stat()
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

    def check(self) -> None:
        """Raise UserError when the folder was taken away: what is written then would be lost, or go elsewhere."""
        if self._lock is not None and not self._is_here():
            raise UserError(
                f"{self.path} was deleted, renamed or replaced at step {self.step} of its run; if it was renamed, "
                f"rename it back, and start again: the run goes on from its newest checkpoint"
            )

    def _is_here(self) -> bool:
        try:
            return os.path.samestat(self._identity, self.path.stat())
        except FileNotFoundError:
            return False

    def record(self, config: str, environment: dict[str, Any], start_step: int) -> None:
        """Write down how this start was asked for; print what a resumed run's last start had otherwise.

        Passwords and keys in URLs are left out.
        """
        if self._lock is None:
            return
        config, environment = mask(config), json.loads(mask(json.dumps(environment)))
        if start_step:
            for line in changes(self.path / "config.yaml", config):
                print(line)
        (self.path / "config.yaml").write_text(config)
        (self.path / "environment.json").write_text(json.dumps(environment, indent=1))
        when = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        row = {"time": when, "step": start_step, **environment, "config": yaml.safe_load(config)}
        with (self.path / "starts.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")


def agree(state: PartialState, find: Callable[[], T]) -> T:
    """What ``find()`` returns on the first rank, for all ranks; a UserError that it raises there is raised on all."""
    answer: list[Any] = [None]
    if state.is_main_process:
        try:
            answer = [find()]
        except UserError as error:
            answer = [error]
    broadcast_object_list(answer)
    if isinstance(answer[0], UserError):
        raise answer[0]
    return answer[0]


def mask(text: str) -> str:
    """``text`` without the passwords and keys of its URLs."""
    return _KEY.sub(r"\1***", _USER.sub(r"\1***@", text))


def flat(text: str) -> dict[str, Any]:
    """A recipe's text as dotted names and values."""
    sections = yaml.safe_load(text)
    return {f"{section}.{key}": value for section, keys in sections.items() for key, value in keys.items()}


def changes(recorded: Path, config: str) -> list[str]:
    """A line for each setting that differs from the file that the last start left."""
    try:
        old = flat(recorded.read_text())
    except FileNotFoundError:
        return []
    except (OSError, ValueError, AttributeError, yaml.YAMLError):
        return [f"{recorded} cannot be read: what has changed since the last start is not shown"]
    new = flat(config)
    names = [name for name in new if old.get(name) != new[name]]
    return [f"changed since the last start: {name} was {old.get(name)}, now {new[name]}" for name in names]
