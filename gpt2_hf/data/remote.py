"""Data folders in object storage: read as if they were local, by way of a bounded cache on disk.

`open_folder("s3://bucket/folder")` gives what `open_folder("data/folder")` gives. Any URL that fsspec knows will do.
A file that is mapped is fetched whole, once a machine, into the cache; a small read asks for just its bytes.

    CACHE/<32 hex digits>.data   a whole file: written under the other name, checked, synced to disk, renamed
    CACHE/<32 hex digits>.part   a file being fetched, already as long as it will be: so its place is spoken for
    CACHE/.lock                  held for the moment in which files are counted, removed or renamed

The digits are a hash of URL, size and the storage's own mark of the content (ETag or the like), so changed data has
another name. The process that fetches a file holds a lock on its .part; others that want the file wait for that lock
and then find the .data. The kernel drops the locks of a process that dies: a .part without a lock is rubbish.
"""

import errno
import hashlib
import json
import logging
import os
import random
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import urlsplit

import numpy as np

from .folder import Folder, LocalFolder, ShardError

logger = logging.getLogger(__name__)
T = TypeVar("T")

CHUNK_BYTES = 8 << 20  # bytes of one request
SMALLEST_CHUNK = 256 << 10
# Words in the names of errors that no waiting mends: NoCredentialsError, ProfileNotFound, OfflineModeIsEnabled, ...
ASKS_THE_USER = ("Credential", "Token", "Profile", "Config", "Validation", "Region", "Offline")


@dataclass(frozen=True)
class Retry:
    """How long to wait for a storage that does not answer, in seconds."""

    timeout: float = 60.0  # a request that takes longer (at most 8 MiB) counts as stalled
    first_wait: float = 1.0  # the wait before the next try doubles, up to longest_wait, and is shortened at random
    longest_wait: float = 60.0
    give_up: float = 3600.0  # without any progress


def open_folder(
    path: str | Path, cache_dir: str | Path | None = None, cache_gb: float = 50.0, retry: Retry | None = None
) -> Folder:
    """A data folder of this machine, or a remote one for anything with "://" in it (s3://, gs://, hf://, ...).

    The other arguments are for remote folders: where to keep fetched files (default: `gpt2_hf` in the Hugging Face
    cache folder), the most 10**9 bytes they may take, and how patient to be. Raises ShardError or ImportError, in one
    line, when the URL, the credentials or the packages are not right.
    """
    if "://" not in str(path):
        return LocalFolder.open(path)
    folder = RemoteFolder(str(path), cache_dir, int(cache_gb * 1e9), retry=retry)
    if "manifest.json" in folder.sizes():
        folder.checksums = _checksums(folder.read("manifest.json"))
    return folder


def _checksums(manifest: bytes) -> dict[str, str]:
    """File name -> sha256. A garbled manifest has none: the reader of shards will say what is wrong with it."""
    try:
        shards = [shard for split in json.loads(manifest)["splits"].values() for shard in split["shards"]]
        return {shard["file"]: shard["sha256"] for shard in shards} | {
            f"{shard['file']}.index": shard["index_sha256"] for shard in shards
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


class RemoteFolder:
    """The files below an fsspec URL, as they were when this object was made.

    Storage that is down, slow or stalled is waited for, with one line in the log (stderr) a wait, until `retry.give_up`
    seconds have passed without progress. Everything else raises ShardError, in one line. A file that changes in the
    storage while this object lives is refused, never mixed: a new object sees the new one.

    Args:
        checksums: file name -> sha256 in hex, for the files where it is known; compared when a file is fetched.
        fetch_threads: the most files that `fetch_ahead` fetches at once.
    """

    def __init__(
        self,
        url: str,
        cache_dir: str | Path | None = None,
        cache_bytes: int = 50 * 10**9,
        *,
        checksums: dict[str, str] | None = None,
        retry: Retry | None = None,
        fetch_threads: int = 4,
    ):
        self.location = _without_password(url if url.endswith("://") else url.rstrip("/"))
        self.checksums = dict(checksums or {})
        self._retry = retry or Retry()
        self._fs, root = _filesystem(url, self.location, self._retry)
        self._root = root.rstrip("/")
        self._files = self._list()
        self._cache = _Cache(Path(cache_dir).expanduser() if cache_dir else _default_cache(), cache_bytes)
        self._mutex = threading.Lock()
        self._queue: deque[str] = deque()
        self._unused: set[str] = set()  # fetched ahead, or about to be, and not yet asked for
        self._idle_threads = fetch_threads

    def sizes(self) -> dict[str, int]:
        """Name -> bytes of every file below, sorted by name."""
        return {name: file.size for name, file in self._files.items()}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """The bytes that a slice [start:stop] of the file would give; nothing is kept in the cache."""
        remote = self._file(name)
        start, stop, _ = slice(start, stop).indices(remote.size)
        if file := self._cache.open(self._key(name), remote.size):
            with file:
                file.seek(start)
                return file.read(max(0, stop - start))
        return b"".join(self._chunks(name, start, stop, time.monotonic()))

    def map(self, name: str, dtype: Any) -> np.ndarray:
        """The whole file as a read-only array, mapped from the cache, into which it is fetched first if need be.

        The array stays good when its file is removed from the cache; the disk space is then free once it is let go.
        """
        remote = self._file(name)
        with self._mutex:
            self._unused.discard(name)
        if not remote.size:
            return np.empty(0, dtype)
        with self._open(name) as file:
            return np.asarray(np.memmap(file, dtype=dtype, mode="r"))

    def fetch_ahead(self, name: str) -> None:
        """Start to fetch the file into the cache, by a thread, and return at once.

        An error is logged, and met again when the file is needed. Files fetched ahead and not yet mapped take half of
        the cache at most, so that they do not push each other out: what is beyond that is left for later.
        """
        remote = self._file(name)
        with self._mutex:
            unused = sum(self._files[name].size for name in self._unused)
            if not remote.size or name in self._unused or unused + remote.size > self._cache.max_bytes // 2:
                return
            self._unused.add(name)
            self._queue.append(name)
            if not self._idle_threads:
                return
            self._idle_threads -= 1
        # A daemon, so that a wait for the storage never keeps a finished or interrupted run alive.
        threading.Thread(target=self._fetch_queued, name="RemoteFolder", daemon=True).start()

    def _fetch_queued(self) -> None:
        while True:
            with self._mutex:
                if not self._queue:
                    self._idle_threads += 1
                    return
                name = self._queue.popleft()
            try:
                self._open(name).close()
            except Exception as error:
                logger.warning("%s (while fetching ahead: it is tried again when it is needed)", error)
                with self._mutex:
                    self._unused.discard(name)

    def _list(self) -> "dict[str, _RemoteFile]":
        infos, only = self._find(), ""
        if self._root in infos:  # one file: the folder is then that file and what lies beside it under its name
            self._root, _, only = self._root.rpartition("/")
            self.location = self.location.rpartition("/")[0]
            infos, only = self._find(), "" if only == "manifest.json" else only
        files = {}
        for path, info in infos.items():
            name = path.removeprefix(f"{self._root}/")
            if name == path or info.get("type", "file") != "file":
                continue
            if only and name.removesuffix(".index").removesuffix(".metadata") != only:
                continue
            if info.get("size") is None:  # the lists of web servers have no sizes
                info = self._info(path, f"{self.location}/{name}")
            files[name] = _RemoteFile(path, int(info["size"] or 0), _content_mark(info))
        if not files:
            raise ShardError(f"{self.location}: there are no files below it: {_advice(self.location)}")
        return dict(sorted(files.items()))

    def _find(self) -> dict[str, dict]:
        return self._persist(self.location, lambda _: self._fs.find(self._root, detail=True), time.monotonic())

    def _info(self, path: str, url: str) -> dict:
        def ask(_: int) -> dict:
            self._fs.invalidate_cache(path)  # some keep lists even if asked not to
            return self._fs.info(path)

        return self._persist(url, ask, time.monotonic())

    def _file(self, name: str) -> "_RemoteFile":
        if name not in self._files:
            raise FileNotFoundError(
                f"{self.location}/{name} does not exist, or did not when this folder was opened: "
                "upload it or prepare the data again"
            )
        return self._files[name]

    def _key(self, name: str) -> str:
        remote = self._files[name]
        identity = [self.location, name, remote.size, sorted(remote.mark.items()), self.checksums.get(name)]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]

    def _open(self, name: str) -> BinaryIO:
        """The cached file, fetched if it is not there. Open, so that nobody can take it away any more."""
        started = time.monotonic()
        key, size = self._key(name), self._files[name].size
        if size > self._cache.max_bytes:
            raise ShardError(
                f"{self.location}/{name} has {size / 1e9:.3g} GB, more than the whole cache of "
                f"{self._cache.max_bytes / 1e9:.3g} GB in {self._cache.folder}: raise data.cache_gb"
            )
        while True:
            if file := self._cache.open(key, size):
                return file
            if part := self._cache.claim(key):
                try:
                    self._cache.reserve(part, size)
                    self._download(name, part, started)
                    return self._cache.keep(part, key)
                except BaseException as error:
                    self._cache.discard(part, key)
                    if isinstance(error, OSError):
                        raise ShardError(
                            f"cannot write to the cache {self._cache.folder} ({error.strerror or error}): free space "
                            "there, lower data.cache_gb, or set data.cache_dir"
                        ) from error
                    raise

    def _download(self, name: str, part: BinaryIO, started: float) -> None:
        remote, expected = self._files[name], self.checksums.get(name)
        url = f"{self.location}/{name}"
        for is_last in (False, True):
            digest = hashlib.sha256()
            part.seek(0)
            for chunk in self._chunks(name, 0, remote.size, started):
                digest.update(chunk)
                left = memoryview(chunk)
                while left:
                    left = left[part.write(left) :]
            info = self._info(remote.path, url)
            if info["size"] != remote.size or _differ(remote.mark, _content_mark(info)):
                raise ShardError(f"{url} has changed since this run opened it: start the run again")
            if expected in (None, found := digest.hexdigest()):
                return
            problem = f"{url}: sha256 is {found[:12]}..., the manifest says {expected[:12]}..."
            if is_last:
                raise ShardError(f"{problem}, twice: upload the file again or prepare the data again")
            logger.warning("%s; fetching it again", problem)

    def _chunks(self, name: str, start: int, stop: int, started: float) -> Iterator[bytes]:
        """The bytes from start to stop, in pieces. `started` is when the wait for the first one began."""
        path, url = self._files[name].path, f"{self.location}/{name}"
        length = CHUNK_BYTES

        def get(stalls: int) -> bytes:
            end = min(start + max(length >> stalls, SMALLEST_CHUNK), stop)  # a slow line is asked for less
            data = self._fs.cat_file(path, start=start, end=end)
            if len(data) != end - start:
                # An early end can be a broken connection. More than was asked for is a server that ignores ranges.
                kind = ValueError if len(data) > end - start else ConnectionError
                raise kind(f"{len(data):,} bytes came instead of {end - start:,}")
            return data

        while start < stop:
            data = self._persist(url, get, started)
            yield data
            start, length, started = start + len(data), len(data), time.monotonic()

    def _persist(self, url: str, ask: Callable[[int], T], started: float) -> T:
        """What `ask` returns, asked again for as long as it makes sense. It is told how often it has stalled."""
        retry, wait, stalls = self._retry, self._retry.first_wait, 0
        while True:
            try:
                return _within(retry.timeout, partial(ask, stalls))
            except Exception as error:
                reason = _reason(error, retry.timeout)
                if not _is_transient(error):
                    raise ShardError(f"{url}: {reason}: {_advice(url)}") from error
                pause = wait * random.uniform(0.5, 1.0)
                waited = time.monotonic() - started
                if waited + pause > retry.give_up:
                    raise ShardError(
                        f"{url}: {reason}; given up after {waited:.0f} s: {_advice(url)}, then start the run again"
                    ) from error
                logger.warning("%s: %s; next try in %.1f s", url, reason, pause)
                stalls += isinstance(error, TimeoutError)
            time.sleep(pause)
            wait = min(2 * wait, retry.longest_wait)


@dataclass(frozen=True)
class _RemoteFile:
    path: str  # as the file system names it
    size: int
    mark: dict[str, str]  # what the storage tells about the content


class _Cache:
    """Files of at most max_bytes together, by length, those of unfinished fetches included (see the file's top)."""

    def __init__(self, folder: Path, max_bytes: int):
        self.folder, self.max_bytes = folder, max_bytes
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with self._counting():
                self._evict(max_bytes)
        except OSError as error:
            raise ShardError(f"cannot use the cache {folder} ({error.strerror}): set data.cache_dir") from error

    def open(self, key: str, size: int) -> BinaryIO | None:
        """The file, if it is there and whole; this counts as a use."""
        path = self.folder / f"{key}.data"
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

    def claim(self, key: str) -> BinaryIO | None:
        """The right to fetch the file, waited for; None when another may have fetched it meanwhile: look again."""
        path = self.folder / f"{key}.part"
        part = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)
        _lock(part)
        if not _is_at(part, path):  # whoever had the lock has renamed or removed it
            _unlock(part)
            return None
        if (self.folder / f"{key}.data").exists():
            self.discard(part, key)
            return None
        part.truncate(0)  # what a killed process left behind
        return part

    def reserve(self, part: BinaryIO, size: int) -> None:
        """Give the claimed file its length, once there is room; the files unused for longest are removed for it."""
        while True:
            with self._counting():
                if self._evict(self.max_bytes - size):
                    part.truncate(size)
                    return
            time.sleep(0.1)  # the rest is being fetched by others: it can be removed when they are through

    def keep(self, part: BinaryIO, key: str) -> BinaryIO:
        """Make the fetched file one of the cache's."""
        os.fsync(part.fileno())
        _touch(part)
        with self._counting():  # a folder that is read while a name changes may show the file never or twice
            os.rename(self.folder / f"{key}.part", self.folder / f"{key}.data")
        _unlock(part, close=False)
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        return part

    def discard(self, part: BinaryIO, key: str) -> None:
        path = self.folder / f"{key}.part"
        if not part.closed and _is_at(part, path):
            path.unlink(missing_ok=True)
        _unlock(part)

    @contextmanager
    def _counting(self) -> Iterator[None]:
        with (self.folder / ".lock").open("ab") as lock:
            _lock(lock)
            try:
                yield
            finally:
                _unlock(lock)

    def _evict(self, limit: int) -> bool:
        """Remove files until the rest is within the limit; whether that was possible."""
        total, files = 0, []
        for entry in os.scandir(self.folder):
            if not re.fullmatch(r"[0-9a-f]{32}\.(data|part)", entry.name):
                continue
            try:
                if entry.name.endswith(".part") and _remove_if_left(Path(entry.path)):
                    continue
                stat = entry.stat()
            except FileNotFoundError:
                continue
            total += stat.st_size
            if entry.name.endswith(".data"):
                files.append((stat.st_mtime_ns, stat.st_size, entry.path))
        for _, size, path in sorted(files):
            if total <= limit:
                break
            Path(path).unlink(missing_ok=True)
            total -= size
        return total <= limit


def _remove_if_left(path: Path) -> bool:
    """Remove a .part whose process is gone."""
    with path.open("r+b") as part:
        if not _lock(part, wait=False):
            return False
        if _is_at(part, path):
            path.unlink()
        _unlock(part)
        return True


def _lock(file: BinaryIO, wait: bool = True) -> bool:
    try:
        import fcntl
    except ImportError:
        raise ShardError("remote data needs file locks (Linux, macOS): copy the folder to this machine") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _unlock(file: BinaryIO, close: bool = True) -> None:
    import fcntl

    if not file.closed:
        fcntl.flock(file, fcntl.LOCK_UN)  # closing is not enough where a forked child holds the file too
        if close:
            file.close()


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _touch(file: BinaryIO) -> None:
    # Times of access are not kept on many disks, and the kernel's own "now" is too coarse to order files by.
    now = time.time_ns()
    os.utime(file.fileno(), ns=(now, now))


def _default_cache() -> Path:
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "gpt2_hf"


def _filesystem(url: str, location: str, retry: Retry) -> tuple[Any, str]:
    """fsspec's file system for the URL, and the folder's path in it."""
    import fsspec

    # An object of our own, without a cache of listings, so that a new folder sees what is there now.
    options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
    protocol = urlsplit(url).scheme
    if is_s3 := protocol in ("s3", "s3a"):
        # Its silent retries, nested in botocore's, would hide for minutes what _persist has to report.
        given = fsspec.config.conf.get(protocol, {}).get("config_kwargs", {})
        ours = {"retries": {"total_max_attempts": 1}, "read_timeout": 2 * retry.timeout}
        options["config_kwargs"] = {**ours, **given}
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
    return fs, root


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

    threading.Thread(target=run, name="RemoteFolder request", daemon=True).start()
    return result.result(seconds)


def _content_mark(info: dict) -> dict[str, str]:
    """What the storage tells of a file's content: its own hash where there is one, else when it was written."""
    for keys in (
        ("ETag", "etag", "md5Hash", "blob_id"),
        ("mtime", "LastModified", "last_modified", "updated", "created"),
    ):
        if mark := {key: _text(info[key]) for key in keys if info.get(key)}:
            return mark
    return {}


def _text(value: Any) -> str:
    """The same for the same time, which some storages give as text in one answer and as a number in the next."""
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            return value
    return str(value.timestamp() if isinstance(value, datetime) else value)


def _differ(one: dict[str, str], other: dict[str, str]) -> bool:
    return any(one[key] != other[key] for key in one.keys() & other.keys())


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
    return _without_password(f"HTTP {status}, {text}" if status else text)[:200]


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


def _without_password(text: str) -> str:
    return re.sub(r"://[^/@\s]*@", "://***@", text)
