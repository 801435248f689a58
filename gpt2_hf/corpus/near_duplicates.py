"""Near-duplicates: of documents that share most of their 5-grams, the first one stays.

    read -> WriteSignatures (every task) -> FindPairs (every band) -> FindDuplicates (one task): near_duplicates.npy
    read -> MarkNearDuplicates -> tokenise

The steps are datatrove's MinHash steps, but with shingles hashed in NumPy instead of spaCy's words hashed in Python.
Nothing is removed here: a document that should go is marked, and the writer counts it and reports its place.
"""

import contextlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .running import Stage
from .words import hash_ngrams, overlapping_blocks

if TYPE_CHECKING:
    from datatrove.data import Document

# FineWeb's choice: two documents with Jaccard similarity J of their 5-grams share a band with 1 - (1 - J^8)^14.
SHINGLE_WORDS = 5
BANDS = 14
HASHES_PER_BAND = 8
DUPLICATES_FILE = "duplicates/near_duplicates.npy"

_BLOCK = 512  # shingles, times 112 hashes in 32 bits: 0.2 MB, which stay in a core's cache
_MIX = np.uint64(0xBF58476D1CE4E5B9)


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
    for _, words in overlapping_blocks(text, SHINGLE_WORDS):
        if len(words) < SHINGLE_WORDS:
            continue
        *_, hashes = hash_ngrams(words, SHINGLE_WORDS)
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
