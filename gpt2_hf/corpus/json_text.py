"""Rows of JSON, however they are laid out: one a line; or an array, objects over several lines, or lines ended by CR.

The first is read line by line, so that one broken line costs no other. The rest is read value by value with a buffer
that grows only as far as one value needs, LINE_BYTES at most.
"""

import codecs
import io
import json
import re
from collections.abc import Iterator
from typing import Any

from .opening import BOM, Damaged, other_encoding

LINE_BYTES = 64 * 2**20  # a longer line, or value, is not read
STRIPE_BYTES = 2**16  # of text: the tasks that share a file take turns with stripes of lines, or values
BUFFER = 2**20
BETWEEN = re.compile(r"[\s,]*")
DECODER = json.JSONDecoder()

Row = tuple[Any, dict[str, Any]]  # a document's fields, and where it stands; "skipped" there says why it is unusable


def is_lines(head: bytes) -> bool:
    """Whether a file that begins so has a value on each line."""
    text = head.removeprefix(BOM).decode(errors="ignore").lstrip()
    if re.match(r"\[\s*[{\]]", text):
        return False
    if not text.startswith("{"):
        return True
    try:
        _, end = DECODER.raw_decode(text)
    except (ValueError, RecursionError):
        return not re.match(r"\{\s*[\r\n]\s*(\"|$)", text)  # a broken first line, or one longer than what was seen
    after = re.match(r"[^\S\n]*", text[end:])
    rest = text[end + (after.end() if after else 0) :]
    return "\n" not in text[:end] and (not rest or rest.startswith("\n") or not rest.startswith("{"))


def read_lines(file: io.BufferedIOBase, start: int, end: int, shared: bool) -> Iterator[Row]:
    """The lines that begin at bytes start to end; if `shared`, those in the stripes of share `start` of `end`."""
    position = number = 0
    if not shared and start:
        position = start - 1
        file.seek(position)
        position += len(file.readline())
    while (shared or position < end) and (line := file.readline(LINE_BYTES)):
        number += 1
        # Inside a large file the number of a line is counted only if it must be reported.
        place: dict[str, Any] = {"line": number} if shared else {"offset": position}
        mine = not shared or position // STRIPE_BYTES % end == start
        if not position and line.startswith(BOM):
            position, line = len(BOM), line[len(BOM) :]
        position += len(line)
        if len(line) == LINE_BYTES and not line.endswith(b"\n"):
            while (more := file.readline(LINE_BYTES)) and not more.endswith(b"\n"):
                position += len(more)
            position += len(more)
            if mine:
                yield None, place | {"skipped": "too_long"}
        elif mine and line and not line.isspace():
            row, detail = None, None
            try:
                text = line.decode()
                del line  # 50 MB, perhaps, and so has each form of it
                row = json.loads(text)
                del text
            except UnicodeDecodeError as error:
                detail = hint(error.object)
            except (ValueError, RecursionError):
                pass
            yield row, place | ({"detail": detail} if detail else {})
            del row


def hint(raw: bytes) -> str | None:
    """What to try with bytes that are no UTF-8."""
    name = other_encoding(raw)
    return f"it looks like {name}: if all of it is, pass --encoding {name}" if name else None


def read_values(file: io.BufferedIOBase, share: int, shares: int) -> Iterator[Row]:
    """The values of a file one after another, or the elements of its arrays; raises Damaged where they end."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
    text, at, line, position, ended, wanted = "", 0, 1, 0, False, BUFFER
    depth = 0  # 1 inside an array
    while True:
        skip = BETWEEN.match(text, at)
        begin = skip.end() if skip else at
        line, position, at = line + _lines(text, at, begin), position + begin - at, begin
        bracket = text[at : at + 1]
        if bracket and bracket in "[]" and (bracket == "]") == bool(depth):
            depth, at, position = 1 - depth, at + 1, position + 1
            continue
        try:
            if at == len(text):
                raise json.JSONDecodeError("nothing left", text, at)
            value, end = DECODER.raw_decode(text, at)
            # A number at the end of the buffer may go on.
            if end == len(text) and not ended and text[end - 1] not in '}]"':
                raise json.JSONDecodeError("perhaps cut", text, end)
        except (ValueError, RecursionError) as error:
            if ended:
                if at < len(text) or depth:
                    raise Damaged(f"not valid JSON, or cut short: {error}") from None
                return
            fault = error.pos if isinstance(error, json.JSONDecodeError) else at
            unterminated = not isinstance(error, json.JSONDecodeError) or error.msg.startswith("Unterminated")
            if len(text) - fault > 4096 and not unterminated:
                raise Damaged(f"not valid JSON: {error}") from None
            if len(text) - at > LINE_BYTES:
                raise Damaged(f"a value of more than {LINE_BYTES // 2**20} MiB") from None
            wanted = max(BUFFER, len(text) - at)  # twice as much: the value is begun again only a few times
            block = file.read(wanted)
            ended = not block
            text, at = text[at:] + decoder.decode(block, final=ended), 0
            continue
        if position // STRIPE_BYTES % shares == share:
            yield value, {"line": line}
        line, position, at = line + _lines(text, at, end), position + end - at, end


def _lines(text: str, start: int, end: int) -> int:
    return text.count("\n", start, end) or text.count("\r", start, end)
