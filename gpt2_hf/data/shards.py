"""Reading token shards: the files of one split, checked when they are opened and mapped into memory when they are read.

    DATA/manifest.json
    DATA/train/00000.ds          tokens, little-endian uint16, every document closed by <|endoftext|>
    DATA/train/00000.ds.index    where each document ends, in tokens from the file's start, little-endian uint64
    DATA/val/...

The pair of files is datatrove's own format. To the rest of the project a `Shard` is only a flat array of tokens and an
array of document ends, so another format is another function that makes a `Shard`.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

FORMAT = "gpt2_hf/shards"
VERSION = 1
TOKEN_BYTES = 2
INDEX_BYTES = 8


class ShardError(ValueError):
    """The data folder is missing, incomplete or damaged."""


@dataclass(frozen=True)
class Shard:
    """One file of tokens. Nothing is read before `tokens` or `document_ends` is called, and each call maps afresh."""

    name: str
    path: Path
    n_tokens: int
    n_documents: int
    sha256: str
    tokens: Callable[[], np.ndarray]  # -> (n_tokens,) uint16
    document_ends: Callable[[], np.ndarray]  # -> (n_documents,) int64, increasing; the last is n_tokens


@dataclass(frozen=True)
class ShardSet:
    """The shards of one split, in the manifest's order. `n_bytes` counts the UTF-8 text the tokens were made from."""

    split: str
    shards: tuple[Shard, ...]
    vocab_size: int
    eot: int
    n_bytes: int

    @property
    def n_tokens(self) -> int:
        return sum(shard.n_tokens for shard in self.shards)

    @property
    def n_documents(self) -> int:
        return sum(shard.n_documents for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """16 hex digits that change with any file's name, length or content: a resumed run must find its own data."""
        identity = [(shard.name, shard.n_tokens, shard.sha256) for shard in self.shards]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]

    def verify(self) -> None:
        """Read every file to the end and compare it with its checksum and its index; raises ShardError."""
        for shard in self.shards:
            with shard.path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != shard.sha256:
                raise ShardError(
                    f"{shard.path}: sha256 is {found[:12]}..., the manifest says {shard.sha256[:12]}...: "
                    "copy the file again or prepare the data again"
                )
            if not shard.n_tokens:
                continue
            tokens, ends = shard.tokens(), shard.document_ends()
            if ends[0] <= 0 or (np.diff(ends) <= 0).any() or (tokens[ends - 1] != self.eot).any():
                raise ShardError(
                    f"{shard.path}.index: a document does not end with token {self.eot}: prepare the data again"
                )
            if (largest := int(tokens.max())) >= self.vocab_size:
                raise ShardError(
                    f"{shard.path}: holds token {largest}, outside a vocabulary of {self.vocab_size}: "
                    "prepare the data again"
                )


def open_split(path: str | Path, split: str) -> ShardSet:
    """Open one split ("train" or "val") of a prepared data folder.

    Only file sizes and each index's last entry are looked at, so this is quick for any amount of data;
    `ShardSet.verify` reads everything. Raises ShardError, in one line, when something is missing or does not fit.
    """
    root = Path(path)
    source = root / "manifest.json"
    try:
        manifest = json.loads(source.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ShardError(
            f"no prepared data in {root} (manifest.json not found): prepare some, see "
            "python scripts/prepare_data.py --help"
        ) from None
    except ValueError as error:
        raise ShardError(f"{source} is not valid JSON ({error}): prepare the data again") from None
    try:
        kind = (manifest["format"], manifest["version"], manifest["dtype"])
        if kind != (FORMAT, VERSION, "uint16"):
            raise ShardError(
                f"{source} has format, version, dtype {kind}, this reader knows {(FORMAT, VERSION, 'uint16')}: "
                "prepare the data again"
            )
        if split not in manifest["splits"]:
            raise ShardError(f"{root} has no split '{split}': it has {', '.join(manifest['splits']) or 'none'}")
        entry = manifest["splits"][split]
        return ShardSet(
            split=split,
            shards=tuple(_open_ds(root, file) for file in entry["shards"]),
            vocab_size=manifest["vocab_size"],
            eot=manifest["eot"],
            n_bytes=entry["bytes"],
        )
    except (KeyError, TypeError) as error:
        raise ShardError(f"{source} lacks or garbles an entry ({error}): prepare the data again") from None


def _open_ds(root: Path, entry: dict) -> Shard:
    path = root / entry["file"]
    index = path.with_name(path.name + ".index")
    n_tokens, n_documents = entry["tokens"], entry["documents"]
    for file, size in ((path, TOKEN_BYTES * n_tokens), (index, INDEX_BYTES * n_documents)):
        if not file.is_file():
            raise ShardError(f"{file} is in the manifest but not on disk: copy it again or prepare the data again")
        if (found := file.stat().st_size) != size:
            raise ShardError(
                f"{file} has {found:,} bytes, the manifest says {size:,}: copy it again or prepare the data again"
            )
    last_end = 0
    if n_documents:
        with index.open("rb") as stream:
            stream.seek(-INDEX_BYTES, 2)
            last_end = int.from_bytes(stream.read(INDEX_BYTES), "little")
    if last_end != n_tokens:
        raise ShardError(
            f"{index} ends at token {last_end:,}, its shard has {n_tokens:,}: copy it again or prepare the data again"
        )
    return Shard(
        name=entry["file"],
        path=path,
        n_tokens=n_tokens,
        n_documents=n_documents,
        sha256=entry["sha256"],
        tokens=partial(_map, path, "<u2"),
        document_ends=partial(_map, index, "<i8"),  # unsigned in the file, but NumPy would mix that with int as float
    )


def _map(path: Path, dtype: str) -> np.ndarray:
    # A plain array, not the memmap subclass, whose every slice costs several microseconds.
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))
