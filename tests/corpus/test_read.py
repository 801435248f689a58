"""Files as people have them: whatever they are packed, laid out or encoded as, the same documents come out of them.

Read task by task, without tokenizing; compared with the texts that the files were made of.
"""

import bz2
import gzip
import json
import lzma
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gpt2_hf.corpus import json_text, plain_text
from gpt2_hf.corpus import read as reading
from gpt2_hf.corpus.read import Source
from gpt2_hf.program import UserError

for needed in ("datatrove", "zstandard", "pyarrow"):
    pytest.importorskip(needed)

TEXTS = [f'Nr. {i}: "naïve" {{[]}} 中文 😀\n' + "the sea was calm, " * (i % 30) for i in range(200)]
ROWS = [{"id": str(i), "text": text, "meta": {"n": [i, {"a": None}]}} for i, text in enumerate(TEXTS)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def rows_of(path: Path, **source: Any) -> tuple[list[str], list[dict[str, Any]]]:
    """The texts of all tasks, and what stands with each unusable document."""
    _, settled, tasks = reading.plan(Source((str(path),), **source))
    step = reading.ReadDocuments(settled, tasks)
    documents = [document for task in range(len(tasks)) for document in step(None, task, len(tasks))]
    return (
        [document.text for document in documents if "skipped" not in document.metadata],
        [document.metadata for document in documents if "skipped" in document.metadata],
    )


def long_window(raw: bytes, log: int) -> bytes:
    """As zstd --long=LOG packs what it reads from a pipe: without its length, so the window counts."""
    import zstandard

    parameters = zstandard.ZstdCompressionParameters(window_log=log, write_content_size=False)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return packer.compress(raw) + packer.flush()


PACKED = {
    "gz": gzip.compress(LINES),
    "gz of two members": gzip.compress(LINES[:5000]) + gzip.compress(LINES[5000:]),
    "bz2": bz2.compress(LINES),
    "xz": lzma.compress(LINES),
    "zst with a long window": long_window(LINES, 28),
    "zst with the longest window": long_window(LINES, 31),
    "zst with a skippable frame": b"\x50\x2a\x4d\x18\x03\0\0\0abc" + long_window(LINES, 20),
    "nothing": LINES,
}


@pytest.mark.parametrize("packing", PACKED)
def test_what_a_file_is_packed_with_is_told_by_content(tmp_path: Path, packing: str):
    for ending in ("jsonl", "jsonl.gz", "ndjson.zst", "json.xz", "json.bz2"):
        (tmp_path / f"docs.{ending}").write_bytes(PACKED[packing])
        assert rows_of(tmp_path / f"docs.{ending}") == (TEXTS, []), ending


@pytest.mark.parametrize(
    "raw",
    [
        gzip.compress(LINES) + b"junk",
        long_window(LINES, 20) + b"junk that is long enough",
        long_window(LINES, 20) + b"j",
    ],
    ids=["gz", "zst", "zst, one byte"],
)
def test_junk_behind_the_last_frame_costs_no_document(tmp_path: Path, raw: bytes):
    (tmp_path / "docs.jsonl.gz").write_bytes(raw)
    texts, damage = rows_of(tmp_path / "docs.jsonl.gz")
    assert texts == TEXTS
    assert [(found["skipped"], found["line"]) for found in damage] == [("damaged", len(TEXTS))]


LAYOUTS = {
    "array": json.dumps(ROWS),
    "array, one a line": "[\n" + ",\n".join(map(json.dumps, ROWS)) + "\n]\n",
    "pretty array": json.dumps(ROWS, indent=2),
    "pretty objects": "\n".join(json.dumps(row, indent=4, ensure_ascii=False) for row in ROWS),
    "CR": "\r".join(map(json.dumps, ROWS)),
    "CRLF": "\r\n".join(map(json.dumps, ROWS)),
    "one line": " ".join(map(json.dumps, ROWS)),
    "two arrays": json.dumps(ROWS[:70]) + "\n" + json.dumps(ROWS[70:]),
    "byte-order mark": "\ufeff" + json.dumps(ROWS),
}


@pytest.mark.parametrize("buffer", [64, 2**20])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_json_is_read_however_it_is_laid_out(tmp_path: Path, monkeypatch, layout: str, buffer: int):
    monkeypatch.setattr(json_text, "BUFFER", buffer)
    monkeypatch.setattr(json_text, "STRIPE_BYTES", 500)
    (tmp_path / "docs.json").write_bytes(LAYOUTS[layout].encode())
    assert rows_of(tmp_path / "docs.json") == (TEXTS, [])
    (tmp_path / "docs.jsonl.gz").write_bytes(gzip.compress(LAYOUTS[layout].encode()))
    monkeypatch.setattr(reading, "SHARE_BYTES", 100)  # several tasks read it
    texts, skipped = rows_of(tmp_path / "docs.jsonl.gz")
    assert (sorted(texts), skipped) == (sorted(TEXTS), [])


def test_a_broken_array_is_read_up_to_the_fault_and_said(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(json_text, "BUFFER", 4096)
    whole = json.dumps(ROWS, indent=1)
    for broken in (whole[: len(whole) // 2], whole.replace('"id": "100"', '"id" "100"')):
        (tmp_path / "docs.json").write_text(broken)
        texts, skipped = rows_of(tmp_path / "docs.json")
        assert 10 < len(texts) < len(TEXTS) and texts == TEXTS[: len(texts)]
        assert [found["skipped"] for found in skipped] == ["damaged"] and "not valid JSON" in skipped[0]["detail"]


@pytest.mark.parametrize(
    "row", [{"data": {"text": "found"}}, {"data.text": "found"}, {"data.text": "found", "data": {"text": "other"}}]
)
def test_a_field_inside_another_is_named_with_a_dot(tmp_path: Path, row: dict):
    (tmp_path / "docs.jsonl").write_text(json.dumps(row))
    assert rows_of(tmp_path / "docs.jsonl", text_field="data.text") == (["found"], [])


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"content": "x", "meta": {"lang": "en"}}, "no 'text' among content, meta.lang; set --text_field"),
        ({"text": ["a", "b"]}, "'text' is a list of str, not a text"),
        ({"text": {"body": "x"}}, "'text' is not a text, but holds text.body; set --text_field"),
        ({"text": 5}, "'text' is a int, not a text"),
        ({"text": None}, "'text' is null"),
    ],
)
@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_a_row_without_text_says_what_it_has(tmp_path: Path, row: dict, said: str, ending: str):
    import pyarrow as pa
    import pyarrow.parquet

    path = tmp_path / f"docs.{ending}"
    if ending == "jsonl":
        path.write_text(json.dumps(row))
    else:
        pa.parquet.write_table(pa.Table.from_pylist([row]), path)
        if "text" not in row:
            with pytest.raises(UserError, match=r"no column 'text' among \['content', 'meta'\]: set --text_field"):
                rows_of(path)
            return
    texts, skipped = rows_of(path)
    assert not texts and skipped[0]["skipped"] == "no_text" and said in skipped[0]["detail"]


def test_columns_of_every_type_of_text_are_read(tmp_path: Path):
    import pyarrow as pa
    import pyarrow.parquet

    path = tmp_path / "docs.parquet"
    for kind in (pa.string(), pa.large_string(), pa.binary(), pa.large_binary(), pa.string_view()):
        pa.parquet.write_table(pa.table({"text": pa.array(TEXTS, pa.string()).cast(kind)}), path)
        assert rows_of(path) == (TEXTS, []), kind
    pa.parquet.write_table(pa.table({"text": pa.array(TEXTS).dictionary_encode()}), path)
    assert rows_of(path) == (TEXTS, [])
    pa.parquet.write_table(pa.Table.from_pylist([{"data": {"text": text, "n": 1}} for text in TEXTS]), path)
    assert rows_of(path, text_field="data.text") == (TEXTS, [])
    pa.parquet.write_table(pa.table({"text": [b"good", b"\xff", b"fine"]}), path)
    texts, skipped = rows_of(path)
    assert texts == ["good", "fine"] and [(found["skipped"], found["line"]) for found in skipped] == [("broken", 2)]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("ending", ["txt", "jsonl", "json.gz"])
def test_text_of_wide_characters_is_recognised(tmp_path: Path, encoding: str, ending: str):
    texts = ["The sea was calm\r\nand nobody's heart heard it. " * 20] if ending == "txt" else ["calm sea"] * 30
    raw = (texts[0] if ending == "txt" else "\n".join(json.dumps({"text": text}) for text in texts)).encode(encoding)
    path = tmp_path / f"docs.{ending}"
    path.write_bytes(gzip.compress(raw) if ending.endswith("gz") else raw)
    if encoding != "utf-32":
        with pytest.raises(UserError, match=f"docs.{ending} looks like UTF-16.*pass --encoding utf-16"):
            rows_of(path)
    assert rows_of(path, encoding=encoding) == (texts, [])


@pytest.mark.parametrize(
    ("encoding", "text"), [("latin-1", "Müßiggang, café. " * 20), ("cp1252", "“naïve” – ça va. " * 20)]
)
def test_text_of_one_byte_a_character_is_recognised(tmp_path: Path, encoding: str, text: str):
    (tmp_path / "docs.txt").write_bytes(text.encode(encoding))
    (tmp_path / "docs.jsonl").write_bytes(json.dumps({"text": text}, ensure_ascii=False).encode(encoding))
    for name in ("docs.txt", "docs.jsonl"):
        texts, skipped = rows_of(tmp_path / name)
        assert not texts and skipped[0]["skipped"] == "broken"
        assert f"it looks like {encoding}: if all of it is, pass --encoding {encoding}" in skipped[0]["detail"]
        assert rows_of(tmp_path / name, encoding=encoding) == ([text], [])


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("docs.parquet", b"", "is empty"),
        ("docs.parquet", b"PK\x03\x04" + bytes(100), "no parquet file"),
        ("docs.txt", b"\x7fELF\x02\x01\x01" + bytes(range(256)) * 9, "holds binary data, not text"),
        ("docs.jsonl.gz", bytes(range(256)) * 9, "holds binary data, not text"),
    ],
)
def test_what_is_no_text_stops_at_once(tmp_path: Path, name: str, content: bytes, said: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said):
        rows_of(tmp_path / name)


def test_a_long_unbroken_text_is_one_document_lost(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(plain_text, "TXT_BYTES", 1000)
    monkeypatch.setattr(plain_text, "LINE_BYTES", 3000)
    body = b"first\n" * 200 + b"x" * 20_000 + b"\n" + b"last\n" * 200
    (tmp_path / "docs.txt").write_bytes(body)
    (tmp_path / "docs.txt.gz").write_bytes(gzip.compress(body))
    for name in ("docs.txt", "docs.txt.gz"):
        texts, skipped = rows_of(tmp_path / name)
        assert [found["skipped"] for found in skipped] == ["too_long"]
        assert "".join(texts).endswith("last\n" * 190) and max(map(len, texts)) <= 3000


PEAK = """
import re, sys
from gpt2_hf.corpus import read as reading
_, settled, tasks = reading.plan(reading.Source((sys.argv[1],)))
found = [d.metadata.get("skipped") or len(d.text) for d in reading.ReadDocuments(settled, tasks)(None, 0, 1)]
# Not ru_maxrss, in which the process that started this one is counted.
print(len(found), found[0], int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) // 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", ["bomb.txt.zst", "bomb.jsonl.zst", "bomb.parquet"])
def test_a_small_file_cannot_take_all_memory(tmp_path: Path, name: str):
    """A few kilobytes that unpack to 1 GB."""
    import pyarrow as pa
    import pyarrow.parquet
    import zstandard

    path = tmp_path / name
    if name.endswith("parquet"):
        rows = pa.DictionaryArray.from_arrays([0] * 128, ["x" * 8_000_000])
        pa.parquet.write_table(pa.table({"text": rows}), path, compression="zstd")
    else:
        packer = zstandard.ZstdCompressor().compressobj()
        block = b"x" * 2**24
        path.write_bytes(b"".join(packer.compress(block) for _ in range(64)) + packer.flush())
    assert path.stat().st_size < 500_000
    done = subprocess.run([sys.executable, "-c", PEAK, str(path)], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    count, first, peak = done.stdout.split()
    assert (int(count), first) == ((128, "8000000") if name.endswith("parquet") else (1, "too_long"))
    assert int(peak) < 700
