"""Data folders in object storage: read as if they were local, by way of a bounded cache on disk.

`open_folder("s3://bucket/folder")` gives what `open_folder("data/folder")` gives. Any URL that fsspec knows will do.
A file that is mapped is fetched whole, once a machine, into the cache (`cache.py`), by requests that wait for storage
in trouble (`storage.py`); a small read asks for just its bytes.
"""

import hashlib
import json
import logging
import threading
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .cache import Cache
from .folder import Folder, LocalFolder, ShardError
from .storage import Retry, Storage, StoredFile

logger = logging.getLogger(__name__)

FETCHES = 4  # files that are fetched ahead at one time
READ_TOGETHER = 10  # files: the order of training reads 8 at a time, and asks for the next 8 then


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
    return RemoteFolder(str(path), cache_dir, int(cache_gb * 1e9), retry)


class RemoteFolder:
    """The files below an fsspec URL, as they were when this object was made.

    Storage in trouble is waited for, as `Storage` describes; everything else raises ShardError, in one line. A file
    that changes in the storage while this object lives is refused, never mixed: a new object sees the new one. The
    checksums of a manifest are compared when a file is fetched.
    """

    def __init__(
        self,
        url: str,
        cache_dir: str | Path | None = None,
        cache_bytes: int = 50 * 10**9,
        retry: Retry | None = None,
    ):
        self._storage, self._files = _list(Storage.open(url, retry or Retry()))
        self.location = self._storage.location
        folder = Path(cache_dir).expanduser() if cache_dir else _default_cache()
        try:
            self._cache = Cache(folder, cache_bytes)
        except OSError as error:
            raise ShardError(f"cannot use the cache {folder} ({error.strerror}): set data.cache_dir") from error
        self._checksums: dict[str, str] = {}
        if "manifest.json" in self._files:
            self._checksums = _checksums(self.read("manifest.json"))
        self._fetching = threading.Semaphore(FETCHES)

    def sizes(self) -> dict[str, int]:
        """Name -> bytes of every file below, sorted by name."""
        return {name: self._size(name) for name in self._files}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """The bytes that a slice [start:stop] of the file would give; nothing is kept in the cache."""
        size = self._size(name)
        start, stop, _ = slice(start, stop).indices(size)
        if file := self._cache.open(self._key(name), size):
            with file:
                file.seek(start)
                return file.read(max(0, stop - start))
        return b"".join(self._storage.read(name, start, stop))

    def map(self, name: str, dtype: Any) -> np.ndarray:
        """The whole file as a read-only array, mapped from the cache, into which it is fetched first if need be.

        The array stays good when its file is removed from the cache; the disk space is then free once it is let go.
        """
        size = self._size(name)
        if not size:
            return np.empty(0, dtype)
        with self._open(name) as file:
            return np.asarray(np.memmap(file, dtype=dtype, mode="r"))

    def fetch_ahead(self, name: str) -> None:
        """Start to fetch the file into the cache, by a thread, and return at once.

        An error is logged, and met again when the file is needed. A file so large that those that are read together
        would push each other out of the cache is left until then.
        """
        if self._size(name) <= self._cache.max_bytes // READ_TOGETHER:
            # A daemon, so that a wait for the storage never keeps a finished or interrupted run alive.
            threading.Thread(target=self._fetch, args=(name,), name="RemoteFolder", daemon=True).start()

    def _fetch(self, name: str) -> None:
        try:
            with self._fetching:
                self.map(name, "u1")
        except Exception as error:
            logger.warning("%s (while fetching ahead: it is tried again when it is needed)", error)

    def _size(self, name: str) -> int:
        if name not in self._files:
            raise FileNotFoundError(
                f"{self.location}/{name} does not exist, or did not when this folder was opened: "
                "upload it or prepare the data again"
            )
        return self._files[name].size or 0

    def _key(self, name: str) -> str:
        """A hash of the URL, the size and the storage's own mark of the content: changed data has another."""
        best_mark = list(self._files[name].marks.items())[:1]
        identity = [self.location, name, self._size(name), best_mark, self._checksums.get(name)]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]

    def _open(self, name: str) -> BinaryIO:
        """The cached file, fetched if it is not there."""
        cache, size = self._cache, self._size(name)
        if size > cache.max_bytes:
            raise ShardError(
                f"{self.location}/{name} has {size / 1e9:.3g} GB, more than the whole cache of "
                f"{cache.max_bytes / 1e9:.3g} GB in {cache.folder}: raise data.cache_gb"
            )
        try:
            return cache.fetch(self._key(name), size, partial(self._download, name))
        except OSError as error:
            raise ShardError(
                f"cannot write to the cache {cache.folder} ({error.strerror or error}): free space there, lower "
                "data.cache_gb, or set data.cache_dir"
            ) from error

    def _download(self, name: str, file: BinaryIO) -> None:
        """Write the whole file, or raise ShardError where it is not what it was, or what the manifest says."""
        url, expected = f"{self.location}/{name}", self._checksums.get(name)
        found = self._copy(name, file)
        if expected not in (None, found):
            problem = f"{url}: sha256 is {found[:12]}..., the manifest says {expected[:12]}..."
            logger.warning("%s; fetching it again", problem)
            if self._copy(name, file) != expected:
                raise ShardError(f"{problem}, twice: upload the file again or prepare the data again")

    def _copy(self, name: str, file: BinaryIO) -> str:
        """Write the storage's file into an unbuffered one, from its start; returns the sha256 of what came."""
        digest = hashlib.sha256()
        file.seek(0)
        for chunk in self._storage.read(name, 0, self._size(name)):
            digest.update(chunk)
            left = memoryview(chunk)
            while left:
                left = left[file.write(left) :]
        if self._storage.look(name).differs(self._files[name]):
            raise ShardError(f"{self.location}/{name} has changed since this run opened it: start the run again")
        return digest.hexdigest()


def _list(storage: Storage) -> tuple[Storage, dict[str, StoredFile]]:
    """The files of a data folder, sorted by name, and where they are."""
    files, only = storage.list(), ""
    if "" in files:  # one file: the folder is then that file and what lies beside it under its name
        storage, only = storage.parent()
        files = storage.list()
        only = "" if only == "manifest.json" else only
    if only:
        files = {name: f for name, f in files.items() if name.removesuffix(".index").removesuffix(".metadata") == only}
    # The lists of web servers have no sizes.
    files = {name: storage.look(name) if file.size is None else file for name, file in files.items()}
    return storage, dict(sorted(files.items()))


def _checksums(manifest: bytes) -> dict[str, str]:
    """File name -> sha256. A garbled manifest has none: the reader of shards will say what is wrong with it."""
    try:
        shards = [shard for split in json.loads(manifest)["splits"].values() for shard in split["shards"]]
        return {shard["file"]: shard["sha256"] for shard in shards} | {
            f"{shard['file']}.index": shard["index_sha256"] for shard in shards
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def _default_cache() -> Path:
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "gpt2_hf"
