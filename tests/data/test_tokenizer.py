"""The shipped tokenizer against tiktoken's own reading of the published files, and both encoders against each other."""

import functools
import gzip
import itertools
import json
import random
import time
import unicodedata
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from gpt2_hf.data import encoding
from gpt2_hf.data.tokenizer import ASSETS, EOT, VOCAB_SIZE, gpt2_tokenizer, load_tokenizer, save_tokenizer

tiktoken = pytest.importorskip("tiktoken")

GPT2 = gpt2_tokenizer()
encode_document, decode, byte_lengths = GPT2.encode_document, GPT2.decode, GPT2.token_byte_lengths

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ASSETS / "tokenizer"
PUBLISHED_PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
TEXTS = [
    "",
    " ",
    "\n",
    "Hello, I'm a language model,",
    "it's they'll WE'LL I'd o'clock ''' 'tis",
    "  two   three    spaces \t tab\t\ttabs \r\n lines\n\n\nend  ",
    "naïve café Ωμέγα русский 中文字符 日本語 한국어 العربية עברית हिन्दी",
    "👩‍👩‍👧‍👦 🇨🇭 e\u0301 \u200b\u200d\ufeff \u2028 \u3000 \x00\x01\x1c\x1f\x85\xa0",
    "½ Ⅷ ² 1234567890 1.5e-3 $#@!~ <html></html> {}[]",
    "a\ufffdb \U0010ffff \ue000",
    "x" * 5000 + "ab" * 3000,
    "def f(x):\n    return x ** 2  # ok\n\n\tif y:\r\n",
]


@functools.cache
def published_encoding() -> "tiktoken.Encoding":
    """GPT-2 as published: OpenAI's files, held by their hashes, and the original pattern; nothing of our encoder."""
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    ranks = data_gym_to_mergeable_bpe_ranks(
        vocab_bpe_file=str(FOLDER / "merges.txt"),
        encoder_json_file=str(FOLDER / "vocab.json"),
        vocab_bpe_hash="1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
        encoder_json_hash="196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    )
    return tiktoken.Encoding("p", pat_str=PUBLISHED_PATTERN, mergeable_ranks=ranks, special_tokens={})


@functools.cache
def rust_tokenizer():
    """The shipped tokenizer in the `tokenizers` library, for which the text of a special token is ordinary too."""
    backend = load_tokenizer().backend_tokenizer
    backend.encode_special_tokens = True
    return backend


@pytest.fixture(scope="module")
def published() -> "tiktoken.Encoding":
    return published_encoding()


@pytest.fixture(scope="module")
def hugging_face():
    return load_tokenizer()


def assert_all_agree(texts: Iterable[str]) -> int:
    """Compare encode_document with tiktoken and `tokenizers` on every text; return how many bytes that was."""
    n_bytes = 0
    waiting = iter(texts)
    # In batches, because the library spends some 150 bytes of memory on a byte of text.
    while batch := list(itertools.islice(waiting, 64)):
        for text, theirs in zip(batch, rust_tokenizer().encode_batch_fast(batch), strict=True):
            expected = published_encoding().encode_ordinary(text)
            ours = encode_document(text)
            assert ours.dtype == np.uint16 and ours[-1] == EOT
            for name, ids in (("encode_document", ours[:-1].tolist()), ("tokenizers", theirs.ids)):
                if ids != expected:
                    pairs = enumerate(itertools.zip_longest(ids, expected))
                    first = next(i for i, (got, wanted) in pairs if got != wanted)
                    near = published_encoding().decode_bytes(expected[max(first - 5, 0) : first + 5])
                    pytest.fail(f"{name} differs from tiktoken at token {first}, near {near!r}")
            n_bytes += len(text.encode())
    return n_bytes


def noise(seed: int) -> str:
    draw = random.Random(seed)
    alphabet = " \t\n\r'sStTdDmlLvVrReE019.,-é中😀\xa0\u2009\u3000\x1c\x85ﬁ\u0301"
    return "".join(draw.choice(alphabet) for _ in range(draw.randrange(200)))


def test_files_are_the_published_ones_and_the_ids_agree(published, hugging_face):
    for text in [*TEXTS, *map(noise, range(500))]:
        expected = published.encode_ordinary(text)
        assert encode_document(text).tolist() == [*expected, EOT], repr(text)
        assert hugging_face.encode(text) == expected, repr(text)
        assert decode(expected) == text
        assert hugging_face.decode(expected) == text


def test_known_ids(hugging_face):
    assert hugging_face.encode("Hello, I'm a language model,") == [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    assert encode_document("Hello world").tolist() == [15496, 995, 50256]
    assert encode_document("x").dtype == np.uint16


def test_the_folder_is_a_gpt2_tokenizer_that_survives_saving(tmp_path: Path, hugging_face):
    from transformers import AutoTokenizer, GPT2Tokenizer

    hugging_face.save_pretrained(tmp_path)
    for folder in (FOLDER, tmp_path):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert isinstance(tokenizer, GPT2Tokenizer) and tokenizer.is_fast
        assert len(tokenizer) == tokenizer.vocab_size == VOCAB_SIZE
        assert tokenizer.model_max_length == 1024
        assert {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id} == {EOT}
        assert tokenizer.eos_token == tokenizer.decode([EOT]) == "<|endoftext|>"
        assert tokenizer.encode("a<|endoftext|>b") == [64, EOT, 65]
        assert tokenizer.encode("world") == [6894]  # no space put in front
        assert tokenizer("a b")["attention_mask"] == [1, 1]


def test_saved_files_are_read_by_tools_of_any_age(tmp_path: Path, hugging_face):
    """By what older readers open: string merges (tokenizers before 0.20), the two files of 2019 (transformers 4)."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import AutoTokenizer

    save_tokenizer(hugging_face, tmp_path, n_positions=128)
    for name in ("vocab.json", "merges.txt"):
        read = json.loads if name == "vocab.json" else str.splitlines
        assert read((tmp_path / name).read_text()) == read((FOLDER / name).read_text())
    merges = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["merges"]
    assert merges == (FOLDER / "merges.txt").read_text().splitlines()[1:]
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["model_max_length"] == 128 and not {"is_local", "local_files_only"} & config.keys()
    assert hugging_face.model_max_length == 1024  # the given one is as before
    plain = ByteLevelBPETokenizer.from_file(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.model_max_length == 128
    for text in TEXTS:
        assert again.encode(text) == plain.encode(text).ids == hugging_face.encode(text)
    assert len(again("word " * 300, truncation=True)["input_ids"]) == 128


@pytest.mark.parametrize("space", [" ", "\n", "\n \t", "\u3000", "\x85"])
@pytest.mark.parametrize("length", [4094, 4095, 4096, 4097, 4098, 20_000])
def test_long_whitespace_keeps_the_ids(hugging_face, space: str, length: int):
    run = (space * length)[:length]
    for text in (run, run + "x", "x" + run + " y", f"a{run}b\x1c{run}"):
        assert encode_document(text)[:-1].tolist() == hugging_face.encode(text)


def test_whitespace_that_overflows_the_regex_is_encoded():
    text = "a" + "\n" * 2_000_000 + "b"
    assert decode(encode_document(text)[:-1].tolist()) == text


def test_whitespace_just_below_the_limit_does_not_take_quadratic_time():
    began = time.process_time()
    text = (" " * 4095 + "x") * 1000
    assert len(encode_document(text)) == 4095 * 1000 + 1  # " x" is one token, and so is every other space
    assert time.process_time() - began < 10


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\ud800", r"U\+D800 at character 0 of 1:"),
        ("a\udfff", r"U\+DFFF at character 1 of 2:"),
        ("中😀\udc00b\ud800", r"U\+DC00 at character 2 of 5:"),
        ("\ud83d\ude00", r"U\+D83D at character 0 of 2:"),  # Python joins halves in JSON, never in a str
        ("a" + " " * 10_000 + "b\udbff", r"U\+DBFF at character 10,002 of 10,003:"),
        (" " * 10_000 + "b\udbff" + "\n" * 10_000, r"U\+DBFF at character 10,001 of 20,002:"),
    ],
)
def test_lone_surrogates_are_refused(text: str, message: str):
    with pytest.raises(ValueError, match="lone surrogate " + message):
        encode_document(text)


def test_all_bytes_and_the_borders_of_utf8_agree():
    borders = {0xD7FF, 0xE000, 0x10FFFF}
    for step, end in ((0x1, 0x100), (0x40, 0x800), (0x1000, 0x10000), (0x40000, 0x110000)):  # of every first byte
        borders |= {code + near for code in range(0, end, step) for near in (-1, 0, 1)}
    codes = [code for code in sorted(borders) if 0 <= code < 0x110000 and not 0xD800 <= code < 0xE000]
    assert set(range(256)) < set(codes) and {len(chr(code).encode()) for code in codes} == {1, 2, 3, 4}
    never = {0xC0, 0xC1, *range(0xF5, 0x100)}
    assert {byte for code in codes for byte in chr(code).encode()} == set(range(256)) - never
    assert_all_agree(in_company(chr(code)) for code in codes)
    assert_all_agree(["".join(chr(a) + chr(b) for a in range(256) for b in range(256))])


def in_company(char: str) -> str:
    """The character alone, doubled, and beside letters, digits, spaces, apostrophes, punctuation and line ends."""
    shapes = (
        "{0}",
        " {0}",
        "{0} x",
        "a{0}b",
        "1{0}2",
        "'{0}s",
        "{0}'s",
        "  {0}{0}  ",
        ".{0}.",
        "\n{0}\r\n",
        "\u0301{0}",
    )
    return "|".join(shape.format(char) for shape in shapes)


def test_every_unicode_category_agrees():
    by_category: dict[str, list[str]] = {}
    for char in map(chr, range(0x110000)):
        by_category.setdefault(unicodedata.category(char), []).append(char)
    del by_category["Cs"]  # lone surrogates
    assert len(by_category) == 29
    draw = random.Random(0)
    chars = [char for members in by_category.values() for char in draw.sample(members, min(200, len(members)))]
    chars += [members[i] for members in by_category.values() for i in (0, -1)]
    assert_all_agree(map(in_company, chars))
    draw.shuffle(chars)
    assert_all_agree(["".join(chars), " ".join(chars), "a".join(chars), "1".join(chars)])


@pytest.mark.parametrize(
    "text",
    [
        "<|endoftext|>" * 3 + " <|endoftext|> <|endoftext<|endoftext|>|> <|im_start|>a<|endoftext|>",
        "\0" * 10 + "a\0b \0 1\0",
        "\ufeffBOM first\ufeff and \ufeff later",
        "one\r\ntwo\r\n\r\n  three\r\r\nfour\n\r ",
        "e\u0301 a\u0300\u0301\u0302 \u0301 \u20dd1\u20e3 क्षि நி กำ 각 각 ﷺ",
        "Z" + "".join(map(chr, range(0x300, 0x370))) * 3,
        "abc \u202edef\u202c \u2066שלום\u2069 \u200f1\u200e2\u061c\u202a\u202b\u202d\u2067\u2068",
        "".join(
            map(
                chr, [*range(0xFDD0, 0xFDF0), *(plane * 0x10000 + low for plane in range(17) for low in (65534, 65535))]
            )
        ),
        "\ue000 \uf8ffa\U000f0000\U0010fffd1 ",
        "🇨🇭🇺🇳👩🏽‍🚀🏳️‍🌈 1️⃣ ☃︎ ☃️",
        "\u180e\u200b\u2060\u00ad a\u00adb\x1c\x1d\x1e\x1f\x85 \x0b\x0c",
        "'S 'LL 'Ve ’s ʼs ''s 's's '' d'll'dn't'ſ 'ſ",
    ],
)
def test_awkward_texts_agree(text: str):
    assert_all_agree([text, text * 50, f"a{text}b", f" {text} ", "\n".join(text), " ".join(text)])


ONE_MEGABYTE = {
    "one letter": lambda draw: "a" * 10**6,
    "letters": lambda draw: "".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=10**6)),
    "ideographs": lambda draw: "".join(map(chr, draw.choices(range(0x4E00, 0x9FFF), k=10**6 // 3))),
    "mixed": lambda draw: "".join(
        map(chr, draw.choices([*range(33, 127), *range(0x4E00, 0x4F00), *range(0x1F600, 0x1F640)], k=400_000))
    ),
}


@pytest.mark.parametrize("kind", ONE_MEGABYTE)
def test_a_megabyte_without_a_space_agrees_in_time(kind: str):
    """The pattern makes one piece of a million letters; merging its pairs one after the other takes minutes."""
    text = ONE_MEGABYTE[kind](random.Random(0))
    assert len(text.encode()) > 9.9e5 and not any(map(str.isspace, text))
    began = time.process_time()
    ours = encode_document(text)
    assert time.process_time() - began < 20
    assert ours[:-1].tolist() == rust_tokenizer().encode_batch_fast([text])[0].ids


@pytest.mark.parametrize("part", [1, 2, 7, 100])
def test_a_long_text_encoded_in_parts_has_the_same_ids(monkeypatch, part: int):
    draw = random.Random(part)
    alphabet = [
        "a",
        "don't",
        "'ll",
        " ",
        "  ",
        "\n",
        "\t",
        "\u00a0",
        "\u3000",
        "42",
        "!?",
        "中",
        "é",
        "😀",
        "\x1c",
        "x" * 30,
    ]
    texts = ["".join(draw.choices(alphabet, k=300)) for _ in range(50)]
    texts += [" " * 50, "a" * 500, " a" * 200, "a \n\n b" * 50, ""]
    whole = [encode_document(text).tolist() for text in texts]
    monkeypatch.setattr(encoding, "_PART", part)
    assert sum(len(list(encoding._parts(text, encoding._SPACE_AFTER))) for text in texts) > 2 * len(texts)
    assert [encode_document(text).tolist() for text in texts] == whole


def test_byte_lengths_sum_to_the_length_of_the_text(published):
    assert byte_lengths.shape == (VOCAB_SIZE,) and byte_lengths[EOT] == 0
    assert byte_lengths[:EOT].tolist() == [len(published.decode_single_token_bytes(i)) for i in range(EOT)]
    for text in TEXTS:
        assert byte_lengths[encode_document(text)].sum() == len(text.encode())


def test_hellaswag_is_whole():
    with gzip.open(ASSETS / "hellaswag_val.jsonl.gz", "rt", encoding="utf-8") as file:
        items = [json.loads(line) for line in file]
    assert len(items) == 10_042
    assert all(len(item["endings"]) == 4 and item["label"] in range(4) for item in items)


# First and last letter of each.
SCRIPTS = (
    "az AZ àö āſ αω ая աև את ءي ܐܬ अह কহ ਕਹ கஹ กฮ ກຮ ཀཧ ကအ აჰ ᄀᄒ ሀቿ ᎠᏴ កអ ᠠᡂ ぁん ァヶ 一龥 가힣 𐌰𐍊 𝐀𝐙 "
    "09 ٠٩ ०९ ²³ ½¾ ⅠⅫ ①⑳ !/ :@ [` {~ ¡¿ \u2010\u205e \u2060\u2064 ←⇿ ∀⋿ ─╿ ⠀⣿ 😀🙏 🚀🛅 🇦🇿 🏻🏿 \u0300\u036f"
)
SPACES = [" "] * 12 + [
    "\n",
    "\n\n",
    "\r\n",
    "\t",
    "   ",
    " " * 9,
    "\xa0",
    "\u3000",
    "\u2009",
    "\u2028",
    "\x85",
    "\x0b",
    " \n  \t",
]
ENDINGS = [
    "",
    "",
    "",
    "",
    "'s",
    "'ll",
    "n't",
    "’s",
    "'",
    '"',
    ",",
    ".",
    "...",
    "-",
    "\u200d",
    "\ufe0f",
    "\u0301",
    "1",
    "é",
]


def babel(seed: int, words: int) -> str:
    """Words and numbers of many scripts, symbols and emoji, run together now and then."""
    draw = random.Random(seed)
    parts = []
    for _ in range(words):
        first, last = draw.choice(SCRIPTS.split()) if draw.random() < 0.7 else "az"
        letters = "".join(chr(draw.randint(ord(first), ord(last))) for _ in range(draw.randint(1, 9)))
        parts += [letters, draw.choice(ENDINGS), draw.choice(SPACES) if draw.random() < 0.9 else ""]
    return "".join(parts)


def test_megabytes_of_mixed_text_agree():
    def lines(name: str) -> list[dict]:
        with gzip.open(ASSETS / name, "rt", encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    plays = [play["text"] for play in lines("shakespeare.jsonl.gz")[::10]]
    items = [item["ctx"] + " " + item["endings"][item["label"]] for item in lines("hellaswag_val.jsonl.gz")[::2]]
    code = [path.read_text(encoding="utf-8") for path in (ROOT / "gpt2_hf").rglob("*.py")]
    assert assert_all_agree(plays) > 4e5
    assert assert_all_agree(items) > 1e6
    assert assert_all_agree(code) > 2e5
    assert assert_all_agree(babel(seed, 2000) for seed in range(30)) > 5e5


def test_the_plays_are_38_documents_in_order():
    with gzip.open(ASSETS / "shakespeare.jsonl.gz", "rt", encoding="utf-8") as file:
        plays = [json.loads(line) for line in file]
    assert len(plays) == 38 and [play["id"] for play in plays] == sorted({play["id"] for play in plays})
    assert all(len(play["text"]) > 50_000 for play in plays)
