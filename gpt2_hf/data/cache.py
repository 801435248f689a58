"""A bounded cache of whole files on disk, which the processes of a machine share.

    CACHE/<32 hex digits>.data   a whole file: written under the other name, synced to disk, renamed
    CACHE/<32 hex digits>.part   a file being written, already as long as it will be: so its place is spoken for
    CACHE/.lock                  held for the moment in which files are counted, removed or renamed

Who writes a file holds a lock on its .part; others that want the file wait for that lock and then find the .data. The
kernel drops the locks of a process that dies: a .part without a lock is rubbish.
"""

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ..files import lock, to_disk, unlock


class Cache:
    """Files of at most `max_bytes` together, unfinished ones included; those unused for longest leave first.

    Raises OSError where the folder cannot be written to, or has no locks.
    """

    def __init__(self, folder: Path, max_bytes: int):
        self.folder, self.max_bytes = folder, max_bytes
        folder.mkdir(parents=True, exist_ok=True)
        with self._counting():
            self._make_room(max_bytes)

    def open(self, key: str, size: int) -> BinaryIO | None:
        """The file of that key, of 32 hex digits, if it is there and whole; this counts as a use."""
        path = self._data(key)
        try:
            file = path.open("rb")
        except FileNotFoundError:
            return None
        if os.fstat(file.fileno()).st_size != size:
            file.close()
            path.unlink(missing_ok=True)
            return None
        _touch(file)
        return file

    def fetch(self, key: str, size: int, write: Callable[[BinaryIO], None]) -> BinaryIO:
        """The file, which `write` fills if it is not there: by one process at a time, the others wait for it.

        It comes open, so that nobody can take it away any more; an error of `write` leaves no trace. `size` must not
        exceed `max_bytes`.
        """
        path = self.folder / f"{key}.part"
        while True:
            if file := self.open(key, size):
                return file
            with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0) as part:
                lock(part)
                try:
                    # Whoever had the lock has renamed or removed the .part, or did so before this one was made.
                    if _is_at(part, path) and not self._data(key).exists():
                        self._reserve(part, size)
                        write(part)
                        return self._keep(part, key)
                finally:
                    _discard(part, path)

    def _data(self, key: str) -> Path:
        return self.folder / f"{key}.data"

    def _reserve(self, part: BinaryIO, size: int) -> None:
        """Give a .part its length once there is room."""
        part.truncate(0)  # what a killed process left behind
        while True:
            with self._counting():
                if self._make_room(self.max_bytes - size):
                    part.truncate(size)
                    return
            time.sleep(0.1)  # the rest is being written by others: it can be removed when they are through

    def _keep(self, part: BinaryIO, key: str) -> BinaryIO:
        """Make a .part one of the cache's files."""
        to_disk(part)
        _touch(part)
        with self._counting():  # a folder that is read while a name changes may show the file never or twice
            os.rename(self.folder / f"{key}.part", self._data(key))
            file = self._data(key).open("rb")
        to_disk(self.folder)
        return file

    @contextmanager
    def _counting(self) -> Iterator[None]:
        with (self.folder / ".lock").open("ab") as file:
            lock(file)
            try:
                yield
            finally:
                unlock(file)

    def _make_room(self, limit: int) -> bool:
        """Remove the files unused for longest until the rest is within the limit; whether that was possible."""
        total, removable = 0, []
        for path in list(self.folder.iterdir()):
            if not re.fullmatch(r"[0-9a-f]{32}\.(data|part)", path.name):
                continue
            try:
                if path.suffix == ".part" and _remove_if_left(path):
                    continue
                stat = path.stat()
            except FileNotFoundError:
                continue
            total += stat.st_size
            if path.suffix == ".data":
                removable.append((stat.st_mtime_ns, stat.st_size, path))
        for _, size, path in sorted(removable):
            if total <= limit:
                break
            path.unlink(missing_ok=True)
            total -= size
        return total <= limit


def _remove_if_left(part: Path) -> bool:
    """Remove a .part whose process is gone."""
    with part.open("r+b") as file:
        if not lock(file, wait=False):
            return False
        _discard(file, part)
        return True


def _discard(part: BinaryIO, path: Path) -> None:
    """Let go of a .part, and remove it unless it was renamed."""
    if _is_at(part, path):
        path.unlink()
    unlock(part)


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _touch(file: BinaryIO) -> None:
    # Times of access are not kept on many disks, and the kernel's own "now" is too coarse to order files by.
    now = time.time_ns()
    os.utime(file.fileno(), ns=(now, now))
