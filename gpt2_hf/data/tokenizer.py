"""The GPT-2 tokenizer, shipped with the package: transformers' for people, tiktoken's for bulk encoding.

Both are read from the same files in `gpt2_hf/assets/tokenizer`, need no network, and give the same ids.
"""

import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import tiktoken
    from transformers import PreTrainedTokenizerBase

ASSETS = Path(__file__).resolve().parent.parent / "assets"
EOT = 50256  # <|endoftext|>: ends every document in our shards
VOCAB_SIZE = 50257

# GPT-2's published pre-tokenizer, with possessive quantifiers where backtracking cannot change the match.
_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
# Unicode White_Space, which the pattern's \s means; Python's own \s has four control characters more.
_SPACE = "[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"
_LONG = 4096  # characters of whitespace in a row; tiktoken's regex gives up before a million
_LONG_SPACE = re.compile(f"(?<!{_SPACE}){_SPACE}{{{_LONG},}}")  # looking behind, it tries each run only once
_PART = 2**21  # characters encoded at a time
_SPACE_AFTER = re.compile(f"(?<!{_SPACE}){_SPACE}")
_SURROGATE = re.compile("[\ud800-\udfff]")
_NO_SPECIAL: frozenset[str] = frozenset()


def load_tokenizer() -> "PreTrainedTokenizerBase":
    """The shipped tokenizer as transformers' `GPT2Tokenizer`, equal to the hub's `openai-community/gpt2`."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tokenizer", local_files_only=True)
    for how in ("is_local", "local_files_only"):  # it was loaded: no word of that in what it saves
        tokenizer.init_kwargs.pop(how, None)
    return tokenizer


def save_tokenizer(tokenizer: Any, folder: Path, n_positions: int) -> None:
    """Write a byte-level BPE tokenizer so that tools of any age read it, cutting texts at the model's `n_positions`.

    transformers alone writes merges as pairs, which tokenizers before 0.20 cannot read, and neither of the files from
    2019, which older versions of transformers want.
    """
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"model_max_length": n_positions}
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    tokenizer.backend_tokenizer.model.save(str(folder))  # vocab.json and merges.txt
    path = folder / "tokenizer.json"
    saved = json.loads(path.read_text(encoding="utf-8"))
    # Unambiguous, as no token has a space in it: another character stands for that byte.
    saved["model"]["merges"] = [m if isinstance(m, str) else " ".join(m) for m in saved["model"]["merges"]]
    path.write_text(json.dumps(saved, indent=2, ensure_ascii=False), encoding="utf-8")


@functools.cache
def _token_bytes() -> tuple[bytes, ...]:
    """The bytes of every token by id, (VOCAB_SIZE,); `<|endoftext|>` stands for none."""
    # GPT-2 writes a byte as the character of the same number where that prints, else as one from 256 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    byte_of = {chr(byte): byte for byte in printable}
    byte_of |= {chr(256 + i): byte for i, byte in enumerate(sorted(set(range(256)) - set(printable)))}
    vocab = json.loads((ASSETS / "tokenizer" / "vocab.json").read_text(encoding="utf-8"))
    in_order = sorted(vocab, key=vocab.__getitem__)
    return (*(bytes(byte_of[char] for char in token) for token in in_order[:EOT]), b"")


@functools.cache
def bulk_encoder() -> "tiktoken.Encoding":
    """A `tiktoken.Encoding` with the ids of `load_tokenizer()`. Prefer `encode_document`, which survives any text."""
    import tiktoken

    # A GPT-2 id is also the rank of the merge that made the token.
    ranks = {token: rank for rank, token in enumerate(_token_bytes()[:EOT])}
    return tiktoken.Encoding(
        "gpt2",
        pat_str=_PATTERN,
        mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": EOT},
        explicit_n_vocab=VOCAB_SIZE,
    )


def encode_document(text: str) -> np.ndarray:
    """Tokens of one document, ended by EOT: uint16 (n_tokens + 1,).

    A literal "<|endoftext|>" in the text is encoded as ordinary text. Raises UnicodeError (a ValueError) for a lone
    surrogate, half of a character: replacing it would train on a text that nobody wrote.
    """
    encoder = bulk_encoder()
    try:
        ids = [
            encoder.encode_to_numpy(piece, allowed_special=_NO_SPECIAL, disallowed_special=_NO_SPECIAL).astype(
                np.uint16
            )
            for part in _parts(text)
            for piece in _safe_pieces(part)
        ]
    except UnicodeEncodeError:
        found = _SURROGATE.search(text)
        assert found is not None  # nothing else in a str fails to encode
        raise UnicodeError(
            f"lone surrogate U+{ord(found[0]):04X} at character {found.start():,} of {len(text):,}: "
            "repair the text, or leave it out"
        ) from None
    return np.concatenate([*ids, np.array([EOT], np.uint16)])


def _parts(text: str) -> Iterator[str]:
    """A very long text in parts, to save memory; the ids stay the same.

    A part ends where whitespace follows something else, and there the pattern never joins the two.
    """
    start = 0
    while len(text) - start > _PART and (cut := _SPACE_AFTER.search(text, start + _PART)):
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:] if start else text


def _safe_pieces(text: str) -> list[str]:
    """Cut out very long runs of whitespace, on which tiktoken's regex overflows its stack; the ids stay the same.

    The pattern never joins a run to what stands before it, and joins only its last character to what follows.
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


@functools.cache
def token_byte_lengths() -> np.ndarray:
    """UTF-8 bytes that each token stands for, int64 (VOCAB_SIZE,), 0 for EOT: turns nats per token into bits per byte.

    Their sum over the tokens of a text is the text's length in bytes.
    """
    lengths = np.array([len(token) for token in _token_bytes()], dtype=np.int64)
    lengths.flags.writeable = False  # one cached array for everyone
    return lengths
