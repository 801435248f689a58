"""Documents of plain text: a file of its own, or cut at a separator, or at line ends where one is too long."""

import io
from collections.abc import Iterator
from typing import Any

from ..program import UserError
from .json_text import LINE_BYTES, hint
from .opening import BOM, LOOK_BYTES

TXT_BYTES = 32 * 2**20  # a longer .txt is no document, but a corpus: it is cut at a line end

Texts = Iterator[tuple[dict[str, int], bytes | None]]  # where each begins, by line or offset; None: it is too long


def decode(raw: bytes | None, place: dict[str, int]) -> tuple[str | None, dict[str, Any]]:
    """The text, or None, and its place, or where it is at fault."""
    if raw is None:
        return None, place | {"skipped": "too_long"}
    mark = len(BOM) * raw.startswith(BOM)
    try:
        return raw[mark:].decode(), place
    except UnicodeDecodeError as error:
        before = mark + error.start
        if "line" in place:
            before = raw.count(b"\n", 0, before)
        detail = hint(raw[mark : mark + LOOK_BYTES + error.start])
        at_fault = {key: value + before for key, value in place.items()}
        return None, at_fault | ({"detail": detail} if detail else {})


def lines_between(file: io.BufferedIOBase, start: int, end: int) -> Texts:
    """The lines that begin at bytes start to end, if any do, and where the first one does; an empty file is empty. None
    stands for a text that is too long."""
    if start:
        file.seek(start - 1)
        while (line := file.readline(TXT_BYTES)) and not line.endswith(b"\n"):
            pass
    begin = file.tell()
    if begin < end:
        yield {"offset": begin}, _to_line_end(file, file.read(end - 1 - begin))
    elif not start:
        yield {"offset": 0}, b""


def _to_line_end(file: io.BufferedIOBase, block: bytes) -> bytes | None:
    """The block with the rest of its last line; None if they are longer than LINE_BYTES together."""
    rest = file.readline(max(LINE_BYTES - len(block), 1))
    if len(rest) < LINE_BYTES - len(block) or rest.endswith(b"\n"):
        return block + rest
    while (rest := file.readline(TXT_BYTES)) and not rest.endswith(b"\n"):
        pass
    return None


def blocks(file: io.BufferedIOBase) -> Texts:
    """A file in blocks of about TXT_BYTES, cut at a line end, and the line on which each begins."""
    line = 1
    while begin := file.read(TXT_BYTES):
        block = _to_line_end(file, begin)
        yield {"line": line}, block
        line += begin.count(b"\n") + 1 if block is None else block.count(b"\n")


def split_at(file: io.BufferedIOBase, separator: bytes, path: str) -> Texts:
    """The documents between separators, and the line on which each begins; empty ones are nothing."""
    line, rest, ended = 1, b"", False
    while not ended:
        block = file.read(2**20)
        ended = not block
        *whole, rest = (rest + block).split(separator)
        for text in [*whole, rest] if ended else whole:
            if text.strip():
                yield {"line": line}, text
            line += (text + separator).count(b"\n")
        if len(rest) > TXT_BYTES:
            raise UserError(f"{path}: no {separator.decode()!r} within {TXT_BYTES:,} bytes: check --separator")
