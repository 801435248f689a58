"""Folders as people have them: mixed, linked in circles, half done, or of several corpora."""

import gzip
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gpt2_hf.corpus.inputs import find_files, unread_files
from gpt2_hf.corpus.prepare import PrepareConfig, prepare
from gpt2_hf.data.shards import ShardError, open_split
from gpt2_hf.data.stream import TokenStream
from gpt2_hf.data.tokenizer import load_tokenizer
from gpt2_hf.program import UserError

for needed in ("datatrove", "tiktoken", "datasets"):
    pytest.importorskip(needed)

ROOT = Path(__file__).resolve().parents[2]
TEXTS = [f"{i}: the sea was calm and nobody's heart heard it" for i in range(60)]


def write_jsonl(path: Path, texts: list[str] = TEXTS, field: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"id": f"d{i}", field: text}) + "\n" for i, text in enumerate(texts)))
    return path


def config(tmp_path: Path, *inputs: Path | str, **more) -> PrepareConfig:
    return PrepareConfig(tuple(map(str, inputs)), **{"out": str(tmp_path / "out"), "workers": 1, **more})


def texts_of(out: Path, split: str) -> list[str]:
    shards = open_split(out, split)
    tokens = np.concatenate([shard.tokens() for shard in shards.shards])
    return load_tokenizer().decode(tokens.tolist()).split("<|endoftext|>")[:-1]


def test_a_mixed_folder_says_what_was_not_read(tmp_path: Path, capsys):
    mixed = tmp_path / "mixed"
    raw = write_jsonl(mixed / "a.jsonl", TEXTS[:20]).read_bytes()
    (mixed / "c4.json.gz").write_bytes(gzip.compress(raw.replace(b"sea", b"lake")))
    for name in ("b.csv", "c.csv", "README.md", "LICENSE", "x.parquet.gz"):
        (mixed / name).write_text("x")
    prepare(config(tmp_path, mixed, val_fraction=0))
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("read 2 files; not read, by their ending: .csv 2, ")
    assert ".md 1" in last and "no ending 1" in last and "--dataset FOLDER reads a folder of .csv" in last
    assert texts_of(tmp_path / "out", "train") == TEXTS[:20] + [text.replace("sea", "lake") for text in TEXTS[:20]]
    assert "Files that were not read, by their ending: .csv 2" in (tmp_path / "out" / "report.md").read_text()
    assert json.loads((tmp_path / "out" / "report.json").read_text())["files_not_read"][".csv"] == 2
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "a.csv").write_text("text\nx\n")
    with pytest.raises(UserError, match=r"none of its files .*\(.csv 1\).*or pass --dataset .*tables instead"):
        find_files([str(tmp_path / "tables")])


@pytest.mark.parametrize("empty", ["", " "])
def test_an_empty_name_is_refused(tmp_path: Path, empty: str):
    with pytest.raises(UserError, match="is a shell variable unset"):
        config(tmp_path, empty)
    with pytest.raises(UserError, match="is a shell variable unset"):
        config(tmp_path, write_jsonl(tmp_path / "a.jsonl"), decontaminate=(empty,))


def test_links_that_lead_back_are_followed_once(tmp_path: Path):
    for name in ("l1/a", "l1/b", "l1/c", "l1/c/d"):
        (tmp_path / name).mkdir(parents=True)
        for link, to in (("up", ".."), ("top", "../.."), ("b", tmp_path / "l1/b"), ("c", tmp_path / "l1/c")):
            if not (tmp_path / name / link).exists():
                (tmp_path / name / link).symlink_to(to)
    kept = [write_jsonl(tmp_path / "l1" / name) for name in ("a/x.jsonl", "c/d/y.jsonl")]
    for given in (tmp_path / "l1", tmp_path / "l1" / "**" / "*.jsonl", tmp_path / "l1" / "**"):
        assert {path.resolve() for path in find_files([str(given)])} == set(kept)
    assert find_files([str(tmp_path / "l1" / "**" / "d" / "*.jsonl")])[0].resolve() == kept[1]
    assert unread_files([str(tmp_path / "l1")]) == {}


@pytest.mark.parametrize("lines", [True, False])
def test_a_book_alone_is_divided(tmp_path: Path, capsys, lines: bool):
    book = "".join(f"Line {i}, and the sea was calm.{chr(10) if lines else ' '}" for i in range(9000))
    (tmp_path / "book.txt").write_text(book)
    prepare(config(tmp_path, tmp_path / "book.txt"))
    out = tmp_path / "out"
    (train,), (val,) = texts_of(out, "train"), texts_of(out, "val")
    assert train + val == book and (not lines or train.endswith("\n"))
    splits = json.loads((out / "manifest.json").read_text())["splits"]
    assert 8192 <= splits["val"]["tokens"] <= 8192 + 257 and "one document: its last 8," in capsys.readouterr().out
    for name, text in (("train", train), ("val", val)):
        assert (splits[name]["documents"], splits[name]["bytes"]) == (1, len(text.encode()))
        open_split(out, name).verify()


def test_several_corpora_or_half_of_one_are_no_data(tmp_path: Path):
    for name in ("one", "two"):
        prepare(config(tmp_path, write_jsonl(tmp_path / "a.jsonl"), out=str(tmp_path / "data" / name)))
    with pytest.raises(ShardError, match=r"holds prepared folders, choose one of them: .*data/one, .*data/two$"):
        open_split(tmp_path / "data", "train")
    one = tmp_path / "data" / "one"
    (one / ".preparing").mkdir()
    (one / ".preparing" / "plan.json").write_text("{}")
    (one / "manifest.json").unlink()
    with pytest.raises(ShardError, match=r"one is not prepared to its end: start the same scripts/prepare_data.py"):
        open_split(one, "train")


def test_a_disk_is_no_data_folder(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("gpt2_hf.data.folder.MOST_FILES", 50)
    for i in range(60):
        (tmp_path / f"{i}.txt").touch()
    with pytest.raises(ShardError, match="holds more than 50 files: name the folder of shards itself"):
        open_split(tmp_path, "train")


def test_a_saved_dataset_without_the_split_names_those_it_has(tmp_path: Path):
    import datasets

    rows = datasets.Dataset.from_dict({"text": TEXTS})
    datasets.DatasetDict({"validation": rows, "test": rows}).save_to_disk(tmp_path / "saved")
    with pytest.raises(UserError, match="has no split 'train', but test, validation: choose one with --split"):
        prepare(PrepareConfig(dataset=str(tmp_path / "saved"), out=str(tmp_path / "out"), workers=1))
    prepare(PrepareConfig(dataset=str(tmp_path / "saved"), split="test", out=str(tmp_path / "out"), workers=1))


def test_a_plain_folder_as_dataset_that_changed_is_noticed(tmp_path: Path):
    write_jsonl(tmp_path / "rows" / "a.jsonl")
    given = PrepareConfig(dataset=str(tmp_path / "rows"), out=str(tmp_path / "out"), workers=1)
    prepare(given)
    prepare(given)
    write_jsonl(tmp_path / "rows" / "a.jsonl", TEXTS[::-1])
    with pytest.raises(ValueError, match="inputs that have changed"):
        prepare(given)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [({"text_field": "txet"}, {}), ({"val_ids": ("d5", "d999")}, {"val_ids": ("d5",)})],
)
def test_a_corrected_typo_starts_anew(tmp_path: Path, wrong: dict, right: dict):
    source = write_jsonl(tmp_path / "docs.jsonl")
    with pytest.raises(UserError):
        prepare(config(tmp_path, source, **wrong))
    prepare(config(tmp_path, source, **right))
    assert sum(open_split(tmp_path / "out", split).n_documents or 0 for split in ("train", "val")) == len(TEXTS)


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    prepare(config(tmp_path, write_jsonl(tmp_path / "docs.jsonl", TEXTS * 40), val_fraction=0))
    return tmp_path / "out"


def test_a_shard_that_changed_at_its_size_is_noticed_when_opened(prepared: Path):
    shard = prepared / "train" / "00000.ds"
    raw = shard.read_bytes()
    for at in (0, len(raw) // 4 * 2, len(raw) - 2):
        shard.write_bytes(raw[:at] + b"\0\0" + raw[at + 2 :])
        with pytest.raises(ShardError, match=r"00000\.ds has changed since it was prepared"):
            open_split(prepared, "train")


def test_a_shard_cut_short_while_it_is_read_ends_in_one_line(prepared: Path):
    stream = TokenStream(open_split(prepared, "train"), seq_len=64, seed=0)
    stream.batch(0, 2)
    os.truncate(prepared / "train" / "00000.ds", 4096)
    with pytest.raises(ShardError, match=r"00000\.ds was cut short while it was read"):
        stream.batch(2, 2)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("Müßiggang und Größe: “ça va”, 中文. ".encode() * 500, "is text, not tokens"),
        (np.arange(1, 9000).astype("<u2").tobytes() + bytes(6000), "zeros in a row"),
        (np.arange(1, 9000).astype("<u2").tobytes() + bytes(700), "zeros in a row"),
    ],
    ids=["text", "a tail of zeros", "a short tail"],
)
def test_what_is_no_row_of_tokens_is_refused(tmp_path: Path, content: bytes, said: str):
    (tmp_path / "train.bin").write_bytes(content[: len(content) // 2 * 2])
    with pytest.raises(ShardError, match=said):
        open_split(tmp_path, "train")


def test_zeros_anywhere_are_found_when_all_is_read(tmp_path: Path):
    tokens = np.resize(np.arange(1, 50000), 400_000).astype("<u2")
    tokens[100_000:102_048] = 0
    (tmp_path / "train.bin").write_bytes(tokens.tobytes())
    shards = open_split(tmp_path, "train")
    with pytest.raises(ShardError, match="2,048 or more zeros in a row"):
        shards.verify()


def test_results_are_on_disk_before_the_manifest_says_so(tmp_path: Path, monkeypatch):
    synced = []
    fsync = os.fsync

    def record(descriptor: int) -> None:
        synced.append(os.path.realpath(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    prepare(config(tmp_path, write_jsonl(tmp_path / "docs.jsonl")))
    out = tmp_path / "out"
    manifest = synced.index(str(out / ".manifest.json.writing"))
    wanted = {out / split / name for split in ("train", "val") for name in ("", "00000.ds", "00000.ds.index")}
    assert {str(path) for path in wanted} <= set(synced[:manifest])
    assert str(out) in synced[manifest:]


def test_names_that_the_console_lacks_end_nothing(tmp_path: Path):
    folder = os.fsencode(tmp_path / "mixed") + b"/caf\xe9"
    os.makedirs(folder)
    for name in (b"caf\xe9.txt", "中文.txt".encode()):
        with open(folder + b"/" + name, "wb") as file:
            file.write(b"The sea was calm. " * 30)
    with open(folder + b"/bad\xe9.jsonl", "wb") as file:
        file.write(b'{"text": "good"}\n{\n')
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONPATH": str(ROOT), "PYTHONUTF8": "0"}
    scripts = (["prepare_data.py", str(tmp_path / "mixed"), "--workers", "2", "--out"], ["inspect_data.py"])
    for name, *arguments in scripts:
        command = [sys.executable, str(ROOT / "scripts" / name), *arguments, str(tmp_path / "out")]
        done = subprocess.run(command, capture_output=True, env=env, timeout=100)
        assert done.returncode == 0, done.stderr
    assert r"bad\udce9.jsonl:2: not valid UTF-8" in (tmp_path / "out" / "logs" / "dropped.txt").read_text("utf-8")
    assert json.loads((tmp_path / "out" / "report.json").read_text("utf-8"))["dropped"]["broken"]["documents"] == 1


@pytest.mark.parametrize(("n_documents", "held_out"), [(12, "a tenth"), (79, "a tenth"), (400, "8,192 tokens")])
def test_a_small_corpus_has_enough_to_validate_on(tmp_path: Path, n_documents: int, held_out: str):
    """1% of the documents, the default, would be next to nothing: so many more, and not one above."""
    rng = random.Random(n_documents)
    texts = [" ".join(rng.choices(["house", "river", "green"], k=rng.randint(200, 400))) for _ in range(n_documents)]
    prepare(config(tmp_path, write_jsonl(tmp_path / "docs.jsonl", texts)))
    sizes = sorted(map(len, texts_of(tmp_path / "out", "val")))
    enough = {"a tenth": sum(map(len, texts)) // 10, "8,192 tokens": 8192 * 4}[held_out]
    assert sum(sizes) >= enough > sum(sizes) - sizes[-1]
    assert len(texts_of(tmp_path / "out", "train")) == n_documents - len(sizes)
