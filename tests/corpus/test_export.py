import struct

import numpy as np
import pytest

from gpt2_hf.corpus import export
from gpt2_hf.corpus.export import export_llmc
from gpt2_hf.data.shards import ShardError, open_split

EOT = 50256


def read_llmc(path):
    """Header and tokens of a file, by llm.c's definition."""
    raw = path.read_bytes()
    header = struct.unpack("<256i", raw[:1024])
    return header[:3], header[3:], list(struct.unpack(f"<{(len(raw) - 1024) // 2}H", raw[1024:]))


def documents(n, first=0):
    return [[first + 10 * i + j for j in range(i % 5)] for i in range(n)]


@pytest.mark.parametrize("shard_tokens", [7, 10, 1000])
@pytest.mark.parametrize("block", [3, 2**22])
def test_documents_begin_with_the_mark_in_files_of_one_size(make_shards, tmp_path, monkeypatch, shard_tokens, block):
    monkeypatch.setattr(export, "BLOCK_TOKENS", block)
    train, val = [documents(6), [], documents(7, 1000)], [documents(9, 2000)]
    paths = export_llmc(make_shards({"train": train, "val": val}), tmp_path / "mine", shard_tokens)
    assert set(paths) == set((tmp_path / "mine").iterdir()) and not list(tmp_path.glob("*.partial"))
    for split, shards, first in (("train", train, 1), ("val", val, 0)):
        row = [token for shard in shards for document in shard for token in [EOT, *document]]
        expected = [row[start : start + shard_tokens] for start in range(0, len(row), shard_tokens)]
        names = [f"mine_{split}_{number:06d}.bin" for number in range(first, first + len(expected))]
        found = [path for path in paths if f"_{split}_" in path.name]
        assert [path.name for path in found] == names
        for path, tokens in zip(found, expected, strict=True):
            assert read_llmc(path) == ((20240520, 1, len(tokens)), (0,) * 253, tokens)
    data = open_split(tmp_path / "mine", "train")
    assert data.eot_first and data.n_tokens == sum(len(d) + 1 for shard in train for d in shard)


def test_what_begins_with_the_mark_is_copied(tmp_path):
    row = [EOT, 1, 2, EOT, 3, 4, 5, 6, EOT, 7]
    (tmp_path / "data").mkdir()
    for number, tokens in enumerate([row[:5], row[5:]]):
        np.save(tmp_path / f"data/x_train_{number}.npy", np.array(tokens, "<i4"))
    (path,) = export_llmc(tmp_path / "data", tmp_path / "out")
    assert read_llmc(path)[2] == row


def test_a_last_document_without_a_mark_is_kept_whole(tmp_path):
    np.array([1, 2, EOT, 3, 4, EOT], "<u2").tofile(tmp_path / "train.bin")
    np.array([5, EOT, 6], "<u2").tofile(tmp_path / "val.bin")
    (tmp_path / "only").mkdir()
    np.array([8, 9, EOT, 5, EOT, 6, 7], "<u2").tofile(tmp_path / "only/a.bin")
    paths = {path.name: read_llmc(path)[2] for path in export_llmc(tmp_path / "only", tmp_path / "out")}
    assert paths == {"out_train_000001.bin": [EOT, 8, 9, EOT, 5, EOT, 6, 7]}


def test_without_validation_it_says_so(make_shards, tmp_path, capsys):
    (path,) = export_llmc(make_shards({"train": [[[1]]]}), tmp_path / "out")
    assert read_llmc(path)[2] == [EOT, 1]
    assert "no validation split" in capsys.readouterr().out


def test_a_folder_in_use_is_left_alone(make_shards, tmp_path):
    data = make_shards({"train": [[[1]]]})
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("x")
    for out in (tmp_path / "out", tmp_path / "out/mine.txt"):
        with pytest.raises(ValueError, match="is there already"):
            export_llmc(data, out)
    (tmp_path / "out/mine.txt").unlink()
    assert len(export_llmc(data, tmp_path / "out")) == 1


def test_a_run_that_fails_leaves_nothing_that_looks_finished(make_shards, tmp_path):
    data = make_shards({"train": [[[1, 2]], [[3]]]})
    path = data / "train/00001.ds"
    path.write_bytes(struct.pack("<2H", 60000, EOT))
    with pytest.raises(ShardError, match=r"00001\.ds holds token 60000"):
        export_llmc(data, tmp_path / "out", 2)
    assert not (tmp_path / "out").exists()
    path.write_bytes(struct.pack("<2H", 3, EOT))
    assert [read_llmc(p)[2] for p in export_llmc(data, tmp_path / "out", 2)] == [[EOT, 1], [2, EOT], [3]]


def test_a_damaged_validation_split_is_not_taken_for_a_missing_one(make_shards, tmp_path):
    data = make_shards({"train": [[[1]]], "val": [[[2]]]})
    (data / "val/00000.ds").unlink()
    with pytest.raises(ShardError, match=r"val/00000\.ds"):
        export_llmc(data, tmp_path / "out")
