"""A trained tokenizer is the one that tokenizers' own trainer gives for the same text; its report is true."""

import hashlib
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from gpt2_hf.corpus import train_tokenizer as training
from gpt2_hf.corpus.train_tokenizer import Smallest, TokenizerConfig, passages, train_tokenizer
from gpt2_hf.data.tokenizer import ASSETS
from gpt2_hf.program import UserError

pytest.importorskip("datatrove", reason="the extra data has it")

SYLLABLES = ("un", "ge", "schlag", "heit", "ver", "über", "donau", "dampf", "schiff", "fahrt", "st", "ä", "ß", "en")
ODD = (
    "  ",
    "\n\n",
    "\t",
    " don't",
    " 1999",
    " 中文",
    " 😀",
    "…",
    " <|endoftext|>",
    "\u3000",
    "\x1c",
    "!\x1c",
    "e\u0301",
)
ADVERSARIAL = [
    "",
    " ",
    "\n",
    " \n \t\r\n  x  ",
    "a" * 3000,
    " " * 3000 + "b",
    "".join(map(chr, range(0x3000))),
    "👩‍👩‍👧‍👦🏳️‍🌈 🇩🇪\u200d\ufe0f\ufeff",
    "\U0010ffff\ue000\ufffd\ufffe\x00\x7f\x85\xa0",
    "Ünïcödé e\u0301 \u05d0\u05d1 العربية हिन्दी ไทย 日本語",
    "<|endoftext|>it's<|endoftext|> WE'LL <|endoftext",
    "if x:\n\t\treturn  {**y}  # ----------\r\n",
]


def documents(n: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)

    def word() -> str:
        if rng.random() < 0.1:
            return rng.choice(ODD)
        return " " + "".join(rng.choices(SYLLABLES, k=rng.randint(1, 4)))

    return ["".join(word() + "\n" * (rng.random() < 0.1) for _ in range(rng.randint(5, 200))) for _ in range(n)]


TEXTS = documents(200)


def write(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def train(tmp_path: Path, texts: list[str] = TEXTS, out: str = "tokenizer", **settings: Any) -> Path:
    source = write(tmp_path / "texts.jsonl", texts)
    return train_tokenizer(TokenizerConfig((source,), out=str(tmp_path / out), **{"vocab_size": 600} | settings))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("trained"))


def by_hash(texts: list[str], n_bytes: float, key: bytes = b"") -> tuple[list[str], list[str]]:
    """The texts of the smallest hashes that have so many bytes, in that order, and the others."""
    ordered = sorted(texts, key=lambda text: hashlib.blake2b(text.encode(), digest_size=8, key=key).digest()[::-1])
    sizes = itertools.accumulate(len(text.encode()) for text in ordered)
    n = next((number for number, size in enumerate(sizes, 1) if size >= n_bytes), len(ordered))
    return ordered[:n], ordered[n:]


def split(texts: list[str]) -> tuple[list[str], list[str]]:
    return by_hash(texts, sum(len(text.encode()) for text in texts) / 10)


def plainly(texts: list[str], vocab_size: int) -> dict[str, Any]:
    """What tokenizers' own trainer makes of the texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=vocab_size, min_frequency=2, initial_alphabet=alphabet, show_progress=False),
    )
    return json.loads(tokenizer.to_str())["model"]


def model_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]


def same(folder: Path, texts: list[str], vocab_size: int = 600) -> bool:
    """Whether the tokenizer is the one for these texts, with the end of text as its last entry."""
    plain, model = plainly(texts, vocab_size - 1), model_of(folder)
    return model["vocab"] == plain["vocab"] | {"<|endoftext|>": vocab_size - 1} and model["merges"] == [
        f"{left} {right}" for left, right in plain["merges"]
    ]


# --- the tokenizer ------------------------------------------------------------------------------------------------


def test_it_is_what_the_trainer_makes_of_all_but_the_text_held_out(trained):
    held_out, rest = split(TEXTS)
    assert 0.05 < len(held_out) / len(TEXTS) < 0.2
    assert same(trained, rest) and not same(trained, TEXTS)


def test_a_long_document_is_cut_where_nothing_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "PASSAGE", 40)
    long = ["".join(TEXTS), "\x1c \u3000 \u3000\n x\n\n  !\x1c".join(ODD) * 30, "中文" * 5000]
    for text in (*long, *ADVERSARIAL):
        parts = [part.decode() for part in passages(text)]
        assert "".join(parts) == text and (len(parts) > 1 or text not in long[:2])
        of = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str
        assert [token for part in parts for token, _ in of(part)] == [token for token, _ in of(text)]
    folder = train(tmp_path, long[:2])
    held_out, rest = split([part.decode() for text in long[:2] for part in passages(text)])
    assert len(held_out) > 20 and same(folder, rest)


@pytest.mark.parametrize("vocab_size", [257, 300, 600])
def test_it_loads_everywhere_and_loses_nothing(tmp_path, vocab_size):
    folder = train(tmp_path, vocab_size=vocab_size)
    loaded, bare = AutoTokenizer.from_pretrained(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    old = tmp_path / "files of 2019"
    old.mkdir()
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (old / name).write_bytes((folder / name).read_bytes())
    oldest = AutoTokenizer.from_pretrained(old)
    for tokenizer in (loaded, oldest):
        assert type(tokenizer).__name__.startswith("GPT2Tokenizer") and len(tokenizer) == vocab_size
        ends = (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id)
        assert ends == (vocab_size - 1,) * 3 and tokenizer.model_max_length > 10**20
    for text in [*ADVERSARIAL, *TEXTS[:20]]:
        ids = bare.encode(text).ids
        assert loaded(text)["input_ids"] == ids and oldest(text)["input_ids"] == ids
        assert bare.decode(ids, skip_special_tokens=False) == text == loaded.decode(ids)
        bare.encode_special_tokens = True
        literal = bare.encode(text).ids
        bare.encode_special_tokens = False
        assert vocab_size - 1 not in literal and bare.decode(literal) == text
        assert sum(len(bare.id_to_token(number)) for number in literal) == len(text.encode())
        assert vocab_size > 257 or len(literal) == len(text.encode())


def test_bytes_have_the_numbers_that_they_have_in_gpt2(tmp_path, trained):
    gpt2 = json.loads((ASSETS / "tokenizer" / "vocab.json").read_text(encoding="utf-8"))
    bytes_of_gpt2 = {token: number for token, number in gpt2.items() if number < 256}
    assert bytes_of_gpt2.items() <= model_of(trained)["vocab"].items()
    for texts in (["x"], ["a b"]):
        alone = train(tmp_path, texts, vocab_size=257, overwrite=True)
        assert model_of(alone)["vocab"] == bytes_of_gpt2 | {"<|endoftext|>": 256} and model_of(alone)["merges"] == []


def test_neither_the_order_nor_the_number_of_threads_matters(tmp_path, trained):
    program = """
import sys
from gpt2_hf.corpus.train_tokenizer import TokenizerConfig, train_tokenizer
train_tokenizer(TokenizerConfig(tuple(sys.argv[2:]), out=sys.argv[1], vocab_size=600))
"""
    inputs = [write(tmp_path / f"{name}.jsonl", texts) for name, texts in (("z", TEXTS[70:]), ("b", TEXTS[:70][::-1]))]
    command = [sys.executable, "-c", program, str(tmp_path / "one"), *inputs]
    one = os.environ | {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONHASHSEED": "7"}
    subprocess.run(command, env=one, check=True, capture_output=True)
    train_tokenizer(TokenizerConfig(tuple(inputs[::-1]), out=str(tmp_path / "two"), vocab_size=600))
    for name in training.FILES:
        assert (tmp_path / "one" / name).read_bytes() == (trained / name).read_bytes(), name
        assert (tmp_path / "two" / name).read_bytes() == (trained / name).read_bytes(), name


# --- which text ---------------------------------------------------------------------------------------------------


def test_what_is_kept_depends_on_the_passages_alone():
    rng = random.Random(1)
    for n_bytes, share in itertools.product((1, 40, 500, 10**6), (0.1, 0.5, 1.0)):
        texts = [rng.choice("abcdef") * rng.randint(1, 30) for _ in range(rng.randint(1, 60))]
        enough = min(n_bytes, share * sum(map(len, texts)))
        expected = by_hash(texts, enough, key=(3).to_bytes(8, "little"))[0]
        for _ in range(3):
            rng.shuffle(texts)
            kept = Smallest(n_bytes, share, seed=3)
            others = list(kept.sift(text.encode() for text in texts))
            found = [raw.decode() for raw in kept.kept()]
            assert Counter(found) + Counter(raw.decode() for raw in others) == Counter(texts)
            assert not set(found) & {raw.decode() for raw in others}  # equal ones stay together
            assert list(dict.fromkeys(found)) == list(dict.fromkeys(expected)) and kept.size == sum(map(len, found))


def test_a_sample_is_drawn_by_the_seed(tmp_path):
    n_bytes = 20_000
    _, rest = split(TEXTS)
    models = []
    for seed in (1337, 4):
        sample, _ = by_hash(rest, n_bytes, seed.to_bytes(8, "little"))
        for order in (TEXTS, TEXTS[::-1]):
            folder = train(tmp_path, order, vocab_size=400, sample_bytes=n_bytes, seed=seed, overwrite=True)
            assert same(folder, sample, 400)
            models.append(model_of(folder)["merges"])
    assert models[0] != models[2]
    size = sum(len(text.encode()) for text in sample) / 1e6
    assert f"Trained on {size:,.1f} of" in (folder / "report.md").read_text(encoding="utf-8")


def test_the_only_document_is_divided(tmp_path):
    text = "Das Schiff fährt auf der Donau. Die Fahrt ist lang.\n" * 50
    (tmp_path / "one.txt").write_text(text, encoding="utf-8")
    config = TokenizerConfig((str(tmp_path / "one.txt"),), out=str(tmp_path / "t"), vocab_size=280)
    report = (train_tokenizer(config) / "report.md").read_text(encoding="utf-8")
    held_out = int(re.search(r"measured on ([\d,]+) bytes", report)[1].replace(",", ""))
    cut = text.encode()[: len(text.encode()) - held_out].decode()
    assert 0.05 < held_out / len(text.encode()) <= 0.11 and text[len(cut)] in " \n" and not cut[-1].isspace()
    assert same(tmp_path / "t", [cut], 280)


def test_copies_of_a_text_are_on_one_side(tmp_path):
    held_out, rest = split(TEXTS)
    folder = train(tmp_path, [*held_out, *rest, *held_out, *rest])
    twice, others = split([*TEXTS, *TEXTS])
    assert len(set(twice)) * 2 >= len(twice) > len(set(twice)) and same(folder, [t for t in others if t not in twice])


# --- the report ---------------------------------------------------------------------------------------------------


def test_the_report_is_true(trained):
    report = (trained / "report.md").read_text(encoding="utf-8")
    held_out, rest = split(TEXTS)
    n_bytes = sum(len(text.encode()) for text in held_out)
    assert f"measured on {n_bytes:,} bytes" in report
    rows = dict(re.findall(r"^\| ([a-z ]+) \| (.*) \|$", report, re.M))
    ours, gpt2 = AutoTokenizer.from_pretrained(trained), AutoTokenizer.from_pretrained(ASSETS / "tokenizer")
    expected: dict[str, list[str]] = {
        "entries": [],
        "tokens": [],
        "bytes per token": [],
        "entries that do not occur": [],
    }
    for tokenizer in (ours, gpt2):
        ids = [tokenizer(text, split_special_tokens=True)["input_ids"] for text in held_out]
        n, size = sum(map(len, ids)), len(tokenizer)
        unused = 1 - len(set().union(*ids)) / (size - 1)
        for name, value in zip(expected, (f"{size:,}", f"{n:,}", f"{n_bytes / n:.4f}", f"{unused:.2%}"), strict=True):
            expected[name].append(value)
    assert rows == {name: " | ".join(values) for name, values in expected.items()}
    assert float(expected["bytes per token"][0]) > float(expected["bytes per token"][1])  # it fits these texts better

    counts = Counter(number for text in held_out for number in ours(text, split_special_tokens=True)["input_ids"])
    longest = re.findall(r"^ *([\d,]+) +([\d,]+)  ('.*')$", report, re.M)
    sizes = {number: len(ours.backend_tokenizer.id_to_token(number)) for number in range(len(ours) - 1)}
    assert [int(size) for size, _, _ in longest] == sorted(sizes.values(), reverse=True)[:20]
    for size, times, shown in longest:
        written = [number for number, length in sizes.items() if repr(ours.decode([number])) == shown]
        assert any(sizes[number] == int(size) and counts[number] == int(times.replace(",", "")) for number in written)

    lines = re.findall(r"^(?:this  |GPT-2 ) *(\d+)  (.*)$", report, re.M)
    assert len(lines) == 60
    for (n, pieces), (_, pieces_of_gpt2) in zip(lines[::2], lines[1::2], strict=True):
        assert len(pieces.split("│")) == int(n)
        if not set("�\\") & set(pieces + pieces_of_gpt2):
            line = pieces.replace("│", "")
            assert line == pieces_of_gpt2.replace("│", "")
            assert any(line in text for text in held_out) and len(line) <= 72
            assert pieces.split("│") == [ours.decode([i]) for i in ours(line, split_special_tokens=True)["input_ids"]]


def test_a_summary_is_said(tmp_path, capsys):
    texts = [*TEXTS, "", "half \ud800 of a character"]
    train(tmp_path, texts, vocab_size=640)
    said = capsys.readouterr().out
    assert "bytes per token on" in said and "GPT-2's tokenizer has" in said and "of the entries do not occur" in said
    assert "left out 1 empty, 1 surrogate; the first: " in said and "texts.jsonl:201: empty text" in said
    assert "multiple of 128" not in said
    train(tmp_path, vocab_size=641, overwrite=True)
    assert "641 entries are no multiple of 128" in capsys.readouterr().out


# --- what cannot work ---------------------------------------------------------------------------------------------


def refused(tmp_path: Path, **changes: Any) -> str:
    with pytest.raises((UserError, OSError)) as refusal:
        train(tmp_path, **changes)
    assert "\n" not in str(refusal.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["texts.jsonl"]
    return str(refusal.value)


def test_more_entries_than_the_text_supports(tmp_path):
    text = ["ein kurzer Text, ein kurzer Text"] * 3 + ["und noch einer, und noch einer"] * 5
    said = refused(tmp_path, texts=text, vocab_size=500)
    most = int(re.search(r"this text supports (\d+)", said)[1])
    assert 257 < most < 500 and f"--vocab_size {most}" in said
    assert len(model_of(train(tmp_path, text, vocab_size=most))["vocab"]) == most
    said = refused_after(tmp_path, texts=text, out="another", vocab_size=most + 1)
    assert f"supports {most}" in said


def refused_after(tmp_path: Path, **changes: Any) -> str:
    with pytest.raises(UserError) as refusal:
        train(tmp_path, **changes)
    return str(refusal.value)


def test_no_text(tmp_path):
    said = refused(tmp_path, texts=[])
    assert "no text in" in said and "--text_field" in said
    said = refused(tmp_path, texts=["", " \n"])
    assert "left out 2 empty" in said and "texts.jsonl:1: empty text" in said
    said = refused(tmp_path, texts=["a"], text_field="body")
    assert "'body'" in said and "no text in the text field" in said


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"vocab_size": 256}, "vocab_size is 256, and must be >= 257"),
        ({"vocab_size": 2**40}, "vocab_size is"),
        ({"sample_bytes": 0}, "sample_bytes is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"out": ""}, "out is empty"),
        ({"encoding": "klingon"}, "encoding is 'klingon'"),
        ({"separator": ""}, "separator is empty"),
        ({"dataset": "x"}, "name one of the two"),
        ({"inputs": ()}, "name one of the two"),
    ],
)
def test_wrong_settings(settings, words):
    with pytest.raises(UserError, match=re.escape(words)):
        TokenizerConfig(**{"inputs": ("x.txt",), "out": "t"} | settings)


def test_a_folder_is_replaced_only_if_it_is_a_tokenizer_and_that_is_wanted(tmp_path):
    folder = train(tmp_path, vocab_size=300)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {*before} == {*training.FILES, "manifest.json"}
    assert "--overwrite true" in refused_after(tmp_path)
    assert "supports" in refused_after(tmp_path, vocab_size=50_000, overwrite=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    train(tmp_path, vocab_size=310, overwrite=True)
    assert len(model_of(folder)["vocab"]) == 310
    (folder / "model.safetensors").write_text("")
    assert "has model.safetensors in it" in refused_after(tmp_path, overwrite=True)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "report.md").write_text("mine")
    assert "is no tokenizer" in refused_after(tmp_path, out="notes", overwrite=True)
    assert "is no tokenizer" in refused_after(tmp_path, out="texts.jsonl", overwrite=True)


@pytest.mark.skipif(threading.current_thread() is not threading.main_thread(), reason="signals go to the main thread")
def test_ctrl_c_is_heard_while_text_is_read():
    stop, begun = threading.Event(), threading.Event()

    def endless():
        for number in itertools.count():
            if stop.is_set():
                raise KeyboardInterrupt
            begun.set()
            yield str(number)

    def press() -> None:
        begun.wait()
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press).start()
    with pytest.raises(KeyboardInterrupt):
        training._heeding_ctrl_c(lambda: training.learn(endless(), 300), stop)
    assert stop.is_set()
