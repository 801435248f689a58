"""A bounded look at a split: some of its shards for the lengths of documents, some of their documents for the rest."""

from dataclasses import dataclass
from itertools import groupby

import numpy as np

from ..data.shards import Shard, ShardError, ShardSet

SURVEY_BYTES = 512_000_000  # of indexes, or of tokens where a shard has no index and is searched for its documents
SAMPLE_TOKENS = 64_000_000
RUN = 16  # neighbouring documents that are read together

Rng = np.random.Generator
Surveyed = list[tuple[Shard, np.ndarray]]  # shards, and where their documents end, in tokens


@dataclass(frozen=True)
class Sample:
    """Whole documents, one after the other in `tokens`."""

    tokens: np.ndarray  # (n_tokens,) of an unsigned type
    ends: np.ndarray  # (n,) int64
    shard: list[Shard]  # of each document
    document: np.ndarray  # (n,) its number in its shard
    run: np.ndarray  # (n,) equal for documents that were drawn together

    @property
    def starts(self) -> np.ndarray:
        return np.concatenate([[0], self.ends[:-1]])

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.ends, prepend=0)

    def tokens_of(self, i: int) -> np.ndarray:
        return self.tokens[self.ends[i - 1] if i else 0 : self.ends[i]]


def survey(shards: ShardSet, most: int, rng: Rng) -> Surveyed:
    """Shards with their document ends: `most`, or as many as SURVEY_BYTES allows, in the split's order."""
    found: dict[int, tuple[Shard, np.ndarray]] = {}
    left = SURVEY_BYTES
    for number in rng.permutation(len(shards.shards)).tolist():
        shard = shards.shards[number]
        left -= 2 * shard.n_tokens if shard.n_documents is None else 8 * shard.n_documents
        if not shard.n_tokens or (found and left < 0) or len(found) == most:
            continue
        ends = shard.document_ends()
        if not len(ends) or ends[-1] != shard.n_tokens or (np.diff(ends, prepend=0) <= 0).any():
            raise ShardError(f"{shard.path}: its documents do not add up to its tokens: prepare the data again")
        found[number] = (shard, ends)
    return [found[number] for number in sorted(found)]


def draw(surveyed: Surveyed, n: int, rng: Rng) -> Sample:
    """About n documents, or all of them; fewer where they would hold more than SAMPLE_TOKENS."""
    n_documents = sum(len(ends) for _, ends in surveyed)
    n = min(n, n_documents, max(1, SAMPLE_TOKENS * n_documents // sum(shard.n_tokens for shard, _ in surveyed)))
    runs = [(number, first) for number, (_, ends) in enumerate(surveyed) for first in range(0, len(ends), RUN)]
    chosen = np.arange(len(runs)) if n == n_documents else rng.choice(len(runs), -(-n // RUN), replace=False)
    tokens, lengths, shard_of, document, run = [], [], [], [], []
    for number, some in groupby(np.sort(chosen).tolist(), lambda i: runs[i][0]):
        shard, all_ends = surveyed[number]
        mapped = shard.tokens()
        for i in some:
            first = runs[i][1]
            start, ends = int(all_ends[first - 1]) if first else 0, all_ends[first : first + RUN]
            tokens.append(mapped[start : ends[-1]].copy())  # a mapped file takes disk space even when off the cache
            lengths.append(np.diff(ends, prepend=start))
            shard_of += [shard] * len(ends)
            document.append(np.arange(first, first + len(ends)))
            run.append(np.full(len(ends), i))
    all_lengths, documents, run_of = (np.concatenate(part) for part in (lengths, document, run))
    return Sample(np.concatenate(tokens), all_lengths.cumsum(), shard_of, documents, run_of)
