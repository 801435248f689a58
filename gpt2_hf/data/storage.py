"""Object storage behind any URL that fsspec knows: asked again while it is down, and failing in one line."""

import errno
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit

from ..files import mask
from .folder import ShardError

logger = logging.getLogger(__name__)
T = TypeVar("T")

CHUNK_BYTES = 8 << 20  # bytes of one request
SLOW = 1e6  # bytes per second
# What a storage tells of a file's content, the best first: its own hash, else when it was written.
MARKS = ("ETag", "etag", "md5Hash", "blob_id", "mtime", "LastModified", "last_modified", "updated", "created")
# Words in the names of errors that no waiting mends: NoCredentialsError, ProfileNotFound, OfflineModeIsEnabled, ...
ASKS_THE_USER = ("Credential", "Token", "Profile", "Config", "Validation", "Region", "Offline")


@dataclass(frozen=True)
class Retry:
    """How long to wait for a storage that does not answer, in seconds."""

    timeout: float = 60.0  # a request that takes longer (at most 8 MiB) counts as stalled
    first_wait: float = 1.0  # the wait before the next try doubles, up to longest_wait, and is shortened at random
    longest_wait: float = 60.0
    give_up: float = 3600.0  # without any progress


@dataclass(frozen=True)
class StoredFile:
    """What the storage tells of a file."""

    size: int | None  # bytes; None in the lists of web servers
    marks: dict[str, str]  # of its content, the best first

    @classmethod
    def of(cls, info: dict) -> Self:
        return cls(info.get("size"), {key: _text(info[key]) for key in MARKS if info.get(key)})

    def differs(self, other: "StoredFile") -> bool:
        """Whether the two have other content, as far as their marks tell."""
        common = next((key for key in self.marks if key in other.marks), None)
        return self.size != other.size or (common is not None and self.marks[common] != other.marks[common])


@dataclass(frozen=True)
class Storage:
    """The files below a URL. Their names are relative to it.

    Storage that is down, slow or stalled is waited for, with one line in the log (stderr) a wait, until
    `retry.give_up` seconds have passed without progress. Everything else raises ShardError, in one line.
    """

    location: str  # the URL as it is shown in messages
    fs: Any
    root: str  # as the file system names it
    retry: Retry

    @classmethod
    def open(cls, url: str, retry: Retry) -> Self:
        """Raises ShardError or ImportError, in one line, for a URL that fsspec or its packages do not know."""
        import fsspec

        location = mask(url if url.endswith("://") else url.rstrip("/"))
        protocol = urlsplit(url).scheme
        # An object of our own, without a cache of listings, so that a new folder sees what is there now.
        options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
        if is_s3 := protocol in ("s3", "s3a"):
            # Its silent retries, nested in botocore's, would hide for minutes what is to be reported here.
            given = fsspec.config.conf.get(protocol, {}).get("config_kwargs", {})
            ours = {"retries": {"total_max_attempts": 1}, "read_timeout": 2 * retry.timeout}
            options["config_kwargs"] = {**ours, **given}
        if protocol in ("", "file", "local"):
            options["auto_mkdir"] = True
        try:
            fs, root = fsspec.url_to_fs(url, **options)
        except ImportError as error:
            missing = getattr(error.__cause__, "name", None) or getattr(error, "name", None) or protocol
            raise ImportError(
                f"{location}: {protocol}:// needs the package {missing}: pip install {missing.partition('.')[0]}"
            ) from error
        except Exception as error:
            raise ShardError(f"{location}: {_reason(error, retry.timeout)}: {_advice(location)}") from error
        if is_s3:
            fs.retries = 1
            fs.max_concurrency = 2  # parts of 50 MB and more that an upload holds in memory
        return cls(location, fs, root.rstrip("/"), retry)

    def parent(self) -> tuple["Storage", str]:
        """The folder above, and the name of this one in it."""
        root, _, name = self.root.rpartition("/")
        return replace(self, location=self.location.rpartition("/")[0], root=root), name

    def list(self) -> dict[str, StoredFile]:
        """Name -> file, of every file below; the name is empty where the URL is that of a file."""
        if not (files := self.find()):
            raise ShardError(f"{self.location}: there are no files below it: {_advice(self.location)}")
        return files

    def find(self) -> dict[str, StoredFile]:
        """The same, also where there is none."""
        found = self._persist(self.location, partial(self.fs.find, self.root, detail=True))
        below = f"{self.root}/"
        return {
            "" if path == self.root else path.removeprefix(below): StoredFile.of(info)
            for path, info in found.items()
            if info.get("type", "file") == "file" and (path == self.root or path.startswith(below))
        }

    def look(self, name: str) -> StoredFile:
        """What is told of one file now."""
        path = f"{self.root}/{name}"

        def ask() -> dict:
            self.fs.invalidate_cache(path)  # some keep lists even if asked not to
            return self.fs.info(path)

        return StoredFile.of(self._persist(f"{self.location}/{name}", ask))

    def read(self, name: str, start: int, stop: int) -> Iterator[bytes]:
        """The bytes from `start` to `stop`, in pieces."""
        path = f"{self.root}/{name}"
        for first in range(start, stop, CHUNK_BYTES):
            ask = partial(self._read_piece, path, first, min(first + CHUNK_BYTES, stop))
            yield self._persist(f"{self.location}/{name}", ask)

    def read_file(self, name: str) -> bytes:
        """All of a small file, as long as it is now."""
        return self._persist(f"{self.location}/{name}", partial(self.fs.cat_file, f"{self.root}/{name}"))

    def write(self, name: str, file: Path) -> None:
        """Put a local file there. A file system that takes no more than SLOW bytes a second is given more time."""
        put = partial(self.fs.put_file, str(file), f"{self.root}/{name}")
        self._persist(f"{self.location}/{name}", put, self.retry.timeout + file.stat().st_size / SLOW, longer=2.0)

    def copy(self, name: str, other: str) -> None:
        """Make another file of the same content there, by the storage itself where it can."""
        copy = partial(self.fs.cp_file, f"{self.root}/{name}", f"{self.root}/{other}")
        size = self.look(name).size or 0
        self._persist(f"{self.location}/{other}", copy, self.retry.timeout + size / SLOW, longer=2.0)

    def remove(self, name: str) -> None:
        """Delete a file there, if it is there."""

        def remove() -> None:
            with suppress(FileNotFoundError):
                self.fs.rm_file(f"{self.root}/{name}")

        self._persist(f"{self.location}/{name}", remove)
        if getattr(self.fs, "local_file", False):  # of a disk: object storage has no folders to be left over
            with suppress(OSError):
                for folder in list(Path(self.root, name).parents)[: len(Path(name).parents) - 1]:
                    folder.rmdir()

    def _read_piece(self, path: str, start: int, stop: int) -> bytes:
        data = self.fs.cat_file(path, start=start, end=stop)
        if len(data) != stop - start:
            # An early end can be a broken connection. More than was asked for is a server that ignores ranges.
            kind = ValueError if len(data) > stop - start else ConnectionError
            raise kind(f"{len(data):,} bytes came instead of {stop - start:,}")
        return data

    def _persist(self, url: str, ask: Callable[[], T], timeout: float | None = None, longer: float = 1.0) -> T:
        """What `ask` returns, asked again for as long as it makes sense, each time with `longer` times the timeout."""
        timeout = timeout or self.retry.timeout
        wait, started = self.retry.first_wait, time.monotonic()
        while True:
            try:
                return _within(timeout, ask)
            except Exception as error:
                reason = _reason(error, timeout)
                timeout *= longer if isinstance(error, TimeoutError) else 1.0
                if not _is_transient(error):
                    raise ShardError(f"{url}: {reason}: {_advice(url)}") from error
                pause = wait * random.uniform(0.5, 1.0)
                waited = time.monotonic() - started
                if waited + pause > self.retry.give_up:
                    raise ShardError(
                        f"{url}: {reason}; given up after {waited:.0f} s: {_advice(url)}, then start the run again"
                    ) from error
                logger.warning("%s: %s; next try in %.1f s", url, reason, pause)
            time.sleep(pause)
            wait = min(2 * wait, self.retry.longest_wait)


def _within(seconds: float, call: Callable[[], T]) -> T:
    """The call's result; TimeoutError when it takes longer, and the call is left to its fate in its own thread.

    Not every file system has timeouts, and not all that have one keep it.
    """
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(call())
        except BaseException as error:
            result.set_exception(error)

    # A daemon, so that a wait for the storage never keeps a finished or interrupted run alive.
    threading.Thread(target=run, name="Storage request", daemon=True).start()
    return result.result(seconds)


def _text(value: Any) -> str:
    """The same for the same time, which some storages give as a number in one answer and as a datetime in the next."""
    return str(value.timestamp() if isinstance(value, datetime) else value)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _http_status(error: BaseException) -> int | None:
    """The HTTP status behind an error of botocore, aiohttp, httpx, requests or gcsfs."""
    for cause in _causes(error):
        response = getattr(cause, "response", None)
        if isinstance(response, dict):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        elif type(cause).__name__ == "HttpError":  # of gcsfs; other errors' `code` is something else
            status = getattr(cause, "code", None)
        else:
            status = getattr(response, "status_code", None) or getattr(cause, "status", None)
        if str(status).isdecimal() and 300 <= int(str(status)) < 600:
            return int(str(status))
    return None


def _is_transient(error: BaseException) -> bool:
    """Whether the same request may work later: stalls, broken connections, servers in trouble or under load."""
    if isinstance(error, TimeoutError):
        return True
    if status := _http_status(error):
        return (status >= 500 and status != 501) or status in (408, 409, 425, 429)
    # Each package has its own classes, which cannot be imported here: some are known by their names.
    if any(word in type(error).__name__ for word in ASKS_THE_USER):
        return False
    if isinstance(error, (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError)):
        return False
    if isinstance(error, OSError):
        return error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENAMETOOLONG)
    return not isinstance(error, (ValueError, TypeError, LookupError, AttributeError, ImportError, NotImplementedError))


def _reason(error: BaseException, timeout: float) -> str:
    """In one line."""
    if isinstance(error, TimeoutError) and not str(error):
        return f"no answer for {timeout:g} s"
    text = " ".join((getattr(error, "strerror", None) or str(error) or type(error).__name__).split())
    status = _http_status(error)
    return mask(f"HTTP {status}, {text}" if status else text)[:200]


def _advice(url: str) -> str:
    protocol = urlsplit(url).scheme
    if protocol in ("s3", "s3a"):
        endpoint = (
            os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "not set: Amazon's own"
        )
        return (
            "check the bucket and the path, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE, and "
            f"AWS_ENDPOINT_URL ({endpoint})"
        )
    if protocol in ("gs", "gcs"):
        return "check the bucket and the path, and GOOGLE_APPLICATION_CREDENTIALS or gcloud auth"
    if protocol == "hf":
        return "check the repository and the path, and hf auth login or HF_TOKEN for a private one"
    return "check the URL and that this machine may read it"
