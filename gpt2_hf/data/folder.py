"""Where shards lie: all that reads them goes through a `Folder`, so that a remote one can stand in for a disk."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from ..program import UserError

MOST_FILES = 100_000  # without a manifest; a folder of so many files is hardly one of shards


class ShardError(UserError):
    """The data folder is missing, incomplete or damaged."""


class Folder(Protocol):
    """Read access to the files below one place. Names are relative to it, with "/" between their parts."""

    @property
    def location(self) -> str:
        """The folder as it is shown in messages."""

    def sizes(self) -> dict[str, int]:
        """Name -> bytes of every file below, sorted by name; empty if there is no such folder."""

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes [start, stop) of a file, up to its end without `stop`; fewer where the file is shorter."""

    def map(self, name: str, dtype: str) -> np.ndarray:
        """The whole file as a read-only array; the file's size must be a multiple of the dtype's."""

    def fetch_ahead(self, name: str) -> None:
        """`map` will be called for this file soon. Returns at once."""


@dataclass(frozen=True)
class LocalFolder:
    """A folder on disk, or one file in it with what lies beside it under the same name (NAME.index, NAME.metadata)."""

    root: Path
    only: str = ""

    @classmethod
    def open(cls, path: str | Path) -> "LocalFolder":
        path = Path(path)
        if path.name == "manifest.json":
            return cls(path.parent)
        return cls(path.parent, path.name) if path.is_file() else cls(path)

    @property
    def location(self) -> str:
        return str(self.root)

    def sizes(self) -> dict[str, int]:
        found: dict[str, int] = {}
        bounded = not (self.root / "manifest.json").exists()
        todo: list[tuple[str, frozenset]] = [("", frozenset())]  # a folder, and those above it: a link may lead back
        while todo:
            prefix, above = todo.pop()
            try:
                status = os.stat(self.root / prefix)
                entries = os.scandir(self.root / prefix)
            except (FileNotFoundError, NotADirectoryError):
                continue
            except PermissionError:
                if not prefix:
                    raise
                continue
            identity = (status.st_dev, status.st_ino)
            with entries:
                for entry in entries if identity not in above else ():
                    if self.only and entry.name.removesuffix(".index").removesuffix(".metadata") != self.only:
                        continue
                    if entry.is_file():
                        found[prefix + entry.name] = entry.stat().st_size
                    elif entry.is_dir():
                        todo.append((f"{prefix}{entry.name}/", above | {identity}))
            if bounded and len(found) + len(todo) > MOST_FILES:
                raise ShardError(f"{self.root} holds more than {MOST_FILES:,} files: name the folder of shards itself")
        return dict(sorted(found.items()))

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        with open(self.root / name, "rb") as file:
            file.seek(start)
            return file.read(-1 if stop is None else max(stop - start, 0))

    def map(self, name: str, dtype: str) -> np.ndarray:
        # A plain array, not the memmap subclass, whose every slice costs several microseconds.
        path = self.root / name
        return np.asarray(np.memmap(path, dtype, "r")) if path.stat().st_size else np.empty(0, dtype)

    def fetch_ahead(self, name: str) -> None:
        pass
