import hashlib
import json

import numpy as np
import pytest

from gpt2_hf.data.shards import LocalFolder, ShardError, open_split
from gpt2_hf.data.stream import TokenStream

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


def test_no_such_split(root, make_shards):
    message = error_of(root, "test")
    assert "'test'" in message and "train, val" in message
    message = error_of(make_shards({"train": [[[1]]]}, "train alone"), "val")
    assert "it has train" in message and "--eval.val_every 0" in message


GARBLED = {
    "version": ({"version": 1}, "1"),
    "dtype": ({"dtype": "uint64"}, "uint64"),
    "format": ({"format": "llmc"}, "llmc"),
    "tokenizer": ({"tokenizer": "llama"}, "'llama'"),
    "no splits": ({"splits": []}, "no split"),
    "an empty split": ({"splits": {"train": None}}, "lacks or garbles an entry"),
    "no shard": ({"splits": {"train": {"shards": [None], "bytes": 1}}}, "lacks or garbles an entry"),
}


@pytest.mark.parametrize(("change", "complaint"), GARBLED.values(), ids=GARBLED)
def test_a_manifest_of_another_kind_is_refused(root, change, complaint):
    edit_manifest(root, lambda manifest: manifest.update(change))
    message = error_of(root)
    assert complaint in message and str(root) in message


def test_a_damaged_manifest_is_refused(root):
    for checksum in ("index_sha256", "sha256"):
        edit_manifest(root, lambda manifest, key=checksum: manifest["splits"]["train"]["shards"][1].pop(key))
        assert f"'{checksum}'" in error_of(root)
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


def verify_error(root):
    return error_of(root, check=lambda shards: shards.verify())


def test_verify_reads_every_token(root, monkeypatch):
    monkeypatch.setattr("gpt2_hf.data.shards.VERIFY_TOKENS", 2)  # so that one file takes several blocks
    open_split(root, "train").verify()
    path = root / "train/00000.ds"
    tokens = np.fromfile(path, "<u2")
    for place in range(len(tokens)):
        changed = tokens.copy()
        changed[place] += 1
        path.write_bytes(changed.tobytes())
        message = verify_error(root)
        assert "train/00000.ds: sha256" in message


def test_verify_reads_every_document_end(root):
    path = root / "train/00000.ds.index"
    path.write_bytes(np.array([1, 6, 7], dtype="<u8").tobytes())
    assert "train/00000.ds.index: sha256" in verify_error(root)


@pytest.mark.parametrize(
    ("tokens", "ends", "complaint"),
    [
        ([1, 2, 3, 50256, 4, 50256, 50256], [5, 6, 7], "does not end with token 50256"),
        ([1, 2, 3, 50256, 4, 50256, 50256], [6, 4, 7], "does not end with token 50256"),
        ([1, 2, 60000, 50256, 4, 50256, 50256], [4, 6, 7], "token 60000"),
    ],
    ids=["wrong end", "unordered", "outside the vocabulary"],
)
def test_verify_checks_what_the_checksum_cannot(root, tokens, ends, complaint, monkeypatch):
    monkeypatch.setattr("gpt2_hf.data.shards.VERIFY_TOKENS", 2)
    raw = np.array(tokens, dtype="<u2").tobytes()
    (root / "train/00000.ds").write_bytes(raw)
    (root / "train/00000.ds.index").write_bytes(np.array(ends, dtype="<u8").tobytes())
    digests = {
        "sha256": hashlib.sha256(raw).hexdigest(),
        "index_sha256": hashlib.sha256(np.array(ends, dtype="<u8").tobytes()).hexdigest(),
    }
    edit_manifest(root, lambda manifest: manifest["splits"]["train"]["shards"][0].update(digests))
    assert complaint in error_of(root, check=lambda shards: shards.verify())


def windows_of(shards, **attributes):
    stream = type("Small", (TokenStream,), attributes)(shards, 2, seed=0)
    return [stream.window(epoch, index).tolist() for epoch in range(2) for index in range(stream.n_windows)]


def test_a_token_outside_the_vocabulary_is_named_with_its_file_when_read(root):
    path = root / "train/00000.ds"
    path.write_bytes(path.read_bytes().replace(b"\x03\x00", b"\x51\xc4"))  # 3 becomes 50257
    for check in (windows_of, lambda shards: TokenStream(shards, 2, seed=0).batch(0, 8)):
        assert "train/00000.ds holds token 50257" in error_of(root, check=check)


class MemoryFolder:
    """Stands in for a remote folder: the files of `root`, without a disk."""

    location = "memory://data"

    def __init__(self, root):
        self.files = {str(p.relative_to(root).as_posix()): p.read_bytes() for p in root.rglob("*") if p.is_file()}
        self.asked = []
        self.mapped = set()
        self.n_read = 0

    def sizes(self):
        return {name: len(self.files[name]) for name in sorted(self.files)}

    def read(self, name, start=0, stop=None):
        self.n_read += name != "manifest.json" and len(self.files[name][start:stop])
        return self.files[name][start:stop]

    def map(self, name, dtype):
        self.mapped.add(name)
        return np.frombuffer(self.files[name], dtype)

    def fetch_ahead(self, name):
        self.asked.append((name, len(self.mapped)))


def test_another_folder_can_stand_in_for_the_disk(root):
    local = open_split(root, "train")
    other = open_split(MemoryFolder(root), "train")
    assert other.fingerprint == local.fingerprint
    assert windows_of(other) == windows_of(local)
    other.verify()
    folder = MemoryFolder(root)
    folder.files["train/00000.ds"] = folder.files["train/00000.ds"][:-2]
    assert "memory://data/train/00000.ds has 12 bytes" in error_of(folder)
    folder.files.clear()
    assert "memory://data" in error_of(folder)


def test_opening_maps_and_fetches_nothing(root):
    folder = MemoryFolder(root)
    TokenStream(open_split(folder, "train"), 2, seed=0)
    assert not folder.mapped and not folder.asked
    assert folder.n_read == 2 * 8  # the end of each index


def test_the_next_group_is_fetched_when_one_is_entered(make_shards):
    """5 shards in groups of one: each is asked for once an epoch, before it is read and when the one before is."""
    folder = MemoryFolder(make_shards({"train": [[[10 * i, 10 * i + 1, 10 * i + 2]] for i in range(5)]}))
    stream = type("Small", (TokenStream,), {"group_size": 1})(open_split(folder, "train"), 2, seed=0)
    order = []
    for epoch in range(2):
        for index in range(stream.n_windows):
            before = len(folder.asked)
            stream.window(epoch, index)
            tokens = [name for name, _ in folder.asked[before:] if name.endswith(".ds")]
            if tokens:
                order.append(tokens)
    shards_of = [[f"train/{part:05d}.ds" for part in stream._epoch(epoch).parts] for epoch in range(3)]
    # The first group has nobody to ask for it but itself; from then on each asks for the one behind it.
    assert order[0] == shards_of[0][:2]
    assert [names for names in order[1:]] == [[name] for name in [*shards_of[0][2:], *shards_of[1], shards_of[2][0]]]
    assert sum(name.endswith(".ds.index") for name, _ in folder.asked) == len(folder.asked) / 2


def test_a_large_file_is_fetched_once_a_group(make_shards):
    folder = MemoryFolder(make_shards({"train": [[[1, 2, 3]] * 10]}))
    stream = type("Small", (TokenStream,), {"part_tokens": 10})(open_split(folder, "train"), 2, seed=0)
    assert len(stream._parts) == 4
    for index in range(stream.n_windows):
        stream.window(0, index)
    assert [name for name, _ in folder.asked] == ["train/00000.ds", "train/00000.ds.index"] * 2


def test_a_local_folder_lists_all_files_below_once(tmp_path):
    (tmp_path / "b/c").mkdir(parents=True)
    for name, size in {"z": 3, "b/c/a": 0, "b/x": 5, "a": 1}.items():
        (tmp_path / name).write_bytes(bytes(size))
    (tmp_path / "b/loop").symlink_to(tmp_path)
    (tmp_path / "b/link").symlink_to(tmp_path / "z")
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    sizes = LocalFolder(tmp_path).sizes()
    names = [name for name in sizes if "loop" not in name]
    assert names == sorted(names) == ["a", "b/c/a", "b/link", "b/x", "z"]
    assert (sizes["z"], sizes["b/link"], sizes["b/c/a"]) == (3, 3, 0)
    assert len(sizes) == len(names)
    assert LocalFolder(tmp_path / "nowhere").sizes() == {}


def test_a_local_folder_reads_ranges_and_maps_read_only(tmp_path):
    (tmp_path / "a").write_bytes(bytes(range(10)))
    (tmp_path / "empty").touch()
    folder = LocalFolder(tmp_path)
    assert folder.read("a") == bytes(range(10))
    assert folder.read("a", 7) == b"\x07\x08\x09" and folder.read("a", 2, 4) == b"\x02\x03"
    assert folder.read("a", 8, 99) == b"\x08\x09" and folder.read("a", 4, 2) == b""
    assert folder.map("a", "<u2")[1] == 0x0302 and not folder.map("a", "<u2").flags.writeable
    assert len(folder.map("empty", "<u2")) == 0


def test_the_manifest_itself_can_be_named(root):
    assert open_split(root / "manifest.json", "train").n_tokens == 10
