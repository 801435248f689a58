"""Documents -> token shards: a datatrove pipeline of two steps, then one pass that cuts the shards.

    inputs -> tasks -> [ReadDocuments -> WriteTokens] by N workers -> parts/ -> train/, val/, manifest.json

Tasks follow from the inputs alone (files, and byte ranges of large ones), and parts are joined in the order of the
tasks, so the shards do not depend on the number of workers. A document goes to validation by a hash of its text:
equal texts stay on one side, and the same text goes the same way from a .txt, a .jsonl or a .parquet file.

The shards are datatrove's: `NNNNN.ds` (uint16 tokens, little-endian), `NNNNN.ds.index` (uint64, where each document
ends, in tokens) and `NNNNN.ds.metadata`. A run that was killed goes on with the tasks that it had not finished.
"""

import contextlib
import glob
import gzip
import hashlib
import io
import itertools
import json
import os
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO, Any

import numpy as np

from .tokenizer import ASSETS, EOT, VOCAB_SIZE, encode_document, token_byte_lengths

TASK_BYTES = 64 * 2**20  # input bytes of one task: large .jsonl files are cut, small files are put together
REPORTS_PER_TASK = 1000  # skipped documents that are listed one by one; all are counted
COPY_TOKENS = 2**23
SHAKESPEARE_VAL = ("a-midsummer-night-s-dream", "macbeth")
SUFFIXES = (".txt", ".jsonl", ".ndjson", ".parquet")
# A part's side file has one record per document: where it ends in tokens and in UTF-8 bytes, and its place in the split.
RECORD = np.dtype([("token_end", "<u8"), ("byte_end", "<u8"), ("key", "<u8")])


@dataclass(frozen=True)
class PrepareConfig:
    """What to turn into token shards, and how.

    Args:
        inputs: .txt, .jsonl, .ndjson (also .gz, .zst) or .parquet files, folders or globs; "shakespeare" is built in.
        dataset: instead of inputs, a dataset on the Hub (streamed) or a folder that save_to_disk wrote.
        name: configuration of the Hub dataset, such as sample-10BT.
        revision: commit, tag or branch of the Hub dataset.
        split: split of the dataset to read.
        text_field: field or column that has the text; a .txt file is one document.
        out: folder to write to.
        workers: processes; 0 means one per core. The shards do not depend on it.
        tokens_per_shard: a new shard starts when the last one has this many tokens.
        val_fraction: share of the documents held out for validation, 0 for none (default 0.01).
        val_documents: or the number of documents held out (copies of one text stay together).
        val_ids: or the ids of the documents held out (field "id"; for a .txt file its name without suffix).
        overwrite: replace what the folder holds if something else was prepared there.
    """

    inputs: tuple[str, ...] = ()
    dataset: str | None = None
    name: str | None = None
    revision: str | None = None
    split: str = "train"
    text_field: str = "text"
    out: str = ""
    workers: int = 0
    tokens_per_shard: int = 100_000_000
    val_fraction: float | None = None
    val_documents: int | None = None
    val_ids: tuple[str, ...] = ()
    overwrite: bool = False

    def __post_init__(self) -> None:
        if bool(self.inputs) == bool(self.dataset):
            raise ValueError(f"inputs is {list(self.inputs)} and dataset is {self.dataset}: name one of the two")
        if not self.out:
            raise ValueError("out is empty: name the folder to write to, such as --out data/mine")
        if self.workers < 0 or self.tokens_per_shard < 1:
            raise ValueError(
                f"workers={self.workers}, tokens_per_shard={self.tokens_per_shard}: workers must be >= 0 and "
                "tokens_per_shard >= 1"
            )
        if (self.val_fraction is not None) + (self.val_documents is not None) + bool(self.val_ids) > 1:
            raise ValueError("val_fraction, val_documents and val_ids are set together: keep one of them")
        if self.val_fraction is not None and not 0 <= self.val_fraction < 1:
            raise ValueError(f"val_fraction is {self.val_fraction}: choose 0 <= val_fraction < 1")
        if self.val_documents is not None and self.val_documents < 0:
            raise ValueError(f"val_documents is {self.val_documents}: choose 0 or more")

    def resolved(self) -> "PrepareConfig":
        """The same with the validation split's default filled in."""
        if self.val_fraction is not None or self.val_documents is not None or self.val_ids:
            return self
        default = {"val_ids": SHAKESPEARE_VAL} if self.inputs == ("shakespeare",) else {"val_fraction": 0.01}
        return PrepareConfig(**(asdict(self) | default))

    def recorded(self) -> dict[str, Any]:
        """What the shards depend on, as JSON: no worker count, and names in place of local paths."""
        values = asdict(self)
        for field in ("out", "workers", "overwrite"):
            del values[field]
        values["inputs"] = [Path(item).name for item in self.inputs]
        values["val_ids"] = list(self.val_ids)
        if self.dataset and Path(self.dataset).is_dir():
            values["dataset"] = Path(self.dataset).name
        return values


@dataclass(frozen=True)
class Piece:
    """Part of the input: bytes [start, end) of a file, or shard `start` of `end` of a dataset when path is empty."""

    path: str
    start: int
    end: int


def prepare(config: PrepareConfig) -> Path:
    """Write the shards of `config.inputs` or `config.dataset` under `config.out`; return the manifest's path.

    A folder that already holds the result is left as it is, one that holds something else is refused unless
    `config.overwrite`. Raises ValueError or OSError with one line that says what to do.
    """
    config = config.resolved()
    out = Path(config.out)
    manifest_path = out / "manifest.json"
    recorded = config.recorded()
    if manifest_path.exists() and not config.overwrite:
        done = json.loads(manifest_path.read_text(encoding="utf-8"))
        if done.get("config") != recorded:
            raise ValueError(f"{out} was prepared with other settings ({_difference(done, recorded)}): {_REMEDY}")
        if config.inputs and _inputs_changed(config, done):
            raise ValueError(f"{out} was prepared from inputs that have changed since: {_REMEDY}")
        shutil.rmtree(out / "parts", ignore_errors=True)
        print(f"{manifest_path}: already prepared")
        return manifest_path

    source, tasks = _plan(config)
    plan = {"config": recorded, "source": source, "task_bytes": TASK_BYTES}
    _start_or_resume(out, plan, config.overwrite)
    _run_tasks(config, source, tasks)
    reports = [json.loads((out / "parts" / f"{rank:05d}.json").read_text("utf-8")) for rank in range(len(tasks))]
    skipped = _report_skipped(out, reports)
    manifest = {
        "format": "gpt2_hf/shards",
        "version": 1,
        "tokenizer": "gpt2",
        "vocab_size": VOCAB_SIZE,
        "dtype": "uint16",
        "eot": EOT,
        "config": recorded,
        "source": source,
        "splits": _cut_shards(config, len(tasks)),
        "skipped": skipped,
    }
    partial = manifest_path.with_suffix(".json.tmp")
    partial.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    partial.replace(manifest_path)
    shutil.rmtree(out / "parts")
    for split, got in manifest["splits"].items():
        print(f"{split}: {got['tokens']:,} tokens, {got['documents']:,} documents, {len(got['shards'])} shards")
    print(f"{manifest_path}: written")
    return manifest_path


# --- what there is to read ---------------------------------------------------------------------------------------

_REMEDY = "choose another --out, or pass --overwrite true"


def _difference(done: dict[str, Any], wanted: dict[str, Any]) -> str:
    old = done.get("config", {})
    return ", ".join(f"{key} {old.get(key)} -> {value}" for key, value in wanted.items() if old.get(key) != value)


def _inputs_changed(config: PrepareConfig, done: dict[str, Any]) -> bool:
    """Whether the inputs are still there and differ; shards whose inputs were deleted stay good."""
    try:
        return _describe(_find_files(config.inputs)) != done.get("source")
    except FileNotFoundError:
        return False


def _plan(config: PrepareConfig) -> tuple[dict[str, Any], list[list[Piece]]]:
    """What is read, for the manifest, and the pieces of each task."""
    if config.dataset:
        return _plan_dataset(config)
    files = _find_files(config.inputs)
    tasks: list[list[Piece]] = [[]]
    room = TASK_BYTES
    for path in files:
        size = path.stat().st_size
        step = TASK_BYTES if path.suffix in (".jsonl", ".ndjson") else max(size, 1)
        for start in range(0, max(size, 1), step):
            end = min(start + step, size)
            if tasks[-1] and end - start > room:
                tasks.append([])
                room = TASK_BYTES
            tasks[-1].append(Piece(str(path), start, end))
            room -= end - start
    return _describe(files), tasks


def _describe(files: list[Path]) -> dict[str, Any]:
    listing = [(path.name, path.stat().st_size) for path in files]
    digest = hashlib.sha256(json.dumps(listing).encode()).hexdigest()
    return {"files": len(files), "bytes": sum(size for _, size in listing), "names_and_sizes_sha256": digest}


def _find_files(inputs: Iterable[str]) -> list[Path]:
    """The files to read, in the order of the inputs, by name inside a folder or glob, each once."""
    found: dict[Path, Path] = {}
    for item in inputs:
        if item == "shakespeare" and not Path(item).exists():
            item = str(ASSETS / "shakespeare.jsonl.gz")
        if Path(item).is_dir():
            paths = [path for path in Path(item).rglob("*") if path.is_file() and _format(path)]
        elif Path(item).is_file():
            paths = [Path(item)]
        else:
            paths = [Path(path) for path in glob.glob(item, recursive=True) if Path(path).is_file()]
        if not paths:
            raise FileNotFoundError(f"{item}: no such file, or a folder without {', '.join(SUFFIXES)}: check the path")
        for path in sorted(paths):
            if not _format(path):
                raise ValueError(f"{path}: not one of {', '.join(SUFFIXES)} (or .gz, .zst of text): convert it first")
            found.setdefault(path.resolve(), path)
    return list(found.values())


def _format(path: Path) -> str | None:
    """The suffix without compression, if it is one that we read."""
    suffix = Path(path.stem).suffix if path.suffix in (".gz", ".zst") else path.suffix
    compressed_table = path.suffix != suffix and suffix == ".parquet"
    return suffix if suffix in SUFFIXES and not compressed_table and not path.name.startswith(".") else None


def _plan_dataset(config: PrepareConfig) -> tuple[dict[str, Any], list[list[Piece]]]:
    """One task per file of a dataset that is streamed, one per TASK_BYTES of a saved one."""
    revision = config.revision
    try:
        if not Path(str(config.dataset)).is_dir():
            from huggingface_hub import HfApi

            # Every task must read one and the same commit, even if the dataset changes during the run.
            revision = HfApi().dataset_info(str(config.dataset), revision=config.revision, timeout=10).sha
        rows = _load_dataset(config, revision)
        count = rows.num_shards if hasattr(rows, "num_shards") else -(-rows.data.nbytes // TASK_BYTES)
    except Exception as error:  # the clients' own exceptions have no common base
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise OSError(
            f"dataset {config.dataset}: {reason.rstrip('. ')}: check name, configuration, split and network, "
            "or pass local files"
        ) from error
    count = max(count, 1)
    return {"revision": revision, "tasks": count}, [[Piece("", index, count)] for index in range(count)]


def _load_dataset(config: PrepareConfig, revision: str | None) -> Any:
    """A map-style dataset for a folder of save_to_disk, else a streamed one."""
    import datasets

    datasets.disable_progress_bars()
    folder = Path(str(config.dataset))
    if (folder / "dataset_dict.json").exists():
        folder /= config.split
    if (folder / "state.json").exists():
        return datasets.load_from_disk(str(folder))
    return datasets.load_dataset(
        str(config.dataset), config.name, split=config.split, revision=revision, streaming=True
    )


def _start_or_resume(out: Path, plan: dict[str, Any], overwrite: bool) -> None:
    """Leave finished tasks of the same plan in place; clear what another plan left, if that is allowed."""
    plan_path = out / "parts" / "plan.json"
    if plan_path.exists() and not (out / "manifest.json").exists():
        if json.loads(plan_path.read_text(encoding="utf-8")) == plan:
            print(f"{out}: going on with an unfinished preparation")
            return
        if not overwrite:
            raise ValueError(f"{out} holds an unfinished preparation of something else: {_REMEDY}")
    (out / "manifest.json").unlink(missing_ok=True)  # first, so that a half-cleared folder never looks finished
    for name in ("parts", "train", "val", "logs"):
        shutil.rmtree(out / name, ignore_errors=True)
    plan_path.parent.mkdir(parents=True)
    partial = plan_path.with_suffix(".tmp")
    partial.write_text(json.dumps(plan), encoding="utf-8")
    partial.replace(plan_path)


# --- the pipeline ------------------------------------------------------------------------------------------------


def _run_tasks(config: PrepareConfig, source: dict[str, Any], tasks: list[list[Piece]]) -> None:
    from datatrove.executor.local import LocalPipelineExecutor

    out = Path(config.out)
    workers = min(config.workers or len(os.sched_getaffinity(0)), len(tasks))
    steps: list[Callable] = [
        ReadDocuments(config, tasks, source.get("revision")),
        WriteTokens(str(out / "parts"), config.val_ids),
    ]
    (out / "logs").mkdir(parents=True, exist_ok=True)
    log = out / "logs" / "datatrove.log"
    print(f"{len(tasks)} tasks, {workers} workers; datatrove's log: {log}", flush=True)
    with _progress(out / "parts", len(tasks)), _stderr_to(log):
        executor = LocalPipelineExecutor(steps, tasks=len(tasks), workers=workers, logging_dir=str(out / "logs"))
        executor.run()


@dataclass
class ReadDocuments:
    """First step (datatrove takes any callable): the documents of task `rank`; what it skips goes along as `None`.

    A skipped document is passed on as a Document with an empty text and its reason and place in `metadata`.
    """

    config: PrepareConfig
    tasks: list[list[Piece]]
    revision: str | None

    def __call__(self, data: Any, rank: int, world_size: int) -> Iterator[Any]:
        from datatrove.data import Document

        for piece in self.tasks[rank]:
            for text, name, place, problem in self._read(piece):
                if problem is None and not isinstance(text, str):
                    problem = "no_text"
                elif problem is None and not text.strip():
                    problem = "empty"
                metadata = {"skipped": problem, "place": place} if problem else {}
                yield Document(text="" if problem else text, id=name, metadata=metadata)

    def _read(self, piece: Piece) -> Iterator[tuple[Any, str, str, str | None]]:
        """Text, id, place ("file:line") and problem of each document."""
        path = Path(piece.path)
        if not piece.path:
            yield from self._read_dataset(piece)
            return
        try:
            kind = _format(path)
            if kind == ".parquet":
                yield from self._read_parquet(path)
            elif kind == ".txt":
                yield _read_text(path)
            else:
                yield from self._read_lines(piece)
        except (EOFError, gzip.BadGzipFile, *_damage()) as error:
            raise ValueError(f"{path}: damaged ({error}): fetch the file again, or leave it out") from error

    def _read_lines(self, piece: Piece) -> Iterator[tuple[Any, str, str, str | None]]:
        path = Path(piece.path)
        whole = path.suffix in (".gz", ".zst")
        with _open(path) as file:
            first = 1
            if not whole and piece.start:
                # A line belongs to the piece in which it begins.
                first += _count_lines(path, piece.start)
                file.seek(piece.start - 1)
                first += file.readline() != b"\n"
            position = file.tell() if not whole else 0
            for number in itertools.count(first):
                if not whole and position >= piece.end:
                    return
                line = file.readline()
                if not line:
                    return
                position += len(line)
                place = f"{path.name}:{number}"
                try:
                    row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8")) if line.strip() else None
                except ValueError:  # not JSON, or not UTF-8
                    yield "", "", place, "broken"
                    continue
                if not line.strip():
                    continue
                if not isinstance(row, dict):
                    yield "", "", place, "broken"
                    continue
                yield row.get(self.config.text_field), str(row.get("id", place)), place, None

    def _read_parquet(self, path: Path) -> Iterator[tuple[Any, str, str, str | None]]:
        import pyarrow.parquet

        field = self.config.text_field
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            self._check_columns(str(path), names)
            number = 0
            for batch in file.iter_batches(
                batch_size=256, columns=[c for c in dict.fromkeys((field, "id")) if c in names]
            ):
                for row in batch.to_pylist():
                    number += 1
                    place = f"{path.name}:{number}"
                    yield row[field], str(row.get("id", place)), place, None

    def _read_dataset(self, piece: Piece) -> Iterator[tuple[Any, str, str, str | None]]:
        rows = _load_dataset(self.config, self.revision)
        if rows.column_names:
            self._check_columns(str(self.config.dataset), rows.column_names)
            field = self.config.text_field
            rows = rows.select_columns([c for c in dict.fromkeys((field, "id")) if c in rows.column_names])
        rows = rows.shard(num_shards=piece.end, index=piece.start, contiguous=True)
        for number, row in enumerate(rows, 1):
            place = f"{self.config.dataset} {piece.start + 1}/{piece.end}:{number}"
            yield row.get(self.config.text_field), str(row.get("id", place)), place, None

    def _check_columns(self, where: str, names: list[str]) -> None:
        if self.config.text_field not in names:
            raise ValueError(f"{where}: no column {self.config.text_field!r} among {names}: set --text_field")
