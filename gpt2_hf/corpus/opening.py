"""Opening text files as people have them: packed or not, whatever the ending says, and in the encoding they were told.

What a file is packed with follows from its first bytes. Everything reads as a buffered stream of UTF-8 bytes.
"""

import bz2
import codecs
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ..program import UserError

LOOK_BYTES = 2**16  # of a file's beginning, from which its kind is told
ZSTD_INPUT = 2**11  # bytes; a block of 4 may unpack to 128 KiB, so these to 64 MiB at most
PARQUET = b"PAR1"
BOM = codecs.BOM_UTF8
GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
ZSTD_SKIPPABLE = re.compile(rb"[\x50-\x5f]\x2a\x4d\x18")
READ_ERRORS = (EOFError, OSError, zlib.error, lzma.LZMAError)


class Damaged(OSError):
    """A packed file that cannot be unpacked from here on; like gzip's own errors it has no errno."""


class _Stream(io.RawIOBase):
    """What is made of a file, block by block, as a stream of bytes."""

    def __init__(self, file: BinaryIO, blocks: Iterator[bytes]):
        self._file, self._blocks, self._left = file, blocks, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._left = memoryview(block)
        size = min(len(buffer), len(self._left))
        buffer[:size], self._left = self._left[:size], self._left[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()


def _unpack_zstd(file: BinaryIO) -> Iterator[bytes]:
    """Unpack frames one after another, in memory bounded by the window that they ask for (2 GiB with --long=31).

    Raises EOFError where the file was cut short, Damaged where it is no zstd.
    """
    import zstandard

    frame: Any = None
    packed = b""
    while packed := packed or file.read(2**16):
        if frame is None:
            packed += file.read(4 - len(packed)) if len(packed) < 4 else b""
            if not (packed.startswith(ZSTD) or ZSTD_SKIPPABLE.match(packed)):
                raise Damaged("junk after the last zstd frame")
            frame = zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
        block, packed = packed[:ZSTD_INPUT], packed[ZSTD_INPUT:]
        try:
            yield frame.decompress(block)
        except zstandard.ZstdError as error:
            raise Damaged(str(error)) from error
        if frame.eof:
            packed = frame.unused_data + packed
            frame = None
    if frame is not None:
        raise EOFError("the file ended before the end of its last frame")


def _recode(file: BinaryIO, encoding: str) -> Iterator[bytes]:
    """Text of another encoding, as UTF-8. What is no text there becomes what is no UTF-8, to be noticed later."""
    decoder = codecs.getincrementaldecoder(encoding)("surrogateescape")
    ended = False
    while not ended:
        block = file.read(2**16)
        ended = not block
        try:
            text = decoder.decode(block, final=ended)
        except UnicodeError as error:
            raise Damaged(str(error)) from error
        yield text.encode(errors="surrogateescape")


def packing(head: bytes) -> Callable[[BinaryIO], BinaryIO] | None:
    """What unpacks a file that begins so; None for one that is not packed."""
    if head.startswith(GZIP):
        return lambda file: gzip.GzipFile(fileobj=file)  # type: ignore[return-value]
    if head.startswith(ZSTD) or ZSTD_SKIPPABLE.match(head):
        return lambda file: io.BufferedReader(_Stream(file, _unpack_zstd(file)))
    if re.match(rb"BZh[1-9]1AY&SY", head):
        return bz2.BZ2File  # type: ignore[return-value]
    if head.startswith(b"\xfd7zXZ\0"):
        return lzma.LZMAFile  # type: ignore[return-value]
    return None


def open_text(path: str | Path, encoding: str = "utf-8") -> io.BufferedIOBase:
    """The text of a file as UTF-8 bytes; can be entered in the middle if it is neither packed nor recoded."""
    file: Any = io.BufferedReader(io.FileIO(path))  # closed by what is wrapped around it
    if unpack := packing(file.peek(8)[:16]):
        file = unpack(file)
    if not is_utf8(encoding):
        file = io.BufferedReader(_Stream(file, _recode(file, encoding)), 2**20)
    return file


def is_utf8(encoding: str) -> bool:
    return codecs.lookup(encoding).name == "utf-8"


def look(path: Path, encoding: str) -> bytes:
    """The first bytes of a file's text, fewer where it is damaged.

    Raises UserError, in one line, for a file that is sound but not text in this encoding.
    """
    head = b""
    try:
        with open_text(path, encoding) as file:
            while len(head) < LOOK_BYTES and (block := file.read1(LOOK_BYTES)):
                head += block
    except READ_ERRORS as error:
        if getattr(error, "errno", None) is not None:
            raise
    found = other_encoding(head[:LOOK_BYTES]) if is_utf8(encoding) else None
    if found and found.startswith("utf"):
        raise UserError(f"{path} looks like {found.upper()}, not UTF-8: pass --encoding {found}")
    if b"\0" in head.removeprefix(BOM)[:LOOK_BYTES] and not head.startswith(PARQUET):
        raise UserError(f"{path} holds binary data, not text: leave it out, or convert it first")
    return head


def other_encoding(raw: bytes) -> str | None:
    """The encoding that bytes look like if they are no UTF-8; None if they are, or look like nothing."""
    for mark, name in ((codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32")):
        if raw.startswith(mark):
            return name
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    even, odd = raw[0:512:2], raw[1:512:2]
    if len(raw) >= 8 and odd.count(0) > 0.4 * len(odd) and even.count(0) < 0.1 * len(even):
        return "utf-16-le"
    if len(raw) >= 8 and even.count(0) > 0.4 * len(even) and odd.count(0) < 0.1 * len(odd):
        return "utf-16-be"
    try:
        codecs.getincrementaldecoder("utf-8")().decode(raw)
    except UnicodeDecodeError as error:
        if b"\0" in raw:
            return None
        # Each is a letter between ASCII in a text of one byte a character; between 0x80 and 0x9f only Windows has any.
        near = raw[error.start : error.start + 4096]
        if sum(byte > 127 for byte in near) > 0.5 * len(near) or re.search(rb"[\x00-\x08\x0e-\x1f]", near):
            return None
        return "cp1252" if re.search(rb"[\x80-\x9f]", near) else "latin-1"
    return None
