"""Which files there are to read: inputs as they are typed -> files, and what was left out."""

import fnmatch
import glob
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..data.tokenizer import ASSETS
from ..program import UserError

COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
SUFFIXES = (".txt", ".jsonl", ".ndjson", ".json", ".parquet")
BY_DATASETS = (".csv", ".tsv", ".arrow", ".xml")  # a folder of these is read by the datasets library
SAMPLE_BYTES = 2**16  # of a file's beginning, middle and end, which tell whether it has changed


def describe(files: Iterable[Path]) -> dict[str, Any]:
    """The files by number, size and a hash of their names, sizes and parts of their content."""
    digest, total, count = hashlib.sha256(), 0, 0
    for path in files:
        size = path.stat().st_size
        total, count = total + size, count + 1
        digest.update(json.dumps([path.name, size]).encode())
        with path.open("rb") as file:
            for start in (0, size // 2, max(size - SAMPLE_BYTES, 0)):
                file.seek(start)
                digest.update(file.read(SAMPLE_BYTES))
    return {"files": count, "bytes": total, "sha256_of_samples": digest.hexdigest()}


def find_files(inputs: Iterable[str], out: str | Path | None = None) -> list[Path]:
    """The files to read, in the order of the inputs, by name inside a folder or glob, each once; none below `out`."""
    return _find(inputs, out)[0]


def unread_files(inputs: Iterable[str], out: str | Path | None = None) -> dict[str, int]:
    """How many files of the folders among the inputs are left out, by their ending, the most frequent first."""
    return dict(_find(inputs, out)[1].most_common())


def _find(inputs: Iterable[str], out: str | Path | None) -> tuple[list[Path], Counter[str]]:
    found: dict[Path, Path] = {}
    unread: Counter[str] = Counter()
    below = Path(out).resolve() if out else None
    for item in inputs:
        if not item.strip():
            raise UserError(f"an input is {item!r}: name a file or folder (is a variable of the shell unset?)")
        if item == "shakespeare" and not Path(item).exists():
            item = str(ASSETS / "shakespeare.jsonl.gz")
        in_folder = Path(item).is_dir()
        if in_folder:
            paths = list(walk(Path(item)))
        elif Path(item).is_file():
            paths = [Path(item)]
        else:
            paths = _expand(item)
        there = bool(paths)
        if below:
            paths = [path for path in paths if below not in path.resolve().parents]
            if there and not paths:
                raise UserError(f"{item} lies in --out {out}, which is written to: choose another --out")
        if in_folder:
            others = Counter(path.suffix.lower() or "no ending" for path in paths if not text_format(path))
            unread += others
            paths = [path for path in paths if text_format(path)]
            if not paths and others:
                raise UserError(
                    f"{item}: none of its files can be read ({listing(dict(others.most_common()))}): "
                    f"what can is {', '.join(SUFFIXES)}{_datasets_remedy(others, item)}"
                )
        if not paths:
            raise FileNotFoundError(f"{item}: no such file, or a folder without {', '.join(SUFFIXES)}: check the path")
        for path in sorted(paths):
            if not text_format(path):
                raise UserError(
                    f"{path}: not one of {', '.join(SUFFIXES)} (or of text {', '.join(COMPRESSED)}): convert it first"
                    + _datasets_remedy([path.suffix.lower()], str(path.parent))
                )
            found.setdefault(path.resolve(), path)
    return list(found.values()), unread


def _datasets_remedy(endings: Iterable[str], folder: str) -> str:
    return f", or pass --dataset {folder} instead" if set(endings) & set(BY_DATASETS) else ""


def listing(unread: dict[str, int], shown: int = 6) -> str:
    """As in ".csv 3, .md 1"."""
    rest = sum(list(unread.values())[shown:])
    return ", ".join(f"{ending} {count:,}" for ending, count in list(unread.items())[:shown]) + (
        f", others {rest:,}" if rest else ""
    )


def walk(folder: Path) -> Iterator[Path]:
    """The files below, sorted by name in each folder. Hidden files and folders are left out, linked ones followed, but
    a folder is entered once, however many links lead there: some lead back."""
    seen: set[tuple[int, int]] = set()
    for name, folders, files in os.walk(folder, followlinks=True):
        status = os.stat(name)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(folder for folder in folders if not folder.startswith("."))
        paths = [Path(name, file) for file in sorted(files) if not file.startswith(".")]
        yield from (path for path in paths if path.is_file())


def _expand(pattern: str) -> list[Path]:
    """The files that a glob names. Its ** is walked here: glob's own goes round in circles where links do."""
    base, deep, rest = pattern.partition("**")
    if not deep:
        return [path for path in map(Path, glob.glob(pattern)) if path.is_file()]
    last = rest.rpartition("**")[2].lstrip("/") or "*"
    folders = [Path(folder) for folder in glob.glob(base or ".") if Path(folder).is_dir()]
    ending = tuple(last.split("/"))
    return [
        path
        for folder in folders
        for path in walk(folder)
        if len(parts := path.relative_to(folder).parts) >= len(ending)
        and all(map(fnmatch.fnmatchcase, parts[-len(ending) :], ending))
    ]


def text_format(path: Path) -> str | None:
    """The suffix without compression, if it is one that we read."""
    last = path.suffix.lower()
    suffix = Path(path.stem).suffix.lower() if last in COMPRESSED else last
    compressed_table = last != suffix and suffix == ".parquet"
    return suffix if suffix in SUFFIXES and not compressed_table and not path.name.startswith(".") else None
