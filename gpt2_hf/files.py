"""Files that are whole or absent, on the disk when they are said to be; locks that die with their process."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO

# The part of a URL before its host, and the parts of its query that open doors.
_USER = re.compile(r"(://)[^/\s\"'?#]*@")
_KEY = re.compile(
    r"([?&][^=&\s\"']*(?:token|key|secret|passw|signature|credential|auth)[^=&\s\"']*=)[^&\s\"'#]+", re.IGNORECASE
)


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes its name when it is complete and on the disk; an error leaves no trace."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.writing")
    try:
        with temporary.open("wb") as file:
            yield file
            to_disk(file)
        os.replace(temporary, path)
        to_disk(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def to_disk(file: IO[Any] | Path) -> None:
    """Make an open file, a closed one, or the names in a folder, outlast a loss of power."""
    if isinstance(file, Path):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    else:
        file.flush()
        os.fsync(file.fileno())


def lock(file: IO[Any], wait: bool = True) -> bool:
    """Make an open file this process's own until `unlock`, or until the process ends in whatever way.

    Returns:
        False when another has it and `wait` is False.

    Raises:
        OSError: where the system, or the file's file system, has no locks.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        raise OSError(errno.ENOTSUP, "this system has no file locks") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def unlock(file: IO[Any], close: bool = True) -> None:
    """Let go of a locked file: closing alone is not enough where a forked child holds it too."""
    import fcntl

    if not file.closed:
        fcntl.flock(file, fcntl.LOCK_UN)
        if close:
            file.close()


def lock_folder(folder: Path) -> IO[str]:
    """Make a folder this process's own until the returned file, FOLDER/.lock, is closed, or the process ends.

    The file names the process. Where there are no locks, say so and go on.

    Raises:
        BlockingIOError: when another process has the folder; its text is that process.
    """
    file = (folder / ".lock").open("a+")
    try:
        is_ours = lock(file, wait=False)
    except OSError as error:
        print(f"{folder} cannot be locked ({error.strerror}): take care that only one process writes there")
        is_ours = True
    if not is_ours:
        file.seek(0)
        holder = file.read(200).strip() or "another process"
        file.close()
        raise BlockingIOError(holder)
    file.truncate(0)
    with suppress(OSError):  # on a full disk the lock holds all the same
        os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
    return file


def mask(text: str) -> str:
    """``text`` without the passwords and keys of its URLs."""
    return _KEY.sub(r"\1***", _USER.sub(r"\1***@", text))


def sha256(path: Path) -> str:
    """The hash of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
