"""Token files of other projects, each written here from its definition."""

import struct
import threading
import time
from itertools import pairwise

import numpy as np
import pytest

from gpt2_hf.data import formats
from gpt2_hf.data.formats import begins_with_eot, cut_points, examine, find_token_files, split_of
from gpt2_hf.data.shards import LocalFolder, ShardError, SplitMissing, open_split
from gpt2_hf.data.stream import DOCUMENTS, SHARDS, WINDOWS, TokenStream
from gpt2_hf.data.tokenizer import gpt2_tokenizer

EOT = 50256
T = 8
LLMC = (20240520, 1)


def texts(n=60, seed=0):
    """Documents without <|endoftext|>, of 1 to 30 tokens."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, EOT, length).tolist() for length in rng.integers(1, 31, n)]


def write_llmc(path, tokens, magic=LLMC, count=None):
    header = struct.pack("<256i", *magic, len(tokens) if count is None else count, *[0] * 253)
    path.write_bytes(header + struct.pack(f"<{len(tokens)}H", *tokens))


def write_npy(path, tokens, dtype="<u2"):
    """Version 1.0 by hand: magic, version, header length, a dict as text padded with spaces, the numbers."""
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': ({len(tokens)},), }}"
    text += " " * (-(len(text) + 11) % 64) + "\n"
    head = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()
    path.write_bytes(head + np.array(tokens, dtype).tobytes())


def write_raw(path, tokens):
    path.write_bytes(struct.pack(f"<{len(tokens)}H", *tokens))


def write_datatrove(path, tokens, ends=None, letter="H", metadata="gpt2|2\n7\n7T"):
    path.write_bytes(struct.pack(f"<{len(tokens)}{letter}", *tokens))
    ends = [i + 1 for i, token in enumerate(tokens) if token == EOT] if ends is None else ends
    path.with_name(f"{path.name}.index").write_bytes(struct.pack(f"<{len(ends)}Q", *ends))
    if metadata:
        path.with_name(f"{path.name}.metadata").write_text(metadata)


def begun(documents):
    return [token for document in documents for token in [EOT, *document]]


def ended(documents):
    return [token for document in documents for token in [*document, EOT]]


def write_dataset(folder, kind):
    """A data set as its project writes it; returns {split: [file's tokens]}."""
    folder.mkdir(exist_ok=True)
    if kind in ("llm.c", "build-nanogpt"):
        row = begun(texts())
        step = len(row) // 4 - 3  # not a multiple of anything
        pieces = [row[start : start + step] for start in range(0, len(row), step)]
        for number, piece in enumerate(pieces):
            split = "train" if number else "val"
            if kind == "llm.c":
                write_llmc(folder / f"fineweb_{split}_{number:06d}.bin", piece)
            else:
                write_npy(folder / f"edufineweb_{split}_{number:06d}.npy", piece)
        assert len(pieces) == 5 and pieces[0][0] == EOT and all(piece[0] != EOT for piece in pieces[1:])
        return {"val": pieces[:1], "train": pieces[1:]}
    if kind == "nanoGPT":
        row = {"train": [ended(texts(50))], "val": [ended(texts(10, seed=1))]}
        for split, (tokens,) in row.items():
            write_raw(folder / f"{split}.bin", tokens)
        (folder / "prepare.py").write_text("# tokenizes\n")
        (folder / "readme.md").write_text("## openwebtext dataset\n")
        return row
    letter = {"datatrove": "H", "datatrove, 4 bytes": "I"}[kind]
    row = {"train": [ended(texts(20, seed)) for seed in range(3)], "validation": [ended(texts(10, seed=9))]}
    for split, files in row.items():
        (folder / split).mkdir()
        for number, tokens in enumerate(files):
            write_datatrove(folder / split / f"{number:05d}_tokens.ds", tokens, letter=letter)
    return {"train": row["train"], "val": row["validation"]}


def split_documents(tokens, eot_first):
    """Documents of a file, a piece of one at either end included, the plain way."""
    found, current = [], []
    for token in tokens:
        if eot_first and token == EOT and current:
            found.append(current)
            current = []
        current.append(token)
        if not eot_first and token == EOT:
            found.append(current)
            current = []
    return found + [current] * bool(current)


def brute_force_epoch(files, eot_first, seed, epoch):
    """All windows of an epoch of few files, in the order of training."""

    def shuffled(items, purpose, which):
        key, counter = np.array([seed, epoch], np.uint64), np.array([0, 0, purpose, which], np.uint64)
        bits = np.random.Philox(key=key, counter=counter).random_raw(len(items)).tolist()
        return [items[i] for i in sorted(range(len(items)), key=bits.__getitem__)]

    row = []
    for number in shuffled(list(range(len(files))), SHARDS, 0):
        for document in shuffled(split_documents(files[number], eot_first), DOCUMENTS, number):
            row += document
    windows = [row[k * T : k * T + T + 1] for k in range((len(row) - 1) // T)]
    return shuffled(windows, WINDOWS, 0)


def epoch_of(data, seed=3, epoch=1):
    stream = TokenStream(data, T, seed)
    return [stream.window(epoch, index).tolist() for index in range(stream.n_windows)]


def error_of(path, split="train", check=lambda data: None):
    with pytest.raises(ShardError) as caught:
        check(open_split(path, split))
    message = str(caught.value)
    assert "\n" not in message
    return message


KINDS = {"llm.c": True, "build-nanogpt": True, "nanoGPT": False, "datatrove": False, "datatrove, 4 bytes": False}


@pytest.mark.parametrize(("kind", "eot_first"), KINDS.items())
def test_every_format_trains_in_the_order_of_training(tmp_path, kind, eot_first):
    files = write_dataset(tmp_path / "data", kind)
    for split in ("train", "val"):
        data = open_split(tmp_path / "data", split)
        assert data.eot_first == eot_first
        assert (data.n_tokens, data.vocab_size, data.eot) == (sum(map(len, files[split])), 50257, EOT)
        assert data.n_bytes is None
        assert [shard.tokens().tolist() for shard in data.shards] == files[split]
        for shard, tokens in zip(data.shards, files[split], strict=True):
            lengths = [len(document) for document in split_documents(tokens, eot_first)]
            assert shard.document_ends().tolist() == np.cumsum(lengths).tolist()
            assert shard.document_ends().dtype == np.int64
        assert epoch_of(data) == brute_force_epoch(files[split], eot_first, seed=3, epoch=1)
        data.verify()


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_file_is_follows_from_its_content(tmp_path, kind):
    """The same files under another ending give the same windows."""
    write_dataset(tmp_path / "data", kind)
    before = epoch_of(open_split(tmp_path / "data", "train"))
    ending = {"llm.c": ".npy", "build-nanogpt": ".bin", "nanoGPT": ".npy"}.get(kind, ".tokens")
    for path in list((tmp_path / "data").rglob("*")):
        if path.suffix in (".bin", ".npy", ".ds"):
            for companion in ("", ".index", ".metadata"):
                if (source := path.with_name(path.name + companion)).exists():
                    source.rename(path.with_name(path.stem + ending + companion))
    assert epoch_of(open_split(tmp_path / "data", "train")) == before


@pytest.mark.parametrize("dtype", ["<i4", "<u4", "<i8", "<u8"])
def test_wide_integers_are_read_if_they_fit(tmp_path, dtype):
    tokens = begun(texts())
    write_npy(tmp_path / "narrow.npy", tokens)
    write_npy(tmp_path / "wide.npy", tokens, dtype)
    wide = open_split(tmp_path / "wide.npy", "train")
    assert epoch_of(wide) == epoch_of(open_split(tmp_path / "narrow.npy", "train"))
    wide.verify()
    assert wide.shards[0].tokens().base is not None  # mapped, not copied


def test_one_numpy_header_is_parsed_at_a_time(tmp_path, monkeypatch):
    """Files are examined by many threads, in which Python 3.11's parser now and then fails."""
    write_dataset(tmp_path / "data", "build-nanogpt")
    read, parsing = np.lib.format.read_array_header_1_0, threading.Lock()

    def alone(stream):
        assert parsing.acquire(blocking=False)
        time.sleep(0.01)
        parsing.release()
        return read(stream)

    monkeypatch.setattr(np.lib.format, "read_array_header_1_0", alone)
    assert len(open_split(tmp_path / "data", "train").shards) == 4


@pytest.mark.parametrize(("dtype", "bad"), [("<u2", 50257), ("<i4", -1), ("<u4", 65536 + 5), ("<i8", 2**40)])
def test_a_wrong_token_is_found_wherever_it_is(tmp_path, dtype, bad):
    """Opening sees the begin, the middle and the end; the others are found when they are read, before wrapping."""
    tokens = begun(texts(2500))
    for place in (0, len(tokens) // 2, len(tokens) - 1, len(tokens) // 4):
        write_npy(tmp_path / "x.npy", [*tokens[:place], bad, *tokens[place + 1 :]], dtype)
        if place != len(tokens) // 4:
            message = error_of(tmp_path)
        else:
            message = error_of(tmp_path, check=epoch_of)
            assert "x.npy" in error_of(tmp_path, check=lambda data: data.verify())
        assert "x.npy" in message and ("50257" in message or "65535" in message or str(bad % 2**32) in message)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train/000.bin", "train"),
        ("val/000.bin", "val"),
        ("validation/a/000.bin", "val"),
        ("edufineweb_val_000000.npy", "val"),
        ("fineweb_train_000001.bin", "train"),
        ("Validation.bin", "val"),
        ("val.bin", "val"),
        ("train/val_0.bin", "val"),
        ("without_val_train_0.bin", "train"),
        ("test.bin", "test"),
        ("retrieval_000.bin", "train"),
        ("interval/strain.bin", "train"),
        ("000_00000.ds", "train"),
    ],
)
def test_a_split_is_told_by_words_of_the_name(name, split):
    assert split_of(name) == split


def test_without_names_all_is_for_training(tmp_path):
    write_raw(tmp_path / "a.bin", ended(texts(5)))
    write_raw(tmp_path / "b.bin", ended(texts(6)))
    assert len(open_split(tmp_path, "train").shards) == 2
    assert "--eval.val_every 0" in error_of(tmp_path, "val")
    with pytest.raises(SplitMissing):
        open_split(tmp_path, "val")


def test_one_file_can_be_named(tmp_path):
    files = write_dataset(tmp_path / "data", "build-nanogpt")
    path = tmp_path / "data/edufineweb_train_000002.npy"
    assert [shard.tokens().tolist() for shard in open_split(path, "train").shards] == [files["train"][1]]
    write_datatrove(tmp_path / "one.ds", ended(texts(4)))
    write_raw(tmp_path / "other.bin", ended(texts(4)))
    assert open_split(str(tmp_path / "one.ds"), "train").n_documents == 4


def write_row(folder, kind, row, cuts):
    folder.mkdir()
    for number, (start, stop) in enumerate(pairwise([0, *cuts, len(row)])):
        {"llm.c": write_llmc, "npy": write_npy, "raw": write_raw}[kind](folder / f"x_{number:03d}.bin", row[start:stop])


@pytest.mark.parametrize("kind", ["llm.c", "npy", "raw"])
@pytest.mark.parametrize("eot_first", [True, False])
def test_where_the_mark_stands_follows_from_the_row_s_ends(tmp_path, kind, eot_first):
    row = begun(texts()) if eot_first else ended(texts())
    marks = [i for i, token in enumerate(row) if token == EOT]
    inside = [mark + 2 for mark in marks[10:40:10] if row[mark + 1] != EOT]
    for name, cuts in {
        "inside": inside,
        "before marks": marks[10:40:10],
        "behind marks": [mark + 1 for mark in marks[10:40:10]],
        "whole": [],
    }.items():
        write_row(tmp_path / name, kind, row, cuts)
        assert open_split(tmp_path / name, "train").eot_first == eot_first, name


@pytest.mark.parametrize(("kind", "eot_first"), [("llm.c", True), ("npy", True), ("raw", False)])
def test_a_part_of_a_data_set_goes_by_its_format(tmp_path, kind, eot_first):
    row = begun(texts())[5:-5]
    write_row(tmp_path / "data", kind, row, [100, 200])
    assert open_split(tmp_path / "data", "train").eot_first == eot_first


def test_marks_are_looked_for_in_both_splits(tmp_path):
    """Only the validation file shows the begin, and its number is not the lowest name."""
    row = ended(texts())  # as nanoGPT's, but in llm.c's format, and train.bin goes on in val.bin
    write_llmc(tmp_path / "train.bin", row[:-100])
    write_llmc(tmp_path / "val.bin", row[-100:])
    assert not open_split(tmp_path, "train").eot_first
    row = begun(texts())
    write_raw(tmp_path / "val.bin", row[:100])
    write_raw(tmp_path / "train.bin", row[100:])
    assert open_split(tmp_path, "train").eot_first


def test_text_without_marks_is_one_document(tmp_path):
    write_raw(tmp_path / "train.bin", list(range(1, 500)))
    (shard,) = open_split(tmp_path, "train").shards
    assert shard.document_ends().tolist() == [499]


@pytest.mark.parametrize("eot_first", [True, False])
def test_long_files_are_cut_between_documents(tmp_path, monkeypatch, eot_first):
    monkeypatch.setattr(formats, "PART_TOKENS", 500)
    monkeypatch.setattr(formats, "LOOK_BYTES", 16)
    monkeypatch.setattr(formats, "SCAN_TOKENS", 7)
    row = begun(texts(200)) if eot_first else ended(texts(200))
    write_raw(tmp_path / "train.bin", row)
    data = open_split(tmp_path, "train")
    assert len(data.shards) == round(len(row) / 500) >= 5
    assert [token for shard in data.shards for token in shard.tokens().tolist()] == row
    for number, (before, after) in enumerate(pairwise(data.shards), 1):
        assert (after.tokens()[0] if eot_first else before.tokens()[-1]) == EOT
        share = len(row) * number // len(data.shards)
        cut = sum(shard.n_tokens for shard in data.shards[:number])
        assert share <= cut and EOT not in (row[share:cut] if eot_first else row[share : cut - 1])
    files = [shard.tokens().tolist() for shard in data.shards]
    assert epoch_of(data) == brute_force_epoch(files, eot_first, seed=3, epoch=1)


def test_a_long_search_for_a_cut_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "PART_TOKENS", 100)
    monkeypatch.setattr(formats, "SEARCH_TOKENS", 16)
    monkeypatch.setattr(formats, "LOOK_BYTES", 16)
    row = [1] * 220 + [EOT] + [2] * 79
    write_raw(tmp_path / "train.bin", row)
    file = examine(LocalFolder(tmp_path), {"train.bin": 600}, gpt2_tokenizer(), "train.bin")
    assert cut_points(file, EOT, eot_first=False) == [0, 100, 200, 300]
    monkeypatch.setattr(formats, "SEARCH_TOKENS", 32)
    assert cut_points(file, EOT, eot_first=False) == [0, 100, 221, 300]


class CountingFolder(LocalFolder):
    """Counts the bytes that are read, and maps nothing."""

    n_read = 0

    def read(self, name, start=0, stop=None):
        found = super().read(name, start, stop)
        type(self).n_read += len(found)
        return found

    def map(self, name, dtype):
        raise AssertionError(f"{name} was mapped")


@pytest.mark.parametrize("kind", ["llm.c", "npy", "raw"])
def test_opening_reads_a_few_kilobytes(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(CountingFolder, "n_read", 0)
    row = begun(texts(10_000))
    write_row(tmp_path / "data", kind, row, [len(row) // 2])
    data = open_split(CountingFolder(tmp_path / "data"), "train")
    assert data.n_tokens == len(row) and data.n_documents is None and data.fingerprint
    assert CountingFolder.n_read <= 2 * 4 * 4096 < 2 * len(row) / 4


@pytest.mark.parametrize("kind", ["llm.c", "npy", "raw"])
def test_the_fingerprint_follows_names_sizes_and_content(tmp_path, kind):
    row = [7, *begun(texts(2000))]

    def fingerprint(folder, row, cuts=(1000,)):
        write_row(tmp_path / folder, kind, row, cuts)
        return open_split(tmp_path / folder, "train").fingerprint

    one = fingerprint("one", row)
    assert one == fingerprint("two", row)
    for place in (1000, (1000 + len(row)) // 2, len(row) - 1):  # of the second file
        assert one != fingerprint(f"content {place}", [*row[:place], 8, *row[place + 1 :]])
    assert one != fingerprint("cut", row, [1001])
    (tmp_path / "two/x_001.bin").rename(tmp_path / "two/y_001.bin")
    assert one != open_split(tmp_path / "two", "train").fingerprint


TOKENS = ended(texts())
DAMAGE = {
    "llm.c cut short": (lambda p: write_llmc(p, TOKENS, count=len(TOKENS) + 1), "its header says"),
    "llm.c too long": (lambda p: write_llmc(p, TOKENS, count=len(TOKENS) - 1), "its header says"),
    "llm.c, header only": (lambda p: p.write_bytes(struct.pack("<3i", *LLMC, 5)), "header"),
    "llm.c without tokens": (lambda p: write_llmc(p, []), "is empty"),
    "llm.c of another version": (lambda p: write_llmc(p, TOKENS, (20240520, 2)), "begins with"),
    "llm.c for Llama 3": (lambda p: write_llmc(p, TOKENS, (20240801, 7)), "another tokenizer"),
    "npy cut short": (lambda p: (write_npy(p, TOKENS), p.write_bytes(p.read_bytes()[:-2])), "its header says"),
    "npy of floats": (lambda p: np.save(p, np.ones(9, "f4")), "array of <f4"),
    "npy of int16": (lambda p: np.save(p, np.ones(9, "<i2")), "array of <i2"),
    "npy of big-endian": (lambda p: np.save(p, np.ones(9, ">u2")), "array of >u2"),
    "npy of two dimensions": (lambda p: np.save(p, np.ones((3, 3), "<u2")), r"shape (3, 3)"),
    "npy of objects": (lambda p: np.save(p, np.array([{}, 1]), allow_pickle=True), "array of |O"),
    "npy without tokens": (lambda p: np.save(p, np.ones(0, "<u2")), "is empty"),
    "npy with a broken header": (
        lambda p: p.write_bytes(b"\x93NUMPY\x01\x00\x10\x00{'descr': '<u2', "),
        "NumPy header",
    ),
    "raw, empty": (lambda p: p.write_bytes(b""), "is empty"),
    "raw, cut inside a token": (lambda p: p.write_bytes(b"\x01\x02\x03"), "even number"),
    "raw of 4 bytes": (lambda p: np.array(TOKENS, "<u4").tofile(p), "not 4 bytes each"),
    "raw with holes": (lambda p: p.write_bytes(bytes(10_000)), "holes"),
    "text": (lambda p: p.write_text("All the world's a stage. " * 300), "is text"),
    "compressed": (lambda p: p.write_bytes(np.random.default_rng(0).bytes(5000)), "outside GPT-2's vocabulary"),
    "raw, above the vocabulary": (lambda p: write_raw(p, [*TOKENS, 50257]), "token 50257"),
    "datatrove's index is cut short": (lambda p: write_datatrove(p, TOKENS, [5, 9]), "its .index ends at token 9"),
    "datatrove's tokens are cut short": (
        lambda p: (write_datatrove(p, TOKENS), p.write_bytes(p.read_bytes()[:-2])),
        "one of them is cut short",
    ),
    "datatrove's index is empty": (lambda p: write_datatrove(p, TOKENS, []), "its .index ends at token 0"),
    "datatrove with another tokenizer": (
        lambda p: write_datatrove(p, TOKENS, metadata="meta-llama/Llama-2-7b|2\n7\n7T"),
        "'meta-llama/Llama-2-7b'",
    ),
    "datatrove without marks": (
        lambda p: write_datatrove(p, [1, 2, 3, 4], [2, 4]),
        "do not end with <|endoftext|>",
    ),
    "datatrove without index": (lambda p: write_raw(p.rename(p.with_suffix(".ds")), TOKENS), "no bad.ds.index"),
    "of characters": (lambda p: (write_raw(p, TOKENS), (p.parent / "meta.pkl").write_bytes(b"")), "meta.pkl"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_is_no_file_of_tokens_is_refused_by_name(tmp_path, name):
    write, complaint = DAMAGE[name]
    path = tmp_path / "bad.bin"
    path.touch()
    if name.startswith("npy"):  # np.save would add the ending
        path = path.rename(tmp_path / "bad.npy")
    write(path)
    message = error_of(tmp_path)
    assert complaint in message and str(tmp_path / "bad") in message


@pytest.mark.parametrize("tokenizer", ["gpt2", "openai-community/gpt2", "gpt2-xl", "/models/gpt2"])
def test_gpt2_s_tokenizer_under_its_names(tmp_path, tokenizer):
    write_datatrove(tmp_path / "a.ds", TOKENS, metadata=f"{tokenizer}|2\n7\n7T")
    assert open_split(tmp_path, "train").n_documents == 60


@pytest.mark.parametrize("splits", [("train", "train"), ("train", "val")])
def test_mixed_formats_are_refused_by_name(tmp_path, splits):
    write_llmc(tmp_path / f"a_{splits[0]}.bin", TOKENS)
    write_npy(tmp_path / f"b_{splits[1]}.bin", TOKENS)
    for split in splits:
        message = error_of(tmp_path, split)
        assert f"b_{splits[1]}.bin" in message and f"a_{splits[0]}.bin" in message
        assert "llm.c" in message and "npy" in message


def test_hidden_and_other_files_are_passed_over(tmp_path):
    write_raw(tmp_path / "good.bin", TOKENS)
    (tmp_path / ".cache/huggingface").mkdir(parents=True)
    (tmp_path / ".cache/huggingface/good.bin.metadata").write_text("x")
    (tmp_path / ".cache/x.bin").write_bytes(b"x")
    for name in ("README.md", "LICENSE", "dataset_infos.json", "tokens.txt"):
        (tmp_path / name).write_text("All the world's a stage")
    assert [
        file.name for file in find_token_files(LocalFolder(tmp_path), LocalFolder(tmp_path).sizes(), gpt2_tokenizer())
    ] == ["good.bin"]


def test_a_document_end_damaged_in_a_foreign_index_is_found(tmp_path):
    ends = [i + 1 for i, token in enumerate(TOKENS) if token == EOT]
    write_datatrove(tmp_path / "a.ds", TOKENS, [*ends[:3], ends[3] - 1, *ends[4:]])
    assert "a.ds.index" in error_of(tmp_path, check=lambda data: data.verify())
    write_datatrove(tmp_path / "a.ds", TOKENS, [ends[1], ends[0], *ends[2:]])
    assert "a.ds" in error_of(tmp_path, check=epoch_of)


def test_files_number_do_not_slow_the_search_for_marks_down(tmp_path):
    write_raw(tmp_path / "x.bin", TOKENS)
    file = examine(LocalFolder(tmp_path), {"x.bin": 2 * len(TOKENS)}, gpt2_tokenizer(), "x.bin")
    assert not begins_with_eot([file] * 20_000, EOT)  # took minutes when it was quadratic
