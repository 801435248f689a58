"""Byte-level BPE tokenizers other than GPT-2's: the ids of `tokenizers` itself, or a refusal that says why."""

import json
import unicodedata
from functools import cache

import numpy as np
import pytest
from test_tokenizer import TEXTS, babel, noise
from tiny_tokenizers import END, MAKES, QWEN2, SLOWER, merges_of, of_merges, split_by, texts, trained, write_tokenizer
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from gpt2_hf.data import encoding
from gpt2_hf.data.encoding import merge_ranks
from gpt2_hf.data.tokenizer import EOT, gpt2_tokenizer, load_tokenizer, open_tokenizer, read_tokenizer
from gpt2_hf.program import UserError

OTHER_CUTS = ("cl100k", "qwen2", "o200k", "llama3", "nfc", "single digits")  # than GPT-2's
AWKWARD = [
    *TEXTS,
    *texts(10),
    *map(noise, range(150)),
    babel(3, 400),
    f"{END}{END} a{END} <|begin_of_text|><|end_of_text|> they'll THEY'LL",
    "abc abcabc bc ab c",
    " unheard of, unheard\n",
    "".join(map(chr, range(0x300))),
    "no space at the end\n  \n   ",
    "('x')\n\n\n[y]:\r\n\r\n//\n/",
]


@cache
def opened(make: str):
    made = MAKES[make]()
    eos = "<|end_of_text|>" if make == "llama3" else END
    found = read_tokenizer(make, {"tokenizer.json": made.to_str().encode(), "tokenizer_config.json": settings(eos)})
    made.encode_special_tokens = True
    return found, made


def settings(eos: object) -> bytes:
    return json.dumps({"eos_token": eos}).encode()


@pytest.mark.parametrize("make", MAKES)
def test_ids_are_those_of_the_library(make):
    ours, theirs = opened(make)
    assert ours.encoder == ("tokenizers" if make in SLOWER else "tiktoken")
    assert ours.vocab_size == theirs.get_vocab_size(with_added_tokens=True)
    assert ours.dtype == ("<u4" if make == "pairs" else "<u2") and (ours.vocab_size > 2**16) == (make == "pairs")
    for text in AWKWARD:
        *ids, eot = ours.encode_document(text).tolist()
        assert ids == theirs.encode(text, add_special_tokens=False).ids, repr(text)
        assert eot == ours.eot not in ids
        same = unicodedata.normalize("NFC", text) if make == "nfc" else text
        assert ours.decode(ids) == same
        assert ours.token_byte_lengths[[*ids, eot]].sum() == len(same.encode())


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("space", [" ", "\n", " \n"])
def test_long_whitespace_and_long_texts_keep_the_ids(make, space, monkeypatch):
    ours, theirs = opened(make)
    monkeypatch.setattr(encoding, "_PART", 50)
    for text in (
        f"a{space * 5000}",
        f"(a){space * 5000}b\n",
        " ".join(texts(3)),
        "\n".join(["'x'", "y z", "(z)"] * 99),
    ):
        assert ours.encode_document(text)[:-1].tolist() == theirs.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("make", ["cl100k", "nfc", "single digits"])
def test_lone_surrogates_are_refused(make):
    with pytest.raises(ValueError, match=r"lone surrogate U\+D800 at character 2 of 4:"):
        opened(make)[0].encode_document("ab\ud800c")


def test_gpt2_s_own_merges_pass_the_test_for_tiktoken():
    spec = json.loads(load_tokenizer().backend_tokenizer.to_str())
    found = merge_ranks(spec)
    assert found is not None and list(found.values()) == list(range(EOT))
    assert list(found) == list(gpt2_tokenizer().token_bytes[:EOT])


def test_another_name_for_gpt2_s_is_gpt2_s(tmp_path):
    load_tokenizer().save_pretrained(tmp_path / "mine")
    assert open_tokenizer(tmp_path / "mine") is open_tokenizer("gpt2") is open_tokenizer(None)
    assert open_tokenizer(tmp_path / "mine" / "tokenizer.json").is_gpt2


@pytest.mark.parametrize("make", MAKES)
def test_transformers_reads_what_is_saved_and_gives_the_same_ids(make, tmp_path):
    """Beside a model's config.json, where it takes what says nothing for GPT-2's tokenizer."""
    from transformers import AutoTokenizer

    from gpt2_hf.data.tokenizer import save_tokenizer
    from gpt2_hf.model import GPTConfig

    ours, _ = opened(make)
    ours.save(tmp_path / "kept")
    assert open_tokenizer(tmp_path / "kept").fingerprint == ours.fingerprint
    GPTConfig(vocab_size=ours.vocab_size, bos_token_id=ours.eot, eos_token_id=ours.eot).save_pretrained(tmp_path)
    save_tokenizer(ours.hugging_face(), tmp_path, n_positions=77)
    found = AutoTokenizer.from_pretrained(tmp_path)
    assert found.eos_token_id == found.bos_token_id == ours.eot and found.model_max_length == 77
    for text in TEXTS[:-2] + texts(5):
        assert found(text)["input_ids"] == ours.encode_document(text)[:-1].tolist()  # nothing put before it
        assert found.decode(ours.encode_document(text)[:-1]) == ours.decode(ours.encode_document(text)[:-1])
    assert found("a" + ours.eot_token)["input_ids"][-1] == ours.eot
    assert (tmp_path / "merges.txt").exists() == (make not in OTHER_CUTS)


def test_what_decides_the_ids_decides_the_fingerprint():
    def fingerprint(made: Tokenizer, eos: object = END) -> str:
        return read_tokenizer(
            "x", {"tokenizer.json": made.to_str().encode(), "tokenizer_config.json": settings(eos)}
        ).fingerprint

    same, other = trained(), trained(QWEN2)
    same.enable_padding()
    same.enable_truncation(9)
    assert fingerprint(trained()) == fingerprint(same) == fingerprint(trained(), {"content": END})
    swapped = merges_of(trained())
    swapped[3], swapped[4] = swapped[4], swapped[3]
    different = [trained(), other, trained(vocab_size=299), of_merges(merges_of(trained())), of_merges(swapped)]
    assert len({fingerprint(made) for made in different}) == 5


def test_numbers_without_an_entry_are_rows_all_the_same():
    made = of_merges([("a", "b")], lambda number: 2 * number)
    found = read_tokenizer("x", {"tokenizer.json": made.to_str().encode()})
    assert found.vocab_size == max(made.get_vocab().values()) + 1 > made.get_vocab_size()
    ids = found.encode_document("xab")[:-1].tolist()
    assert ids == made.encode("xab").ids and found.decode(ids) == "xab"
    assert found.token_bytes[1] == b"" and found.decode([99_999]) == "<|99999|>"


def changed(**steps) -> bytes:
    made = trained()
    for name, value in steps.items():
        setattr(made, name, value)
    return made.to_str().encode()


def model_changed(**settings) -> bytes:
    spec = json.loads(trained().to_str())
    spec["model"] |= settings
    return json.dumps(spec).encode()


def without_a_byte() -> bytes:
    spec = json.loads(of_merges([]).to_str())
    del spec["model"]["vocab"][chr(0x100)]
    return json.dumps(spec).encode()


def with_greedy_word() -> bytes:
    made = trained()
    made.add_tokens([AddedToken("word", lstrip=True)])
    return made.to_str().encode()


def without_end() -> bytes:
    spec = json.loads(trained().to_str())
    spec["added_tokens"] = []
    spec["model"]["vocab"] = {entry: i for entry, i in spec["model"]["vocab"].items() if entry != END}
    return json.dumps(spec).encode()


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
REFUSED = {
    "WordPiece": (Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]")).to_str().encode(), "kind WordPiece"),
    "Unigram": (Tokenizer(models.Unigram([("a", -1.0)])).to_str().encode(), "kind Unigram"),
    "words": (Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).to_str().encode(), "kind WordLevel"),
    "Metaspace": (changed(pre_tokenizer=pre_tokenizers.Metaspace()), "of characters, as SentencePiece's"),
    "byte_fallback": (model_changed(byte_fallback=True), "of characters, as SentencePiece's"),
    "CLIP's": (model_changed(end_of_word_suffix="</w>"), "marks the parts of a word"),
    "dropout": (model_changed(dropout=0.1), "merges by chance"),
    "a space in front": (changed(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)), "add_prefix_space"),
    "lower case": (changed(normalizer=normalizers.Lowercase()), r"changes texts .*Lowercase"),
    "several": (changed(normalizer=normalizers.Sequence([normalizers.NFC(), normalizers.Strip()])), r"\(Strip\)"),
    "spaces lost": (
        changed(pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), BYTES])),
        "does not give texts back",
    ),
    "a byte too few": (without_a_byte(), "no entry for 1 of the 256 bytes"),
    "a greedy word": (with_greedy_word(), "swallows spaces beside it, 'word'"),
    "no end": (without_end(), r"has no end-of-text token: .* nor has it <\|endoftext\|>"),
    "no JSON": (b"{", "broken tokenizer.json"),
    "no tokenizer": (b"{}", "broken tokenizer.json"),
    "another version": (changed().replace(b'"ByteLevel"', b'"BiteLevel"', 1), "cannot be read|of characters"),
}


@pytest.mark.parametrize(("content", "said"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_used_is_refused_in_a_line_that_says_why(content, said):
    with pytest.raises(UserError, match=f"^the tokenizer mine .*({said})") as caught:
        read_tokenizer("mine", {"tokenizer.json": content})
    assert "\n" not in str(caught.value)


def test_an_end_of_text_that_any_text_may_hold_is_refused():
    made = trained()
    made.pre_tokenizer = split_by(None)
    spec = json.loads(made.to_str())
    with pytest.raises(UserError, match="makes its end-of-text token of ordinary text, 'x'"):
        read_tokenizer("mine", {"tokenizer.json": json.dumps(spec).encode(), "tokenizer_config.json": settings("x")})


def test_what_is_not_there_or_not_fast_is_refused_in_a_line(tmp_path):
    with pytest.raises(UserError, match="no tokenizer no/such: there is no such folder, and the Hub"):
        open_tokenizer("no/such")
    with pytest.raises(UserError, match=r"no folder .*/missing: give one with a tokenizer\.json, or a model id"):
        open_tokenizer(tmp_path / "missing")
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(UserError, match=r"has no tokenizer\.json, so it is none of the fast ones"):
        open_tokenizer(tmp_path)


def test_the_name_is_the_folder_s_and_gpt2_is_kept_for_gpt2_s(tmp_path):
    assert open_tokenizer(write_tokenizer(trained(), tmp_path / "mine")).name == "mine"
    found = open_tokenizer(write_tokenizer(trained(), tmp_path / "gpt2"))
    assert not found.is_gpt2 and found.name == "another"


def test_a_long_document_is_of_the_type_of_the_shards():
    ours, _ = opened("pairs")
    document = ours.encode_document("ab" * 10)
    assert document.dtype == np.uint32 and document[:-1].max() < ours.vocab_size
