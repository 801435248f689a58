"""Preparation: what goes in comes out, whatever the format and the number of workers.

Tokens are compared with the `tokenizers` library's, which preparation does not use, and are read back as plain files.
"""

import gzip
import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from gpt2_hf.corpus import json_text, plain_text
from gpt2_hf.corpus import read as reading
from gpt2_hf.corpus import write as writing
from gpt2_hf.corpus.prepare import PrepareConfig, prepare
from gpt2_hf.data.shards import open_split
from gpt2_hf.data.tokenizer import EOT, Tokenizer, load_tokenizer

for needed in ("datatrove", "tiktoken", "zstandard", "pyarrow", "datasets"):
    pytest.importorskip(needed)

ROOT = Path(__file__).resolve().parents[2]
WORDS = [
    "the",
    "sea",
    "was",
    "calm,",
    "naïve",
    "中文",
    "and",
    "😀",
    "nobody's",
    "<|endoftext|>",
    "heard\n\n",
    "of",
    "42",
    "",
]


def make_texts(count: int) -> list[str]:
    return [f"{i}: " + " ".join(WORDS[(i * 7 + j * j) % len(WORDS)] for j in range(i % 40 + 1)) for i in range(count)]


TEXTS = make_texts(300)
SCRIPT_ENV = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


def script_command(*arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "scripts" / "prepare_data.py"), *arguments]


def run_script(*arguments: str) -> subprocess.CompletedProcess:
    command = script_command(*arguments)
    return subprocess.run(command, capture_output=True, text=True, env=SCRIPT_ENV, timeout=60, cwd=ROOT)


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": t, "id": f"d{i}"}) + "\n" for i, t in enumerate(texts)), "utf-8")
    return path


def documents(out: Path, split: str) -> list[tuple[int, ...]]:
    """The documents of a split, read as the format says; also checks the manifest and the end of every document."""
    entry = json.loads((out / "manifest.json").read_text())["splits"][split]
    found = []
    for shard in entry["shards"]:
        raw = (out / shard["file"]).read_bytes()
        assert hashlib.sha256(raw).hexdigest() == shard["sha256"]
        tokens = np.frombuffer(raw, "<u2")
        ends = np.frombuffer((out / (shard["file"] + ".index")).read_bytes(), "<u8").astype(int)
        assert (len(tokens), len(ends), ends[-1]) == (shard["tokens"], shard["documents"], len(tokens))
        assert (np.flatnonzero(tokens == EOT) + 1 == ends).all()
        found += [tuple(part.tolist()) for part in np.split(tokens, ends)[:-1]]
    for key in ("tokens", "documents", "bytes"):
        assert entry[key] == sum(shard[key] for shard in entry["shards"])
    assert [shard["file"] for shard in entry["shards"]] == sorted(
        path.relative_to(out).as_posix() for path in (out / split).glob("*.ds")
    )
    return found


def expected(texts: list[str]) -> list[tuple[int, ...]]:
    encoder = load_tokenizer().backend_tokenizer
    encoder.encode_special_tokens = True  # the literal text <|endoftext|> is ordinary
    return [(*encoded.ids, EOT) for encoded in encoder.encode_batch(texts)]


def tree(out: Path) -> dict[str, bytes]:
    """Every file that a reader of the data sees."""
    files = [
        out / "manifest.json",
        out / "report.json",
        *(path for split in ("train", "val") for path in (out / split).iterdir()),
    ]
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def wanted() -> list[tuple[int, ...]]:
    return expected(TEXTS)


@pytest.mark.parametrize("kind", ["txt", "txt.gz", "jsonl", "jsonl.gz", "jsonl.zst", "parquet", "dataset"])
def test_every_format_gives_the_same_documents(tmp_path: Path, kind: str, wanted):
    import datasets
    import pyarrow as pa
    import pyarrow.parquet
    import zstandard

    source = tmp_path / f"docs.{kind}"
    plain = write_jsonl(tmp_path / "plain", TEXTS).read_bytes()
    if kind.startswith("txt"):
        source.mkdir()
        opener = gzip.open if kind.endswith("gz") else open
        for i, text in enumerate(TEXTS):
            with opener(source / f"d{i:03d}.{kind}", "wb") as file:
                file.write(text.encode())
    elif kind == "parquet":
        pa.parquet.write_table(pa.table({"text": TEXTS, "other": list(range(len(TEXTS)))}), source, row_group_size=70)
    elif kind == "dataset":
        datasets.Dataset.from_dict({"text": TEXTS, "n": list(range(len(TEXTS)))}).save_to_disk(source)
    elif kind == "jsonl.zst":  # two frames, as concatenated files have
        middle = plain.index(b"\n", len(plain) // 2) + 1
        source.write_bytes(zstandard.compress(plain[:middle]) + zstandard.compress(plain[middle:]))
    else:
        source.write_bytes(gzip.compress(plain) if kind.endswith("gz") else plain)

    given = {"dataset": str(source)} if kind == "dataset" else {"inputs": (str(source),)}
    prepare(PrepareConfig(**given, out=str(tmp_path / "out"), workers=1, val_documents=9))
    train, val = documents(tmp_path / "out", "train"), documents(tmp_path / "out", "val")
    assert len(val) == 9
    assert sorted(train + val) == sorted(wanted)
    in_train = set(train)
    assert train == [document for document in wanted if document in in_train]  # the inputs' order
    # The split goes by a hash of the text, so it is the same for every format.
    held_out = sorted(TEXTS, key=lambda text: hashlib.blake2b(text.encode(), digest_size=8).digest()[::-1])[:9]
    assert sorted(val) == sorted(wanted[TEXTS.index(text)] for text in held_out)


def test_workers_do_not_change_a_byte(tmp_path: Path, monkeypatch, wanted):
    monkeypatch.setattr(reading, "TASK_BYTES", 5000)  # the file is cut into several tasks
    source = write_jsonl(tmp_path / "docs.jsonl", TEXTS)
    trees = []
    for workers in (1, 2, 3):
        out = tmp_path / f"out{workers}"
        prepare(PrepareConfig((str(source),), out=str(out), workers=workers, tokens_per_shard=1000, val_fraction=0.1))
        assert len(list((out / "logs" / "tokens" / "completions").iterdir())) > 5
        trees.append(tree(out))
    assert trees[0] == trees[1] == trees[2]
    assert str(tmp_path) not in trees[0]["manifest.json"].decode()
    out = tmp_path / "out1"
    train, val = documents(out, "train"), documents(out, "val")
    assert sorted(train + val) == sorted(wanted) and not set(train) & set(val)
    assert 15 <= len(val) <= 50


def test_cutting_a_file_anywhere_loses_no_line(tmp_path: Path, monkeypatch, wanted):
    source = write_jsonl(tmp_path / "docs.jsonl", TEXTS[:12])
    size = source.stat().st_size
    reader = reading.ReadDocuments(reading.Source((str(source),)), [])
    for cut in range(1, size, 7):
        pieces = [reading.Piece(str(source), "bytes", 0, cut), reading.Piece(str(source), "bytes", cut, size)]
        assert [row["text"] for piece in pieces for row, _ in reader.rows(piece)] == TEXTS[:12], cut


@pytest.mark.parametrize("tokens_per_shard", [1, 1000, 10**9])
def test_shards_roll_over_between_documents(tmp_path: Path, tokens_per_shard: int, wanted):
    source = write_jsonl(tmp_path / "docs.jsonl", TEXTS)
    out = tmp_path / "out"
    prepare(PrepareConfig((str(source),), out=str(out), workers=1, tokens_per_shard=tokens_per_shard, val_fraction=0))
    assert documents(out, "train") == wanted
    entry = json.loads((out / "manifest.json").read_text())["splits"]["train"]
    assert entry["bytes"] == sum(len(text.encode()) for text in TEXTS)
    longest = max(map(len, wanted))
    for shard in entry["shards"][:-1]:
        assert tokens_per_shard <= shard["tokens"] < tokens_per_shard + longest
    assert json.loads((out / "manifest.json").read_text())["splits"]["val"]["documents"] == 0


def test_other_readers_read_the_shards(tmp_path: Path, wanted):
    from datatrove.utils.dataset import DatatroveFolderDataset

    source = write_jsonl(tmp_path / "docs.jsonl", TEXTS)
    out = tmp_path / "out"
    prepare(PrepareConfig((str(source),), out=str(out), workers=1, val_documents=20))
    for split in ("train", "val"):
        tokens = np.concatenate(documents(out, split))
        theirs = DatatroveFolderDataset(str(out / split), seq_len=63, filename_pattern="*.ds", return_positions=True)
        items = [theirs[i] for i in range(len(theirs))]
        read = np.concatenate([item["input_ids"].numpy() for item in items])
        assert (read == tokens[: len(read)]).all() and len(tokens) - len(read) < 64
        ours = open_split(out, split)
        ours.verify()
        assert (np.concatenate([shard.tokens() for shard in ours.shards]) == tokens).all()


REPAIR = "repair the text, or leave it out"


def test_bad_lines_are_counted_and_named(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(reading, "TASK_BYTES", 400)
    good = [json.dumps({"text": text}).encode() for text in TEXTS[:40]]
    bad = {
        10: (b'{"text": "cut of', "not valid UTF-8 or JSON"),
        20: (b'{"body": "elsewhere"}', "no text in the text field"),
        21: (b'{"text": null}', "no text in the text field"),
        25: (b'{"text": " \\n"}', "empty text"),
        30: (b'{"text": "\xff\xfe"}', "not valid UTF-8 or JSON"),
        31: (b"[1, 2]", "not valid UTF-8 or JSON"),
        32: (b'{"text": "a\\ud800b"}', f"not valid Unicode: lone surrogate U+D800 at character 1 of 3: {REPAIR}"),
        33: (b'{"text": "\\ude00\\ud83d"}', f"not valid Unicode: lone surrogate U+DE00 at character 0 of 2: {REPAIR}"),
        34: (b'{"text": "\xed\xa0\x80"}', "not valid UTF-8 or JSON"),  # a surrogate in bytes
    }
    lines = list(good)
    for number, (line, _) in bad.items():
        lines.insert(number - 1, line)
    lines.insert(37, b"")  # a blank line is nothing
    body = b"\xef\xbb\xbf" + b"\r\n".join(lines)  # with a byte-order mark, without a last line end
    (tmp_path / "plain.jsonl").write_bytes(body)
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress(body))
    for name in ("plain.jsonl", "packed.jsonl.gz"):
        out = tmp_path / f"out-{name}"
        path = tmp_path / name
        manifest = json.loads(prepare(PrepareConfig((str(path),), out=str(out), workers=1, val_fraction=0)).read_text())
        assert manifest["dropped"] == {"empty": 1, "broken": 4, "no_text": 2, "surrogate": 2}
        assert documents(out, "train") == expected(TEXTS[:40])
        named = [f"{path}:{number}: {reason}" for number, (_, reason) in bad.items()]
        found = (out / "logs" / "dropped.txt").read_text().splitlines()
        assert len(found) == len(named) and all(map(str.startswith, found, named))
        assert named[0] in capsys.readouterr().out


def test_surrogate_pairs_in_json_escapes_are_characters(tmp_path: Path):
    texts = ["a😀b", "𝐀" * 5, "plain"]
    lines = [json.dumps({"text": text}, ensure_ascii=True) for text in texts]
    assert "\\ud83d\\ude00" in lines[0]
    (tmp_path / "docs.jsonl").write_text("\n".join(lines))
    out = tmp_path / "out"
    manifest = prepare(PrepareConfig((str(tmp_path / "docs.jsonl"),), out=str(out), workers=1, val_fraction=0))
    assert json.loads(manifest.read_text())["dropped"] == {}
    assert documents(out, "train") == expected(texts)


def damaged(path: Path, texts: list[str]) -> Path:
    """A .jsonl.gz, .jsonl.zst or .parquet whose end is missing."""
    import pyarrow as pa
    import pyarrow.parquet
    import zstandard

    body = write_jsonl(path.with_name("plain"), texts).read_bytes()
    if path.suffix == ".parquet":
        pa.parquet.write_table(pa.table({"text": texts}), path)
    else:
        path.write_bytes(gzip.compress(body) if path.suffix == ".gz" else zstandard.compress(body))
    path.write_bytes(path.read_bytes()[:-100])
    return path


@pytest.mark.parametrize("name", ["cut.jsonl.gz", "cut.jsonl.zst", "cut.parquet"])
def test_a_damaged_file_is_read_up_to_the_damage_or_stops_the_run(tmp_path: Path, name: str, wanted, capsys):
    noise = np.random.default_rng(0)
    long = [f"{i} " + noise.bytes(1500).hex() for i in range(400)]
    source = damaged(tmp_path / name, long)
    good = write_jsonl(tmp_path / "good.jsonl", TEXTS)
    config = PrepareConfig((str(source), str(good)), out=str(tmp_path / "out"), workers=1, val_fraction=0)
    manifest = json.loads(prepare(config).read_text())
    assert manifest["dropped"] == {"damaged": 1}
    found = documents(tmp_path / "out", "train")
    kept = len(found) - len(TEXTS)
    assert found == expected(long[:kept]) + wanted
    assert kept == 0 if name.endswith("parquet") else kept > 100
    line = (tmp_path / "out" / "logs" / "dropped.txt").read_text()
    assert (
        line.startswith(f"{source}:{kept}: the file cannot be read from here on: ") and line in capsys.readouterr().out
    )
    with pytest.raises(ValueError, match=f"{name}:{kept}: the file cannot be read .*--on_error skip"):
        prepare(PrepareConfig(**{**vars(config), "on_error": "stop", "out": str(tmp_path / "other")}))
    assert not (tmp_path / "other" / "manifest.json").exists()


def test_on_error_stop_names_the_first_bad_line(tmp_path: Path):
    good = [json.dumps({"text": text}).encode() for text in TEXTS[:5]]
    source = tmp_path / "docs.jsonl"
    for bad, reason in (
        (b'{"text": "a\\ud800b"}', "not valid Unicode"),
        (b'{"text": "cut of', "not valid UTF-8 or JSON"),
    ):
        source.write_bytes(b"\n".join([*good[:3], bad, *good[3:], bad]))
        with pytest.raises(ValueError, match=f"docs.jsonl:4: {reason}"):
            prepare(PrepareConfig((str(source),), out=str(tmp_path / reason), workers=1, on_error="stop"))
    done = run_script(str(source), "--out", str(tmp_path / "two"), "--on-error", "stop", "--workers", "2")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1) and f"docs.jsonl:4: {reason}" in done.stderr


def test_an_error_of_the_disk_is_never_skipped(tmp_path: Path):
    source = write_jsonl(tmp_path / "docs.jsonl", TEXTS)
    reader = reading.ReadDocuments(reading.Source((str(source),)), [[reading.Piece(str(source), "bytes", 0, 99)]])
    source.unlink()
    with pytest.raises(FileNotFoundError):
        list(reader(None, 0, 1))


def test_a_line_too_long_to_read_is_one_document_lost(tmp_path: Path, monkeypatch, wanted):
    monkeypatch.setattr(json_text, "LINE_BYTES", 5000)
    lines = [json.dumps({"text": text}) for text in TEXTS[:30]]
    lines[10:10] = [json.dumps({"text": "x" * 20_000}), json.dumps({"text": "y" * 4990})]
    (tmp_path / "docs.jsonl").write_text("\n".join(lines))
    (tmp_path / "docs.jsonl.gz").write_bytes(gzip.compress((tmp_path / "docs.jsonl").read_bytes()))
    for name in ("docs.jsonl", "docs.jsonl.gz"):
        out = tmp_path / f"out-{name}"
        prepare(PrepareConfig((str(tmp_path / name),), out=str(out), workers=1, val_fraction=0))
        assert documents(out, "train") == wanted[:10] + wanted[10:30]
        listed = [line.removeprefix(f"{tmp_path}/") for line in (out / "logs" / "dropped.txt").read_text().splitlines()]
        assert listed == [f"{name}:{n}: a line of more than 64 MiB" for n in (11, 12)]


def test_several_tasks_share_a_compressed_file(tmp_path: Path, monkeypatch, wanted):
    monkeypatch.setattr(reading, "SHARE_BYTES", 100)
    plain = write_jsonl(tmp_path / "plain", TEXTS * 20).read_bytes()
    assert len(plain) > 8 * json_text.STRIPE_BYTES
    source = tmp_path / "docs.jsonl.gz"
    source.write_bytes(gzip.compress(plain))
    _, _, tasks = reading.plan(reading.Source((str(source),)))
    assert [piece for task in tasks for piece in task] == [reading.Piece(str(source), "share", i, 8) for i in range(8)]
    trees = []
    for workers in (1, 2):
        out = tmp_path / f"out{workers}"
        prepare(PrepareConfig((str(source),), out=str(out), workers=workers, val_fraction=0))
        trees.append(tree(out))
        assert sorted(documents(out, "train")) == sorted(wanted * 20)
    assert trees[0] == trees[1]


def test_row_groups_of_a_large_table_are_shared(tmp_path: Path, monkeypatch, wanted):
    import pyarrow as pa
    import pyarrow.parquet

    source = tmp_path / "docs.parquet"
    pa.parquet.write_table(pa.table({"text": [*TEXTS[:99], None, *TEXTS[99:]]}), source, row_group_size=20)
    monkeypatch.setattr(reading, "TASK_BYTES", source.stat().st_size // 5)
    _, _, tasks = reading.plan(reading.Source((str(source),)))
    assert len(tasks) > 3
    out = tmp_path / "out"
    prepare(PrepareConfig((str(source),), out=str(out), workers=1, val_fraction=0))
    assert documents(out, "train") == wanted
    assert (out / "logs" / "dropped.txt").read_text() == f"{source}:100: no text in the text field: 'text' is null\n"


@pytest.mark.parametrize("compressed", [False, True])
def test_a_text_file_larger_than_any_document_is_cut_at_line_ends(tmp_path: Path, monkeypatch, compressed: bool):
    monkeypatch.setattr(plain_text, "TXT_BYTES", 1000)
    text = "".join(f"{t}\n" for t in TEXTS)
    source = tmp_path / ("big.txt.gz" if compressed else "big.txt")
    source.write_bytes(gzip.compress(text.encode()) if compressed else text.encode())
    out = tmp_path / "out"
    prepare(PrepareConfig((str(source),), out=str(out), workers=2, val_fraction=0))
    found = documents(out, "train")
    decode = load_tokenizer().decode
    texts = [decode(tokens[:-1]) for tokens in found]
    assert "".join(texts) == text and len(texts) > 5
    assert all(t.endswith("\n") and len(t.encode()) < 3000 for t in texts)


def test_a_separator_cuts_a_text_into_documents(tmp_path: Path, monkeypatch, wanted):
    texts = [text.replace("<|endoftext|>", "") for text in TEXTS]
    separator = "<|endoftext|>"
    (tmp_path / "stories.txt").write_text(separator.join([*texts[:150], "", " \n", *texts[150:], ""]))
    out = tmp_path / "out"
    prepare(
        PrepareConfig((str(tmp_path / "stories.txt"),), out=str(out), workers=1, val_fraction=0, separator=separator)
    )
    assert documents(out, "train") == expected(texts)
    monkeypatch.setattr(plain_text, "TXT_BYTES", 10)
    with pytest.raises(ValueError, match=r"stories.txt: no 'absent' within 10 bytes: check --separator"):
        config = PrepareConfig((str(tmp_path / "stories.txt"),), out=str(out), workers=1, separator="absent")
        prepare(PrepareConfig(**{**vars(config), "overwrite": True}))


def test_exact_copies_are_dropped_when_asked(tmp_path: Path, monkeypatch, wanted):
    monkeypatch.setattr(reading, "TASK_BYTES", 3000)
    repeated = [*TEXTS, *TEXTS[40:60], TEXTS[7] + " ", *TEXTS[50:55]]
    source = write_jsonl(tmp_path / "docs.jsonl", repeated)
    out = tmp_path / "out"
    config = PrepareConfig((str(source),), out=str(out), workers=1, val_fraction=0.1, dedup="exact")
    manifest = json.loads(prepare(config).read_text())
    found = documents(out, "train") + documents(out, "val")
    assert sorted(found) == sorted(wanted + expected([TEXTS[7] + " "]))
    train = set(documents(out, "train"))
    assert documents(out, "train") == [d for d in [*wanted, *expected([TEXTS[7] + " "])] if d in train]
    assert manifest["dropped"] == {"exact_duplicate": 25}
    report = json.loads((out / "report.json").read_text())
    dropped = report["dropped"]["exact_duplicate"]
    assert dropped["documents"] == 25
    assert dropped["bytes"] == sum(len(t.encode()) for t in TEXTS[40:60] + TEXTS[50:55])
    assert report["read"] == {"documents": 326, "bytes": sum(len(t.encode()) for t in repeated)}
    first = dropped["examples"][0]
    assert (first["line"], first["text"]) == (301, TEXTS[40][:100])
    offset = sum(len(json.dumps({"text": t, "id": f"d{i}"})) + 1 for i, t in enumerate(TEXTS[:40]))
    assert first["detail"] == f"as {source}, offset {offset:,}"
    lines = (out / "logs" / "dropped.txt").read_text().splitlines()
    assert [int(line.split(":")[1]) for line in lines] == [*range(301, 321), *range(322, 327)]


def test_of_copies_the_one_named_for_validation_stays(tmp_path: Path, wanted):
    source = write_jsonl(tmp_path / "docs.jsonl", [*TEXTS, TEXTS[3]])
    config = PrepareConfig((str(source),), out=str(tmp_path / "out"), workers=1, val_ids=("d300",), dedup="exact")
    prepare(config)
    assert documents(tmp_path / "out", "val") == [wanted[3]]
    assert documents(tmp_path / "out", "train") == [*wanted[:3], *wanted[4:]]


def test_wikipedia_is_left_out_when_asked(tmp_path: Path):
    rows = [{"text": t, "url": f"https://example.com/{i}"} for i, t in enumerate(TEXTS[:20])]
    rows[4]["url"] = "https://en.wikipedia.org/wiki/Sea"
    rows[5]["url"] = "https://example.com/?from=https://en.wikipedia.org.example.net"
    rows[9]["text"] = "Sea\nFrom Wikipedia, the free encyclopedia\nThe sea is"
    (tmp_path / "docs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    texts = [row["text"] for row in rows]
    for exclude, kept in ((False, texts), (True, [t for i, t in enumerate(texts) if i not in (4, 9)])):
        out = tmp_path / f"out{exclude}"
        inputs = (str(tmp_path / "docs.jsonl"),)
        prepare(PrepareConfig(inputs, out=str(out), workers=1, val_fraction=0, exclude_wikipedia=exclude))
        assert documents(out, "train") == expected(kept)


@pytest.mark.parametrize("contaminated", ["drop", "report"])
def test_near_copies_and_evaluation_text_are_dropped_and_reported(tmp_path: Path, contaminated: str):
    from gpt2_hf.data.tokenizer import ASSETS

    words = ["".join(letters) for letters in itertools.product("bcdfg", "aeiou", "klmnp", "aeiou", "rst")]
    clean = [" ".join(random.Random(i).choices(words, k=200)) for i in range(30)]
    near = clean[3].replace(clean[3].split()[100], "another", 1)
    with gzip.open(ASSETS / "hellaswag_val.jsonl.gz", "rt") as file:
        item = json.loads(next(itertools.islice(file, 17, None)))
    leaked = f"{clean[5][:300]} {item['ctx']} {item['endings'][item['label']]} {clean[6][:300]}"
    own = "a question of one's own that nobody else would ever ask in just these few words of mine"
    (tmp_path / "mine.jsonl").write_text(json.dumps({"question": own.upper()}))
    texts = [*clean, near, clean[4], leaked, f"{clean[7][:200]}. {own}, he said."]
    source = write_jsonl(tmp_path / "docs.jsonl", texts)
    out = tmp_path / "out"
    config = PrepareConfig(
        (str(source),),
        out=str(out),
        workers=1,
        val_fraction=0,
        dedup="minhash",
        decontaminate=("hellaswag", str(tmp_path / "mine.jsonl")),
        contaminated=contaminated,
    )
    prepare(config)
    report = json.loads((out / "report.json").read_text())
    found = {reason: entry["documents"] for reason, entry in report["dropped"].items() if entry["documents"]}
    kind = {"drop": "dropped", "report": "reported"}[contaminated]
    where = {e["detail"].partition(":")[0]: e for e in report[kind]["contaminated"]["examples"]}
    assert set(where) == {"hellaswag", "mine"} and where["hellaswag"]["line"] == 33
    assert where["mine"]["text"] == texts[33][:100]
    if contaminated == "drop":
        assert found == {"near_duplicate": 2, "contaminated": 2}
        assert documents(out, "train") == expected(clean)
    else:
        assert found == {"near_duplicate": 2} and report["reported"]["contaminated"]["documents"] == 2
        assert documents(out, "train") == expected([*clean, *texts[32:]])
    lines = (out / "logs" / "dropped.txt").read_text().splitlines()
    assert [int(line.split(":")[1]) for line in lines] == [31, 32, 33, 34]
    assert ("(kept)" in lines[-1]) == (contaminated == "report")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
def test_a_document_of_50_megabytes_fits_in_a_worker(tmp_path: Path):
    text = " ".join(random.Random(0).choices(WORDS, k=200_000))
    text = (text * (50_000_000 // len(text.encode()) + 1))[: 50_000_000 * len(text) // len(text.encode())]
    write_jsonl(tmp_path / "docs.jsonl", [TEXTS[0], text, TEXTS[1]])
    measure = """
import sys
from gpt2_hf.corpus.prepare import PrepareConfig, prepare
prepare(PrepareConfig((sys.argv[1],), out=sys.argv[2], workers=1, val_fraction=0))
peak = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")]
print(int(peak[0]) // 1024)  # not ru_maxrss, which begins with that of the process that started this one
"""
    command = [sys.executable, "-c", measure, str(tmp_path / "docs.jsonl"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=SCRIPT_ENV)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) < 600
    first, long, last = documents(tmp_path / "out", "train")
    assert [first, last] == expected(TEXTS[:2])
    assert load_tokenizer().decode(long[:-1]) == text


def test_the_report_accounts_for_every_document(tmp_path: Path):
    lines = [json.dumps({"text": text}) for text in [*TEXTS, *TEXTS[:30]]] + ["{", "[]", '{"text": ""}']
    (tmp_path / "docs.jsonl").write_text("\n".join(lines))
    out = tmp_path / "out"
    prepare(PrepareConfig((str(tmp_path / "docs.jsonl"),), out=str(out), workers=1, val_documents=10, dedup="exact"))
    report = json.loads((out / "report.json").read_text())
    written = sum(split["documents"] for split in report["written"].values())
    dropped = {reason: found["documents"] for reason, found in report["dropped"].items()}
    assert dropped == {"exact_duplicate": 30, "broken": 2, "empty": 1}
    assert report["read"]["documents"] == 333 == written + sum(dropped.values())
    kept_bytes = sum(split["bytes"] for split in report["written"].values())
    assert report["read"]["bytes"] == kept_bytes + sum(found["bytes"] for found in report["dropped"].values())
    text = (out / "report.md").read_text()
    assert "| read | 333 |" in text and "| dropped: exact_duplicate | 30 |" in text
    assert f"`{tmp_path / 'docs.jsonl'}:331`" in text


def test_copies_of_a_text_stay_on_one_side(tmp_path: Path):
    source = write_jsonl(tmp_path / "docs.jsonl", TEXTS[:50] * 3)
    out = tmp_path / "out"
    prepare(PrepareConfig((str(source),), out=str(out), workers=1, val_documents=10))
    train, val = documents(out, "train"), documents(out, "val")
    assert not set(train) & set(val) and len(train) + len(val) == 150 and 10 <= len(val) <= 12


def test_documents_are_held_out_by_id(tmp_path: Path, wanted):
    source = write_jsonl(tmp_path / "docs.jsonl", TEXTS)
    config = PrepareConfig((str(source),), out=str(tmp_path / "out"), workers=1, val_ids=("d7", "d100"))
    prepare(config)
    assert documents(tmp_path / "out", "val") == [wanted[7], wanted[100]]
    with pytest.raises(ValueError, match=r"found 1 of 2 documents, not \['nobody'\]"):
        prepare(PrepareConfig((str(source),), out=str(tmp_path / "other"), workers=1, val_ids=("d7", "nobody")))


def test_a_prepared_folder_is_left_alone_or_refused(tmp_path: Path, capsys):
    source = write_jsonl(tmp_path / "docs.jsonl", TEXTS)
    config = PrepareConfig((str(source),), out=str(tmp_path / "out"), workers=1)
    path = prepare(config)
    before = path.stat().st_mtime_ns
    assert prepare(config) == path and path.stat().st_mtime_ns == before
    assert "already prepared" in capsys.readouterr().out
    other = PrepareConfig((str(source),), out=str(tmp_path / "out"), workers=1, tokens_per_shard=500)
    with pytest.raises(ValueError, match="tokens_per_shard was 100000000, now 500"):
        prepare(other)
    write_jsonl(source, TEXTS[:-1])
    with pytest.raises(ValueError, match="inputs that have changed"):
        prepare(config)
    source.unlink()
    assert prepare(config) == path  # the shards outlive their inputs
    write_jsonl(source, TEXTS)
    prepare(PrepareConfig(**{**vars(other), "overwrite": True}))
    assert len(json.loads(path.read_text())["splits"]["train"]["shards"]) > 5


def test_folders_of_others_are_not_touched(tmp_path: Path):
    source = write_jsonl(tmp_path / "docs.jsonl", TEXTS)
    (tmp_path / "out" / "train").mkdir(parents=True)
    (tmp_path / "out" / "train" / "photo.jpg").write_bytes(b"mine")
    with pytest.raises(ValueError, match="holds train from elsewhere"):
        prepare(PrepareConfig((str(source),), out=str(tmp_path / "out"), workers=1, overwrite=True))
    assert (tmp_path / "out" / "train" / "photo.jpg").read_bytes() == b"mine"


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(reading, "TASK_BYTES", 3000)
    source = write_jsonl(tmp_path / "docs.jsonl", TEXTS)
    prepare(PrepareConfig((str(source),), out=str(tmp_path / "whole"), workers=1))
    config = PrepareConfig((str(source),), out=str(tmp_path / "out"), workers=1)
    encode, calls = Tokenizer.encode_document, 0

    def die_once(self: Tokenizer, text: str) -> np.ndarray:
        nonlocal calls
        calls += 1
        if calls == 150:
            raise OSError("No space left on device")
        return encode(self, text)

    monkeypatch.setattr(Tokenizer, "encode_document", die_once)
    with pytest.raises(OSError, match="No space"):
        prepare(config)
    with pytest.raises(ValueError, match="unfinished preparation of something else"):
        prepare(PrepareConfig(**{**vars(config), "text_field": "body"}))
    prepare(config)
    assert "going on" in capsys.readouterr().out
    assert calls < 150 + 250  # the finished tasks were not done again
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    assert not (tmp_path / "out" / ".preparing").exists()


DRIVER = """
import sys
from gpt2_hf.corpus import read
from gpt2_hf.corpus.prepare import PrepareConfig, prepare
read.TASK_BYTES = 40_000
if __name__ == "__main__":
    config = {"workers": int(sys.argv[3]), "tokens_per_shard": 20_000, "dedup": "minhash"}
    prepare(PrepareConfig((sys.argv[1],), out=sys.argv[2], **config))
"""


@pytest.fixture
def interrupted(tmp_path: Path, monkeypatch) -> PrepareConfig:
    """A preparation that was stopped when all but the last stage was done."""
    source = write_jsonl(tmp_path / "docs.jsonl", TEXTS)
    config = PrepareConfig((str(source),), out=str(tmp_path / "out"), workers=1, val_documents=9)
    with monkeypatch.context() as patch:
        patch.setattr(writing.WriteShards, "_cut_shards", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare(config)
    return config


def test_inputs_that_changed_meanwhile_are_not_mixed(tmp_path: Path, interrupted: PrepareConfig):
    source = Path(interrupted.inputs[0])
    source.write_text(source.read_text().replace("sea", "SEA"))  # of the same size
    with pytest.raises(ValueError, match="unfinished preparation of something else"):
        prepare(interrupted)
    prepare(PrepareConfig(**{**vars(interrupted), "overwrite": True}))
    found = documents(tmp_path / "out", "train") + documents(tmp_path / "out", "val")
    assert sorted(found) == sorted(expected([text.replace("sea", "SEA") for text in TEXTS]))
    source.write_text(source.read_text().replace("SEA", "sea"))
    with pytest.raises(ValueError, match="inputs that have changed"):
        prepare(interrupted)


def test_another_split_keeps_the_finished_tasks(tmp_path: Path, monkeypatch, interrupted: PrepareConfig):
    monkeypatch.setattr(Tokenizer, "encode_document", lambda self, text: 1 / 0)
    prepare(PrepareConfig(**{**vars(interrupted), "val_documents": 3, "tokens_per_shard": 2000}))
    assert len(documents(tmp_path / "out", "val")) == 3
    assert len(list((tmp_path / "out" / "train").glob("*.ds"))) > 1


def test_what_was_skipped_is_remembered_when_errors_must_stop(tmp_path: Path):
    (tmp_path / "docs.jsonl").write_text('{"text": "good"}\n{\n{"text": "fine"}\n')
    config = PrepareConfig((str(tmp_path / "docs.jsonl"),), out=str(tmp_path / "out"), workers=1)
    prepare(config)
    with pytest.raises(ValueError, match=r"was prepared without \{'broken': 1\}"):
        prepare(PrepareConfig(**{**vars(config), "on_error": "stop"}))


def test_a_saved_dataset_that_changed_is_noticed(tmp_path: Path):
    import datasets

    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "saved")
    config = PrepareConfig(dataset=str(tmp_path / "saved"), out=str(tmp_path / "out"), workers=1)
    prepare(config)
    prepare(config)
    datasets.Dataset.from_dict({"text": TEXTS[1:]}).save_to_disk(tmp_path / "other" / "saved")
    with pytest.raises(ValueError, match="inputs that have changed"):
        prepare(PrepareConfig(**{**vars(config), "dataset": str(tmp_path / "other" / "saved")}))


def test_a_lost_shard_is_noticed(tmp_path: Path):
    config = PrepareConfig((str(write_jsonl(tmp_path / "docs.jsonl", TEXTS)),), out=str(tmp_path / "out"), workers=1)
    prepare(config)
    (tmp_path / "out" / "train" / "00000.ds").unlink()
    with pytest.raises(ValueError, match=r"00000\.ds is missing or cut short: pass --overwrite true"):
        prepare(config)


def test_nothing_is_read_from_where_it_would_be_written(tmp_path: Path):
    for name in ("train/a.jsonl", "llmc/a.jsonl", ".preparing/a.jsonl", "a.jsonl"):
        source = tmp_path / "out" / name
        source.parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(source, TEXTS)
        for given in (source, source.parent):
            with pytest.raises(ValueError, match="lies in --out"):
                prepare(PrepareConfig((str(given),), out=str(tmp_path / "out"), workers=1))
        assert source.exists()


def test_an_output_inside_the_input_is_not_read_again(tmp_path: Path, wanted, capsys):
    write_jsonl(tmp_path / "docs.JSONL", TEXTS)
    (tmp_path / ".hidden").mkdir()
    write_jsonl(tmp_path / ".hidden" / "docs.jsonl", TEXTS[:3])
    (tmp_path / "bad.jsonl").write_text("{")  # so that there are logs
    config = PrepareConfig((str(tmp_path),), out=str(tmp_path / "in" / "out"), workers=1, val_fraction=0)
    prepare(config)
    assert documents(tmp_path / "in" / "out", "train") == wanted
    prepare(config)
    assert "already prepared" in capsys.readouterr().out


def workers_at_work(out: Path, count: int) -> list[int]:
    """The processes that write parts, when there are so many."""
    pids: set[int] = set()
    end = time.monotonic() + 100
    while len(pids) < count:
        assert time.monotonic() < end
        time.sleep(0.01)
        pids = {int(path.suffix.rpartition("-")[2]) for path in (out / ".preparing").glob("*.ds.*")}
    return sorted(pids)


def have_ended(pids: list[int]) -> bool:
    end = time.monotonic() + 30  # a signal takes its time on a busy machine
    while time.monotonic() < end:
        if not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.slow
def test_a_killed_worker_ends_the_run_and_the_next_start_goes_on(tmp_path: Path):
    source = write_jsonl(tmp_path / "docs.jsonl", [f"{i} {' '.join(TEXTS)}" for i in range(4000)])
    out = tmp_path / "out"
    command = script_command(str(source), "--workers", "2", "--out", str(out))
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=SCRIPT_ENV)
    pids = workers_at_work(out, 2)
    os.kill(pids[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 2 and len(errors.splitlines()) == 1
    assert "a worker was killed, probably because memory ran out" in errors
    assert have_ended(pids)
    done = subprocess.run(command, capture_output=True, text=True, env=SCRIPT_ENV)
    assert done.returncode == 0 and "going on with an unfinished preparation" in done.stdout
    assert len(documents(out, "train")) + len(documents(out, "val")) == 4000


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_the_run(tmp_path: Path, end: signal.Signals):
    source = write_jsonl(tmp_path / "docs.jsonl", [f"{i} {' '.join(TEXTS)}" for i in range(4000)])
    command = script_command(str(source), "--workers", "2", "--out", str(tmp_path / "out"))
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=SCRIPT_ENV)
    pids = workers_at_work(tmp_path / "out", 2)
    process.send_signal(end)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == ((130, "stopped\n") if end == signal.SIGINT else (-end, ""))
    assert have_ended(pids)


@pytest.mark.slow
def test_ten_kills_do_not_change_a_byte_nor_do_the_workers(tmp_path: Path):
    noise = random.Random(7)
    texts = [" ".join(noise.choices(WORDS, k=40)) for _ in range(3000)]
    source = write_jsonl(tmp_path / "docs.jsonl", [*texts, *(f"{text} and more" for text in texts[:100])])
    (tmp_path / "driver.py").write_text(DRIVER)

    def start(out: str, workers: int) -> subprocess.Popen:
        command = [sys.executable, str(tmp_path / "driver.py"), str(source), str(tmp_path / out), str(workers)]
        return subprocess.Popen(command, env=SCRIPT_ENV, stdout=log, stderr=log)

    log = (tmp_path / "log").open("w+")
    assert start("whole", 1).wait(120) == 0
    began = time.monotonic()
    assert start("other", 2).wait(120) == 0
    took = time.monotonic() - began
    kills = 0
    while kills < 10:
        process = start("out", 2)
        try:
            process.wait(noise.uniform(0.2, 1.0) * took)
            assert process.returncode == 0, Path(log.name).read_text()
            shutil.rmtree(tmp_path / "out")  # it came through: once more from the start
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
    assert start("out", 2).wait(120) == 0, Path(log.name).read_text()
    assert tree(tmp_path / "out") == tree(tmp_path / "other") == tree(tmp_path / "whole")
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["dropped"]["near_duplicate"] > 50


def test_one_document_cannot_be_held_out_whole(tmp_path: Path):
    (tmp_path / "book.txt").write_text("Once upon a time")
    with pytest.raises(ValueError, match="--val_fraction 0"):
        prepare(PrepareConfig((str(tmp_path / "book.txt"),), out=str(tmp_path / "out"), workers=1, val_documents=1))


def test_nothing_to_read_is_said(tmp_path: Path):
    source = write_jsonl(tmp_path / "docs.jsonl", TEXTS)
    with pytest.raises(ValueError, match="--text_field"):
        prepare(PrepareConfig((str(source),), out=str(tmp_path / "out"), workers=1, text_field="body"))
    with pytest.raises(FileNotFoundError, match="no such file"):
        prepare(PrepareConfig((str(tmp_path / "*.parquet"),), out=str(tmp_path / "out")))
    (tmp_path / "a.docx").touch()
    with pytest.raises(ValueError, match="convert it first"):
        prepare(PrepareConfig((str(tmp_path / "a.docx"),), out=str(tmp_path / "out")))


def test_script_prepares_the_plays(tmp_path: Path):
    done = run_script("--config", "recipes/data/shakespeare.yaml", "--out", str(tmp_path), "--tokens_per_shard", "1e6")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "MB/s" in done.stdout and "datatrove.log" in done.stdout
    assert len(documents(tmp_path, "train")) == 36 and len(documents(tmp_path, "val")) == 2
    assert len(list((tmp_path / "train").glob("*.ds"))) == 2


def test_script_without_a_network_says_so_in_one_line(tmp_path: Path):
    done = run_script("--config", "recipes/data/fineweb_edu_10bt.yaml", "--out", str(tmp_path / "out"))
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "fineweb-edu" in done.stderr and "network" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inputs": ()}, "name one of the two"),
        ({"dataset": "x"}, "name one of the two"),
        ({"out": ""}, "--out"),
        ({"workers": -1}, "workers"),
        ({"val_fraction": 1.0}, "val_fraction is 1.0"),
        ({"val_fraction": 0.1, "val_documents": 3}, "keep one"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        PrepareConfig(**{"inputs": ("a.txt",), "out": "o", **changes})
