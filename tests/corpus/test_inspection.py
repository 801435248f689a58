"""Figures are compared with plain Python over the lists of tokens that the shards were written from."""

import hashlib
import json
import runpy
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from test_stream import reference_epoch

from gpt2_hf.cli import parse_cli
from gpt2_hf.config import RunConfig
from gpt2_hf.corpus import inspection, sample
from gpt2_hf.corpus.inspection import first_batch, inspect_data
from gpt2_hf.corpus.inspection_text import draw_lengths, render
from gpt2_hf.data.shards import ShardError, open_split
from gpt2_hf.data.tokenizer import EOT, gpt2_tokenizer, load_tokenizer
from gpt2_hf.knobs import ConfigError

SCRIPT = Path(__file__).parents[2] / "scripts" / "inspect_data.py"
TEXTS = [
    "The sea was calm.",
    "Nobody's here, naïve 中文中文 and 😀, " * 40,
    "",
    "A line\nand\x1b[31m another\r\n\n\tone‮",
    "word " * 1500,
]


def random_documents(count, longest=40, seed=0, vocabulary=EOT):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocabulary, rng.integers(1, longest)).tolist() for _ in range(count)]


def recipe(path="", **flags):
    """A small recipe; `train__steps=3` is --train.steps 3."""
    model = "--model.n_layer=1 --model.n_head=2 --model.n_embd=8 --data.seq_len=8 --train.global_batch_tokens=96"
    given = [f"--{name.replace('__', '.')}={value}" for name, value in flags.items()]
    return parse_cli(RunConfig, [*model.split(), "--train.micro_batch_size=3", f"--data.path={path or 'data'}", *given])


def run_script(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    return capsys.readouterr().out


def refusal(monkeypatch, capsys, *arguments):
    """The one line on stderr of a call that fails."""
    with pytest.raises(SystemExit) as error:
        run_script(monkeypatch, capsys, *arguments)
    captured = capsys.readouterr()
    assert error.value.code == 2
    assert captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    return captured.err


# --- figures ---


def test_figures_equal_plain_counts(make_shards):
    documents = [*random_documents(97, vocabulary=500), []]
    root = make_shards({"train": [documents[:50], documents[50:51], documents[51:]], "val": [documents[:3]]})
    figures, val = inspect_data(root, recipe(), documents=0).splits
    lengths = sorted(len(document) + 1 for document in documents)
    tokens = Counter(token for document in documents for token in [*document, EOT])
    assert (figures.split, val.split) == ("train", "val")
    assert (figures.shards, figures.documents, figures.tokens) == (3, 98, sum(lengths))
    assert (figures.surveyed_shards, figures.sampled_documents, figures.sampled_tokens) == (3, 98, sum(lengths))
    at_90 = 0.9 * 97  # between the 87th and the 88th of 0 ... 97
    expected = {
        "mean": sum(lengths) / 98,
        "median": (lengths[48] + lengths[49]) / 2,
        "p90": lengths[87] + (at_90 - 87) * (lengths[88] - lengths[87]),
        "max": lengths[-1],
    }
    assert figures.tokens_per_document == pytest.approx(expected)
    assert figures.context == 8
    assert figures.longer_than_context == sum(length > 8 for length in lengths) / 98
    assert figures.never_seen == 50257 - len(tokens)
    assert figures.outside_vocabulary == 0
    assert figures.empty == 1
    assert [share for _, share in figures.frequent] == [n / sum(lengths) for _, n in tokens.most_common(8)]
    assert figures.frequent[0][0] == "<|endoftext|>"
    assert (figures.eot_ends, figures.eot_inside) == (1, 0)
    assert figures.eot_begins == 1 / 98
    for i, (n_documents, n_tokens) in enumerate(
        zip(figures.documents_by_length, figures.tokens_by_length, strict=True)
    ):
        inside = [length for length in lengths if 2 ** (i / 4) <= length < 2 ** ((i + 1) / 4)]
        assert (n_documents, n_tokens) == (len(inside), sum(inside))
    assert sum(figures.documents_by_length) == 98


def test_bytes_per_token_are_those_of_the_text(make_shards):
    ids = load_tokenizer()(TEXTS, verbose=False)["input_ids"]
    root = make_shards({"train": [ids]})
    (figures,) = inspect_data(root).splits
    n_bytes = sum(len(text.encode()) for text in TEXTS)
    assert figures.bytes_per_token == pytest.approx(n_bytes / (sum(map(len, ids)) + len(TEXTS)))
    assert figures.bytes_per_token_by_manifest == 4  # the fixture's own claim
    assert "another tokenizer" in render(inspect_data(root))
    manifest = json.loads((root / "manifest.json").read_text())
    manifest["splits"]["train"]["bytes"] = n_bytes
    (root / "manifest.json").write_text(json.dumps(manifest))
    assert "another tokenizer" not in render(inspect_data(root))


def test_documents_are_decoded_whole_and_found_where_they_are_said_to_be(make_shards):
    tokenizer = load_tokenizer()
    texts = [[f"Shard {shard}, document {i} says this." for i in range(40)] for shard in range(3)]
    root = make_shards({"train": [tokenizer(row)["input_ids"] for row in texts]})

    def excerpts(**options):
        (figures,) = inspect_data(root, **options).splits
        return [(e.shard, e.document, e.text) for e in figures.excerpts]

    found = excerpts(documents=5)
    assert len(set(found)) == 5
    for shard, document, text in found:
        assert text == texts[int(shard[-4])][document] + "<|endoftext|>"
    assert excerpts(documents=5) == found
    assert excerpts(documents=5, seed=1) != found
    assert len(excerpts(documents=500)) == 120
    for shard, document, text in excerpts(documents=5, sample=20):
        assert text == texts[int(shard[-4])][document] + "<|endoftext|>"


# --- copies ---


def test_planted_exact_copies_are_found(make_shards):
    documents = random_documents(60)
    planted = [*documents[:30], documents[7], *documents[30:], documents[7], documents[40], documents[7][:-1]]
    root = make_shards({"train": [planted[:35], planted[35:]], "val": [[*random_documents(4, seed=1), documents[9]]]})
    found = inspect_data(root, documents=0)
    exact = found.splits[0].exact
    assert (exact.compared, exact.repeats, exact.most) == (64, 3, 3)
    assert exact.example == load_tokenizer().decode([*documents[7], EOT])
    assert (found.splits[1].exact.repeats, found.splits[1].exact.most) == (0, 0)
    assert (found.val_in_train.compared, found.val_in_train.repeats) == (5, 1)
    text = render(found)
    assert "the document that was read 3 times" in text
    assert "1 of 5 documents read are in train too" in text


def test_near_copies_are_those_of_plain_jaccard(make_shards):
    rng = np.random.default_rng(3)
    documents = random_documents(80, longest=200, seed=3)
    documents = [document for document in documents if len(document) > 30]
    for n_changes in [0, 1, 1, 2, 4, 8, 15]:  # from a copy to something else
        copy = list(documents[n_changes])
        for at in rng.choice(len(copy), n_changes, replace=False):
            copy[at] = int(rng.integers(EOT))
        documents.insert(int(rng.integers(20, len(documents))), copy)
    documents.insert(5, [1, 2])  # too short to have a 5-gram
    sets = [{tuple(tokens[i : i + 5]) for i in range(len(tokens) - 4)} for tokens in ([*d, EOT] for d in documents)]
    similar = {later for later, b in enumerate(sets) for a in sets[:later] if b and len(a & b) >= 0.8 * len(a | b)}
    assert 3 <= len(similar) < 7
    (figures,) = inspect_data(make_shards({"train": [documents[:25], documents[25:]]}), documents=0).splits
    assert figures.near.compared == len(documents) - 1
    assert figures.near.repeats == len(similar)


def test_pairs_of_copies_are_extrapolated_from_a_sample(make_shards):
    documents = random_documents(4000, longest=6)
    unique = [[i, *document] for i, document in enumerate(documents)]
    root = make_shards({"train": [unique, unique[::-1]]})  # 4000 pairs far apart
    guesses = []
    for seed in range(8):
        found = inspect_data(root, documents=0, sample=2000, seed=seed)
        (figures,) = found.splits
        assert figures.sampled_documents == 2000
        assert f"about {16 * figures.exact.pairs:,} +-" in render(found)
        guesses.append(16 * figures.exact.pairs)
    assert np.mean(guesses) == pytest.approx(4000, rel=0.15)


def test_neighbouring_copies_do_not_count_as_drawn_apart(make_shards):
    root = make_shards({"train": [[[1, 2, 3]] * 16 + [[i] for i in range(10, 90)]]})
    (figures,) = inspect_data(root, documents=0).splits
    assert (figures.exact.repeats, figures.exact.pairs) == (15, 0)


def test_a_sample_without_copies_says_how_many_there_may_be(make_shards):
    root = make_shards({"train": [[[i] for i in range(160)]]})
    found = inspect_data(root, documents=0, sample=32)
    assert found.splits[0].sampled_documents == 32
    assert "20.00% of the documents were read" in render(found)
    assert "most likely fewer than 75 pairs" in render(found).replace("\n  ", " ")


# --- what is read ---


def test_reads_are_bounded(make_shards, monkeypatch):
    documents = [random_documents(400, longest=20, seed=seed) for seed in range(6)]
    root = make_shards({"train": documents})
    monkeypatch.setattr(sample, "SURVEY_BYTES", 2 * 8 * 400)
    monkeypatch.setattr(sample, "SAMPLE_TOKENS", 1000)
    (figures,) = inspect_data(root, documents=0).splits
    assert figures.surveyed_shards == 2
    assert sum(figures.documents_by_length) == 800
    assert (figures.documents, figures.documents_counted) == (2400, True)
    assert figures.sampled_documents < 120
    assert 500 < figures.sampled_tokens < 1500
    assert "of the documents were read" in render(inspect_data(root))


def fetched(cache, root):
    """The .ds files of a folder that lie in a cache, known by their bytes."""
    cached = {path.read_bytes() for path in cache.glob("*.data")}
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*.ds") if path.read_bytes() in cached)


def test_of_object_storage_only_the_shards_with_a_chosen_run_are_fetched(make_shards, monkeypatch, tmp_path):
    pytest.importorskip("fsspec")
    train = [random_documents(40, seed=seed) for seed in range(12)]
    root = make_shards({"train": train, "val": [random_documents(40, seed=99)]})
    caches = iter(tmp_path / f"cache{i}" for i in range(9))
    monkeypatch.setattr("gpt2_hf.data.remote._default_cache", lambda: next(caches))
    found = inspect_data(f"file://{root}", sample=16)
    assert [figures.sampled_documents for figures in found.splits] in ([16, 16], [8, 16], [16, 8], [8, 8])
    (one, val) = fetched(tmp_path / "cache0", root)
    assert one.startswith("train/") and val == "val/00000.ds"
    assert {excerpt.shard for excerpt in found.splits[0].excerpts} == {one}
    figures, _ = inspect_data(f"file://{root}").splits
    assert (figures.shards, figures.surveyed_shards, figures.sampled_documents) == (12, 8, 320)
    assert (figures.documents, figures.documents_counted) == (480, True)
    assert len(fetched(tmp_path / "cache1", root)) == 8 + 1
    assert inspect_data(root).splits[0].surveyed_shards == 12


def test_a_recipe_brings_its_cache(make_shards, monkeypatch, tmp_path):
    pytest.importorskip("fsspec")
    monkeypatch.setattr("gpt2_hf.data.remote._default_cache", lambda: tmp_path / "never")
    train = [random_documents(40, seed=seed) for seed in range(24)]
    root = make_shards({"train": train})
    config = recipe(f"file://{root}", data__cache_dir=tmp_path / "cache", data__cache_gb=1)
    found = inspect_data(config.data.path, config, documents=0, sample=16)
    assert found.first_batch == inspect_data(root, config, documents=0).first_batch
    assert not (tmp_path / "never").exists()
    # 12 windows of the first 8 shards, and one for the sample; nothing ahead of them.
    assert 1 < len(fetched(tmp_path / "cache", root)) <= 9
    small = recipe(f"file://{root}", data__cache_dir=tmp_path / "small", data__cache_gb=1e-7)
    with pytest.raises(ShardError, match=r"raise data\.cache_gb"):
        inspect_data(small.data.path, small)


def test_a_format_without_an_index_or_a_manifest(monkeypatch, tmp_path):
    """Documents begin with <|endoftext|>, and nobody knows their number before reading."""
    documents = [[EOT, *document] for document in random_documents(30)]
    documents[3][1:3] = 70_000, 2**17 + 5

    def fake(number):
        rows = documents[number::3]
        return SimpleNamespace(
            name=f"{number}.bin",
            path=tmp_path / f"{number}.bin",
            n_tokens=sum(map(len, rows)),
            n_documents=None,
            tokens=lambda: np.concatenate(rows).astype(np.uint32),
            document_ends=lambda: np.cumsum([len(row) for row in rows]),
        )

    def open_split(path, split):
        if split == "val":
            raise ShardError("this folder has no val")
        shards = tuple(fake(number) for number in range(3))
        return SimpleNamespace(
            split="train",
            shards=shards,
            n_tokens=sum(shard.n_tokens for shard in shards),
            n_documents=None,
            n_bytes=None,
            tokenizer=gpt2_tokenizer(),
            vocab_size=50257,
            eot=EOT,
            eot_first=True,
        )

    monkeypatch.setattr(inspection, "open_split", open_split)
    found = inspect_data(tmp_path)
    (figures,) = found.splits
    assert (figures.documents, figures.documents_counted, figures.surveyed_shards) == (30, True, 3)
    assert (figures.eot_begins, figures.eot_ends, figures.bytes_per_token_by_manifest) == (1, 0, None)
    assert "begins all" in render(found) and "neither ends nor begins" not in render(found)
    assert figures.outside_vocabulary == len([token for token in documents[3] if token > EOT])
    assert found.facts == {"no val": "this folder has no val"} and "has no val" in render(found)
    monkeypatch.setattr(sample, "SURVEY_BYTES", 1)
    (figures,) = inspect_data(tmp_path).splits
    assert (figures.documents_counted, figures.surveyed_shards) == (False, 1)
    assert 15 < figures.documents < 60
    assert "about" in render(inspect_data(tmp_path))


def test_what_is_wrong_is_said(make_shards):
    root = make_shards({"train": [[[1, EOT, 2], [50300, 3], [4]]]})
    text = render(inspect_data(root))
    assert "1 tokens lie outside the vocabulary" in text
    assert "1 <|endoftext|> stand inside a document" in text
    assert "<|50300|>" in text
    tokens = np.fromfile(root / "train/00000.ds", "<u2")
    tokens[-1] = 7
    tokens.tofile(root / "train/00000.ds")
    text = render(inspect_data(root))
    assert "ends 66.67%" in text and "neither ends" not in text  # a file may be cut anywhere
    tokens[-3] = 7
    tokens.tofile(root / "train/00000.ds")
    assert "neither ends nor begins every document" in render(inspect_data(root))
    one_token = make_shards({"train": [[[], [1]]]}, "one_token")
    np.array([EOT, 1, 7], "<u2").tofile(one_token / "train/00000.ds")
    np.array([1, 2, 3], "<u8").tofile(one_token / "train/00000.ds.index")
    manifest = (one_token / "manifest.json").read_text().replace('"documents": 2', '"documents": 3')
    (one_token / "manifest.json").write_text(manifest)
    assert inspect_data(one_token).splits[0].empty == 1


def test_what_the_manifest_says_is_shown(make_shards):
    root = make_shards({"train": [random_documents(5)]})
    manifest = json.loads((root / "manifest.json").read_text())
    manifest |= {
        "source": {"files": 1234},
        "dropped": {"exact_duplicate": 5000, "empty": 0},
        "config": {"inputs": ["a.txt", "b.txt", "c.txt", "d.txt"], "text_field": "text"},
    }
    (root / "manifest.json").write_text(json.dumps(manifest))
    text = render(inspect_data(root))
    for expected in (
        "files 1,234",
        "inputs a.txt b.txt c.txt and 1 more",
        "exact_duplicate 5,000",
    ):
        assert expected in text
    assert "empty" not in inspect_data(root).facts["dropped"]


# --- the first batch ---


def test_the_first_batch_is_what_training_gets(make_shards):
    from gpt2_hf.training.start import Start, load_steps

    documents = [random_documents(40, seed=seed) for seed in range(3)]
    root = make_shards({"train": documents})
    config = recipe(train__seed=5)
    data = open_split(root, "train")
    found = inspect_data(root, config).first_batch
    windows, _ = reference_epoch(documents, 5, 0, group_size=8, seq_len=8)
    assert found.windows == windows[:2]
    assert (found.micro_steps, found.micro_batch_size, found.seq_len) == (4, 3, 8)
    assert found.boundaries == sum(window.count(EOT) for window in windows[:12])
    assert found.unbroken == sum(EOT not in window for window in windows[:12]) / 12
    assert found.labels_shifted

    def batch_of(rank, world_size):
        state = SimpleNamespace(process_index=rank, num_processes=world_size, device=SimpleNamespace(type="cpu"))
        with load_steps(config, data, Start(), state) as batches:
            return next(iter(batches)).reshape(-1, 9).tolist()

    assert batch_of(0, 1) == batch_of(0, 2) + batch_of(1, 2) == windows[:12]
    assert found.sha256 == hashlib.sha256(np.array(windows[:12], "<u2").tobytes()).hexdigest()[:16]
    assert inspect_data(root, config, seed=9).first_batch == found
    assert first_batch(recipe(train__seed=6), data).windows != found.windows


def test_the_first_batch_is_shown_with_its_boundaries_and_labels(make_shards):
    tokenizer = load_tokenizer()
    ids = tokenizer([f"Document {i} is short." for i in range(60)])["input_ids"]
    found = inspect_data(make_shards({"train": [ids]}), recipe())
    lines = render(found).splitlines()
    start = lines.index("window 0")
    window = found.first_batch.windows[0]
    for i in range(8):
        _, token, *_ = shown = lines[start + 2 + i].split()
        assert shown[0] == str(i)
        assert token == str(window[i]) and str(window[i + 1]) in shown[2:]
    pieces = [line for line in lines[start : lines.index("window 1")] if line.startswith("  tokens ")]
    starts = [0, *(i + 1 for i, token in enumerate(window[:-1]) if token == EOT)]
    assert [int(line.split()[1]) for line in pieces] == starts
    assert "4 x 3 windows of 8 + 1 tokens" in render(found)


def test_a_recipe_that_does_not_fit_is_refused(make_shards):
    root = make_shards({"train": [[[1] * 50]]})
    with pytest.raises(ConfigError, match="not a multiple"):
        inspect_data(root, recipe(train__global_batch_tokens=80))
    with pytest.raises(ShardError, match="one window needs"):
        inspect_data(root, recipe(data__seq_len=60, train__global_batch_tokens=180))
    with pytest.raises(ShardError, match="no tokens to train on"):
        inspect_data(make_shards({"train": [], "val": [[[1]]]}, "empty"), recipe())


# --- text, picture, script ---


def test_text_fits_100_columns_and_holds_no_control_characters(make_shards):
    from unicodedata import east_asian_width

    ids = load_tokenizer()(TEXTS, verbose=False)["input_ids"]
    root = make_shards({"train": [ids, ids], "val": [ids[1:]]}, "a_name_of_some_length")
    text = render(inspect_data(root, recipe(), documents=10))
    for line in text.splitlines():
        assert sum(2 if east_asian_width(char) in "WF" else 1 for char in line) <= 100, line
    assert all(char.isprintable() for char in text.replace("\n", ""))
    assert "\\x1b[31m another" in text and "中文中文" in text


def test_the_picture_shows_both_splits(make_shards, tmp_path):
    image = pytest.importorskip("matplotlib.image")
    train, val = random_documents(300, longest=2000), random_documents(50, longest=100, seed=1)
    found = inspect_data(make_shards({"train": [train], "val": [val]}), documents=0)
    path = draw_lengths(found, tmp_path / "new" / "lengths.png")
    pixels = image.imread(path)[..., :3]
    assert pixels.shape[1] > 900
    for color in ((0x25, 0x63, 0xA8), (0xC4, 0x54, 0x1A)):
        near = (np.abs(pixels - np.array(color) / 255) < 0.05).all(-1)
        assert near.sum() > 500
        upper, lower = np.array_split(near, 2)
        assert upper.sum() > 100 and lower.sum() > 100


def test_the_script_prints_and_writes_the_same_figures(make_shards, tmp_path, monkeypatch, capsys):
    root = make_shards({"train": [random_documents(50)], "val": [random_documents(5, seed=1)]})
    config = tmp_path / "recipe.yaml"
    config.write_text(recipe(root).to_yaml())
    monkeypatch.chdir(tmp_path)
    text = run_script(monkeypatch, capsys, "--config", config, "--json", "figures.json", "--documents", 1)
    found = inspect_data(root, recipe(root), documents=1)
    assert text == render(found) + "\n\nfigures.json: written\n"
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["splits"][0]["exact"]["compared"] == 50
    assert figures["splits"][1]["tokens_per_document"] == found.splits[1].tokens_per_document
    assert figures["first_batch"]["windows"] == found.first_batch.windows
    assert run_script(monkeypatch, capsys, root, "--documents", 0, "--seed", 3).startswith(str(root))
    assert {path.name for path in tmp_path.iterdir()} == {"data", "recipe.yaml", "figures.json"}


def test_the_script_writes_a_picture_when_asked(make_shards, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    root = make_shards({"train": [random_documents(50)]})
    text = run_script(monkeypatch, capsys, root, "--picture", tmp_path / "lengths.png")
    assert text.endswith(f"\n{tmp_path / 'lengths.png'}: written\n")
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")


def test_errors_are_one_line(make_shards, tmp_path, monkeypatch, capsys):
    assert "nowhere" in refusal(monkeypatch, capsys, tmp_path / "nowhere")
    assert "name a folder" in refusal(monkeypatch, capsys)
    assert "no recipe" in refusal(monkeypatch, capsys, "--config", tmp_path / "none.yaml")
    root = make_shards({"train": [random_documents(50)], "val": [random_documents(5)]})
    assert "sample is 0, and must be >= 1" in refusal(monkeypatch, capsys, root, "--sample", 0)
    for flag in ("--picture", "--json"):
        assert f"there is no folder {tmp_path / 'new'}:" in refusal(monkeypatch, capsys, root, flag, tmp_path / "new/x")
    assert not (tmp_path / "new").exists()
    refusal(monkeypatch, capsys, root, "--picturesque", "x.png")
    (root / "val/00000.ds").unlink()
    assert "val/00000.ds" in refusal(monkeypatch, capsys, root)
    (root / "manifest.json").write_text("{")
    assert "manifest.json is not valid JSON" in refusal(monkeypatch, capsys, root)


def test_a_disordered_index_is_refused(make_shards):
    root = make_shards({"train": [[[1, 2], [3, 4, 5], [6]]]})
    index = root / "train/00000.ds.index"
    ends = np.fromfile(index, "<u8")
    ends[:2] = ends[1], ends[0]
    ends.tofile(index)
    with pytest.raises(ShardError, match="do not add up"):
        inspect_data(root)


def test_only_the_picture_needs_an_optional_package(make_shards, monkeypatch, tmp_path):
    for name in ("matplotlib", "matplotlib.figure", "tiktoken", "datatrove", "datasets"):
        monkeypatch.setitem(sys.modules, name, None)
    found = inspect_data(make_shards({"train": [random_documents(50)]}), recipe())
    assert "first batch" in render(found)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        draw_lengths(found, tmp_path / "lengths.png")
