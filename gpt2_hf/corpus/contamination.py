"""Contamination: documents that hold text which evaluations were made of, in whatever case and punctuation.

Nothing is removed here: a document that should go is marked, and the writer counts it and reports its place.
"""

import functools
import gzip
import hashlib
import itertools
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..data.tokenizer import ASSETS
from ..program import UserError
from .words import hash_ngrams, hash_words, overlapping_blocks, words_of

if TYPE_CHECKING:
    from datatrove.data import Document

SHORTEST_ITEM = 8  # words; an evaluation's item below n words must be found whole, and below this it is not sought
TAG = re.compile(r"\[.*?\]")  # [header], [title], [step], [substeps]: HellaSwag's own, not in the text it came from


@dataclass(frozen=True)
class MarkContaminated:
    """Mark the documents that share `n` words in a row with an evaluation, or hold a short item of it whole.

    Args:
        evaluations: "hellaswag" (shipped), or .jsonl files (also .gz): each line an object, all its strings are text.
        n: words. Items of 8 to n - 1 words must occur whole; shorter ones are not sought.
        mode: "drop" sets metadata "skipped" to "contaminated"; "report" sets "reported".

    An n-gram counts only if at least half of its words differ: runs such as "0 0 0 0" are in every table of numbers.
    The metadata "detail" names the evaluation and the words.
    """

    evaluations: tuple[str, ...] = ("hellaswag",)
    n: int = 13
    mode: Literal["drop", "report"] = "drop"

    def __post_init__(self) -> None:
        if self.n < 1 or self.mode not in ("drop", "report"):
            raise UserError(f"n is {self.n}, mode is {self.mode!r}: choose n >= 1, and drop or report")

    def __call__(self, data: "Iterable[Document]", rank: int, world_size: int) -> "Iterator[Document]":
        index = _evaluation_index(self.evaluations, self.n)
        for document in data:
            if "skipped" not in document.metadata and (detail := index.find(document.text)):
                key = "skipped" if self.mode == "drop" else "reported"
                document.metadata |= {key: "contaminated", "detail": detail}
            yield document


def describe_evaluations(evaluations: Iterable[str], n: int) -> list[dict[str, Any]]:
    """For the manifest: name, sha256, items, and those too short to be sought. Raises like `read_items`."""
    found = []
    for evaluation in evaluations:
        items = read_items(evaluation)
        short = sum(all(len(hash_words(text)) < min(n, SHORTEST_ITEM) for text in item) for item in items)
        if short == len(items):
            raise UserError(f"{evaluation}: no text of {min(n, SHORTEST_ITEM)} words or more: leave it out")
        digest = hashlib.sha256(_evaluation_path(evaluation).read_bytes()).hexdigest()
        found.append({"name": _name(evaluation), "sha256": digest, "items": len(items), "too_short": short})
    return found


def read_items(evaluation: str) -> list[list[str]]:
    """The texts of each item of "hellaswag" or of a .jsonl file; where an item has endings, its context with each.

    Raises OSError or ValueError with one line that names the file.
    """
    path = _evaluation_path(evaluation)
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise OSError(f"{path}: cannot be read ({error}): check the path of the evaluation") from error
    items = []
    for number, line in enumerate(raw.splitlines(), 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except (ValueError, RecursionError):
            item = None
        if not isinstance(item, dict):
            raise UserError(f"{path}:{number}: not a JSON object: an evaluation has one object per line")
        items.append(_texts(item))
    return items


def _texts(item: dict[str, Any]) -> list[str]:
    if isinstance(item.get("ctx"), str) and isinstance(item.get("endings"), list):
        texts = [f"{item['ctx']} {ending}" for ending in item["endings"]]
        return list(dict.fromkeys(texts + [TAG.sub("", text) for text in texts]))
    return list(_strings(item))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)


def _evaluation_path(evaluation: str) -> Path:
    shipped = evaluation == "hellaswag" and not Path(evaluation).is_file()
    return ASSETS / "hellaswag_val.jsonl.gz" if shipped else Path(evaluation)


def _name(evaluation: str) -> str:
    return Path(evaluation).name.removesuffix(".gz").removesuffix(".jsonl")


@dataclass(frozen=True)
class _Ngrams:
    """The n-grams of one length.

    Attributes:
        hashes: sorted, (G,) uint64.
        texts: number of a text that has each, (G,) uint32.
        maybe: a bit for each of the 2^b beginnings of a hash: whether one here has it. (2^b / 8,) uint8. Few others
            have, and the search is the slow part.
    """

    hashes: np.ndarray = field(repr=False)
    texts: np.ndarray = field(repr=False)
    maybe: np.ndarray = field(repr=False)

    @classmethod
    def make(cls, hashes: np.ndarray, texts: np.ndarray) -> "_Ngrams":
        maybe = np.zeros(2 ** (len(hashes).bit_length() + 3), np.uint8)  # at most 1 bit in 32 is set
        byte, bit = _place_in(maybe, hashes)
        np.bitwise_or.at(maybe, byte, np.uint8(1) << bit)
        return cls(hashes, texts, maybe)

    def find(self, hashes: np.ndarray) -> Iterator[tuple[int, int]]:
        """The position of each hash that is here, and the number of a text."""
        byte, bit = _place_in(self.maybe, hashes)
        positions = np.flatnonzero(self.maybe[byte] >> bit & 1)
        rows = np.minimum(np.searchsorted(self.hashes, hashes[positions]), len(self.hashes) - 1)
        found = self.hashes[rows] == hashes[positions]
        return zip(positions[found].tolist(), self.texts[rows[found]].tolist(), strict=True)


def _place_in(table: np.ndarray, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Byte and bit that stand for each hash."""
    first_bits = hashes >> np.uint64(65 - len(table).bit_length() - 3)
    return (first_bits >> np.uint64(3)).view(np.int64), first_bits.astype(np.uint8) & 7


@dataclass(frozen=True)
class _EvaluationIndex:
    """The n-grams of evaluations, and their short items, by the number of words; `names[i]` is where text i is from."""

    n: int
    ngrams: dict[int, _Ngrams]
    texts: list[str] = field(repr=False)
    names: list[str] = field(repr=False)

    def find(self, text: str) -> str | None:
        """ "evaluation: words" of the first match, or None."""
        for begin, words in overlapping_blocks(text, self.n):
            for m, hashes in enumerate(hash_ngrams(words, self.n), 1):
                for position, number in self.ngrams[m].find(hashes) if m in self.ngrams else ():
                    place = begin + position
                    ngram = " ".join(itertools.islice(words_of(text), place, place + m))
                    # Equal hashes are not yet equal words.
                    if f" {ngram} " in f" {' '.join(words_of(self.texts[number]))} ":
                        return f"{self.names[number]}: {ngram}"
        return None


@functools.lru_cache(maxsize=2)
def _evaluation_index(evaluations: tuple[str, ...], n: int) -> _EvaluationIndex:
    names, texts = [], []
    for evaluation in evaluations:
        found = [text for item in read_items(evaluation) for text in item]
        texts += found
        names += [_name(evaluation)] * len(found)
    hashed = [hash_words(text) for text in texts]
    lengths = np.array([len(words) for words in hashed], np.int64)
    words = np.concatenate([*hashed, np.empty(0, "<u8")])
    text_of = np.repeat(np.arange(len(texts), dtype=np.uint32), lengths)
    begins = np.cumsum(lengths) - lengths

    ngrams = {}
    for m, hashes in enumerate(hash_ngrams(words, n), 1):
        if m == n:
            places = np.flatnonzero(text_of[: len(hashes)] == text_of[m - 1 :])
        else:
            places = begins[lengths == m] if m >= SHORTEST_ITEM else begins[:0]
        unique, first = np.unique(hashes[places], return_index=True)
        places = places[first]
        varied = _count_different(words, places, m) >= m / 2
        if varied.any():
            ngrams[m] = _Ngrams.make(unique[varied], text_of[places[varied]])
    return _EvaluationIndex(n, ngrams, texts, names)


def _count_different(words: np.ndarray, places: np.ndarray, m: int) -> np.ndarray:
    """How many different words are among the `m` at each place: (P,) from (W,) and (P,)."""
    counts = np.ones(len(places), np.int64)
    for start in range(0, len(places), 2**16):
        ordered = np.sort(words[places[start : start + 2**16, None] + np.arange(m)], axis=1)
        counts[start : start + 2**16] += (ordered[:, 1:] != ordered[:, :-1]).sum(axis=1)
    return counts
