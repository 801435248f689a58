import hashlib
import json
import time

import numpy as np
import pytest

from gpt2_hf.data.shards import ShardError, open_split

TWO_SHARDS = {"train": [[[1, 2, 3], [4], []], [[5, 6]]], "val": [[[7, 8]]]}


@pytest.fixture
def root(make_shards):
    return make_shards(TWO_SHARDS)


def edit_manifest(root, change):
    path = root / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def error_of(root, split="train", check=lambda shards: None):
    with pytest.raises(ShardError) as caught:
        check(open_split(root, split))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_reads_tokens_and_document_ends(root):
    train = open_split(root, "train")
    assert (train.n_tokens, train.n_documents, train.n_bytes) == (10, 4, 40)
    assert (train.vocab_size, train.eot, train.split) == (50257, 50256, "train")
    assert [shard.tokens().tolist() for shard in train.shards] == [[1, 2, 3, 50256, 4, 50256, 50256], [5, 6, 50256]]
    assert [shard.document_ends().tolist() for shard in train.shards] == [[4, 6, 7], [3]]
    assert train.shards[0].tokens().dtype == np.uint16
    assert train.shards[0].document_ends().dtype == np.int64
    assert open_split(str(root), "val").shards[0].tokens().tolist() == [7, 8, 50256]
    train.verify()


def test_shards_cannot_be_written_to(root):
    with pytest.raises(ValueError, match="read-only"):
        open_split(root, "train").shards[0].tokens()[0] = 9


def test_fingerprint_follows_the_data_and_not_its_place(make_shards):
    one = open_split(make_shards(TWO_SHARDS, "one"), "train").fingerprint
    assert one == open_split(make_shards(TWO_SHARDS, "two"), "train").fingerprint
    assert len(one) == 16 and int(one, 16) >= 0
    other = {"train": [[[1, 2, 3], [9], []], [[5, 6]]]}
    assert one != open_split(make_shards(other, "three"), "train").fingerprint
    swapped = {"train": TWO_SHARDS["train"][::-1]}
    assert one != open_split(make_shards(swapped, "four"), "train").fingerprint


def test_an_empty_shard_is_harmless(make_shards):
    train = open_split(make_shards({"train": [[], [[1, 2]]]}), "train")
    train.verify()
    assert train.n_tokens == 3


def test_no_folder_or_manifest_names_the_command(tmp_path):
    for missing in (tmp_path / "nowhere", tmp_path):
        assert "python scripts/prepare_data.py --help" in error_of(missing)


def test_no_such_split(root):
    message = error_of(root, "test")
    assert "'test'" in message and "train, val" in message


@pytest.mark.parametrize(
    ("key", "value"), [("version", 1), ("dtype", "uint32"), ("format", "llmc")], ids=["version", "dtype", "format"]
)
def test_another_format_is_refused(root, key, value):
    edit_manifest(root, lambda manifest: manifest.update({key: value}))
    assert str(value) in error_of(root)


def test_a_damaged_manifest_is_refused(root):
    edit_manifest(root, lambda manifest: manifest["splits"]["train"]["shards"][1].pop("sha256"))
    assert "sha256" in error_of(root)
    edit_manifest(root, lambda manifest: manifest.pop("version"))
    assert "version" in error_of(root)
    (root / "manifest.json").write_text('{"format": ')
    assert "not valid JSON" in error_of(root)


@pytest.mark.parametrize("file", ["train/00001.ds", "train/00001.ds.index"])
def test_a_missing_file_is_refused(root, file):
    (root / file).unlink()
    message = error_of(root)
    assert file in message and "not on disk" in message
    open_split(root, "val")


@pytest.mark.parametrize("file", ["train/00000.ds", "train/00000.ds.index"])
def test_a_truncated_file_is_refused(root, file):
    path = root / file
    path.write_bytes(path.read_bytes()[:-2])
    message = error_of(root)
    assert file in message and f"{path.stat().st_size} bytes" in message


def test_an_index_of_another_shard_is_refused(root):
    (root / "train/00001.ds.index").write_bytes(np.array([2], dtype="<u8").tobytes())
    assert "ends at token 2, its shard has 3" in error_of(root)


def test_verify_reads_every_token(root):
    path = root / "train/00001.ds"
    path.write_bytes(np.array([5, 7, 50256], dtype="<u2").tobytes())
    assert "sha256" in error_of(root, check=lambda shards: shards.verify())


@pytest.mark.parametrize(
    ("tokens", "ends", "complaint"),
    [
        ([1, 2, 3, 50256, 4, 50256, 50256], [5, 6, 7], "does not end with token 50256"),
        ([1, 2, 3, 50256, 4, 50256, 50256], [6, 4, 7], "does not end with token 50256"),
        ([1, 2, 60000, 50256, 4, 50256, 50256], [4, 6, 7], "token 60000"),
    ],
    ids=["wrong end", "unordered", "outside the vocabulary"],
)
def test_verify_checks_what_the_checksum_cannot(root, tokens, ends, complaint):
    raw = np.array(tokens, dtype="<u2").tobytes()
    (root / "train/00000.ds").write_bytes(raw)
    (root / "train/00000.ds.index").write_bytes(np.array(ends, dtype="<u8").tobytes())
    digests = {
        "sha256": hashlib.sha256(raw).hexdigest(),
        "index_sha256": hashlib.sha256(np.array(ends, dtype="<u8").tobytes()).hexdigest(),
    }
    edit_manifest(root, lambda manifest: manifest["splits"]["train"]["shards"][0].update(digests))
    assert complaint in error_of(root, check=lambda shards: shards.verify())


def test_opening_reads_no_data(tmp_path):
    """100 shards of 100k documents: sparse files, so that only what is written here could be read."""
    (tmp_path / "train").mkdir()
    entries = []
    for number in range(100):
        file = f"train/{number:05d}.ds"
        with (tmp_path / file).open("wb") as stream:
            stream.truncate(2 * 100_000_000)
        with (tmp_path / f"{file}.index").open("wb") as stream:
            stream.seek(8 * (100_000 - 1))
            stream.write((100_000_000).to_bytes(8, "little"))
        entries.append({"file": file, "tokens": 100_000_000, "documents": 100_000, "bytes": 0, "sha256": "0"})
        entries[-1]["index_sha256"] = "0"
    header = {
        "format": "gpt2_hf/shards",
        "version": 2,
        "tokenizer": "gpt2",
        "dtype": "uint16",
        "vocab_size": 50257,
        "eot": 50256,
    }
    manifest = {**header, "splits": {"train": {"bytes": 0, "shards": entries}}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    start = time.perf_counter()
    assert open_split(tmp_path, "train").n_tokens == 10_000_000_000
    assert time.perf_counter() - start < 1
