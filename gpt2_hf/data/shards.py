"""Reading token shards: the files of one split, checked when they are opened and mapped into memory when they are read.

    DATA/manifest.json
    DATA/tokenizer/              that the tokens are of, if not GPT-2's
    DATA/train/00000.ds          tokens, little-endian uint16 (uint32 where a vocabulary needs it), every document
                                 closed by <|endoftext|>
    DATA/train/00000.ds.index    where each document ends, in tokens from the file's start, little-endian uint64
    DATA/val/...

The pair of files is datatrove's own format. To the rest of the project a `Shard` is only a flat array of tokens and an
array of document ends, so another format is another function that makes a `Shard`: a folder without a manifest is read
as one of the formats of `formats.py`.
"""

import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ..program import UserError
from .folder import Folder, LocalFolder, ShardError
from .formats import (
    INDEX_BYTES,
    ZEROS,
    TokenFile,
    begins_with_eot,
    cut_points,
    find_document_ends,
    find_token_files,
    holes,
    longest_zeros,
    read_last_end,
    split_of,
)
from .tokenizer import FILES, GPT2, Tokenizer, gpt2_tokenizer, read_tokenizer

__all__ = ["Folder", "LocalFolder", "Shard", "ShardError", "ShardSet", "SplitMissing", "open_split"]

FORMAT = "gpt2_hf/shards"
VERSION = 2
TOKENIZER = "tokenizer"  # the folder of a prepared one's
VERIFY_TOKENS = 2**23
SAMPLES, SAMPLE_TOKENS = 5, 1024  # places of a shard that are compared whenever it is mapped


class SplitMissing(ShardError):
    """The data folder has no such split."""


@dataclass(frozen=True)
class Shard:
    """A run of tokens in one file. Nothing is read before `tokens` or `document_ends` is called, and each call maps
    (or finds) afresh."""

    folder: Folder
    name: str
    n_tokens: int
    n_documents: int | None  # None until they are looked for
    digest: str  # of the file's content, or of parts of it
    sha256: dict[str, str | None]  # of each file that it is read from, as the manifest has it
    tokens: Callable[[], np.ndarray]  # -> (n_tokens,) uint16, or wider unsigned integers
    document_ends: Callable[[], np.ndarray]  # -> (n_documents,) int64, increasing; the last is n_tokens

    @property
    def path(self) -> str:
        """As it is shown in messages."""
        return f"{self.folder.location}/{self.name}"

    def fetch_ahead(self) -> None:
        """Say that the shard will be read soon; returns at once."""
        for name in self.sha256:
            self.folder.fetch_ahead(name)


@dataclass(frozen=True)
class ShardSet:
    """The shards of one split, in the manifest's order, or without one by name."""

    split: str
    shards: tuple[Shard, ...]
    tokenizer: Tokenizer
    vocab_size: int
    eot: int
    n_bytes: int | None  # UTF-8 text that the tokens were made from; None where nobody wrote it down
    eot_first: bool = False  # documents begin with `eot` instead of ending with it

    @property
    def n_tokens(self) -> int:
        return sum(shard.n_tokens for shard in self.shards)

    @property
    def n_documents(self) -> int | None:
        counts = [shard.n_documents for shard in self.shards if shard.n_documents is not None]
        return sum(counts) if len(counts) == len(self.shards) else None

    @property
    def fingerprint(self) -> str:
        """16 hex digits that change with any file's name, length or content: a resumed run must find its own data.

        Without a manifest, content means that of a few places in each file.
        """
        identity = [(shard.name, shard.n_tokens, shard.digest) for shard in self.shards]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]

    def verify(self) -> None:
        """Read every file to the end and compare it with its checksum and its index; raises ShardError.

        Shows a bar on a terminal when it takes longer than a moment.
        """
        from tqdm import tqdm

        with tqdm(
            total=self.n_tokens, unit="tok", unit_scale=True, desc=f"verify {self.split}", disable=None, delay=1
        ) as bar:
            for shard in self.shards:
                self._verify(shard, bar.update)

    def _verify(self, shard: Shard, progress: Callable[[int], object]) -> None:
        tokens, digest, largest = shard.tokens(), hashlib.sha256(), 0
        for start in range(0, len(tokens), VERIFY_TOKENS):
            block = tokens[start : start + VERIFY_TOKENS]
            largest = max(largest, int(block.max()))
            if (zeros := longest_zeros(block)) >= ZEROS:
                raise holes(shard.path, zeros)
            if shard.sha256[shard.name]:
                digest.update(block.data)
            progress(len(block))
        for name, expected in shard.sha256.items():
            if not expected:
                continue
            read = name == shard.name
            found = digest.hexdigest() if read else hashlib.sha256(shard.folder.read(name)).hexdigest()
            if found != expected:
                raise ShardError(
                    f"{shard.folder.location}/{name}: sha256 is {found[:12]}..., the manifest says "
                    f"{expected[:12]}...: copy the file again or prepare the data again"
                )
        if largest >= self.vocab_size:
            raise outside_vocabulary(shard, largest, self.vocab_size)
        if shard.n_documents:
            ends = shard.document_ends()
            increasing = ends[0] > 0 and (np.diff(ends) > 0).all() and ends[-1] == len(tokens)
            if not increasing or (tokens[ends - 1] != self.eot).any():
                raise ShardError(
                    f"{shard.path}.index: a document does not end with token {self.eot}: prepare the data again"
                )


def sample_digest(tokens: np.ndarray) -> str:
    """sha256 of a few places of a shard, its beginning, middle and end among them: seen cheaply at every opening."""
    starts = [(len(tokens) - SAMPLE_TOKENS) * i // (SAMPLES - 1) for i in range(SAMPLES)]
    places = [tokens[max(start, 0) : max(start, 0) + SAMPLE_TOKENS].tobytes() for start in starts]
    return hashlib.sha256(b"".join(places)).hexdigest()


def outside_vocabulary(shard: Shard, token: int, vocab_size: int) -> ShardError:
    """The error for a token that is none."""
    return ShardError(
        f"{shard.path} holds token {token}, outside a vocabulary of {vocab_size}: the file is damaged, copy it or "
        "prepare the data again"
    )


def open_split(path: str | Path | Folder, split: str, tokenizer: Tokenizer | None = None) -> ShardSet:
    """Open one split ("train" or "val") of a folder: a prepared one, or token files of another project (`formats.py`),
    of which one may also be named itself.

    Only file sizes and a few bytes of each file are looked at, so this is quick for any amount of data;
    `ShardSet.verify` reads everything. Raises ShardError, in one line, when something is missing or does not fit.

    Args:
        tokenizer: that the tokens are of. A prepared folder brings its own, which must be this one then; other files
            are taken for GPT-2's if nothing is said.
    """
    folder = LocalFolder.open(path) if isinstance(path, str | Path) else path
    sizes = folder.sizes()
    if "manifest.json" in sizes:
        return _open_prepared(folder, sizes, split, tokenizer)
    return _open_foreign(folder, sizes, split, tokenizer or gpt2_tokenizer())


def _open_prepared(folder: Folder, sizes: dict[str, int], split: str, expected: Tokenizer | None) -> ShardSet:
    source = f"{folder.location}/manifest.json"
    try:
        manifest = json.loads(folder.read("manifest.json").decode("utf-8"))
    except ValueError as error:
        raise ShardError(f"{source} is not valid JSON ({error}): prepare the data again") from None
    try:
        kind, dtype = (manifest["format"], manifest["version"]), manifest["dtype"]
        if kind != (FORMAT, VERSION) or dtype not in ("uint16", "uint32"):
            raise ShardError(
                f"{source} has format, version, dtype {(*kind, dtype)}, this reader knows "
                f"{(FORMAT, VERSION, 'uint16')} or uint32: prepare the data again"
            )
        tokenizer = _prepared_tokenizer(folder, sizes, manifest["tokenizer"])
        if expected and expected.fingerprint != tokenizer.fingerprint:
            raise ShardError(
                f"{folder.location} was prepared with the tokenizer {tokenizer.name}, not with {expected.name}: leave "
                "out data.tokenizer, or prepare the data again"
            )
        if split not in manifest["splits"]:
            raise SplitMissing(_no_split(folder, split, f"it has {', '.join(manifest['splits']) or 'none'}"))
        entry = manifest["splits"][split]
        with ThreadPoolExecutor(16) as pool:  # a remote folder takes its time to answer
            shards = tuple(pool.map(partial(_open_ds, folder, sizes, np.dtype(dtype)), entry["shards"]))
        return ShardSet(split, shards, tokenizer, manifest["vocab_size"], manifest["eot"], entry["bytes"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ShardError(f"{source} lacks or garbles an entry ({error}): prepare the data again") from None


def _prepared_tokenizer(folder: Folder, sizes: dict[str, int], entry: Any) -> Tokenizer:
    """What a manifest's entry names: GPT-2's, or what lies in the folder."""
    if entry == GPT2:
        return gpt2_tokenizer()
    if not isinstance(entry, dict):
        raise ShardError(
            f"{folder.location}/manifest.json names the tokenizer {entry!r}, and has none of its own: prepare the data "
            "again"
        )
    place = f"{folder.location}/{TOKENIZER}"
    files = {name: folder.read(f"{TOKENIZER}/{name}") for name in FILES if f"{TOKENIZER}/{name}" in sizes}
    if not files:
        raise ShardError(
            f"{place} is gone, in which the tokenizer {entry['name']} of this data was: put it back, or prepare the "
            "data again"
        )
    try:
        found = read_tokenizer(entry["name"], files)
    except UserError as error:
        raise ShardError(f"{place}: {error}") from None
    if found.fingerprint != entry["sha256"]:
        raise ShardError(
            f"{place} is not the tokenizer that this data was prepared with (sha256 {found.fingerprint[:12]}..., the "
            f"manifest says {entry['sha256'][:12]}...): put it back, or prepare the data again"
        )
    return found


def _no_split(folder: Folder, split: str, what: str) -> str:
    remedy = ", or train without validation: --eval.val_every 0" if split == "val" else ""
    return f"{folder.location} has no split '{split}': {what}{remedy}"


def _open_ds(folder: Folder, sizes: dict[str, int], dtype: np.dtype, entry: dict[str, Any]) -> Shard:
    name, n_tokens, n_documents = entry["file"], entry["tokens"], entry["documents"]
    index = f"{name}.index"
    for file, size in ((name, dtype.itemsize * n_tokens), (index, INDEX_BYTES * n_documents)):
        if file not in sizes:
            raise ShardError(
                f"{folder.location}/{file} is in the manifest but not on disk: copy it again or prepare the data again"
            )
        if sizes[file] != size:
            raise ShardError(
                f"{folder.location}/{file} has {sizes[file]:,} bytes, the manifest says {size:,}: "
                "copy it again or prepare the data again"
            )
    if (last_end := read_last_end(folder, name, sizes[index]) if n_documents else 0) != n_tokens:
        raise ShardError(
            f"{folder.location}/{index} ends at token {last_end:,}, its shard has {n_tokens:,}: "
            "copy it again or prepare the data again"
        )
    samples = entry.get("sha256_of_samples")  # older manifests have none

    def tokens() -> np.ndarray:
        mapped = folder.map(name, f"<u{dtype.itemsize}")
        if samples and sample_digest(mapped) != samples:
            raise ShardError(
                f"{folder.location}/{name} has changed since it was prepared, at its size: copy the file again or "
                "prepare the data again"
            )
        return mapped

    if isinstance(folder, LocalFolder):  # what is remote is looked at when it is there
        tokens()
    return Shard(
        folder,
        name,
        n_tokens,
        n_documents,
        digest=entry["sha256"],
        sha256={name: entry["sha256"], index: entry["index_sha256"]},
        tokens=tokens,
        # Unsigned in the file, but NumPy would mix that with int as float.
        document_ends=partial(folder.map, index, "<i8"),
    )


def _open_foreign(folder: Folder, sizes: dict[str, int], split: str, tokenizer: Tokenizer) -> ShardSet:
    _refuse_folder_of_folders(folder, sizes)
    files = find_token_files(folder, sizes, tokenizer)
    if not files:
        raise ShardError(
            f"no prepared data in {folder.location} (manifest.json not found, nor token files of another project): "
            "prepare some, see python scripts/prepare_data.py --help"
        )
    chosen = [file for file in files if split_of(file.name) == split]
    if not chosen:
        raise SplitMissing(_no_split(folder, split, f"no file or folder in it has '{split}' in its name; name one so"))
    eot, vocab_size = tokenizer.eot, tokenizer.vocab_size
    eot_first = begins_with_eot(files, eot)
    shards = [shard for file in chosen for shard in _open_file(file, eot, eot_first)]
    return ShardSet(split, tuple(shards), tokenizer, vocab_size, eot, n_bytes=None, eot_first=eot_first)


def _refuse_folder_of_folders(folder: Folder, sizes: dict[str, int]) -> None:
    """Of a preparation that is not finished, and of several corpora at once, nobody wants a mixture."""
    if ".preparing/plan.json" in sizes:
        raise ShardError(
            f"{folder.location} is not prepared to its end: start the same scripts/prepare_data.py again, it goes on"
        )
    marks = ("/manifest.json", "/.preparing/plan.json")
    inside = {name.removesuffix(mark) for name in sizes for mark in marks if name.endswith(mark)}
    corpora = sorted(name for name in inside if any(other.startswith(f"{name}/train/") for other in sizes))
    if corpora:
        more = f" and {len(corpora) - 8} more" if len(corpora) > 8 else ""
        names = ", ".join(f"{folder.location}/{name}" for name in corpora[:8])
        raise ShardError(f"{folder.location} holds prepared folders, choose one of them: {names}{more}")


def _open_file(file: TokenFile, eot: int, eot_first: bool) -> list[Shard]:
    """One shard; several for a long file whose documents are not listed, so that none needs a long search for them."""
    folder, name, index = file.folder, file.name, f"{file.name}.index"
    if file.n_documents is not None:
        ends = partial(folder.map, index, "<i8")
        files: dict[str, str | None] = {name: None, index: None}
        return [Shard(folder, name, file.n_tokens, file.n_documents, file.digest, files, file.tokens, ends)]

    def part(start: int, stop: int) -> Shard:
        def tokens() -> np.ndarray:
            return file.tokens()[start:stop]

        def document_ends() -> np.ndarray:
            return find_document_ends(tokens(), eot, eot_first)

        return Shard(folder, name, stop - start, None, file.digest, {name: None}, tokens, document_ends)

    return [part(start, stop) for start, stop in pairwise(cut_points(file, eot, eot_first))]
