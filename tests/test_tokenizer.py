"""The shipped tokenizer against tiktoken's own reading of the published files, and both encoders against each other."""

import base64
import gzip
import json
import random
from pathlib import Path

import numpy as np
import pytest

from gpt2_hf.data.tokenizer import ASSETS, EOT, VOCAB_SIZE, bulk_encoder, encode_document, load_tokenizer
from gpt2_hf.data.tokenizer import token_byte_lengths as byte_lengths

tiktoken = pytest.importorskip("tiktoken")

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


@pytest.fixture(scope="module")
def published() -> "tiktoken.Encoding":
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    ranks = data_gym_to_mergeable_bpe_ranks(
        vocab_bpe_file=str(FOLDER / "merges.txt"),
        encoder_json_file=str(FOLDER / "vocab.json"),
        vocab_bpe_hash="1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",  # OpenAI's files
        encoder_json_hash="196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    )
    return tiktoken.Encoding("p", pat_str=PUBLISHED_PATTERN, mergeable_ranks=ranks, special_tokens={})


@pytest.fixture(scope="module")
def hugging_face():
    return load_tokenizer()


def noise(seed: int) -> str:
    draw = random.Random(seed)
    alphabet = " \t\n\r'sStTdDmlLvVrReE019.,-é中😀\xa0\u2009\u3000\x1c\x85ﬁ\u0301"
    return "".join(draw.choice(alphabet) for _ in range(draw.randrange(200)))


def test_files_are_the_published_ones_and_the_ids_agree(published, hugging_face):
    for text in [*TEXTS, *map(noise, range(500))]:
        expected = published.encode_ordinary(text)
        assert encode_document(text).tolist() == [*expected, EOT], repr(text)
        assert hugging_face.encode(text) == expected, repr(text)
        assert bulk_encoder().decode(expected) == text
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


def test_from_the_plain_files_the_ids_are_the_same(hugging_face):
    from tokenizers import ByteLevelBPETokenizer

    plain = ByteLevelBPETokenizer.from_file(str(FOLDER / "vocab.json"), str(FOLDER / "merges.txt"))
    for text in TEXTS:
        assert plain.encode(text).ids == hugging_face.encode(text)


def test_special_text_in_a_document_is_ordinary_text():
    tokens = encode_document("a<|endoftext|>b")
    assert tokens[-1] == EOT and EOT not in tokens[:-1]
    assert bulk_encoder().decode(tokens[:-1].tolist()) == "a<|endoftext|>b"


@pytest.mark.parametrize("space", [" ", "\n", "\n \t", "\u3000", "\x85"])
@pytest.mark.parametrize("length", [4094, 4095, 4096, 4097, 4098, 20_000])
def test_long_whitespace_keeps_the_ids(hugging_face, space: str, length: int):
    run = (space * length)[:length]
    for text in (run, run + "x", "x" + run + " y", f"a{run}b\x1c{run}"):
        assert encode_document(text)[:-1].tolist() == hugging_face.encode(text)


def test_whitespace_that_overflows_the_regex_is_encoded():
    text = "a" + "\n" * 2_000_000 + "b"
    assert bulk_encoder().decode(encode_document(text)[:-1].tolist()) == text


def test_lone_surrogates_become_replacement_characters():
    assert encode_document("a\ud800b\udc00").tolist() == encode_document("a\ufffdb\ufffd").tolist()


def test_byte_lengths_sum_to_the_length_of_the_text(published):
    assert byte_lengths().shape == (VOCAB_SIZE,) and byte_lengths()[EOT] == 0
    assert byte_lengths()[:EOT].tolist() == [len(published.decode_single_token_bytes(i)) for i in range(EOT)]
    for text in TEXTS:
        assert byte_lengths()[encode_document(text)].sum() == len(text.encode())


def test_every_byte_has_a_token(published):
    singles = {base64.b16encode(published.decode_single_token_bytes(i)) for i in range(256)}
    assert len(singles) == 256


def test_hellaswag_is_whole_and_both_encoders_agree_on_it(hugging_face):
    with gzip.open(ASSETS / "hellaswag_val.jsonl.gz", "rt", encoding="utf-8") as file:
        items = [json.loads(line) for line in file]
    assert len(items) == 10_042
    assert all(len(item["endings"]) == 4 and item["label"] in range(4) for item in items)
    texts = [item["ctx"] + " " + item["endings"][item["label"]] for item in items]
    fast = hugging_face.backend_tokenizer.encode_batch(texts)
    assert all(encode_document(text)[:-1].tolist() == got.ids for text, got in zip(texts, fast, strict=True))


def test_the_plays_are_38_documents_in_order():
    with gzip.open(ASSETS / "shakespeare.jsonl.gz", "rt", encoding="utf-8") as file:
        plays = [json.loads(line) for line in file]
    assert len(plays) == 38 and [play["id"] for play in plays] == sorted({play["id"] for play in plays})
    assert all(len(play["text"]) > 50_000 for play in plays)
