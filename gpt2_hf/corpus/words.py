"""Words and their hashes, by which near-duplicates and contamination are told.

Words are those of datatrove's `simplify_text` (lower case, no punctuation, no diacritics, numbers as 0), split at
whitespace.
"""

import functools
import re
from collections.abc import Callable, Iterator

import numpy as np

_PIECE = 2**19  # characters that are hashed at a time: memory stays the same for a document of any size
_CACHED_WORDS = 2**18  # about 40 MB
_WORD_BASE = np.uint64(0x9E3779B97F4A7C15)
_SPACE = re.compile(r"\s")


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


def pieces(text: str) -> Iterator[str]:
    """The text in pieces that end at whitespace (or, without any for long, anywhere)."""
    start = 0
    while start < len(text):
        space = _SPACE.search(text, start + _PIECE, start + 2 * _PIECE)
        end = space.start() if space else min(start + 2 * _PIECE, len(text))
        yield text[start:end]
        start = end


def hash_words(text: str) -> np.ndarray:
    """The hash of each word, (W,) uint64."""
    return np.frombuffer(b"".join(map(_word_hashes().__getitem__, text.split())), "<u8")


def overlapping_blocks(text: str, n: int) -> Iterator[tuple[int, np.ndarray]]:
    """Word hashes in blocks that share n - 1 words, so that each n-gram is whole in one; and where each begins."""
    begin, block = 0, np.empty(0, "<u8")
    for piece in pieces(text):
        keep = max(len(block) - n + 1, 0)
        begin, block = begin + keep, np.concatenate((block[keep:], hash_words(piece)))
        yield begin, block


def hash_ngrams(words: np.ndarray, n: int) -> Iterator[np.ndarray]:
    """For each m = 1 ... n, at most W: the hashes of all m-grams of W words, (W - m + 1,) uint64."""
    hashes = words
    for m in range(1, min(n, len(words)) + 1):
        if m > 1:
            hashes = hashes[:-1] * _WORD_BASE
            hashes += words[m - 1 :]
        yield hashes


def words_of(text: str) -> Iterator[str]:
    """The words that `overlapping_blocks` hashes."""
    for piece in pieces(text):
        for token in piece.split():
            yield from _word_hashes().words(token)
