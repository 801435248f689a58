"""Documents of a sample that repeat an earlier one, word for word or nearly."""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from ..data.tokenizer import Tokenizer
from .sample import Rng, Sample
from .token_text import beginning

# Near copies share at least NEAR of their 5-grams (Jaccard). MinHash finds the candidates: two documents of Jaccard
# 0.8 agree in both rows of at least one of 8 bands with probability 1 - (1 - 0.8^2)^8 = 0.9997.
GRAM, BANDS, NEAR = 5, 8, 0.8
NEAR_DOCUMENTS, NEAR_TOKENS = 20_000, 10_000_000


@dataclass(frozen=True)
class Repeats:
    """Documents that repeat an earlier one, among those compared."""

    compared: int
    repeats: int
    most: int = 0  # times that the most repeated one is there, where there is one and it was counted
    example: str = ""  # its beginning
    pairs: int = 0  # of equal documents that were drawn independently, not in one run


def exact_copies(sample: Sample, hashes: list[bytes], tokenizer: Tokenizer) -> Repeats:
    times = Counter(hashes)
    times_in_run = Counter(zip(hashes, sample.run.tolist(), strict=True))
    in_all, in_runs = (sum(n * (n - 1) // 2 for n in some.values()) for some in (times, times_in_run))
    ((repeated, most),) = times.most_common(1)
    if most == 1:
        return Repeats(len(hashes), 0)
    example = beginning(tokenizer, sample.tokens_of(hashes.index(repeated)), 200)
    return Repeats(len(hashes), len(hashes) - len(times), most, example, in_all - in_runs)


def near_copies(sample: Sample, rng: Rng) -> Repeats:
    """Among some of the sampled documents that have a 5-gram."""
    lengths = sample.lengths
    chosen = rng.permutation(np.flatnonzero(lengths >= GRAM))[:NEAR_DOCUMENTS]
    chosen = np.sort(chosen[np.cumsum(lengths[chosen]) <= NEAR_TOKENS]).tolist()
    if not chosen:
        return Repeats(0, 0)
    grams = [_gram_hashes(sample.tokens_of(i)) for i in chosen]
    all_grams = np.concatenate(grams)
    starts = np.cumsum([0, *(len(some) for some in grams[:-1])])
    pairs: set[tuple[int, int]] = set()
    for _ in range(BANDS):
        salts = rng.integers(2**64, size=2, dtype=np.uint64)
        one, two = (np.minimum.reduceat(_mix(all_grams ^ salt), starts) for salt in salts)
        order = np.lexsort((two, one))  # stable: of equal documents the earlier comes first
        same = (np.diff(one[order]) == 0) & (np.diff(two[order]) == 0)
        pairs |= set(zip(order[:-1][same].tolist(), order[1:][same].tolist(), strict=True))
    found = set()
    for earlier, later in pairs:
        a, b = np.unique(grams[earlier]), np.unique(grams[later])
        common = len(np.intersect1d(a, b, assume_unique=True))
        if common >= NEAR * (len(a) + len(b) - common):
            found.add(later)
    return Repeats(len(chosen), len(found))


def _gram_hashes(tokens: np.ndarray) -> np.ndarray:
    """A 64-bit hash of the GRAM tokens from each position on, (n_tokens - GRAM + 1,) uint64."""
    hashes = np.zeros(len(tokens) - GRAM + 1, dtype=np.uint64)
    for i in range(GRAM):
        hashes = _mix(hashes + tokens[i : i + len(hashes)])
    return hashes


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(32))) * np.uint64(0x9E3779B97F4A7C15)  # odd, and the golden ratio's bits have no pattern
    return x ^ (x >> np.uint64(29))
