"""Cleaning between reading and tokenising: near-duplicates, and text that evaluations were made of.

    read -> WriteSignatures (every task) -> FindPairs (every band) -> FindDuplicates (one task): near_duplicates.npy
    read -> MarkNearDuplicates -> MarkContaminated -> tokenise

Both compare words: datatrove's `simplify_text` (lower case, no punctuation, no diacritics, numbers as 0) split at
whitespace. Its own steps find the near-duplicates, but with shingles hashed in NumPy instead of spaCy's words hashed
in Python. Nothing is removed here: a document that should go is marked, and the writer counts it and reports its place.
"""

import contextlib
import functools
import gzip
import hashlib
import itertools
import json
import os
import re
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..data.tokenizer import ASSETS

if TYPE_CHECKING:
    from datatrove.data import Document

# FineWeb's choice: two documents with Jaccard similarity J of their 5-grams share a band with 1 - (1 - J^8)^14.
SHINGLE_WORDS = 5
BANDS = 14
HASHES_PER_BAND = 8
SHORTEST_ITEM = 8  # words; an evaluation's item below n words must be found whole, and below this it is not sought
DUPLICATES_FILE = "duplicates/near_duplicates.npy"
TAG = re.compile(r"\[.*?\]")  # [header], [title], [step], [substeps]: HellaSwag's own, not in the text it came from

_PIECE = 2**19  # characters that are hashed at a time: memory stays the same for a document of any size
_CACHED_WORDS = 2**18  # about 40 MB
_BLOCK = 512  # shingles, times 112 hashes in 32 bits: 0.2 MB, which stay in a core's cache
_WORD_BASE = np.uint64(0x9E3779B97F4A7C15)
_MIX = np.uint64(0xBF58476D1CE4E5B9)
_SPACE = re.compile(r"\s")


@dataclass(frozen=True)
class Stage:
    """Steps for one executor: run them with `tasks` tasks, after all tasks of the stage before."""

    name: str
    steps: list[Any] = field(repr=False)
    tasks: int


# --- words and their hashes --------------------------------------------------------------------------------------


class _WordHashes(dict[str, bytes]):
    """A piece of text between spaces -> 8 bytes for each word in it (none for "--", two for "don't")."""

    def __init__(self, normalize: Callable[[str], str], punctuation: str, hash_function: Callable[[bytes], int]):
        super().__init__()
        self._normalize, self._punctuation, self._hash = normalize, punctuation, hash_function

    def words(self, token: str) -> list[str]:
        return self._normalize(token).split()

    def __missing__(self, token: str) -> bytes:
        # `normalize` is slow, and most tokens need little of it.
        if token.isascii() and token.isalpha():
            found = self._hash_all([token.lower()])
        elif (bare := token.strip(self._punctuation)) != token:
            found = self[bare]
        else:
            found = self._hash_all(self.words(token))
        if len(token) < 64:
            if len(self) >= _CACHED_WORDS:
                self.clear()
            self[token] = found
        return found

    def _hash_all(self, words: list[str]) -> bytes:
        # A lone surrogate is refused by the writer; here it must only not stop the run.
        return b"".join(self._hash(word.encode("utf-8", "surrogatepass")).to_bytes(8, "little") for word in words)


@functools.cache
def _word_hashes() -> _WordHashes:
    """One for the whole process: it is worth most once it is warm."""
    from datatrove.utils.hashing import HashConfig, create_hash_func
    from datatrove.utils.text import PUNCTUATION, simplify_text

    return _WordHashes(simplify_text, PUNCTUATION, create_hash_func(HashConfig(precision=64)))


def _pieces(text: str) -> Iterator[str]:
    """The text in pieces that end at whitespace (or, without any for long, anywhere)."""
    start = 0
    while start < len(text):
        space = _SPACE.search(text, start + _PIECE, start + 2 * _PIECE)
        end = space.start() if space else min(start + 2 * _PIECE, len(text))
        yield text[start:end]
        start = end


def _hash_words(text: str) -> np.ndarray:
    """The hash of each word, (W,) uint64."""
    return np.frombuffer(b"".join(map(_word_hashes().__getitem__, text.split())), "<u8")


def _overlapping_blocks(text: str, n: int) -> Iterator[tuple[int, np.ndarray]]:
    """Word hashes in blocks that share n - 1 words, so that each n-gram is whole in one; and where each begins."""
    begin, block = 0, np.empty(0, "<u8")
    for piece in _pieces(text):
        keep = max(len(block) - n + 1, 0)
        begin, block = begin + keep, np.concatenate((block[keep:], _hash_words(piece)))
        yield begin, block


def _hash_ngrams(words: np.ndarray, n: int) -> Iterator[np.ndarray]:
    """For each m = 1 ... n, at most W: the hashes of all m-grams of W words, (W - m + 1,) uint64."""
    hashes = words
    for m in range(1, min(n, len(words)) + 1):
        if m > 1:
            hashes = hashes[:-1] * _WORD_BASE
            hashes += words[m - 1 :]
        yield hashes


# --- near-duplicates ---------------------------------------------------------------------------------------------


def minhash_stages(read_step: Any, folder: str, tasks: int) -> list[Stage]:
    """What must run, in this order, before `MarkNearDuplicates(folder)` may.

    `read_step` gives the documents of a task, in the same order each time. Every stage can be killed and started
    again, and what it writes does not depend on the workers. `folder` is local, or shared by all workers.
    """
    return [
        Stage("signatures", [read_step, WriteSignatures(folder)], tasks),
        Stage("pairs", [FindPairs(folder)], BANDS),
        Stage("duplicates", [FindDuplicates(folder)], 1),
    ]


def _minhash_config() -> Any:
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.utils.hashing import HashConfig

    hashes = HashConfig(precision=32)  # half the disk of 64 bits; 8 of them in a band are beyond coincidence
    return MinhashConfig(SHINGLE_WORDS, BANDS, HASHES_PER_BAND, hash_config=hashes)


@dataclass(frozen=True)
class WriteSignatures:
    """The MinHash signature of each document of a task, in datatrove's files (504 bytes a document).

    A document of fewer than 5 words has none: it is nobody's near-duplicate.
    """

    folder: str

    def __call__(self, data: "Iterable[Document]", rank: int, world_size: int) -> None:
        from datatrove.pipeline.dedup.minhash import MinhashDedupSignature
        from datatrove.utils.word_tokenizers import WordTokenizer

        class NoWords(WordTokenizer):  # the constructor wants one; ours would be spaCy, which we do not need
            def word_tokenize(self, text: str) -> list[str]:
                return []

            sent_tokenize = span_tokenize = word_tokenize

        class Signatures(MinhashDedupSignature):
            def get_shingles(self, text: str) -> np.ndarray:
                return _signature(text, *self.parameters)

            def get_signature(self, shingles: np.ndarray) -> list[list[int]]:
                return shingles.reshape(BANDS, HASHES_PER_BAND).tolist()

        with _whole_files(f"{self.folder}/signatures") as unfinished:
            Signatures(unfinished, _minhash_config(), language=NoWords()).run(data, rank, world_size)


def _signature(text: str, factors: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """The least (factor * shingle + offset) mod 2^32 over all shingles: (112,) uint32, or (0,) without a shingle."""
    a, b = (values.astype(np.uint32).reshape(-1, 1) for values in (factors | np.uint64(1), offsets))
    minima = []
    for _, words in _overlapping_blocks(text, SHINGLE_WORDS):
        if len(words) < SHINGLE_WORDS:
            continue
        *_, hashes = _hash_ngrams(words, SHINGLE_WORDS)
        # The sums of neighbours are related; lines through related points would have related minima.
        shingles = (((hashes ^ (hashes >> np.uint64(32))) * _MIX) >> np.uint64(32)).astype(np.uint32)
        for start in range(0, len(shingles), _BLOCK):
            permuted = a * shingles[start : start + _BLOCK]
            permuted += b
            minima.append(permuted.min(axis=1))
    return np.min(minima, axis=0) if minima else np.empty(0, np.uint32)


@dataclass(frozen=True)
class FindPairs:
    """The pairs of documents that agree in a whole band of their signatures; task `rank` is the band."""

    folder: str

    def __call__(self, data: None, rank: int, world_size: int) -> None:
        from datatrove.pipeline.dedup.minhash import MinhashDedupBuckets

        _allow_many_files()
        with _whole_files(f"{self.folder}/pairs") as unfinished:
            step = MinhashDedupBuckets(
                f"{self.folder}/signatures", unfinished, config=_minhash_config(), lines_to_buffer=1000
            )
            step.run(data, rank, world_size)


@dataclass(frozen=True)
class FindDuplicates:
    """The documents to leave out: all but the first of each cluster of pairs, as DUPLICATES_FILE.

    Its rows are uint32 (task, document, task of the first, document of the first), sorted; documents count from 0.
    datatrove keeps whichever member its clustering ends at. The first is what a reader expects, and of exact copies,
    too, it is the first that stays.
    """

    folder: str

    def __call__(self, data: None, rank: int, world_size: int) -> None:
        from datatrove.pipeline.dedup.minhash import MinhashDedupCluster

        _allow_many_files()
        with _whole_files(str(Path(self.folder, DUPLICATES_FILE).parent)) as unfinished:
            MinhashDedupCluster(
                f"{self.folder}/pairs", unfinished, _minhash_config(), save_cluster_id=True, lines_to_buffer=1000
            ).run(data, rank, world_size)
            members = [np.empty((0, 3), np.uint32)]
            for path in sorted(Path(unfinished).glob("*.clusters")):
                rows = np.fromfile(path, "<u4").reshape(-1, 2)  # document, cluster
                members.append(np.insert(rows, 0, int(path.stem), axis=1))
            for path in Path(unfinished).iterdir():
                path.unlink()
            found = np.concatenate(members)
            found = found[np.lexsort((found[:, 1], found[:, 0]))]
            _, first, cluster = np.unique(found[:, 2], return_index=True, return_inverse=True)
            table = np.hstack((found[:, :2], found[first[cluster], :2]))
            np.save(Path(unfinished, Path(DUPLICATES_FILE).name), table[first[cluster] != np.arange(len(found))])


@dataclass(frozen=True)
class MarkNearDuplicates:
    """Mark the documents that FindDuplicates names: metadata "skipped" is "near_duplicate"."""

    folder: str

    def __call__(self, data: "Iterable[Document]", rank: int, world_size: int) -> "Iterator[Document]":
        path = Path(self.folder, DUPLICATES_FILE)
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file: run the stages of minhash_stages first")
        table = np.load(path, mmap_mode="r")
        start, end = np.searchsorted(table[:, 0], [rank, rank + 1])
        firsts = {document: (task, first) for _, document, task, first in table[start:end].tolist()}
        for number, document in enumerate(data):
            if number in firsts and "skipped" not in document.metadata:
                task, first = firsts[number]
                document.metadata |= {"skipped": "near_duplicate", "detail": f"of document {first + 1} of task {task}"}
            yield document


@contextlib.contextmanager
def _whole_files(folder: str) -> Iterator[str]:
    """A folder to write to; its files move to `folder` at the end, so that nobody ever sees half of one."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    # Beside, not inside: the next stage lists `folder`, where a killed task would leave its half.
    with tempfile.TemporaryDirectory(prefix="unfinished-", dir=Path(folder).parent) as unfinished:
        yield unfinished
        for path in sorted(Path(unfinished).rglob("*")):
            target = Path(folder, path.relative_to(unfinished))
            if path.is_dir():
                target.mkdir(exist_ok=True)
            else:
                os.replace(path, target)


def _allow_many_files() -> None:
    """datatrove opens one file per task at once, and the usual limit is 1,024."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # not on Windows; not more than the system has
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = 2**16 if hard == resource.RLIM_INFINITY else min(hard, 2**16)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


# --- contamination -----------------------------------------------------------------------------------------------


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
            raise ValueError(f"n is {self.n}, mode is {self.mode!r}: choose n >= 1, and drop or report")

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
        short = sum(all(len(_hash_words(text)) < min(n, SHORTEST_ITEM) for text in item) for item in items)
        if short == len(items):
            raise ValueError(f"{evaluation}: no text of {min(n, SHORTEST_ITEM)} words or more: leave it out")
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
            raise ValueError(f"{path}:{number}: not a JSON object: an evaluation has one object per line")
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
        for begin, words in _overlapping_blocks(text, self.n):
            for m, hashes in enumerate(_hash_ngrams(words, self.n), 1):
                for position, number in self.ngrams[m].find(hashes) if m in self.ngrams else ():
                    place = begin + position
                    ngram = " ".join(itertools.islice(_words(text), place, place + m))
                    # Equal hashes are not yet equal words.
                    if f" {ngram} " in f" {' '.join(_words(self.texts[number]))} ":
                        return f"{self.names[number]}: {ngram}"
        return None


def _words(text: str) -> Iterator[str]:
    """The words that `_overlapping_blocks` hashes."""
    for piece in _pieces(text):
        for token in piece.split():
            yield from _word_hashes().words(token)


@functools.lru_cache(maxsize=2)
def _evaluation_index(evaluations: tuple[str, ...], n: int) -> _EvaluationIndex:
    names, texts = [], []
    for evaluation in evaluations:
        found = [text for item in read_items(evaluation) for text in item]
        texts += found
        names += [_name(evaluation)] * len(found)
    hashed = [_hash_words(text) for text in texts]
    lengths = np.array([len(words) for words in hashed], np.int64)
    words = np.concatenate([*hashed, np.empty(0, "<u8")])
    text_of = np.repeat(np.arange(len(texts), dtype=np.uint32), lengths)
    begins = np.cumsum(lengths) - lengths

    ngrams = {}
    for m, hashes in enumerate(_hash_ngrams(words, n), 1):
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
