"""Data of another tokenizer than GPT-2's: prepared, carried along, read, looked into, exported."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny_tokenizers import (
    ALPHABET,
    CL100K,
    END,
    normalizing,
    of_bytes,
    of_merges,
    of_pairs,
    texts,
    trained,
    write_tokenizer,
)

from gpt2_hf.corpus import write as writing
from gpt2_hf.corpus.export import export_llmc
from gpt2_hf.corpus.inspection import inspect_data
from gpt2_hf.corpus.inspection_text import render
from gpt2_hf.corpus.prepare import PrepareConfig, prepare
from gpt2_hf.data.shards import ShardError, open_split
from gpt2_hf.data.stream import TokenStream
from gpt2_hf.data.tokenizer import open_tokenizer
from gpt2_hf.program import UserError

TEXTS = [f"{number}: {text}" for number, text in enumerate(texts(40))]


def write_texts(path: Path, documents: list[str] = TEXTS) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


def settings(tmp_path: Path, made, name: str = "mine", **changes) -> PrepareConfig:
    source = tmp_path / "docs.jsonl"
    if not source.exists():
        write_texts(source)
    tokenizer = str(write_tokenizer(made, tmp_path / name)) if made else None
    values = {"inputs": (str(source),), "out": str(tmp_path / "data"), "workers": 1, "tokenizer": tokenizer}
    return PrepareConfig(**(values | changes))


def documents(data: Path, dtype: str) -> list[list[int]]:
    """All documents of a folder, in any order, by the format's description."""
    found = []
    for path in data.glob("*/*.ds"):
        ends = np.fromfile(f"{path}.index", "<u8")
        found += [tokens.tolist() for tokens in np.split(np.fromfile(path, dtype), ends.astype(int))[:-1]]
    return sorted(found)


@pytest.mark.parametrize(("make", "dtype"), [(lambda: trained(CL100K), "<u2"), (of_bytes, "<u2"), (of_pairs, "<u4")])
def test_the_shards_have_its_ids_and_the_folder_is_whole_by_itself(tmp_path, make, dtype):
    made = make()
    prepare(settings(tmp_path, made))
    shutil.rmtree(tmp_path / "mine")
    (tmp_path / "data").rename(tmp_path / "moved")
    manifest = json.loads((tmp_path / "moved" / "manifest.json").read_text())
    assert manifest["tokenizer"].keys() == {"name", "sha256"} and manifest["tokenizer"]["name"] == "mine"
    assert manifest["vocab_size"] == made.get_vocab_size() and manifest["eot"] == made.token_to_id(END)
    assert manifest["dtype"] == np.dtype(dtype).name
    assert documents(tmp_path / "moved", dtype) == sorted([*made.encode(text).ids, manifest["eot"]] for text in TEXTS)
    n_bytes = 0
    for split in ("train", "val"):
        shards = open_split(tmp_path / "moved", split)
        shards.verify()
        n_bytes += shards.n_bytes
        lengths = shards.tokenizer.token_byte_lengths
        assert sum(int(lengths[shard.tokens()].sum()) for shard in shards.shards) == shards.n_bytes
        stream = TokenStream(shards, 16, seed=0, shuffle=False)
        stored = np.concatenate([shard.tokens() for shard in shards.shards])
        assert stream.batch(0, 3)[:, :-1].ravel().tolist() == stored[:48].tolist()
    assert n_bytes == sum(len(text.encode()) for text in TEXTS)
    line, count, _ = (tmp_path / "moved" / "train" / "00000.ds.metadata").read_text().split("\n")
    assert line == f"mine|{np.dtype(dtype).itemsize}" and int(count) == open_split(tmp_path / "moved", "train").n_tokens


def test_datatrove_reads_shards_of_four_bytes(tmp_path):
    from datatrove.utils.dataset import DatatroveFileDataset

    prepare(settings(tmp_path, of_pairs()))
    theirs = DatatroveFileDataset(str(tmp_path / "data" / "train" / "00000.ds"), seq_len=15, token_size=4)
    stored = np.fromfile(tmp_path / "data" / "train" / "00000.ds", "<u4")
    assert theirs[2]["input_ids"].tolist() == stored[32:48].tolist()


def test_bytes_are_of_the_normalised_text(tmp_path):
    prepare(settings(tmp_path, normalizing(), val_fraction=0.0))
    shards = open_split(tmp_path / "data", "train")
    assert shards.n_bytes < sum(len(text.encode()) for text in TEXTS)  # é in one code point
    lengths = shards.tokenizer.token_byte_lengths
    assert sum(int(lengths[shard.tokens()].sum()) for shard in shards.shards) == shards.n_bytes
    assert "LOOK AT THIS" not in render(inspect_data(tmp_path / "data"))


def test_another_tokenizer_is_another_preparation(tmp_path, monkeypatch):
    config = settings(tmp_path, trained())
    with monkeypatch.context() as patch:
        patch.setattr(writing.WriteShards, "_cut_shards", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare(config)
    for other in (settings(tmp_path, of_bytes(), "other"), settings(tmp_path, None)):
        with pytest.raises(UserError, match="unfinished preparation of something else"):
            prepare(other)
    with monkeypatch.context() as patch:
        patch.setattr("gpt2_hf.data.tokenizer.Tokenizer.encode_document", lambda *_: 1 / 0)  # all tasks are done
        prepare(config)
    prepare(config)
    for other in (settings(tmp_path, of_bytes(), "other"), settings(tmp_path, None)):
        with pytest.raises(UserError, match=r"other settings \(tokenizer was mine \(\w{12}\), now (other|gpt2)"):
            prepare(other)
    prepare(settings(tmp_path, None, overwrite=True))
    assert not (tmp_path / "data" / "tokenizer").exists()
    assert open_split(tmp_path / "data", "train").tokenizer.is_gpt2


def test_one_document_is_divided_and_copies_are_shown(tmp_path):
    source = write_texts(tmp_path / "one.jsonl", ["\n".join(TEXTS)])
    prepare(settings(tmp_path, of_pairs(), inputs=(str(source),)))
    train, val = (open_split(tmp_path / "data", split) for split in ("train", "val"))
    parts = [shards.tokenizer.decode(shards.shards[0].tokens()[:-1]) for shards in (train, val)]
    assert "".join(parts) == "\n".join(TEXTS) and parts[0].endswith("\n")
    assert [shards.n_bytes for shards in (train, val)] == [len(part.encode()) for part in parts]

    source = write_texts(tmp_path / "two.jsonl", [*TEXTS, TEXTS[7]])
    prepare(settings(tmp_path, of_pairs(), inputs=(str(source),), out=str(tmp_path / "second"), dedup="exact"))
    report = json.loads((tmp_path / "second" / "report.json").read_text())
    assert json.dumps(TEXTS[7][:20])[1:-1] in json.dumps(report)


def test_a_tokenizer_that_is_gone_or_changed_is_one_line(tmp_path):
    prepare(settings(tmp_path, trained()))
    place = tmp_path / "data" / "tokenizer"
    place.rename(tmp_path / "aside")
    with pytest.raises(ShardError, match="data/tokenizer is gone, in which the tokenizer mine of this data was"):
        open_split(tmp_path / "data", "train")
    open_tokenizer(write_tokenizer(of_bytes(), tmp_path / "bytes")).save(place)
    with pytest.raises(ShardError, match="is not the tokenizer that this data was prepared with"):
        open_split(tmp_path / "data", "train")
    (place / "tokenizer.json").write_text("{")
    with pytest.raises(ShardError, match=r"data/tokenizer: the tokenizer mine has a broken tokenizer\.json"):
        open_split(tmp_path / "data", "train")
    shutil.rmtree(place)
    (tmp_path / "aside").rename(place)
    open_split(tmp_path / "data", "train")
    path = tmp_path / "data" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer": "llama"}))
    with pytest.raises(ShardError, match="names the tokenizer 'llama', and has none of its own"):
        open_split(tmp_path / "data", "train")


def test_ids_beyond_the_vocabulary_are_one_line(tmp_path):
    prepare(settings(tmp_path, of_pairs(), val_fraction=0.0))
    shards = open_split(tmp_path / "data", "train")
    tokens = np.memmap(tmp_path / "data" / "train" / "00000.ds", "<u4", "r+")
    place = len(tokens) // 3  # where no sample is taken
    tokens[place] = shards.vocab_size
    with pytest.raises(ShardError, match="holds token 65793, outside a vocabulary of 65793"):
        TokenStream(shards, 16, 0, shuffle=False).batch(0, place // 16 + 1)


def test_token_files_of_others_are_read_with_the_tokenizer_that_is_named(tmp_path):
    made = of_pairs()
    named = open_tokenizer(write_tokenizer(made, tmp_path / "mine"))
    tokens = np.concatenate([named.encode_document(text) for text in TEXTS])
    (tmp_path / "raw").mkdir()
    tokens.tofile(tmp_path / "raw" / "train.bin")  # as nanoGPT, with 4 bytes a token
    np.save(tmp_path / "train.npy", tokens.astype("<i8"))
    for path in (tmp_path / "raw", tmp_path / "train.npy"):
        found = open_split(path, "train", named)
        assert (found.vocab_size, found.eot, found.n_tokens) == (named.vocab_size, named.eot, len(tokens))
        stream = TokenStream(found, 16, seed=0, shuffle=False)
        assert stream.dtype == np.uint32 and stream.batch(0, 4)[:, :-1].ravel().tolist() == tokens[:64].tolist()
        assert len(found.shards[0].document_ends()) == len(TEXTS)
    small = open_tokenizer(write_tokenizer(trained(), tmp_path / "small"))
    with pytest.raises(ShardError, match=r"outside the vocabulary of the tokenizer small, of 300: .*data\.tokenizer"):
        open_split(tmp_path / "train.npy", "train", small)

    prepare(settings(tmp_path, made))
    with pytest.raises(
        ShardError, match=r"prepared with the tokenizer mine, not with small: leave out data\.tokenizer"
    ):
        open_split(tmp_path / "data", "train", small)
    (tmp_path / "data" / "manifest.json").unlink()
    with pytest.raises(ShardError, match=r"names the tokenizer 'mine', not 'gpt2': name it with data\.tokenizer"):
        open_split(tmp_path / "data" / "train", "train")
    assert open_split(tmp_path / "data" / "train", "train", named).vocab_size == named.vocab_size


def test_of_a_type_s_numbers_the_largest_is_no_token_in_windows(tmp_path):
    """65,536 entries fit into uint16, and then no number is left to stand for one that is too large."""
    full = of_merges([(a, b) for a, b in [(x, y) for x in ALPHABET for y in ALPHABET][: 65_536 - 257]])
    named = open_tokenizer(write_tokenizer(full, tmp_path / "full"))
    assert (named.vocab_size, named.dtype) == (65_536, "<u2")
    tokens = np.array([*range(40), 70_000, named.eot] * 30_000, "<u4")
    np.save(tmp_path / "train.npy", tokens[:-3] if tokens[-1] != named.eot else tokens)
    with pytest.raises(ShardError, match="token 70000"):
        open_split(tmp_path / "train.npy", "train", named)
    tokens[tokens == 70_000] = 65_535
    tokens[len(tokens) // 4] = 70_000
    np.save(tmp_path / "train.npy", tokens)
    stream = TokenStream(open_split(tmp_path / "train.npy", "train", named), 64, seed=0, shuffle=False)
    with pytest.raises(ShardError, match="token 70000"):
        stream.batch(0, stream.n_windows)


def test_what_is_seen_of_it(tmp_path):
    prepare(settings(tmp_path, of_pairs()))
    found = inspect_data(tmp_path / "data", documents=40)
    assert found.facts["tokenizer"] == "mine, 65,793 entries"
    train = found.splits[0]
    assert train.vocab_size == 65_793 and train.outside_vocabulary == train.eot_inside == 0
    assert train.bytes_per_token == pytest.approx(train.bytes_per_token_by_manifest)
    assert all(excerpt.text.removesuffix(" [...]").removesuffix(END) in "".join(TEXTS) for excerpt in train.excerpts)
    assert "LOOK AT THIS" not in render(found)


def test_llm_c_s_files_hold_a_small_vocabulary_and_no_large_one(tmp_path):
    prepare(settings(tmp_path, of_bytes(), export="llmc"))
    (path,) = (tmp_path / "data" / "llmc").glob("*train*")
    named = open_tokenizer(tmp_path / "mine")
    again = open_split(path, "train", named)
    assert again.eot_first and again.n_tokens == open_split(tmp_path / "data", "train").n_tokens
    with pytest.raises(ValueError, match=r"tokenizer large, whose vocabulary of 65,793 does not fit into the uint16"):
        prepare(settings(tmp_path, of_pairs(), "large", out=str(tmp_path / "second"), export="llmc"))
    assert not (tmp_path / "second" / "llmc").exists()
    with pytest.raises(ValueError, match="does not fit"):
        export_llmc(tmp_path / "second", tmp_path / "third")
