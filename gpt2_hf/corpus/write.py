"""Documents -> tokens -> shards: the last two pipeline steps.

    WriteTokens   task N: its documents' tokens as parts/N.ds, a RECORD of each as parts/N.docs, a tally as parts/N.json
    WriteShards   one task: all parts, in the order of the tasks, as train/, val/, report.json, report.md, manifest.json

The shards are datatrove's: `NNNNN.ds` (uint16 tokens, little-endian, or uint32 of a vocabulary that needs it),
`NNNNN.ds.index` (uint64, where each document ends, in tokens) and `NNNNN.ds.metadata`.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import os
import platform
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from ..data.shards import FORMAT, VERSION, sample_digest
from ..data.tokenizer import GPT2, Tokenizer, open_tokenizer
from ..files import to_disk, whole_file
from ..program import UserError
from .audit import ERRORS, EXCERPT, REPORTS_PER_TASK, Tally, add_line_numbers, sentence, write_reports
from .read import Piece
from .settings import VAL_FRACTION

if TYPE_CHECKING:
    from datatrove.data import Document

COPY_TOKENS = 2**23
LEAST_HELD_OUT = 8192  # tokens, or a tenth of a small corpus: several windows of 1,024
BYTES_PER_TOKEN = 4  # of English prose, about
NEAR = 256  # tokens; so near a line's end is looked for
# Kept of each document beside its tokens: where it ends, in tokens and in bytes of text; a hash of its text, which
# decides the split and finds exact copies; whether its id was named for validation; where it was read, for the report.
RECORD = np.dtype(
    [
        ("token_end", "<u8"),
        ("byte_end", "<u8"),
        ("hash", "<u8"),
        ("place", "<u8"),  # line, or offset in a file whose lines were not counted
        ("piece", "<u4"),  # of the task
        ("named", "?"),
    ]
)


@dataclass(frozen=True)
class Split:
    """How validation is held out and what is left out; fields as in PrepareConfig, one of the first three is set."""

    val_fraction: float | None
    val_documents: int | None
    val_ids: tuple[str, ...]
    tokens_per_shard: int
    exact_dedup: bool


@functools.lru_cache(maxsize=1)  # a worker has many tasks
def _opened(folder: str | None, sha256: str) -> Tokenizer:
    found = open_tokenizer(folder)
    if found.fingerprint != sha256:
        raise UserError(f"{folder} has changed since this preparation began: start it again with --overwrite true")
    return found


@dataclass(frozen=True)
class Encoder:
    """The tokenizer of a preparation, by its name and where every worker finds it; GPT-2's comes with the package."""

    name: str = GPT2
    folder: str | None = None
    sha256: str = ""

    def open(self) -> Tokenizer:
        """Raises UserError where it has changed."""
        return _opened(self.folder, self.sha256) if self.folder else open_tokenizer(None)


def tokenizer_entry(tokenizer: Tokenizer, name: str | None = None) -> str | dict[str, str]:
    """What a manifest says of it: "gpt2" of the shipped one."""
    return GPT2 if tokenizer.is_gpt2 else {"name": name or tokenizer.name, "sha256": tokenizer.fingerprint}


@dataclass(frozen=True)
class WriteTokens:
    """Pipeline step. With `stop` an unusable document raises ValueError, in one line that says where it is."""

    folder: str
    val_ids: tuple[str, ...]
    stop: bool = False
    encoder: Encoder = Encoder()

    def __call__(self, data: "Iterable[Document]", rank: int, world_size: int) -> None:
        base = f"{self.folder}/{rank:05d}"
        tokenizer = self.encoder.open()
        tally = Tally()
        read = tally.counts["read"]
        read.update(documents=0, bytes=0)
        token_end = byte_end = 0
        # Renamed when whole: a worker that outlived a killed run may still be writing the same part.
        mine = f".{platform.node()}-{os.getpid()}"
        with (
            open(f"{base}.ds{mine}", "wb", 2**20) as tokens_file,
            open(f"{base}.docs{mine}", "wb", 2**14) as records_file,
        ):
            for document in data:
                text, place = document.text, document.metadata
                reason = place.get("skipped")
                if reason is None:
                    try:
                        tokens = tokenizer.encode_document(text)
                    except UnicodeError as error:
                        reason, place["detail"] = "surrogate", str(error)
                raw = text.encode(errors="surrogatepass")  # after the encoder, which makes Python keep a copy of it
                n_bytes, text_hash = len(raw), hashlib.blake2b(raw, digest_size=8).digest()
                del raw  # 50 MB, perhaps
                if reason != "damaged":  # that is a file, not a document
                    read.update(documents=1, bytes=n_bytes)
                if reason is not None:
                    tally.add(reason, place, text, n_bytes)
                    if self.stop:
                        stop_at_errors(tally)
                    continue
                if reported := place.get("reported"):
                    tally.add(reported, place, text, kept=True)
                token_end += len(tokens)
                byte_end += int(tokenizer.token_byte_lengths[tokens].sum()) if tokenizer.normalizes else n_bytes
                tokens_file.write(tokens.data)
                at = place.get("line", place.get("offset", 0))
                if named := document.id in self.val_ids:
                    tally.named.add(document.id)
                key = int.from_bytes(text_hash, "little")
                record = (token_end, byte_end, key, at, place.get("piece", 0), named)
                records_file.write(np.array(record, dtype=RECORD).tobytes())
        for kind in ("ds", "docs"):
            os.replace(f"{base}.{kind}{mine}", f"{base}.{kind}")
        Path(f"{base}.json").write_text(json.dumps(tally.as_json()), encoding="utf-8")


def stop_at_errors(tally: Tally) -> None:
    """Raise ValueError, naming the first, if documents were dropped that were at fault themselves."""
    if first := next((report for report in tally.reports if report["reason"] in ERRORS), None):
        add_line_numbers([first])
        raise UserError(f"{sentence(first)} (to leave such documents out: --on_error skip)")


@dataclass(frozen=True)
class WriteShards:
    """Pipeline step, one task for all parts. `config` and `source` go into the manifest as they are."""

    out: str
    work: str  # the folder of the parts
    split: Split
    tasks: list[list[Piece]] = field(repr=False)
    config: dict[str, Any]
    source: dict[str, Any]
    unread: dict[str, int] = field(default_factory=dict)  # files by their ending, for the report
    stop: bool = False
    encoder: Encoder = Encoder()

    def __call__(self, data: Any, rank: int, world_size: int) -> None:
        out = Path(self.out)
        parts = [Path(self.work, f"{task:05d}") for task in range(len(self.tasks))]
        tally = Tally()
        for part in parts:
            tally.include(json.loads(part.with_suffix(".json").read_text(encoding="utf-8")))
        if self.stop:  # an earlier start may have skipped them
            stop_at_errors(tally)
        records = _Records(parts)
        if self.split.exact_dedup:
            self._drop_copies(records, parts, tally)
        if records.dropped.all():
            self._complain_of_nothing(tally)
        if missing := sorted(set(self.split.val_ids) - tally.named):
            raise UserError(
                f"val_ids: found {len(tally.named)} of {len(self.split.val_ids)} documents, not {missing}: check the "
                "field id, and whether they were dropped"
            )
        splits = self._cut_shards(records, parts)
        write_reports(out, tally, self.source, splits, self.unread)
        tokenizer = self._tokenizer
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "tokenizer": tokenizer_entry(tokenizer, self.encoder.name),
            "vocab_size": tokenizer.vocab_size,
            "dtype": tokenizer.dtype.name,
            "eot": tokenizer.eot,
            "config": self.config,
            "source": self.source,
            "dropped": dict(sorted(tally.counts["dropped"].items())),
            "splits": splits,
        }
        write_json(out / "manifest.json", manifest)
        for name, got in splits.items():
            print(f"{name}: {got['tokens']:,} tokens, {got['documents']:,} documents, {len(got['shards'])} shard(s)")

    @property
    def _tokenizer(self) -> Tokenizer:
        return self.encoder.open()

    def _part(self, part: Path) -> np.ndarray:
        """All tokens of a part, mapped."""
        return np.memmap(part.with_suffix(".ds"), self._tokenizer.dtype, "r")

    def _writer(self, split: str) -> "_ShardWriter":
        return _ShardWriter(
            Path(self.out), split, self.split.tokens_per_shard, self.encoder.name, self._tokenizer.dtype
        )

    def _drop_copies(self, records: "_Records", parts: list[Path], tally: Tally) -> None:
        """Drop all but the first document of each text."""
        copies, originals = records.copies()
        records.dropped[copies] = True
        tally.counts["dropped"].update(exact_duplicate=len(copies))
        tally.bytes.update(exact_duplicate=int(records.sizes[copies].sum()))
        for copy, original in zip(copies[:REPORTS_PER_TASK].tolist(), originals.tolist(), strict=False):
            first, place = self._place(records, parts, original), self._place(records, parts, copy)
            at = next(f"{key} {first[key]:,}" for key in ("line", "offset") if key in first)
            tally.show("exact_duplicate", place | {"detail": f"as {first['file']}, {at}"}, place["text"])

    def _place(self, records: "_Records", parts: list[Path], document: int) -> dict[str, Any]:
        """Where a document was read, and how its text begins."""
        part, index = records.locate(document)
        rows = read_records(parts[part])
        piece = self.tasks[part][rows[index]["piece"]]
        begin = int(rows[index - 1]["token_end"]) if index else 0
        tokens = self._part(parts[part])[begin : int(rows[index]["token_end"]) - 1]
        text = self._tokenizer.decode(tokens[: 4 * EXCERPT])[:EXCERPT]  # no character has more bytes
        at = "offset" if piece.kind == "bytes" and self.config["separator"] is None else "line"
        return {"file": piece.path, at: int(rows[index]["place"]), "text": text}

    def _cut_shards(self, records: "_Records", parts: list[Path]) -> dict[str, Any]:
        """Join the parts into the shards of each split; return the manifest's "splits"."""
        if (kept := np.flatnonzero(~records.dropped)).size == 1 and self.split.val_fraction:
            return self._divide(records, parts, int(kept[0]))
        last_key = self._last_val_key(records)
        # Equal texts stay together.
        held_out = np.isin(records.hashes, records.hashes[records.named & ~records.dropped])
        if last_key is not None:
            held_out = records.hashes <= last_key
        # 0 for training, 1 for validation, 2 for neither.
        labels = np.where(records.dropped, 2, held_out)
        splits = ("train", "val")
        writers = [self._writer(split) for split in splits]
        for number, part in enumerate(parts):
            rows = read_records(part)
            if not len(rows):
                continue
            tokens = self._part(part)
            if len(tokens) != rows[-1]["token_end"]:
                raise OSError(
                    f"{part}.ds has {len(tokens)} tokens, not {rows[-1]['token_end']}: delete {self.out} and repeat"
                )
            label = labels[records.firsts[number] : records.firsts[number + 1]]
            borders = [0, *(np.flatnonzero(np.diff(label)) + 1).tolist(), len(rows)]
            for first, end in itertools.pairwise(borders):
                if label[first] < 2:
                    writers[label[first]].write(tokens, rows, first, end)
        written = {split: writer.close() for split, writer in zip(splits, writers, strict=True)}
        if not written["train"]["documents"]:
            raise UserError(
                f"all {written['val']['documents']} documents fell to validation, none to training: "
                "hold out fewer, or pass --val_fraction 0"
            )
        return written

    def _divide(self, records: "_Records", parts: list[Path], document: int) -> dict[str, Any]:
        """One document alone: its end is held out, at a line's end where there is one."""
        part, index = records.locate(document)
        rows = read_records(parts[part])
        begin = int(rows[index - 1]["token_end"]) if index else 0
        tokens = np.array(self._part(parts[part])[begin : int(rows[index]["token_end"]) - 1])
        if len(tokens) < 2:
            raise UserError("there is one document of one token: prepare more text, or pass --val_fraction 0")
        assert self.split.val_fraction
        held_out = max(int(len(tokens) * self.split.val_fraction), min(LEAST_HELD_OUT, len(tokens) // 10), 1)
        cut = len(tokens) - held_out
        tokenizer = self._tokenizer
        for near in range(cut, max(cut - NEAR, 1), -1):
            if tokenizer.token_bytes[tokens[near - 1]].endswith(b"\n"):
                cut = near
                break
        print(f"one document: its last {len(tokens) - cut:,} of {len(tokens):,} tokens are held out for validation")
        written = {}
        for split, share in (("train", tokens[:cut]), ("val", tokens[cut:])):
            writer = self._writer(split)
            row = np.zeros(1, RECORD)
            row["token_end"], row["byte_end"] = len(share) + 1, tokenizer.token_byte_lengths[share].sum()
            writer.write(np.append(share, tokenizer.eot).astype(tokenizer.dtype), row, 0, 1)
            written[split] = writer.close()
        return written

    def _complain_of_nothing(self, tally: Tally) -> None:
        where = ", ".join(self.config["inputs"]) or self.config["dataset"]
        counts = ", ".join(f"{count:,} {reason}" for reason, count in tally.counts["dropped"].most_common())
        add_line_numbers(tally.reports)
        first = f"; dropped: {counts}; the first: {sentence(tally.reports[0])}" if tally.reports else ""
        raise UserError(f"no documents in {where} (text field {self.config['text_field']!r}, --text_field){first}")

    def _last_val_key(self, records: "_Records") -> int | None:
        """The largest hash of the documents that go to validation; None when hashes do not decide."""
        kept, split = records.hashes[~records.dropped], self.split
        if split.val_ids:
            return None
        if split.val_documents is not None:
            count = min(split.val_documents, len(kept))
            return int(np.partition(kept, count - 1)[count - 1]) if count else None
        if not split.val_fraction:
            return None
        last_key = max(int(split.val_fraction * 2**64) - 1, int(kept.min()))  # at least one document
        return last_key if split.val_fraction != VAL_FRACTION else max(last_key, self._key_of_enough(records))

    def _key_of_enough(self, records: "_Records") -> int:
        """The largest hash of the documents that make `LEAST_HELD_OUT`, or a tenth of a small corpus; at most half."""
        kept = ~records.dropped
        keys, number = np.unique(records.hashes[kept], return_inverse=True)
        so_far = np.cumsum(np.bincount(number, records.sizes[kept].astype(np.int64)))
        enough = min(LEAST_HELD_OUT * BYTES_PER_TOKEN, so_far[-1] / 10)
        most = max(int(np.searchsorted(so_far, so_far[-1] / 2, "right")) - 1, 0)
        return int(keys[min(int(np.searchsorted(so_far, enough)), most)])


class _Records:
    """What is needed of all documents at once, in the order in which they were read: 18 bytes of each."""

    def __init__(self, parts: list[Path]) -> None:
        self.firsts = np.zeros(len(parts) + 1, np.int64)  # first document of each part
        found: dict[str, list[np.ndarray]] = {"hash": [], "named": [], "size": []}
        for number, part in enumerate(parts):
            rows = read_records(part)
            self.firsts[number + 1] = self.firsts[number] + len(rows)
            found["hash"].append(rows["hash"].copy())
            found["named"].append(rows["named"].copy())
            found["size"].append(np.diff(rows["byte_end"], prepend=np.uint64(0)))
        self.hashes, self.named, self.sizes = (np.concatenate(arrays) for arrays in found.values())
        self.dropped = np.zeros(len(self.hashes), bool)

    def copies(self) -> tuple[np.ndarray, np.ndarray]:
        """The documents whose text was read before, in order, and for each the document that it repeats."""
        # The sort is stable: of equal texts the first one leads, or the one that was named for validation.
        order = np.lexsort((~self.named, self.sizes, self.hashes))
        same = (np.diff(self.hashes[order]) == 0) & (np.diff(self.sizes[order]) == 0)
        leads = np.concatenate([np.ones(min(1, len(order)), bool), ~same])
        leader = order[np.maximum.accumulate(np.where(leads, np.arange(len(order)), 0))]
        by_place = np.argsort(order[~leads], kind="stable")
        return order[~leads][by_place], leader[~leads][by_place]

    def locate(self, document: int) -> tuple[int, int]:
        """The part that a document is in, and its number there."""
        part = int(np.searchsorted(self.firsts, document, side="right")) - 1
        return part, document - int(self.firsts[part])


def read_records(part: Path) -> np.ndarray:
    """The RECORD of each document of a part; (documents,)."""
    return np.fromfile(part.with_suffix(".docs"), RECORD)


def written_so_far(folder: Path) -> tuple[int, int]:
    """Documents, and bytes of their text, in the parts in a folder that are written or being written."""
    documents = n_bytes = 0
    for path in folder.glob("*.docs*"):
        with contextlib.suppress(FileNotFoundError):  # it may be renamed meanwhile
            if count := path.stat().st_size // RECORD.itemsize:
                (last,) = np.fromfile(path, RECORD, 1, offset=(count - 1) * RECORD.itemsize)
                documents += count
                n_bytes += int(last["byte_end"])
    return documents, n_bytes


def write_json(path: Path, value: Any) -> None:
    """All of it or nothing, whenever the process dies."""
    with whole_file(path) as file:
        file.write((json.dumps(value, indent=1) + "\n").encode())


class _ShardWriter:
    """Writes one split's shards; a document is never divided."""

    def __init__(self, out: Path, split: str, tokens_per_shard: int, tokenizer: str, dtype: np.dtype) -> None:
        shutil.rmtree(out / split, ignore_errors=True)
        (out / split).mkdir()
        self.out, self.split, self.tokens_per_shard = out, split, tokens_per_shard
        self.tokenizer, self.dtype = tokenizer, dtype
        self.shards: list[dict[str, Any]] = []
        self.files: tuple[IO[bytes], IO[bytes]] | None = None

    def write(self, tokens: np.ndarray, records: np.ndarray, first: int, end: int) -> None:
        """Append documents [first, end) of a part, whose tokens are `tokens`."""
        while first < end:
            if self.files is None:
                self._open_shard()
            assert self.files is not None
            shard = self.shards[-1]
            begin = records[first - 1] if first else np.zeros((), RECORD)
            ends = records["token_end"][first:end] - begin["token_end"] + np.uint64(shard["tokens"])
            count = min(int(np.searchsorted(ends, self.tokens_per_shard)) + 1, end - first)
            last = records[first + count - 1]
            for start in range(int(begin["token_end"]), int(last["token_end"]), COPY_TOKENS):
                self._append(0, tokens[start : min(start + COPY_TOKENS, int(last["token_end"]))].tobytes())
            self._append(1, ends[:count].astype("<u8").tobytes())
            shard["tokens"] = int(ends[count - 1])
            shard["documents"] += count
            shard["bytes"] += int(last["byte_end"] - begin["byte_end"])
            first += count
            if shard["tokens"] >= self.tokens_per_shard:
                self._close_shard()

    def close(self) -> dict[str, Any]:
        """Finish the last shard; return the split's entry of the manifest."""
        if self.files:
            self._close_shard()
        to_disk(self.out / self.split)
        to_disk(self.out)
        totals = {key: sum(shard[key] for shard in self.shards) for key in ("tokens", "documents", "bytes")}
        return totals | {"shards": self.shards}

    def _append(self, which: int, block: bytes) -> None:
        assert self.files is not None
        self.files[which].write(block)
        self.sha256[which].update(block)

    def _open_shard(self) -> None:
        name = f"{self.split}/{len(self.shards):05d}.ds"
        tokens_path, index_path = self.out / name, self.out / f"{name}.index"
        self.files = tokens_path.open("wb"), index_path.open("wb")  # closed in _close_shard
        self.shards.append({"file": name, "tokens": 0, "documents": 0, "bytes": 0})
        self.sha256 = (hashlib.sha256(), hashlib.sha256())

    def _close_shard(self) -> None:
        import humanize  # comes with datatrove

        assert self.files is not None
        for file in self.files:
            to_disk(file)
            file.close()
        self.files = None
        shard = self.shards[-1]
        path = self.out / shard["file"]
        shard["sha256_of_samples"] = sample_digest(np.memmap(path, self.dtype, "r"))
        shard["sha256"], shard["index_sha256"] = (digest.hexdigest() for digest in self.sha256)
        count = shard["tokens"]
        # As datatrove's own writer: tokenizer and bytes per token, tokens, tokens for people.
        metadata = f"{self.tokenizer}|{self.dtype.itemsize}\n{count}\n{humanize.metric(count, unit='T')}"
        (self.out / f"{shard['file']}.metadata").write_text(metadata, encoding="utf-8")
