"""Token files of other projects, read as they are. What a file is follows from its content:

    llm.c            256 little-endian int32 (20240520, 1, number of tokens, zeros), then uint16 tokens
    build-nanogpt    a NumPy array of one dimension; besides uint16 also wider integers
    nanoGPT          uint16 tokens and nothing else (uint32, of a vocabulary that needs it)
    datatrove        uint16 or uint32 tokens, and beside them NAME.index: uint64 ends of the documents

Nobody but datatrove says where documents begin: that is found from <|endoftext|>, which llm.c and build-nanogpt put
before each document, nanoGPT and datatrove after it. Opening reads a few kilobytes of each file.
"""

import codecs
import hashlib
import io
import re
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import numpy as np

from .folder import Folder, ShardError
from .tokenizer import Tokenizer

GPT2_TOKENIZERS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2")  # one tokenizer, five models

LLMC_MAGIC, LLMC_VERSION, LLMC_HEADER_BYTES = 20240520, 1, 1024
LLAMA3_MAGIC = 20240801
INDEX_BYTES = 8
LOOK_BYTES = 4096  # read at the begin, the middle and the end of each file when it is opened
SCAN_TOKENS = 2**22
ZEROS = 256  # token 0 is "!", but a row of that many is written with "!!!!" and the like
# Both are part of the order of training: a longer file counts as several shards, each cut where the first document
# begins past an even share, if one begins so soon.
PART_TOKENS = 100_000_000
SEARCH_TOKENS = 2**20

SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


# NumPy parses a header as Python, which in Python 3.11 now and then raises SystemError when several threads do so.
_PARSING = threading.Lock()


@dataclass(frozen=True)
class TokenFile:
    """One file of tokens without a manifest."""

    folder: Folder
    name: str
    format: str
    dtype: str
    offset: int  # bytes before the first token
    n_tokens: int
    n_documents: int | None = None  # known where there is an index
    first: int = 0  # token
    last: int = 0
    digest: str = ""  # of the tokens looked at

    @property
    def path(self) -> str:
        return f"{self.folder.location}/{self.name}"

    def tokens(self) -> np.ndarray:
        """All tokens, mapped, (n_tokens,) of an unsigned type."""
        # Bytes first: a header may have any length.
        return self.folder.map(self.name, "u1")[self.offset :].view(self.dtype)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop), without mapping the file."""
        size = np.dtype(self.dtype).itemsize
        return np.frombuffer(
            self.folder.read(self.name, self.offset + size * start, self.offset + size * stop), self.dtype
        )


def find_token_files(folder: Folder, sizes: dict[str, int], tokenizer: Tokenizer) -> list[TokenFile]:
    """The token files of a folder, sorted by name, all of one format.

    Raises ShardError, naming the file, for one that is damaged, holds no tokens of this tokenizer or is of another
    format.
    """
    names = [name for name in sizes if not any(part.startswith(".") for part in name.split("/"))]
    with ThreadPoolExecutor(16) as pool:  # a remote folder takes its time to answer
        files = [file for file in pool.map(partial(examine, folder, sizes, tokenizer), names) if file]
    for file in files:
        if file.format != files[0].format:
            raise ShardError(
                f"{file.path} is in {file.format} format, {files[0].name} beside it in {files[0].format} format: "
                "keep one of them, or name a file instead of the folder"
            )
    return files


def examine(folder: Folder, sizes: dict[str, int], tokenizer: Tokenizer, name: str) -> TokenFile | None:
    """What a file is; None if it is none of the formats. Raises ShardError as `find_token_files`."""
    file = _recognise(folder, sizes, tokenizer, name)
    if file is None:
        return None
    item = np.dtype(file.dtype).itemsize
    expected = file.offset + item * file.n_tokens
    if sizes[name] != expected:
        raise ShardError(
            f"{file.path} has {sizes[name]:,} bytes, its header says {expected:,}: it is cut short or damaged, "
            "copy it again"
        )
    if not file.n_tokens:
        raise ShardError(f"{file.path} is empty: copy it again or delete it")
    length = min(LOOK_BYTES // item, file.n_tokens)
    starts = (0, (file.n_tokens - length) // 2, file.n_tokens - length)
    windows = [file.read(start, start + length) for start in starts]
    _refuse_other_tokens(file, tokenizer, windows)
    digest = hashlib.sha256(b"".join(window.tobytes() for window in windows)).hexdigest()
    return replace(file, first=int(windows[0][0]), last=int(windows[-1][-1]), digest=digest)


def _recognise(folder: Folder, sizes: dict[str, int], tokenizer: Tokenizer, name: str) -> TokenFile | None:
    """The format of a file and what its header or index says."""
    if any(name.endswith(ending) and name.removesuffix(ending) in sizes for ending in (".index", ".metadata", ".loss")):
        return None
    path, head = f"{folder.location}/{name}", folder.read(name, 0, LOOK_BYTES)
    if head[:4] in (LLMC_MAGIC.to_bytes(4, "little"), LLAMA3_MAGIC.to_bytes(4, "little")):
        return TokenFile(folder, name, "llm.c", "<u2", LLMC_HEADER_BYTES, _llmc_tokens(path, head))
    if head[:6] == b"\x93NUMPY":
        return TokenFile(folder, name, "npy", *_npy_layout(path, head))
    if f"{name}.index" in sizes:
        dtype, n_tokens, n_documents = _datatrove_layout(folder, sizes, tokenizer, name)
        return TokenFile(folder, name, "datatrove", dtype, 0, n_tokens, n_documents)
    if name.endswith(".ds"):
        raise ShardError(
            f"{path} has no {name.rpartition('/')[2]}.index beside it: if scripts/prepare_data.py was stopped, start "
            "it again; a .ds file of other origin can be renamed to .bin"
        )
    if name.endswith((".bin", ".npy")):
        if f"{name.rpartition('/')[0]}/meta.pkl".lstrip("/") in sizes:
            raise ShardError(
                f"{path} has a meta.pkl beside it, so its numbers stand for characters, not for tokens: "
                "make tokens of the text with python scripts/prepare_data.py"
            )
        of = tokenizer.dtype
        _refuse_unless_raw(path, sizes[name], head, of)
        return TokenFile(folder, name, f"raw {of.name}", of.str, 0, sizes[name] // of.itemsize)
    return None


def _refuse_other_tokens(file: TokenFile, tokenizer: Tokenizer, windows: list[np.ndarray]) -> None:
    """Raise ShardError for tokens that this tokenizer did not make; `windows` are some from the begin to the end."""
    if (largest := max(int(window.max()) for window in windows)) >= tokenizer.vocab_size:
        whose = "GPT-2's vocabulary" if tokenizer.is_gpt2 else f"the vocabulary of the tokenizer {tokenizer.name},"
        raise ShardError(
            f"{file.path} holds token {largest}, outside {whose} of {tokenizer.vocab_size}: it is damaged, or made "
            "with another tokenizer (data.tokenizer names it), or no file of tokens"
        )
    if (zeros := max(map(longest_zeros, windows))) >= ZEROS:
        raise holes(file.path, zeros)
    if file.format == "datatrove" and windows[-1][-1] != tokenizer.eot:
        eot = tokenizer.eot_token
        raise ShardError(
            f"{file.path}: its documents do not end with {eot}: tokenize them again with that as eos_token"
        )


def longest_zeros(tokens: np.ndarray) -> int:
    """The length of the longest run of token 0."""
    if not (tokens == 0).any():
        return 0
    others = np.flatnonzero(np.concatenate(([True], tokens != 0, [True])))
    return int(np.diff(others).max()) - 1


def holes(path: str, zeros: int) -> ShardError:
    """The error for a file in which copying left a hole."""
    return ShardError(f"{path} holds {zeros:,} or more zeros in a row: it was not copied whole, copy it again")


def _llmc_tokens(path: str, head: bytes) -> int:
    header = np.frombuffer(head[:12], "<i4").tolist()
    if header[:2] != [LLMC_MAGIC, LLMC_VERSION] or len(head) < LLMC_HEADER_BYTES:
        raise ShardError(
            f"{path} begins with {header}, llm.c's GPT-2 tokens with {[LLMC_MAGIC, LLMC_VERSION]} and 1,024 bytes of "
            "header: it is damaged, or made with another tokenizer"
        )
    return header[2]


def _npy_layout(path: str, head: bytes) -> tuple[str, int, int]:
    stream = io.BytesIO(head)
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version[0] == 1 else np.lib.format.read_array_header_2_0
        with _PARSING:
            shape, _, dtype = read(stream)
    except Exception as error:  # NumPy parses it as Python, with many ways to fail
        raise ShardError(f"{path} has a broken NumPy header ({type(error).__name__}): copy it again") from None
    # int16 is too narrow; the wider ones are read as unsigned, so that a negative number is seen as out of range.
    if len(shape) != 1 or dtype.str not in ("<u2", "<i4", "<u4", "<i8", "<u8"):
        raise ShardError(
            f"{path} is an array of {dtype.str} with shape {shape}, tokens are one row of uint16 (or wider integers): "
            "write it again"
        )
    return f"<u{dtype.itemsize}", stream.tell(), shape[0]


def _datatrove_layout(folder: Folder, sizes: dict[str, int], tokenizer: Tokenizer, name: str) -> tuple[str, int, int]:
    path, index_size = f"{folder.location}/{name}", sizes[f"{name}.index"]
    last_end = read_last_end(folder, name, index_size)
    if tokenizer.is_gpt2 and f"{name}.metadata" in sizes:
        named = folder.read(f"{name}.metadata").decode("utf-8", "replace").partition("\n")[0].rpartition("|")[0]
        if named.rpartition("/")[2] not in GPT2_TOKENIZERS:
            raise ShardError(
                f"{path}.metadata names the tokenizer {named!r}, not 'gpt2': name it with data.tokenizer, or if it is "
                "GPT-2's under another name, delete that file"
            )
    if index_size % INDEX_BYTES or not last_end or sizes[name] not in (2 * last_end, 4 * last_end):
        raise ShardError(
            f"{path} has {sizes[name]:,} bytes, its .index ends at token {last_end:,}: one of them is cut short or of "
            "another file, copy both again"
        )
    return f"<u{sizes[name] // last_end}", last_end, index_size // INDEX_BYTES


def read_last_end(folder: Folder, name: str, index_size: int) -> int:
    """The end of the last document in NAME.index, in tokens."""
    return int.from_bytes(folder.read(f"{name}.index", max(index_size - INDEX_BYTES, 0), index_size), "little")


def _refuse_unless_raw(path: str, size: int, head: bytes, dtype: np.dtype) -> None:
    """Raw tokens carry no mark, so this knows what else such a file could be."""
    if size % dtype.itemsize:
        number = "an even number" if dtype.itemsize == 2 else f"a multiple of {dtype.itemsize}"
        raise ShardError(f"{path} has {size:,} bytes, {dtype.name} tokens {number}: it is cut short, copy it again")
    if head and _is_text(head):
        raise ShardError(f"{path} is text, not tokens: make tokens of it with python scripts/prepare_data.py {path}")
    if dtype.itemsize == 2 and len(head) > 8 and not any(head[2::4]) and not any(head[3::4]):
        raise ShardError(
            f"{path} has zeros in every second place: raw tokens are uint16, not 4 bytes each, and a file with holes "
            "was not copied whole"
        )


def _is_text(head: bytes) -> bool:
    plain = bytes(range(32, 127)) + b"\t\n\r\f"
    if not head.translate(None, plain):
        return True
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(head)
    except UnicodeDecodeError:
        return False
    return len(head) >= 16 and all(character.isprintable() or character.isspace() for character in text)


def split_of(name: str) -> str:
    """ "train", "val" or "test", by the last word of the file's name, or else of the folders above it, that says so."""
    for part in reversed(name.lower().split("/")):
        for word in reversed(re.findall("[a-z]+", part)):
            if word in SPLITS:
                return SPLITS[word]
    return "train"


def begins_with_eot(files: Iterable[TokenFile], eot: int) -> bool:
    """Whether the token `eot` begins each document (or ends it), from all files of a folder.

    Inside a row of tokens the two look alike, and shards are cut anywhere. Only where the whole row begins or ends can
    they be told apart: at the files with the lowest numbers and those with the highest. Where that says nothing, as
    in a part of a data set, each format's own habit counts.
    """
    files = list(files)
    numbers = [tuple(map(int, re.findall(r"\d+", file.name.rpartition("/")[2]))) for file in files]
    lowest, highest = min(numbers), max(numbers)
    begins = any(file.first == eot for file, number in zip(files, numbers, strict=True) if number == lowest)
    ends = any(file.last == eot for file, number in zip(files, numbers, strict=True) if number == highest)
    return begins if begins != ends else files[0].format in ("llm.c", "npy")


def find_document_ends(tokens: np.ndarray, eot: int, eot_first: bool) -> np.ndarray:
    """Where each document ends, (documents,) int64; a piece of a document at either end counts as one."""
    blocks = [
        np.flatnonzero(tokens[start : start + SCAN_TOKENS] == eot) + start
        for start in range(0, len(tokens), SCAN_TOKENS)
    ]
    ends = np.concatenate(blocks) + (0 if eot_first else 1)
    borders = np.array([len(tokens)])
    return np.concatenate([ends[(ends > 0) & (ends < len(tokens))], borders])


def cut_points(file: TokenFile, eot: int, eot_first: bool) -> list[int]:
    """Where to cut a long file into parts of about PART_TOKENS: 0, ..., n_tokens."""
    n_parts = max(1, (file.n_tokens + PART_TOKENS // 2) // PART_TOKENS)
    shares = [file.n_tokens * i // n_parts for i in range(n_parts + 1)]
    cuts = [0]
    for share, next_share in pairwise(shares[1:]):
        cut = share
        for start in range(share, min(share + SEARCH_TOKENS, next_share), LOOK_BYTES):
            found = np.flatnonzero(file.read(start, min(start + LOOK_BYTES, next_share)) == eot)
            if len(found):
                cut = start + int(found[0]) + (0 if eot_first else 1)
                break
        cuts.append(cut)
    return [*cuts, file.n_tokens]
