"""Inputs -> documents: what there is to read, cut into tasks, and the pipeline step that reads one task.

Tasks follow from the inputs alone, never from the number of workers: a large .jsonl is cut by byte ranges, a .parquet
by row groups. A compressed file cannot be entered in the middle, so a large one is read by several tasks that each keep
their share of its lines: to unpack text is 20 to 100 times faster than to tokenize it.
"""

import codecs
import contextlib
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from ..knobs import ConfigError, Filled, Knobs, PathName
from ..program import UserError
from . import plain_text
from .inputs import COMPRESSED, describe, find_files, text_format, walk
from .json_text import LINE_BYTES, Row, is_lines, read_lines, read_values
from .opening import LOOK_BYTES, PARQUET, READ_ERRORS, Damaged, is_utf8, look, open_text, packing
from .text_field import prefixes, value_of, what_is_there

if TYPE_CHECKING:
    from datatrove.data import Document

TASK_BYTES = 32 * 2**20  # input bytes of one task: large files are cut, small files are put together
SHARE_BYTES = 16 * 2**20  # compressed bytes that are worth another task
SHARES = 8  # at most so many tasks read one compressed file, and no more than 2 * SHARES read all
BATCH_BYTES = 32 * 2**20  # of rows of a table that are unpacked at a time


@dataclass(frozen=True)
class Source(Knobs):
    """Where documents come from.

    Args:
        inputs: files, folders and globs; or
        dataset: name of a dataset on the Hub, or a folder of save_to_disk, with its name, revision and split.
        text_field: field or column that has the text; data.text for a field inside another.
        encoding: of text files.
        separator: cuts a .txt into documents.
        exclude_wikipedia: mark the pages of Wikipedia.
    """

    inputs: tuple[Annotated[str, PathName()], ...] = ()
    dataset: Annotated[str, PathName()] | None = None
    name: str | None = None
    revision: str | None = None
    split: Annotated[str, Filled()] = "train"
    text_field: Annotated[str, Filled()] = "text"
    encoding: Annotated[str, Filled()] = "utf-8"
    separator: str | None = None
    exclude_wikipedia: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.inputs) == bool(self.dataset):
            raise ConfigError(f"inputs is {list(self.inputs)} and dataset is {self.dataset}: name one of the two")
        try:
            codecs.lookup(self.encoding)
        except (LookupError, ValueError):
            raise ConfigError(f"encoding is {self.encoding!r}: choose one that Python knows, such as latin-1") from None
        if self.separator == "":
            raise ConfigError("separator is empty: leave it out, or name a text")

    def source(self) -> "Source":
        """These settings alone, of a command that has more."""
        values = {item.name: getattr(self, item.name) for item in fields(Source)}
        if self.separator:  # as it is typed in a shell
            values["separator"] = self.separator.replace("\\n", "\n").replace("\\t", "\t")
        return Source(**values)


@dataclass(frozen=True)
class Piece:
    """Part of an input, by its kind: "bytes" start to end of a file, "share" number start of end of one that must be
    read from its beginning, "groups" start to end of a .parquet, "rows" part start of end of a dataset (the path is
    then its name)."""

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
        for piece in _cut(path, size, len(files), source):
            cost = size // piece.end if piece.kind == "share" else size if piece.kind == "groups" else 0
            cost = cost or piece.end - piece.start
            if tasks[-1] and cost > room:
                tasks.append([])
                room = TASK_BYTES
            tasks[-1].append(piece)
            room -= cost
    return describe(files), source, tasks


def _cut(path: Path, size: int, n_files: int, source: Source) -> list[Piece]:
    """The pieces of one file. Raises UserError for one that is sound, but cannot be read."""
    name = str(path)
    with path.open("rb") as file:
        raw = file.read(LOOK_BYTES)
    table, named_table = raw.startswith(PARQUET), text_format(path) == ".parquet"
    if table:
        groups = 1
        import pyarrow.parquet

        with contextlib.suppress(OSError, pyarrow.ArrowInvalid):  # a damaged file is reported when it is read
            groups = pyarrow.parquet.read_metadata(path).num_row_groups
        pieces = max(1, min(groups, round(size / TASK_BYTES)))
        borders = pairwise(groups * i // pieces for i in range(pieces + 1))
        return [Piece(name, "groups", start, end) for start, end in borders]
    if named_table:
        raise UserError(f"{path} is {'empty' if not size else 'no parquet file'}: leave it out, or copy it again")
    head = look(path, source.encoding)
    text = text_format(path) == ".txt"
    if packing(raw) or not is_utf8(source.encoding) or not (text or is_lines(head)):
        share_bytes = SHARE_BYTES if packing(raw) else TASK_BYTES
        shares = 1 if text else max(1, min(SHARES, 2 * SHARES // n_files, size // share_bytes))
        return [Piece(name, "share", share, shares) for share in range(shares)]
    whole = text and (source.separator is not None or size <= plain_text.TXT_BYTES)
    pieces = 1 if whole else max(1, -(-size // (plain_text.TXT_BYTES if text else TASK_BYTES)))
    borders = pairwise(size * i // pieces for i in range(pieces + 1))  # of one length, to end together
    return [Piece(name, "bytes", start, end) for start, end in borders]


def _plan_dataset(source: Source) -> tuple[dict[str, Any], Source, list[list[Piece]]]:
    """One task per file of a dataset that is streamed, one per TASK_BYTES of a saved one."""
    name, revision = str(source.dataset), source.revision
    facts: dict[str, Any] = {}
    try:
        if Path(name).is_dir():
            _refuse_missing_split(Path(name), source.split)
            facts = describe(walk(Path(name)))
        else:
            from huggingface_hub import HfApi

            # Every task must read one and the same commit, even if the dataset changes during the run.
            revision = HfApi().dataset_info(name, revision=revision, timeout=10).sha
        settled = Source(**asdict(source) | {"revision": revision})
        rows = _load_dataset(settled)
        saved = hasattr(rows, "data")
        count = max(min(-(-rows.data.nbytes // TASK_BYTES), len(rows)) if saved else rows.num_shards, 1)
    except UserError:
        raise
    except Exception as error:  # the clients' own exceptions have no common base
        raise OSError(
            f"dataset {name}: {_first_line(error)}: check its name, configuration, split and the network, "
            "or pass local files"
        ) from error
    tasks = [[Piece(name, "rows", index, count)] for index in range(count)]
    # What datasets itself tells contents apart by.
    facts |= {"fingerprint": rows._fingerprint, "rows": len(rows)} if saved else {"revision": revision}
    return {**facts, "tasks": count}, settled, tasks


def _refuse_missing_split(folder: Path, split: str) -> None:
    """Datasets would read all splits of a saved DatasetDict as one, those that were held out as well."""
    if (folder / "dataset_dict.json").exists() and not (folder / split).is_dir():
        there = ", ".join(sorted(path.parent.name for path in folder.glob("*/state.json")))
        raise UserError(f"dataset {folder} has no split {split!r}, but {there}: choose one with --split")


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

    def __call__(self, data: Any, rank: int, world_size: int) -> "Iterator[Document]":
        from datatrove.data import Document

        for number, piece in enumerate(self.tasks[rank]):
            for row, place in self.rows(piece):
                place |= {"file": piece.path, "piece": number}
                text = None
                if "skipped" not in place:
                    text = self._text(row, place)
                if text is None:
                    yield Document(text="", id="", metadata=place)
                else:
                    yield Document(text=text, id=str(row.get("id", "")), metadata=place)

    def _text(self, row: Any, place: dict[str, Any]) -> str | None:
        """The text of a row; None for one that is no document, and then "skipped" is a key of audit.REASONS."""
        place["skipped"] = "broken"
        if not isinstance(row, dict):
            return None
        text = value_of(row, self.source.text_field)
        if isinstance(text, bytes):
            try:
                text = text.decode()
            except UnicodeDecodeError:
                return None
        if not isinstance(text, str):
            place |= {"skipped": "no_text", "detail": what_is_there(row, self.source.text_field, text)}
        elif not text or text.isspace():
            place["skipped"] = "empty"
        elif len(text) > LINE_BYTES // 4 and len(text.encode(errors="replace")) > LINE_BYTES:
            place["skipped"] = "too_long"
        elif self.source.exclude_wikipedia and (
            "wikipedia.org/" in str(row.get("url", ""))[:100] or "Wikipedia, the free encyclopedia" in text[:500]
        ):
            place["skipped"] = "wikipedia"
        else:
            del place["skipped"]
            return text
        return None

    def rows(self, piece: Piece) -> Iterator[Row]:
        """The rows of a piece. A file that cannot be read to its end gives one last row that says so."""
        read = {"rows": self._dataset_rows, "groups": self._parquet_rows}.get(
            piece.kind, self._txt_rows if text_format(Path(piece.path)) == ".txt" else self._json_rows
        )
        place: dict[str, Any] = {"line": 0}
        try:
            for row, place in read(piece):
                yield row, place
        except READ_ERRORS as error:
            # Not the file's fault, but the disk's, the network's or the Hub's: to go on would lose good documents.
            if piece.kind == "rows" or getattr(error, "errno", None) is not None:
                raise
            last = {key: place[key] for key in ("line", "offset") if key in place}
            if piece.kind == "share" and piece.start:  # the first to share the file reports it
                return
            yield None, last | {"skipped": "damaged", "detail": _first_line(error)}

    def _json_rows(self, piece: Piece) -> Iterator[Row]:
        with open_text(piece.path, self.source.encoding) as file:
            if piece.kind == "bytes":
                yield from read_lines(file, piece.start, piece.end, shared=False)
                return
        head = look(Path(piece.path), self.source.encoding)
        with open_text(piece.path, self.source.encoding) as file:
            if is_lines(head):
                yield from read_lines(file, piece.start, piece.end, shared=True)
            else:
                yield from read_values(file, piece.start, piece.end)

    def _txt_rows(self, piece: Piece) -> Iterator[Row]:
        packed = "|".join(map(re.escape, COMPRESSED))
        name = re.sub(rf"(\.txt)?({packed})?$", "", Path(piece.path).name, flags=re.IGNORECASE)
        with open_text(piece.path, self.source.encoding) as file:
            if self.source.separator is not None:
                texts = plain_text.split_at(file, self.source.separator.encode(), piece.path)
            elif piece.kind == "bytes":
                texts = plain_text.lines_between(file, piece.start, piece.end)
            else:
                texts = plain_text.blocks(file)
            for number, (place, raw) in enumerate(texts):
                text, place = plain_text.decode(raw, place)
                del raw  # 32 MB, perhaps, and so has the text
                fields = {"id": f"{name}-{number}" if number else name, self.source.text_field: text}
                yield None if text is None else fields, place

    def _parquet_rows(self, piece: Piece) -> Iterator[Row]:
        import pyarrow.parquet

        try:
            yield from self._table_rows(piece)
        except pyarrow.ArrowInvalid as error:
            raise Damaged(str(error)) from error

    def _table_rows(self, piece: Piece) -> Iterator[Row]:
        import pyarrow.parquet

        # Page by page: a row group may be larger than memory. What was written as a dictionary stays one until each row
        # is asked for: a few kilobytes may stand for gigabytes.
        options: dict[str, Any] = {"memory_map": True, "pre_buffer": False, "buffer_size": 2**20}
        with pyarrow.parquet.ParquetFile(piece.path, **options) as file:
            schema, names = file.schema_arrow, file.schema_arrow.names
            columns = self._columns(piece.path, names)
            plain = (pyarrow.string(), pyarrow.binary())
            options["read_dictionary"] = [name for name in columns if schema.field(name).type in plain]
        with pyarrow.parquet.ParquetFile(piece.path, **options) as file:
            number = sum(file.metadata.row_group(i).num_rows for i in range(piece.start))
            for group in range(piece.start, min(piece.end, file.num_row_groups)):
                facts = file.metadata.row_group(group)
                a_row = facts.total_byte_size // max(facts.num_rows, 1)
                size = max(1, min(256, BATCH_BYTES // max(a_row, 1)))
                for batch in file.iter_batches(batch_size=size, columns=columns, row_groups=[group]):
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
        wanted = self.source.text_field
        text = next((name for name in prefixes(wanted) if name in names), None)
        if text is None:
            raise UserError(f"{where}: no column {wanted!r} among {names}: set --text_field")
        return [name for name in names if name in (text, "id", "url")]


def _rows_of(batch: Any) -> Iterator[dict[str, Any] | None]:
    """The rows of a batch of a table, one at a time; None for one that is not UTF-8."""
    columns = list(zip(batch.schema.names, batch.columns, strict=True))
    for i in range(batch.num_rows):
        try:
            yield {name: column[i].as_py() for name, column in columns}
        except UnicodeDecodeError:
            yield None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__).rstrip(". ")
