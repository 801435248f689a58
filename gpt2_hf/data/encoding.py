"""Byte-level BPE in bulk: what a tokenizer.json says, encoded by tiktoken where that gives the ids of `tokenizers`.

tiktoken is some four times as fast. It knows a vocabulary of byte strings, in which a string's rank says both when it
is merged and what its id is, and merges any two neighbours that together are in it. So a tokenizer goes by tiktoken if
its pre-tokenizer is one of PATTERNS, and if merging any neighbours in the order of its own merges never leads to a
merge that it doesn't list: `merge_ranks` tries that on every entry.
"""

import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np

# A byte is written as the character of the same number where that prints, else as one from 256 on.
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE_OF = {chr(byte): byte for byte in _PRINTABLE}
BYTE_OF |= {chr(256 + i): byte for i, byte in enumerate(sorted(set(range(256)) - set(_PRINTABLE)))}

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _cl100k(digits: str, possessive: str = "") -> str:
    """The pattern of cl100k (and of Llama 3, whose numbers have 1 to 3 digits, and Qwen 2, where each stands alone)."""
    p = possessive
    return (
        rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?{p}\p{{L}}+{p}|\p{{N}}{digits}{p if digits else ''}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+{p}[\r\n]*{p}|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


# As a tokenizer.json has it -> as tiktoken gets it: with possessive quantifiers where backtracking cannot change the
# match. (tiktoken's own cl100k takes whitespace that ends a text in one piece, after a line end too; these don't.)
PATTERNS = {
    GPT2_PATTERN: r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    _cl100k("{1,3}"): _cl100k("{1,3}", "+"),
    _cl100k(""): _cl100k("", "+"),
    _O200K: _O200K,
}

# Unicode White_Space, which the patterns' \s means; Python's own \s has four control characters more.
_SPACE = "[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"
_LONG = 4096  # characters of whitespace in a row; tiktoken's regex gives up before a million
_LONG_SPACE = re.compile(f"(?<!{_SPACE}){_SPACE}{{{_LONG},}}")  # looking behind, it tries each run only once
_PART = 2**21  # characters encoded at a time
_SPACE_AFTER = re.compile(f"(?<!{_SPACE}){_SPACE}")
_BLANK_AFTER = re.compile(f"(?<!{_SPACE}) |(?<=[A-Za-z0-9])[\r\n]")
_NO_SPECIAL: frozenset[str] = frozenset()

Encode = Callable[[str], np.ndarray]  # text -> (n_tokens,) of an unsigned type


def pattern_of(spec: dict[str, Any]) -> str | None:
    """The regular expression by which a tokenizer.json cuts a text before merging, if that is all it does."""
    steps = pre_tokenizers(spec)
    last = steps[-1] if steps else {}
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    if len(steps) == 1:
        return GPT2_PATTERN if last.get("use_regex", True) else None
    first = steps[0]
    is_plain = first.get("type") == "Split" and first["behavior"] == "Isolated" and not first["invert"]
    if len(steps) > 2 or not is_plain or last.get("use_regex", True):
        return None
    return first["pattern"].get("Regex")


def pre_tokenizers(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """The steps of a tokenizer.json's pre-tokenizer."""
    first = spec.get("pre_tokenizer") or {}
    return first["pretokenizers"] if first.get("type") == "Sequence" else [first] if first else []


def piece_bytes(token: str) -> bytes | None:
    """The bytes that an entry of the vocabulary stands for; None where it is written in no bytes."""
    try:
        return bytes(BYTE_OF[character] for character in token)
    except KeyError:
        return None


def merge_ranks(spec: dict[str, Any]) -> dict[bytes, int] | None:
    """Byte string -> id, in the order of merging: tiktoken's vocabulary of a tokenizer.json; None where it has none."""
    model, added = spec["model"], {token["content"] for token in spec["added_tokens"]}
    entries = {t: raw for t in model["vocab"] if t not in added and (raw := piece_bytes(t)) is not None}
    listed: dict[tuple[bytes, bytes], int] = {}
    first: dict[str, int] = {}  # entry -> its first merge
    for number, merge in enumerate(model["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        if not {left, right, left + right} <= entries.keys():
            return None
        listed.setdefault((entries[left], entries[right]), number)
        first.setdefault(left + right, number)
    single = [token for token in entries if len(token) == 1]
    # What no merge makes is found as a whole piece, or never.
    whole = [token for token in entries if len(token) > 1 and token not in first] if model["ignore_merges"] else []
    in_order = [*single, *sorted(first, key=first.__getitem__), *whole]
    ranks = {entries[token]: rank for rank, token in enumerate(in_order)}
    newest = -1
    unreachable = set()
    for piece in ranks:
        if len(piece) == 1:
            continue
        parts = _last_parts(piece, ranks)
        if parts is None:
            unreachable.add(piece)
            continue
        # Of a piece's merges this is the only one that ever comes up, in any text: listed, and in the order of ranks?
        if (number := listed.get(parts, -1)) <= newest:
            return None
        newest = number
    ids = {entries[token]: model["vocab"][token] for token in in_order}
    return ids if model["ignore_merges"] else {piece: i for piece, i in ids.items() if piece not in unreachable}


def _last_parts(piece: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes] | None:
    """What a piece is at last merged from, when it is merged from its bytes on; None if it never comes to be."""
    parts = [piece[i : i + 1] for i in range(len(piece))]
    while len(parts) > 2:
        found = [ranks.get(left + right, len(ranks)) for left, right in pairwise(parts)]
        if (best := min(found)) == len(ranks):
            return None
        at = found.index(best)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


def by_tiktoken(pattern: str, ids: dict[bytes, int], otherwise: Callable[[], Encode]) -> Encode:
    """An encoder for any text.

    Args:
        pattern: one of PATTERNS.
        ids: of the pieces, in the order of merging.
        otherwise: makes the one that is asked where tiktoken's regex would overflow its stack.
    """
    import tiktoken

    encoding = tiktoken.Encoding(
        "bulk",
        pat_str=PATTERNS[pattern],
        mergeable_ranks={piece: rank for rank, piece in enumerate(ids)},
        # With one, encode_to_numpy is faster.
        special_tokens={"<|endoftext|>": len(ids)},
    )
    id_of = np.fromiter(ids.values(), np.uint32, len(ids))
    is_in_order = (id_of == np.arange(len(ids))).all()

    def encode_piece(text: str) -> np.ndarray:
        ranks = encoding.encode_to_numpy(text, allowed_special=_NO_SPECIAL, disallowed_special=_NO_SPECIAL)
        return ranks if is_in_order else id_of[ranks]

    def encode(text: str) -> np.ndarray:
        found = []
        for part in _parts(text, _SPACE_AFTER if pattern == GPT2_PATTERN else _BLANK_AFTER):
            pieces = _safe_pieces(part)
            if len(pieces) > 1 and pattern != GPT2_PATTERN:
                found.append(otherwise()(part))
            else:
                found += map(encode_piece, pieces)
        return np.concatenate(found)

    return encode


def _parts(text: str, border: re.Pattern[str]) -> Iterator[str]:
    """A very long text in parts, to save memory; the ids stay the same.

    A part ends where whitespace follows something else. There GPT-2's pattern never joins the two; the others join
    line ends to punctuation.
    """
    start = 0
    while len(text) - start > _PART and (cut := border.search(text, start + _PART)):
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:] if start else text


def _safe_pieces(text: str) -> list[str]:
    """Cut out very long runs of whitespace, on which tiktoken's regex overflows its stack.

    With GPT-2's pattern the ids stay the same: it never joins a run to what stands before it, and joins only its last
    character to what follows.
    """
    if len(text) < _LONG:
        return [text]
    # A long run fills at least one of these blocks: a look at each costs next to nothing, a search a tenth of the time.
    half = _LONG // 2
    if not any(text[i].isspace() and text[i : i + half].isspace() for i in range(0, len(text), half)):
        return [text]
    pieces, start = [], 0
    for run in _LONG_SPACE.finditer(text):
        end = run.end() if run.end() == len(text) else run.end() - 1
        pieces += [text[start : run.start()], text[run.start() : end]]
        start = end
    return [*pieces, text[start:]]
