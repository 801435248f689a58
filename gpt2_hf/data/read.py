"""Inputs -> documents: what there is to read, cut into tasks, and the pipeline step that reads one task.

Tasks follow from the inputs alone, never from the number of workers: a large .jsonl is cut by byte ranges, a .parquet
by row groups. A compressed file cannot be entered in the middle, so a large one is read by several tasks that each keep
their share of its lines: to unpack text is 20 to 100 times faster than to tokenize it.
"""

import contextlib
import glob
import gzip
import hashlib
import io
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from ..knobs import Filled, Knobs, PathName
from .tokenizer import ASSETS

if TYPE_CHECKING:
    from datatrove.data import Document

TASK_BYTES = 32 * 2**20  # input bytes of one task: large files are cut, small files are put together
SHARE_BYTES = 16 * 2**20  # compressed bytes that are worth another task
SHARES = 8  # at most so many tasks read one compressed file, and no more than 2 * SHARES read all
STRIPE_BYTES = 2**16  # of text: the tasks that share a file take turns with stripes of lines
TXT_BYTES = 32 * 2**20  # a longer .txt is no document, but a corpus: it is cut at a line end
LINE_BYTES = 64 * 2**20  # a longer line of .jsonl is not read
COMPRESSED = (".gz", ".zst")
SUFFIXES = (".txt", ".jsonl", ".ndjson", ".parquet")
SAMPLE_BYTES = 2**16  # of a file's beginning, middle and end, which tell whether it has changed
BOM = b"\xef\xbb\xbf"

Row = tuple[Any, dict[str, Any]]  # a document's fields, and where it stands; "skipped" there says why it is unusable


@dataclass(frozen=True)
class Source(Knobs):
    """Where documents come from.

    Args:
        inputs: files, folders and globs; or
        dataset: name of a dataset on the Hub, or a folder of save_to_disk, with its name, revision and split.
        text_field: field or column that has the text.
        separator: cuts a .txt into documents.
        exclude_wikipedia: mark the pages of Wikipedia.
    """

    inputs: tuple[Annotated[str, PathName()], ...] = ()
    dataset: Annotated[str, PathName()] | None = None
    name: str | None = None
    revision: str | None = None
    split: Annotated[str, Filled()] = "train"
    text_field: Annotated[str, Filled()] = "text"
    separator: str | None = None
    exclude_wikipedia: bool = False


@dataclass(frozen=True)
class Piece:
    """Part of an input, by its kind: "bytes" start to end of a file, "share" number start of end of a compressed one,
    "groups" start to end of a .parquet, "rows" part start of end of a dataset (the path is then its name)."""

    path: str
    kind: str
    start: int
    end: int


def plan(source: Source, out: str | Path | None = None) -> tuple[dict[str, Any], Source, list[list[Piece]]]:
    """What is read, in few words for the manifest; the source with its revision settled; the pieces of each task.

    Files below `out` are not inputs. Raises ValueError or OSError with one line that says what to do.
    """
    if source.dataset:
        return _plan_dataset(source)
    files = find_files(source.inputs, out)
    tasks: list[list[Piece]] = [[]]
    room = TASK_BYTES
    for path in files:
        size = path.stat().st_size
        for piece in _cut(path, size, len(files), source.separator):
            cost = size // piece.end if piece.kind == "share" else size if piece.kind == "groups" else 0
            cost = cost or piece.end - piece.start
            if tasks[-1] and cost > room:
                tasks.append([])
                room = TASK_BYTES
            tasks[-1].append(piece)
            room -= cost
    return describe(files), source, tasks


def _cut(path: Path, size: int, n_files: int, separator: str | None) -> list[Piece]:
    """The pieces of one file."""
    name = str(path)
    if path.suffix.lower() in COMPRESSED:
        shares = 1
        if _format(path) != ".txt":
            shares = max(1, min(SHARES, 2 * SHARES // n_files, size // SHARE_BYTES))
        return [Piece(name, "share", share, shares) for share in range(shares)]
    if _format(path) == ".parquet":
        groups = 1
        with contextlib.suppress(*_read_errors(name)):  # a damaged file is reported when it is read
            import pyarrow.parquet

            groups = pyarrow.parquet.read_metadata(path).num_row_groups
        pieces = max(1, min(groups, round(size / TASK_BYTES)))
        borders = pairwise(groups * i // pieces for i in range(pieces + 1))
        return [Piece(name, "groups", start, end) for start, end in borders]
    text = _format(path) == ".txt"
    whole = text and (separator is not None or size <= TXT_BYTES)
    pieces = 1 if whole else max(1, -(-size // (TXT_BYTES if text else TASK_BYTES)))
    borders = pairwise(size * i // pieces for i in range(pieces + 1))  # of one length, to end together
    return [Piece(name, "bytes", start, end) for start, end in borders]


def describe(files: list[Path]) -> dict[str, Any]:
    """The files by number, size and a hash of their names, sizes and parts of their content."""
    digest, total = hashlib.sha256(), 0
    for path in files:
        size = path.stat().st_size
        total += size
        digest.update(json.dumps([path.name, size]).encode())
        with path.open("rb") as file:
            for start in (0, size // 2, max(size - SAMPLE_BYTES, 0)):
                file.seek(start)
                digest.update(file.read(SAMPLE_BYTES))
    return {"files": len(files), "bytes": total, "sha256_of_samples": digest.hexdigest()}


def find_files(inputs: Iterable[str], out: str | Path | None = None) -> list[Path]:
    """The files to read, in the order of the inputs, by name inside a folder or glob, each once; none below `out`."""
    found: dict[Path, Path] = {}
    below = Path(out).resolve() if out else None
    for item in inputs:
        if item == "shakespeare" and not Path(item).exists():
            item = str(ASSETS / "shakespeare.jsonl.gz")
        if Path(item).is_dir():
            # Hidden files and folders are left out, linked ones followed.
            paths = [Path(path) for path in glob.glob(f"{glob.escape(item)}/**/*", recursive=True)]
            paths = [path for path in paths if path.is_file() and _format(path)]
        elif Path(item).is_file():
            paths = [Path(item)]
        else:
            paths = [Path(path) for path in glob.glob(item, recursive=True) if Path(path).is_file()]
        if below and paths:
            paths = [path for path in paths if below not in path.resolve().parents]
            if not paths:
                raise ValueError(f"{item} lies in --out {out}, which is written to: choose another --out")
        if not paths:
            raise FileNotFoundError(f"{item}: no such file, or a folder without {', '.join(SUFFIXES)}: check the path")
        for path in sorted(paths):
            if not _format(path):
                raise ValueError(f"{path}: not one of {', '.join(SUFFIXES)} (or .gz, .zst of text): convert it first")
            found.setdefault(path.resolve(), path)
    return list(found.values())


def _format(path: Path) -> str | None:
    """The suffix without compression, if it is one that we read."""
    last = path.suffix.lower()
    suffix = Path(path.stem).suffix.lower() if last in COMPRESSED else last
    compressed_table = last != suffix and suffix == ".parquet"
    return suffix if suffix in SUFFIXES and not compressed_table and not path.name.startswith(".") else None


def _plan_dataset(source: Source) -> tuple[dict[str, Any], Source, list[list[Piece]]]:
    """One task per file of a dataset that is streamed, one per TASK_BYTES of a saved one."""
    name, revision = str(source.dataset), source.revision
    try:
        if not Path(name).is_dir():
            from huggingface_hub import HfApi

            # Every task must read one and the same commit, even if the dataset changes during the run.
            revision = HfApi().dataset_info(name, revision=revision, timeout=10).sha
        settled = Source(**asdict(source) | {"revision": revision})
        rows = _load_dataset(settled)
        saved = hasattr(rows, "data")
        count = max(min(-(-rows.data.nbytes // TASK_BYTES), len(rows)) if saved else rows.num_shards, 1)
    except Exception as error:  # the clients' own exceptions have no common base
        raise OSError(
            f"dataset {name}: {_first_line(error)}: check its name, configuration, split and the network, "
            "or pass local files"
        ) from error
    tasks = [[Piece(name, "rows", index, count)] for index in range(count)]
    # What datasets itself tells contents apart by.
    facts = {"fingerprint": rows._fingerprint, "rows": len(rows)} if saved else {"revision": revision}
    return {**facts, "tasks": count}, settled, tasks


def _load_dataset(source: Source) -> Any:
    """A map-style dataset for a folder of save_to_disk, else a streamed one."""
    import datasets

    datasets.disable_progress_bars()
    folder = Path(str(source.dataset))
    if (folder / "dataset_dict.json").exists():
        folder /= source.split
    if (folder / "state.json").exists():
        return datasets.load_from_disk(str(folder))
    return datasets.load_dataset(
        str(source.dataset), source.name, split=source.split, revision=source.revision, streaming=True
    )


@dataclass(frozen=True)
class ReadDocuments:
    """Pipeline step (datatrove runs any callable, so this module imports without it): the documents of task `rank`.

    Metadata say where each stands: "file", "piece" (its number in the task) and "line", or the "offset" of the line in
    bytes. An unusable one passes with an empty text and the reason in "skipped", for the writer to count.
    """

    source: Source
    tasks: list[list[Piece]] = field(repr=False)  # datatrove logs every step's repr, for every task
    running: str | None = None  # folder in which a file marks a task that a process is at work on

    def __call__(self, data: Any, rank: int, world_size: int) -> "Iterator[Document]":
        with self._marked(rank):
            yield from self._documents(self.tasks[rank])

    @contextlib.contextmanager
    def _marked(self, rank: int) -> Iterator[None]:
        if self.running is None:
            yield
            return
        marker = Path(self.running, f"{rank}.{os.getpid()}")
        marker.touch()
        try:
            yield
        finally:
            marker.unlink(missing_ok=True)

    def _documents(self, pieces: list[Piece]) -> "Iterator[Document]":
        from datatrove.data import Document

        for number, piece in enumerate(pieces):
            for row, place in self.rows(piece):
                place |= {"file": piece.path, "piece": number}
                if "skipped" not in place and (problem := self._problem(row)):
                    place["skipped"] = problem
                if "skipped" in place:
                    yield Document(text="", id="", metadata=place)
                else:
                    yield Document(text=row[self.source.text_field], id=str(row.get("id", "")), metadata=place)

    def _problem(self, row: Any) -> str | None:
        """Why a row is no document; a key of audit.REASONS."""
        if not isinstance(row, dict):
            return "broken"
        text = row.get(self.source.text_field)
        if not isinstance(text, str):
            return "no_text"
        if not text or text.isspace():
            return "empty"
        if self.source.exclude_wikipedia and (
            "wikipedia.org/" in str(row.get("url", ""))[:100] or "Wikipedia, the free encyclopedia" in text[:500]
        ):
            return "wikipedia"
        return None

    def rows(self, piece: Piece) -> Iterator[Row]:
        """The rows of a piece. A file that cannot be read to its end gives one last row that says so."""
        form = _format(Path(piece.path)) if piece.kind != "rows" else None
        read = {"rows": self._dataset_rows, "groups": self._parquet_rows}.get(
            piece.kind, self._txt_rows if form == ".txt" else _json_rows
        )
        place: dict[str, Any] = {"line": 0}
        try:
            for row, place in read(piece):
                yield row, place
        except _read_errors(piece.path) as error:
            # Not the file's fault, but the disk's, the network's or the Hub's: to go on would lose good documents.
            if piece.kind == "rows" or getattr(error, "errno", None) is not None:
                raise
            last = {key: place[key] for key in ("line", "offset") if key in place}
            if piece.kind == "share" and piece.start:  # the first to share the file reports it
                return
            yield None, last | {"skipped": "damaged", "detail": _first_line(error)}

    def _txt_rows(self, piece: Piece) -> Iterator[Row]:
        name = re.sub(r"(\.txt)?(\.gz|\.zst)?$", "", Path(piece.path).name, flags=re.IGNORECASE)
        with _open(piece.path) as file:
            if self.source.separator is not None:
                texts = _split(file, self.source.separator.encode(), piece.path)
            else:
                texts = _lines_of(file, piece) if piece.kind == "bytes" else _blocks(file)
            for number, (place, raw) in enumerate(texts):
                mark = len(BOM) * raw.startswith(BOM)
                try:
                    text = raw[mark:].decode()
                except UnicodeDecodeError as error:
                    wrong = mark + error.start
                    wrong = raw.count(b"\n", 0, wrong) if "line" in place else wrong
                    yield None, {key: value + wrong for key, value in place.items()}
                    continue
                del raw
                yield {"id": f"{name}-{number}" if number else name, self.source.text_field: text}, place

    def _parquet_rows(self, piece: Piece) -> Iterator[Row]:
        import pyarrow.parquet

        # Page by page: a row group may be larger than memory.
        with pyarrow.parquet.ParquetFile(piece.path, memory_map=True, pre_buffer=False, buffer_size=2**20) as file:
            columns = self._columns(piece.path, file.schema_arrow.names)
            number = sum(file.metadata.row_group(i).num_rows for i in range(piece.start))
            groups = range(piece.start, min(piece.end, file.num_row_groups))
            for batch in file.iter_batches(batch_size=256, columns=columns, row_groups=groups):
                for row in _rows_of(batch):
                    number += 1
                    yield row, {"line": number}

    def _dataset_rows(self, piece: Piece) -> Iterator[Row]:
        rows = _load_dataset(self.source)
        if rows.column_names:  # a streamed dataset may not know them
            rows = rows.select_columns(self._columns(str(self.source.dataset), rows.column_names))
        # The line counts inside the part, which is all that can be known of a stream.
        for number, row in enumerate(rows.shard(num_shards=piece.end, index=piece.start, contiguous=True), 1):
            yield row, {"line": number}

    def _columns(self, where: str, names: list[str]) -> list[str]:
        if self.source.text_field not in names:
            raise ValueError(f"{where}: no column {self.source.text_field!r} among {names}: set --text_field")
        return [name for name in names if name in (self.source.text_field, "id", "url")]


def _rows_of(batch: Any) -> Iterator[dict[str, Any] | None]:
    """The rows of a batch of a table; None for one that is not UTF-8."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for i in range(batch.num_rows):
            try:
                yield batch.slice(i, 1).to_pylist()[0]
            except UnicodeDecodeError:
                yield None


def _json_rows(piece: Piece) -> Iterator[Row]:
    """The lines that begin inside the piece, or in its stripes."""
    compressed = piece.kind == "share"
    with _open(piece.path) as file:
        position = number = 0
        if not compressed and piece.start:
            position = piece.start - 1
            file.seek(position)
            position += len(file.readline())
        while (compressed or position < piece.end) and (line := file.readline(LINE_BYTES)):
            number += 1
            # Inside a large file the number of a line is counted only if it must be reported.
            place = {"line": number} if compressed else {"offset": position}
            mine = not compressed or position // STRIPE_BYTES % piece.end == piece.start
            if not position and line.startswith(BOM):
                position, line = len(BOM), line[len(BOM) :]
            position += len(line)
            if len(line) == LINE_BYTES and not line.endswith(b"\n"):
                while (more := file.readline(LINE_BYTES)) and not more.endswith(b"\n"):
                    position += len(more)
                position += len(more)
                if mine:
                    yield None, place | {"skipped": "too_long"}
            elif mine and line and not line.isspace():
                try:
                    text = line.decode()
                    del line  # 50 MB, perhaps, and so has each form of it
                    row = json.loads(text)
                    del text
                except (ValueError, RecursionError):  # not UTF-8, or not JSON
                    row = None
                yield row, place
                del row


def _lines_of(file: io.BufferedIOBase, piece: Piece) -> Iterator[tuple[dict[str, int], bytes]]:
    """The lines that begin inside the piece, if any do, and where the first one does; an empty file is empty."""
    if piece.start:
        file.seek(piece.start - 1)
        file.readline()
    begin = file.tell()
    if begin < piece.end:
        yield {"offset": begin}, file.read(piece.end - 1 - begin) + file.readline()
    elif not piece.start:
        yield {"offset": 0}, b""


def _blocks(file: io.BufferedIOBase) -> Iterator[tuple[dict[str, int], bytes]]:
    """A file in blocks of about TXT_BYTES, cut at a line end, and the line on which each begins."""
    line = 1
    while block := file.read(TXT_BYTES):
        block += file.readline()
        yield {"line": line}, block
        line += block.count(b"\n")


def _split(file: io.BufferedIOBase, separator: bytes, path: str) -> Iterator[tuple[dict[str, int], bytes]]:
    """The documents between separators, and the line on which each begins; empty ones are nothing."""
    line, rest, ended = 1, b"", False
    while not ended:
        block = file.read(2**20)
        ended = not block
        *whole, rest = (rest + block).split(separator)
        for text in [*whole, rest] if ended else whole:
            if text.strip():
                yield {"line": line}, text
            line += (text + separator).count(b"\n")
        if len(rest) > TXT_BYTES:
            raise ValueError(f"{path}: no {separator.decode()!r} within {TXT_BYTES:,} bytes: check --separator")


def _open(path: str) -> io.BufferedIOBase:
    if path.lower().endswith(".gz"):
        return gzip.open(path, "rb")
    if path.lower().endswith(".zst"):
        import pyarrow

        # Unlike zstandard's reader, it raises when the file was cut short.
        return io.BufferedReader(pyarrow.input_stream(path, compression="zstd"), 2**20)
    return open(path, "rb")


def _read_errors(path: str) -> tuple[type[Exception], ...]:
    if not path.lower().endswith(".parquet"):
        return (EOFError, OSError, zlib.error)
    import pyarrow

    return (OSError, pyarrow.ArrowInvalid)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__).rstrip(". ")
