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
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from .tokenizer import ASSETS, EOT, VOCAB_SIZE, encode_document, token_byte_lengths

if TYPE_CHECKING:
    from datatrove.data import Document

TASK_BYTES = 64 * 2**20  # input bytes of one task: large .jsonl files are cut, small files are put together
REPORTS_PER_TASK = 1000  # skipped documents that are listed one by one; all are counted
COPY_TOKENS = 2**23
SHAKESPEARE_VAL = ("a-midsummer-night-s-dream", "macbeth")
SUFFIXES = (".txt", ".jsonl", ".ndjson", ".parquet")
REASONS = {
    "empty": "empty text",
    "broken": "not valid UTF-8 or JSON",
    "no_text": "no text in the text field",
    "surrogate": "not valid Unicode",
}
# Kept of each document beside its tokens: where it ends, in tokens and in bytes of text, and what the split goes by.
RECORD = np.dtype([("token_end", "<u8"), ("byte_end", "<u8"), ("key", "<u8")])
Row = tuple[Any, dict[str, Any]]  # a document's fields (None if it was not readable), and where it stands
OUR_FOLDERS = ("train", "val", "logs")
REMEDY = "choose another --out, or pass --overwrite true"


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
        if self.inputs == ("shakespeare",):
            return replace(self, val_ids=SHAKESPEARE_VAL)
        return replace(self, val_fraction=0.01)

    def recorded(self) -> dict[str, Any]:
        """What the shards depend on, as JSON: no worker count, and names in place of local paths."""
        values = asdict(self)
        for name in ("out", "workers", "overwrite"):
            del values[name]
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
    if manifest_path.exists():
        done = json.loads(manifest_path.read_text(encoding="utf-8"))
        if done.get("format") != "gpt2_hf/shards":
            raise ValueError(f"{manifest_path} was not written by this program: choose another --out")
        if not config.overwrite:
            _check_same(config, done)
            shutil.rmtree(out / "parts", ignore_errors=True)
            print(f"{manifest_path}: already prepared")
            return manifest_path

    source, tasks = _plan(config)
    # The plan is this run's identity: a later start with the same plan goes on with it.
    _start_or_resume(out, {"config": recorded, "source": source, "task_bytes": TASK_BYTES}, config.overwrite)
    _run_tasks(config, source, tasks)
    parts = [out / "parts" / f"{rank:05d}" for rank in range(len(tasks))]
    manifest: dict[str, Any] = {
        "format": "gpt2_hf/shards",
        "version": 1,
        "tokenizer": "gpt2",
        "vocab_size": VOCAB_SIZE,
        "dtype": "uint16",
        "eot": EOT,
        "config": recorded,
        "source": source,
        "skipped": _report_skipped(out, parts),
        "splits": _cut_shards(config, parts),
    }
    _write_json(manifest_path, manifest)
    shutil.rmtree(out / "parts")
    for split, got in manifest["splits"].items():
        print(f"{split}: {got['tokens']:,} tokens, {got['documents']:,} documents, {len(got['shards'])} shard(s)")
    print(f"{manifest_path}: written")
    return manifest_path


# --- what there is to read ---------------------------------------------------------------------------------------


def _check_same(config: PrepareConfig, done: dict[str, Any]) -> None:
    """Raise ValueError unless the manifest `done` is what `config` would give."""
    old, new = done.get("config", {}), config.recorded()
    if old != new:
        changes = ", ".join(f"{key} was {old.get(key)}, now {new[key]}" for key in new if old.get(key) != new[key])
        raise ValueError(f"{config.out} was prepared with other settings ({changes}): {REMEDY}")
    # Shards whose inputs were deleted since stay good.
    with contextlib.suppress(FileNotFoundError):
        if config.inputs and _describe(_find_files(config.inputs)) != done.get("source"):
            raise ValueError(f"{config.out} was prepared from inputs that have changed since: {REMEDY}")


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
        saved = hasattr(rows, "data")
        count = max(-(-rows.data.nbytes // TASK_BYTES) if saved else rows.num_shards, 1)
    except Exception as error:  # the clients' own exceptions have no common base
        raise OSError(
            f"dataset {config.dataset}: {_first_line(error)}: check its name, configuration, split and the network, "
            "or pass local files"
        ) from error
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
    """Keep the finished tasks of the same plan; clear what another one left, if that is allowed."""
    manifest_path, plan_path = out / "manifest.json", out / "parts" / "plan.json"
    if plan_path.exists() and not manifest_path.exists():
        unfinished = json.loads(plan_path.read_text(encoding="utf-8"))
        if unfinished == plan:
            for part in plan_path.parent.glob("*.d*.*"):  # what killed workers had not finished
                part.unlink()
            print(f"{out}: going on with an unfinished preparation")
            return
        if unfinished and not overwrite:
            raise ValueError(f"{out} holds an unfinished preparation of something else: {REMEDY}")
    elif not manifest_path.exists() and (foreign := [name for name in OUR_FOLDERS if (out / name).exists()]):
        raise ValueError(f"{out} holds {', '.join(foreign)} from elsewhere: choose another --out, or move them away")
    plan_path.parent.mkdir(parents=True, exist_ok=True)
    _write_json(plan_path, {})  # if this is cut short, the next start knows that the rest may be cleared
    manifest_path.unlink(missing_ok=True)
    for name in OUR_FOLDERS:
        shutil.rmtree(out / name, ignore_errors=True)
    for part in plan_path.parent.glob("[0-9]*"):
        part.unlink()
    _write_json(plan_path, plan)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    """All of it or nothing, whenever the process dies."""
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


# --- the pipeline ------------------------------------------------------------------------------------------------


def _run_tasks(config: PrepareConfig, source: dict[str, Any], tasks: list[list[Piece]]) -> None:
    from datatrove.executor.local import LocalPipelineExecutor

    out = Path(config.out)
    log = out / "logs" / "datatrove.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(config.workers or cores, len(tasks))
    steps: list[Any] = [
        ReadDocuments(config, tasks, source.get("revision")),
        WriteTokens(str(out / "parts"), config.val_ids),
    ]
    print(f"{out}: {len(tasks)} task(s), {workers} worker(s), log in {log}", flush=True)
    with _progress(out / "parts"), _stderr_to(log):
        LocalPipelineExecutor(steps, tasks=len(tasks), workers=workers, logging_dir=str(log.parent)).run()


@dataclass(frozen=True)
class ReadDocuments:
    """First step (datatrove runs any callable, so this module imports without it): the documents of task `rank`.

    Metadata say where each comes from: "file", and "line" (or the "offset" of the line in bytes). A bad one passes
    with an empty text and "skipped" in its metadata, for the writer to count.
    """

    config: PrepareConfig
    tasks: list[list[Piece]] = field(repr=False)  # datatrove logs every step's repr, for every task
    revision: str | None

    def __call__(self, data: Any, rank: int, world_size: int) -> "Iterator[Document]":
        from datatrove.data import Document

        for piece in self.tasks[rank]:
            for row, place in self._rows(piece):
                text = row.get(self.config.text_field) if isinstance(row, dict) else None
                if not isinstance(row, dict):
                    problem = "broken"
                elif not isinstance(text, str):
                    problem = "no_text"
                elif not text.strip():
                    problem = "empty"
                else:
                    yield Document(text=text, id=str(row.get("id", "")), metadata=place)
                    continue
                yield Document(text="", id="", metadata=place | {"skipped": problem})

    def _rows(self, piece: Piece) -> Iterator[Row]:
        if not piece.path:
            return self._dataset_rows(piece)
        readers = {".txt": self._txt_rows, ".parquet": self._parquet_rows}
        read = readers.get(_format(Path(piece.path)) or "", _json_rows)
        return _name_damage(piece.path, read(piece))

    def _txt_rows(self, piece: Piece) -> Iterator[Row]:
        with _open(piece.path) as file:
            raw = file.read()
        name = Path(piece.path).name.removesuffix(".gz").removesuffix(".zst").removesuffix(".txt")
        try:
            yield {"id": name, self.config.text_field: raw.decode("utf-8-sig")}, {"file": piece.path, "line": 1}
        except UnicodeDecodeError as error:
            yield None, {"file": piece.path, "line": raw.count(b"\n", 0, error.start) + 1}

    def _parquet_rows(self, piece: Piece) -> Iterator[Row]:
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(piece.path) as file:
            columns = self._columns(piece.path, file.schema_arrow.names)
            number = 0
            for batch in file.iter_batches(batch_size=256, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield row, {"file": piece.path, "line": number}

    def _dataset_rows(self, piece: Piece) -> Iterator[Row]:
        rows = _load_dataset(self.config, self.revision)
        if rows.column_names:  # a streamed dataset may not know them
            rows = rows.select_columns(self._columns(str(self.config.dataset), rows.column_names))
        place = f"{self.config.dataset} part {piece.start + 1} of {piece.end}"
        for number, row in enumerate(rows.shard(num_shards=piece.end, index=piece.start, contiguous=True), 1):
            yield row, {"file": place, "line": number}

    def _columns(self, where: str, names: list[str]) -> list[str]:
        if self.config.text_field not in names:
            raise ValueError(f"{where}: no column {self.config.text_field!r} among {names}: set --text_field")
        return [name for name in names if name in (self.config.text_field, "id")]


def _json_rows(piece: Piece) -> Iterator[Row]:
    """The lines that begin inside the piece."""
    compressed = Path(piece.path).suffix in (".gz", ".zst")
    with _open(piece.path) as file:
        position = max(piece.start - 1, 0)
        if piece.start:
            file.seek(position)
            position += len(file.readline())
        number = 0
        while (compressed or position < piece.end) and (line := file.readline()):
            number += 1
            # Inside a large file the number of a line is counted only if it must be reported.
            place = {"file": piece.path} | ({"line": number} if compressed else {"offset": position})
            first = number == 1 if compressed else position == 0
            position += len(line)
            try:
                if text := line.decode("utf-8-sig" if first else "utf-8").strip():
                    yield json.loads(text), place
            except (ValueError, RecursionError):  # not UTF-8, or not JSON
                yield None, place


def _open(path: str) -> io.BufferedIOBase:
    if path.endswith(".gz"):
        return gzip.open(path, "rb")
    if path.endswith(".zst"):
        import pyarrow

        # Unlike zstandard's reader, it raises when the file was cut short.
        return io.BufferedReader(pyarrow.input_stream(path, compression="zstd"), 2**20)
    return open(path, "rb")


def _name_damage(path: str, rows: Iterator[Row]) -> Iterator[Row]:
    """The same rows; a file that cannot be read to its end stops the run, or the rest would be lost silently."""
    try:
        yield from rows
    except _read_errors(path) as error:
        raise OSError(f"{path}: cannot be read ({_first_line(error)}): fetch it again, or leave it out") from error


def _read_errors(path: str) -> tuple[type[Exception], ...]:
    if not path.endswith(".parquet"):
        return (EOFError, OSError, zlib.error)
    import pyarrow

    return (OSError, pyarrow.ArrowInvalid)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__).rstrip(". ")


@dataclass(frozen=True)
class WriteTokens:
    """Second step: the documents as `RANK.ds` in `folder`, a RECORD of each in `RANK.docs`, counts in `RANK.json`."""

    folder: str
    val_ids: tuple[str, ...]

    def __call__(self, data: "Iterable[Document]", rank: int, world_size: int) -> None:
        base = f"{self.folder}/{rank:05d}"
        lengths = token_byte_lengths()
        skipped: Counter[str] = Counter()
        reports: list[dict[str, Any]] = []
        token_end = byte_end = 0
        # Renamed when whole: a worker that outlived a killed run may still be writing the same part.
        mine = f".{os.getpid()}"
        with (
            open(f"{base}.ds{mine}", "wb", 2**20) as tokens_file,
            open(f"{base}.docs{mine}", "wb", 2**14) as records_file,
        ):
            for document in data:
                report = document.metadata
                if "skipped" not in report:
                    try:
                        tokens = encode_document(document.text)
                    except UnicodeError as error:
                        report = report | {"skipped": "surrogate", "detail": str(error)}
                if problem := report.get("skipped"):
                    skipped[problem] += 1
                    if len(reports) < REPORTS_PER_TASK:
                        reports.append(report)
                    continue
                token_end += len(tokens)
                byte_end += int(lengths[tokens].sum())
                tokens_file.write(tokens.astype("<u2", copy=False).tobytes())
                records_file.write(np.array((token_end, byte_end, self._key(document)), dtype=RECORD).tobytes())
        for kind in ("ds", "docs"):
            os.replace(f"{base}.{kind}{mine}", f"{base}.{kind}")
        Path(f"{base}.json").write_text(json.dumps({"skipped": skipped, "reports": reports}), encoding="utf-8")

    def _key(self, document: "Document") -> int:
        """The documents with the smallest keys are held out for validation."""
        if self.val_ids:
            return 0 if document.id in self.val_ids else 1
        return int.from_bytes(hashlib.blake2b(document.text.encode(), digest_size=8).digest(), "little")


@contextlib.contextmanager
def _progress(parts: Path, seconds: float = 5.0) -> Iterator[None]:
    """Print a line of progress now and then, from what the workers have written so far."""

    def count() -> np.ndarray:
        total = np.zeros(2)
        for path in parts.glob("*.docs*"):
            with contextlib.suppress(FileNotFoundError), path.open("rb") as file:  # it may be renamed meanwhile
                documents = path.stat().st_size // RECORD.itemsize
                file.seek(max(documents - 1, 0) * RECORD.itemsize)
                last = np.frombuffer(file.read(RECORD.itemsize)[: RECORD.itemsize * bool(documents)], RECORD)
                total += (documents, last["byte_end"].sum() / 1e6)
        return total

    began, before, stop = time.monotonic(), count(), threading.Event()

    def show() -> None:
        now = count()
        per_second = (now - before) / (time.monotonic() - began)
        print(
            f"{now[0]:,.0f} documents, {now[1]:,.1f} MB of text; "
            f"{per_second[0]:,.0f} documents/s, {per_second[1]:.1f} MB/s",
            flush=True,
        )

    def repeat() -> None:
        while not stop.wait(seconds):
            show()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    show()


@contextlib.contextmanager
def _stderr_to(log: Path) -> Iterator[None]:
    """Send file descriptor 2 to `log`: datatrove insists on logging everything there, in the workers as well."""
    sys.stderr.flush()
    terminal = os.dup(2)
    try:
        with log.open("ab") as file:
            os.dup2(file.fileno(), 2)
        yield
    finally:
        sys.stderr.flush()
        os.dup2(terminal, 2)
        os.close(terminal)


# --- what was written --------------------------------------------------------------------------------------------


def _report_skipped(out: Path, parts: list[Path]) -> dict[str, int]:
    """Count the skipped documents; list them in logs/skipped.txt, and the first few on the terminal."""
    skipped = Counter(dict.fromkeys(REASONS, 0))
    reports: list[dict[str, Any]] = []
    for part in parts:
        found = json.loads(part.with_suffix(".json").read_text(encoding="utf-8"))
        skipped.update(found["skipped"])
        reports += found["reports"]
    if lines := list(_with_line_numbers(reports)):
        listing = out / "logs" / "skipped.txt"
        listing.write_text("\n".join(lines) + "\n", encoding="utf-8")
        counts = ", ".join(f"{count} {problem}" for problem, count in skipped.items() if count)
        print(*lines[:5], f"skipped {skipped.total()} documents ({counts}), listed in {listing}", sep="\n")
    return dict(skipped)


def _with_line_numbers(reports: list[dict[str, Any]]) -> Iterator[str]:
    """ "file:line: reason" of each report; the lines known by their offset are counted in one pass over the file."""
    for path, group in itertools.groupby(reports, key=lambda report: report["file"]):
        line, position = 1, 0
        with contextlib.ExitStack() as stack:
            file: IO[bytes] | None = None
            for report in group:
                if "offset" in report:
                    file = file or stack.enter_context(open(path, "rb"))
                    while block := file.read(min(2**20, report["offset"] - position)):
                        line, position = line + block.count(b"\n"), position + len(block)
                reason = ": ".join(filter(None, (REASONS[report["skipped"]], report.get("detail"))))
                yield f"{path}:{report.get('line', line)}: {reason}"


def _cut_shards(config: PrepareConfig, parts: list[Path]) -> dict[str, Any]:
    """Join the parts, in the order of the tasks, into the shards of each split; return the manifest's "splits"."""
    last_key = _last_val_key(config, parts)
    writers = {split: _ShardWriter(Path(config.out), split, config.tokens_per_shard) for split in ("train", "val")}
    for part in parts:
        records = _records(part)
        if not len(records):
            continue
        tokens = np.memmap(part.with_suffix(".ds"), "<u2", "r")
        if len(tokens) != records[-1]["token_end"]:
            raise OSError(
                f"{part}.ds has {len(tokens)} tokens, not {records[-1]['token_end']}: delete {part.parent} and repeat"
            )
        held_out = np.zeros(len(records), bool) if last_key is None else records["key"] <= last_key
        borders = [0, *(np.flatnonzero(np.diff(held_out)) + 1).tolist(), len(records)]
        for first, end in itertools.pairwise(borders):
            writers["val" if held_out[first] else "train"].write(tokens, records, first, end)
    splits = {split: writer.close() for split, writer in writers.items()}
    if not splits["train"]["documents"]:
        raise ValueError(
            f"all {splits['val']['documents']} documents fell to validation, none to training: "
            "hold out fewer, or pass --val_fraction 0"
        )
    return splits


def _last_val_key(config: PrepareConfig, parts: list[Path]) -> int | None:
    """The largest key that goes to validation; None when nothing does."""
    wanted = config.val_documents or len(config.val_ids) or 1
    smallest, total = np.empty(0, "<u8"), 0
    for part in parts:
        records = _records(part)
        total += len(records)
        smallest = np.sort(np.concatenate([smallest, records["key"]]))[:wanted]
    if not total:
        raise ValueError(
            f"no documents in {', '.join(config.inputs) or config.dataset}: "
            f"is the text in the field {config.text_field!r} (--text_field)?"
        )
    if config.val_ids:
        if (found := int(np.count_nonzero(smallest == 0))) < wanted:
            raise ValueError(f"val_ids: found {found} of {wanted} documents {list(config.val_ids)}: check the field id")
        return 0
    if config.val_documents is not None:
        return int(smallest[-1]) if config.val_documents else None
    if not config.val_fraction:
        return None
    return max(int(config.val_fraction * 2**64) - 1, int(smallest[0]))  # at least one document


def _records(part: Path) -> np.ndarray:
    return np.fromfile(part.with_suffix(".docs"), RECORD)


class _ShardWriter:
    """Writes one split's shards; a document is never divided."""

    def __init__(self, out: Path, split: str, tokens_per_shard: int) -> None:
        shutil.rmtree(out / split, ignore_errors=True)
        (out / split).mkdir()
        self.out, self.split, self.tokens_per_shard = out, split, tokens_per_shard
        self.shards: list[dict[str, Any]] = []
        self.files: tuple[IO[bytes], IO[bytes]] | None = None

    def write(self, tokens: np.ndarray, records: np.ndarray, first: int, end: int) -> None:
        """Append documents [first, end) of a part, whose tokens are `tokens`."""
        while first < end:
            if self.files is None:
                self._open_shard()
            assert self.files is not None
            tokens_file, index_file = self.files
            shard = self.shards[-1]
            begin = records[first - 1] if first else np.zeros((), RECORD)
            ends = records["token_end"][first:end] - begin["token_end"] + np.uint64(shard["tokens"])
            count = min(int(np.searchsorted(ends, self.tokens_per_shard)) + 1, end - first)
            last = records[first + count - 1]
            for start in range(int(begin["token_end"]), int(last["token_end"]), COPY_TOKENS):
                block = tokens[start : min(start + COPY_TOKENS, int(last["token_end"]))].tobytes()
                tokens_file.write(block)
                self.sha256.update(block)
            index_file.write(ends[:count].astype("<u8").tobytes())
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
        totals = {key: sum(shard[key] for shard in self.shards) for key in ("tokens", "documents", "bytes")}
        return totals | {"shards": self.shards}

    def _open_shard(self) -> None:
        name = f"{self.split}/{len(self.shards):05d}.ds"
        tokens_path, index_path = self.out / name, self.out / f"{name}.index"
        self.files = tokens_path.open("wb"), index_path.open("wb")  # closed in _close_shard
        self.shards.append({"file": name, "tokens": 0, "documents": 0, "bytes": 0})
        self.sha256 = hashlib.sha256()

    def _close_shard(self) -> None:
        import humanize  # comes with datatrove

        assert self.files is not None
        for file in self.files:
            file.close()
        self.files = None
        shard = self.shards[-1]
        shard["sha256"] = self.sha256.hexdigest()
        count = shard["tokens"]
        # As datatrove's own writer: tokenizer and bytes per token, tokens, tokens for people.
        metadata = f"gpt2|2\n{count}\n{humanize.metric(count, unit='T')}"
        (self.out / f"{shard['file']}.metadata").write_text(metadata, encoding="utf-8")
