"""Preparation: what goes in comes out, whatever the format and the number of workers.

Tokens are compared with the `tokenizers` library's, which preparation does not use, and are read back as plain files.
"""

import gzip
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gpt2_hf.data import prepare as module
from gpt2_hf.data.prepare import PrepareConfig, prepare
from gpt2_hf.data.shards import open_split
from gpt2_hf.data.tokenizer import EOT, load_tokenizer

for needed in ("datatrove", "tiktoken", "zstandard", "pyarrow", "datasets"):
    pytest.importorskip(needed)

ROOT = Path(__file__).resolve().parent.parent
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
    files = [out / "manifest.json", *(path for split in ("train", "val") for path in (out / split).iterdir())]
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
    monkeypatch.setattr(module, "TASK_BYTES", 5000)  # the file is cut into several tasks
    source = write_jsonl(tmp_path / "docs.jsonl", TEXTS)
    trees = []
    for workers in (1, 2, 3):
        out = tmp_path / f"out{workers}"
        prepare(PrepareConfig((str(source),), out=str(out), workers=workers, tokens_per_shard=1000, val_fraction=0.1))
        assert len(list((out / "logs" / "completions").iterdir())) > 5
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
    reader = module.ReadDocuments(PrepareConfig((str(source),), out="unused"), [], None)
    for cut in range(1, size, 7):
        pieces = [module.Piece(str(source), 0, cut), module.Piece(str(source), cut, size)]
        assert [row["text"] for piece in pieces for row, _ in reader._rows(piece)] == TEXTS[:12], cut


@pytest.mark.parametrize("tokens_per_shard", [1, 100, 1000, 10**9])
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
    monkeypatch.setattr(module, "TASK_BYTES", 400)
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
        assert manifest["skipped"] == {"empty": 1, "broken": 4, "no_text": 2, "surrogate": 2}
        assert documents(out, "train") == expected(TEXTS[:40])
        named = [f"{path}:{number}: {reason}" for number, (_, reason) in bad.items()]
        assert (out / "logs" / "skipped.txt").read_text().splitlines() == named
        assert named[0] in capsys.readouterr().out


def test_surrogate_pairs_in_json_escapes_are_characters(tmp_path: Path):
    texts = ["a😀b", "𝐀" * 5, "plain"]
    lines = [json.dumps({"text": text}, ensure_ascii=True) for text in texts]
    assert "\\ud83d\\ude00" in lines[0]
    (tmp_path / "docs.jsonl").write_text("\n".join(lines))
    out = tmp_path / "out"
    manifest = prepare(PrepareConfig((str(tmp_path / "docs.jsonl"),), out=str(out), workers=1, val_fraction=0))
    assert not any(json.loads(manifest.read_text())["skipped"].values())
    assert documents(out, "train") == expected(texts)


@pytest.mark.parametrize("name", ["cut.jsonl.gz", "cut.jsonl.zst", "cut.parquet"])
def test_a_damaged_file_stops_the_run(tmp_path: Path, name: str):
    import zstandard

    body = os.urandom(20_000).hex().encode()
    whole = {"gz": gzip.compress(body), "zst": zstandard.compress(body), "parquet": b"PAR1" + body}
    (tmp_path / name).write_bytes(whole[name.rpartition(".")[2]][:-100])
    with pytest.raises(OSError, match=f"{name}: cannot be read"):
        prepare(PrepareConfig((str(tmp_path / name),), out=str(tmp_path / "out"), workers=1))
    assert not (tmp_path / "out" / "manifest.json").exists()


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
    with pytest.raises(ValueError, match="found 1 of 2"):
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
    monkeypatch.setattr(module, "TASK_BYTES", 3000)
    source = write_jsonl(tmp_path / "docs.jsonl", TEXTS)
    prepare(PrepareConfig((str(source),), out=str(tmp_path / "whole"), workers=1))
    config = PrepareConfig((str(source),), out=str(tmp_path / "out"), workers=1)
    encode, calls = module.encode_document, 0

    def die_once(text: str) -> np.ndarray:
        nonlocal calls
        calls += 1
        if calls == 150:
            raise OSError("No space left on device")
        return encode(text)

    monkeypatch.setattr(module, "encode_document", die_once)
    with pytest.raises(OSError, match="No space"):
        prepare(config)
    with pytest.raises(ValueError, match="unfinished preparation of something else"):
        prepare(PrepareConfig(**{**vars(config), "tokens_per_shard": 7}))
    prepare(config)
    assert "going on" in capsys.readouterr().out
    assert calls < 150 + 250  # the finished tasks were not done again
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    assert not (tmp_path / "out" / "parts").exists()


def test_one_document_cannot_be_split(tmp_path: Path):
    (tmp_path / "book.txt").write_text("Once upon a time")
    with pytest.raises(ValueError, match="--val_fraction 0"):
        prepare(PrepareConfig((str(tmp_path / "book.txt"),), out=str(tmp_path / "out"), workers=1))


def test_nothing_to_read_is_said(tmp_path: Path):
    source = write_jsonl(tmp_path / "docs.jsonl", TEXTS)
    with pytest.raises(ValueError, match="--text_field"):
        prepare(PrepareConfig((str(source),), out=str(tmp_path / "out"), workers=1, text_field="body"))
    with pytest.raises(FileNotFoundError, match="no such file"):
        prepare(PrepareConfig((str(tmp_path / "*.parquet"),), out=str(tmp_path / "out")))
    (tmp_path / "a.docx").touch()
    with pytest.raises(ValueError, match="convert it first"):
        prepare(PrepareConfig((str(tmp_path / "a.docx"),), out=str(tmp_path / "out")))


def run_script(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "scripts" / "prepare_data.py"), *arguments]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=60, cwd=ROOT)


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
