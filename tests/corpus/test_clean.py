"""Cleaning: near-duplicates against a brute-force Jaccard similarity, contamination against sets of n-grams."""

import gzip
import itertools
import json
import os
import pickle
import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from gpt2_hf.corpus import contamination, near_duplicates
from gpt2_hf.corpus import words as hashing
from gpt2_hf.corpus.contamination import MarkContaminated, describe_evaluations, read_items
from gpt2_hf.corpus.near_duplicates import DUPLICATES_FILE, MarkNearDuplicates, minhash_stages
from gpt2_hf.corpus.running import Stage
from gpt2_hf.data.tokenizer import ASSETS
from gpt2_hf.evaluation.hellaswag import hellaswag_texts, load_hellaswag

NEEDS = "preparation's packages (the extra 'data') are not installed, as on a machine that only trains"
Document = pytest.importorskip("datatrove.data", reason=NEEDS).Document
simplify_text = pytest.importorskip("datatrove.utils.text", reason=NEEDS).simplify_text
xxhash = pytest.importorskip("xxhash", reason=NEEDS)

DATA = os.environ.get("GPT2_HF_DATA")


# --- text, and steps around ours ---------------------------------------------------------------------------------


def plays() -> list[str]:
    lines = gzip.decompress((ASSETS / "shakespeare.jsonl.gz").read_bytes()).splitlines()
    return [json.loads(line)["text"] for line in lines]


def passages(count: int, words: int) -> list[str]:
    """Passages of the plays, with their line breaks and punctuation."""
    found = []
    for text in plays():
        ends = [match.end() for match in re.finditer(r"\S+\s*", text)]
        found += [text[begin:end] for begin, end in itertools.pairwise(ends[::words])]
    return found[:: len(found) // count][:count]


class Words:
    """A generator of words, some frequent and most rare, as in a language."""

    def __init__(self, seed: int, vocabulary: int = 3000):
        self.random = random.Random(seed)
        letters = "abcdefghijklmnopqrstuvwxyz"
        self.vocabulary = [
            "".join(self.random.choices(letters, k=self.random.randint(2, 9))) for _ in range(vocabulary)
        ]
        self.weights = [1 / (rank + 3) for rank in range(vocabulary)]

    def __call__(self, count: int) -> list[str]:
        return self.random.choices(self.vocabulary, self.weights, k=count)


def normal(text: str) -> list[str]:
    return simplify_text(text).split()


def ngrams(text: str, n: int) -> set[tuple[str, ...]]:
    words = normal(text)
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def jaccard(one: str, other: str) -> float:
    a, b = ngrams(one, 5), ngrams(other, 5)
    return len(a & b) / len(a | b)


@dataclass(frozen=True)
class Read:
    """The texts of each task; an empty one was skipped by the reader."""

    tasks: tuple[tuple[str, ...], ...]

    def __call__(self, data: None, rank: int, world_size: int) -> Iterator[Document]:
        assert world_size == len(self.tasks)
        for number, text in enumerate(self.tasks[rank]):
            yield Document(text=text, id=str(number), metadata={} if text else {"skipped": "empty"})


def deal(texts: list[str], tasks: int) -> Read:
    """Consecutive texts for each task."""
    size = -(-len(texts) // tasks)
    return Read(tuple(tuple(texts[i * size : (i + 1) * size]) for i in range(tasks)))


def run(stages: Iterable[Stage]) -> None:
    for stage in stages:
        for rank in range(stage.tasks):
            data = None
            for step in stage.steps:
                data = step(data, rank, stage.tasks)
            assert data is None


def find_duplicates(texts: list[str], folder: Path, tasks: int = 1) -> dict[int, int]:
    """Number of each duplicate among the texts -> number of the one that stays."""
    read = deal(texts, tasks)
    run(minhash_stages(read, str(folder), tasks))
    size = len(read.tasks[0])
    table = np.load(folder / DUPLICATES_FILE).tolist()
    assert table == sorted(table)
    return {task * size + number: first_task * size + first for task, number, first_task, first in table}


def mark(step: Callable, texts: list[str], **metadata) -> list[Document]:
    return list(step((Document(text=text, id="", metadata=dict(metadata)) for text in texts), 0, 1))


def write_jsonl(path: Path, rows: list[object]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


# --- words -------------------------------------------------------------------------------------------------------

STRANGE = [
    *(
        "don't",
        "O’Neill—and",
        "3.14",
        "1,000,000",
        "1, 2",
        "٣٫١٤",
        "ΟΔΟΣ",
        "ΑΣ\u0301",
        "naïve",
        "nai\u0308ve",
        "İI",
        "ﬁ",
    ),
    *(
        "--",
        "...",
        "\u0301",
        "e\u0301\u0323",
        "中文，字符。",
        "😀",
        "\ud800x",
        "x" * 100,
        "<b>[tag]</b>",
        "\u212b",
        "½",
        "²",
    ),
]
SPACES = [" ", "  ", "\n", "\t", "\r\n", "\u00a0", "\u2003", "\u2028", "\x1c", "\x85", " \u3000 "]


def test_words_are_datatroves(monkeypatch):
    rng = random.Random(0)
    for piece in (2**19, 101, 16):
        monkeypatch.setattr(hashing, "_PIECE", piece)
        for _ in range(100):
            text = "".join(rng.choice(STRANGE) + rng.choice(SPACES) for _ in range(rng.randint(0, 30)))
            if piece == 16:  # where there is no whitespace for so long, the text is cut
                text = text.replace("x" * 100, "x")
            expected = [xxhash.xxh64_intdigest(word.encode("utf-8", "surrogatepass")) for word in normal(text)]
            blocks = [hashing.hash_words(part) for part in hashing.pieces(text)]
            assert [value for block in blocks for value in block.tolist()] == expected
            assert list(hashing.words_of(text)) == normal(text)
            assert "".join(hashing.pieces(text)) == text


def test_every_ngram_of_a_text_in_pieces_is_hashed_once(monkeypatch):
    text = " ".join(f"w{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(200))
    whole = hashing.hash_words(text)
    for n, piece in itertools.product((1, 5, 13), (3, 30, 1000)):
        monkeypatch.setattr(hashing, "_PIECE", piece)
        found = []
        for begin, block in hashing.overlapping_blocks(text, n):
            assert (block == whole[begin : begin + len(block)]).all()
            found += range(begin, begin + len(block) - n + 1)
        assert found == list(range(len(whole) - n + 1))


def test_ngram_hashes_tell_words_and_their_order_apart():
    words = hashing.hash_words("a b c a b c b a c a b c d")
    for m, hashes in enumerate(hashing.hash_ngrams(words, 4), 1):
        grams = [tuple(words[i : i + m].tolist()) for i in range(len(words) - m + 1)]
        assert len(hashes) == len(grams)
        for (gram, value), (other, also) in itertools.combinations(zip(grams, hashes.tolist(), strict=True), 2):
            assert (gram == other) == (value == also)


# --- near-duplicates ---------------------------------------------------------------------------------------------


def edited(words: list[str], changes: int, rng: random.Random) -> list[str]:
    """Some words replaced, left out or doubled."""
    words = list(words)
    for place in sorted(rng.sample(range(len(words)), changes), reverse=True):
        words[place : place + 1] = rng.choice([["changed"], [], [words[place]] * 2])
    return words


def test_near_duplicates_are_found_as_often_as_theory_says(tmp_path):
    make, rng = Words(1), random.Random(2)
    originals = [make(rng.randint(60, 300)) for _ in range(400)]
    variants = [edited(words, int(len(words) * rng.random() * 0.08), rng) for words in originals]
    texts = [" ".join(words) for words in originals + variants]
    found = find_duplicates(texts, tmp_path, tasks=3)

    similarity = np.array([jaccard(texts[i], texts[i + 400]) for i in range(400)])
    hit = np.array([found.get(i + 400) == i for i in range(400)])
    close = similarity >= 0.85
    assert close.sum() > 100
    assert hit[close].mean() >= 0.95
    for low, high in ((0, 0.6), (0.6, 0.75), (0.75, 0.85), (0.85, 0.99)):
        group = (similarity >= low) & (similarity < high)
        chance = 1 - (1 - similarity[group] ** 8) ** 14
        assert group.sum() >= 30
        assert abs(hit[group].sum() - chance.sum()) <= 3.5 * np.sqrt((chance * (1 - chance)).sum()) + 1
    assert found.keys() == set((np.flatnonzero(hit) + 400).tolist())  # and nothing else


def test_copies_are_found_and_the_first_stays(tmp_path):
    texts = passages(60, 120)
    copies = {
        60: (7, texts[7]),
        61: (0, texts[0].upper()),
        62: (59, "\n".join(texts[59].split())),
        63: (30, f"*** {texts[30]} !!!"),
        64: (7, texts[7].replace(",", " ;")),
    }
    found = find_duplicates(texts + [text for _, text in copies.values()], tmp_path, tasks=4)
    assert found == {number: original for number, (original, _) in copies.items()}


def test_the_first_of_a_chain_stays_whatever_the_order_of_the_pairs(tmp_path):
    """Of documents that are alike only by way of others, and of exact copies among them, the first one stays."""
    words = Words(3)(400)
    chain = [" ".join(words[shift : shift + 300]) for shift in range(0, 60, 6)]
    for seed in range(2):
        order = random.Random(seed).sample(chain, len(chain))
        found = find_duplicates([*passages(3, 100), *order, *order], tmp_path / str(seed), tasks=2)
        assert found == dict.fromkeys(range(4, 3 + 2 * len(chain)), 3)


def test_short_and_skipped_documents_are_nobodys_duplicates_but_count(tmp_path):
    text = " ".join(Words(4)(50))
    texts = ["", "four words are few", "four words are few", "-- !", "", text, "five words are just enough", "", text]
    assert find_duplicates([*texts, "five WORDS: are just enough"], tmp_path, tasks=2) == {8: 5, 9: 6}
    assert find_duplicates([*texts, *[""] * 30], tmp_path / "empty task", tasks=4) == {8: 5}
    assert find_duplicates([""], tmp_path / "nothing") == {}


def test_a_long_document_in_pieces_has_the_same_signature(monkeypatch):
    text = plays()[0]
    rng = np.random.default_rng(0)
    factors, offsets = rng.integers(1, 2**61, (2, 1, 112), dtype=np.uint64)
    whole = near_duplicates._signature(text, factors, offsets)
    monkeypatch.setattr(hashing, "_PIECE", 1000)
    monkeypatch.setattr(near_duplicates, "_BLOCK", 100)
    assert len(whole) == 112
    assert (near_duplicates._signature(text, factors, offsets) == whole).all()
    assert (near_duplicates._signature(" ".join(text.split()[::-1]), factors, offsets) == whole).mean() < 0.1


def test_a_signature_is_the_least_of_each_permutation():
    text = " ".join(Words(9)(12))
    ones, zeros = np.ones((1, 112), np.uint64), np.zeros((1, 112), np.uint64)
    rng = np.random.default_rng(1)
    factors, offsets = rng.integers(1, 2**61, (2, 1, 112), dtype=np.uint64)
    windows = [" ".join(text.split()[i : i + 5]) for i in range(8)]
    shingles = [int(near_duplicates._signature(window, ones, zeros)[0]) for window in windows]
    assert len(set(shingles)) == 8
    expected = [
        min(((a | 1) * shingle + b) % 2**32 for shingle in shingles)
        for a, b in zip(factors[0].tolist(), offsets[0].tolist(), strict=True)
    ]
    assert near_duplicates._signature(text, factors, offsets).tolist() == expected


def test_marks(tmp_path):
    texts = ["", *passages(3, 100)]
    texts += [texts[2], "", texts[1], "another text that is not like any of the others"]
    read = deal(texts, 2)
    stages = minhash_stages(read, str(tmp_path), 2)
    assert [(stage.name, stage.tasks) for stage in stages] == [("signatures", 2), ("pairs", 14), ("duplicates", 1)]
    run(stages)
    step = MarkNearDuplicates(str(tmp_path))
    found = [list(step(read(None, rank, 2), rank, 2)) for rank in range(2)]
    assert [document.text for document in found[0]] == texts[:4]
    assert ["skipped" in document.metadata for document in found[1]] == [True, True, True, False]
    marks = [document.metadata for documents in found for document in documents]
    assert marks == [
        *({"skipped": "empty"}, {}, {}, {}),
        {"skipped": "near_duplicate", "detail": "of document 3 of task 0"},
        {"skipped": "empty"},
        {"skipped": "near_duplicate", "detail": "of document 2 of task 0"},
        {},
    ]


def test_marking_without_the_stages_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"near_duplicates\.npy: no such file: run"):
        list(MarkNearDuplicates(str(tmp_path))([], 0, 1))


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@dataclass(frozen=True)
class Breaking:
    read: Read

    def __call__(self, data: None, rank: int, world_size: int) -> Iterator[Document]:
        yield from itertools.islice(self.read(None, rank, world_size), 5)
        raise KeyboardInterrupt


def test_what_a_killed_task_leaves_is_harmless(tmp_path):
    texts = [*passages(20, 80), *passages(20, 80)]
    read, folder = deal(texts, 2), tmp_path / "broken"
    expected = find_duplicates(texts, tmp_path / "whole", tasks=2)
    assert len(expected) == 20
    stages = minhash_stages(read, str(folder), 2)
    with pytest.raises(KeyboardInterrupt):
        run([replace(stages[0], steps=[Breaking(read), stages[0].steps[1]])])
    assert snapshot(folder) == {}
    # SIGKILL gives no chance to clean up.
    for name in ("unfinished-1/bucket_000/00001.minhash.sig", "unfinished-2/00000_00.dups", "unfinished-3/x.clusters"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_bytes(b"half")
    for stage in stages:
        run([stage, stage])  # and a task that had ended may run once more
    assert np.load(folder / DUPLICATES_FILE).tolist() == np.load(tmp_path / "whole" / DUPLICATES_FILE).tolist()


# --- contamination -----------------------------------------------------------------------------------------------

DISGUISES: list[Callable[[str], str]] = [
    str,
    str.swapcase,
    lambda text: text.replace(" ", "\r\n\u2003"),
    lambda text: text.replace(" ", ' -- "').replace(". ", "! "),
]


def test_hellaswag_items_are_found_in_the_middle_of_a_document():
    """In the wording of one way of evaluating or the other, with any of its endings. All items are sought alike."""
    around, documents = passages(100, 12), []
    for number, item in enumerate(load_hellaswag()[::7]):
        context, endings = hellaswag_texts(item, ("lecture", "lm_eval")[number % 2])
        planted = DISGUISES[number // 2 % 4](f"{context} {endings[number // 8 % 4]}")
        documents.append(f"{around[number % 100]} {planted}\n{around[(number + 1) % 100]}")
    found = mark(MarkContaminated(), documents)
    assert {document.metadata["skipped"] for document in found} == {"contaminated"}
    for document, text in zip(found[::13], documents[::13], strict=True):
        name, words = document.metadata["detail"].split(": ")
        assert name == "hellaswag"
        assert f" {words} " in f" {simplify_text(text)} "


def test_nothing_is_dropped_from_a_thousand_clean_documents(tmp_path):
    make = Words(5)
    texts = passages(500, 200) + [" ".join(make(200)) for _ in range(500)]
    assert len(texts) == 1000
    assert [document.metadata for document in mark(MarkContaminated(), texts)] == [{}] * 1000
    assert find_duplicates(texts, tmp_path) == {}


def test_report_drops_nothing():
    context, endings = hellaswag_texts(load_hellaswag(1)[0], "lecture")
    texts = [*passages(2, 80), f"{context} {endings[0]}"]
    found = mark(MarkContaminated(mode="report"), texts, file="a.txt")
    assert [document.text for document in found] == texts
    assert [document.metadata for document in found[:2]] == [{"file": "a.txt"}] * 2
    assert found[2].metadata.keys() == {"file", "reported", "detail"}
    assert found[2].metadata["reported"] == "contaminated"


def test_a_document_that_is_skipped_already_keeps_its_reason():
    context, endings = hellaswag_texts(load_hellaswag(1)[0], "lecture")
    found = mark(MarkContaminated(), [f"{context} {endings[0]}"], skipped="near_duplicate", detail="of document 1")
    assert found[0].metadata == {"skipped": "near_duplicate", "detail": "of document 1"}


def matches(text: str, items: list[str], n: int) -> bool:
    """The rule in plain Python."""
    words = normal(text)
    for item in map(normal, items):
        lengths = [n] if len(item) >= n else [len(item)] if len(item) >= 8 else []
        for m in lengths:
            grams = {tuple(item[i : i + m]) for i in range(len(item) - m + 1)}
            if any(
                tuple(words[i : i + m]) in grams and len(set(words[i : i + m])) >= m / 2
                for i in range(len(words) - m + 1)
            ):
                return True
    return False


@pytest.mark.parametrize("n", [3, 8, 13])
@pytest.mark.parametrize("piece", [2**19, 40])
def test_marks_are_those_of_plain_python(tmp_path, monkeypatch, n, piece):
    monkeypatch.setattr(hashing, "_PIECE", piece)
    make, rng = Words(6, vocabulary=40), random.Random(7)
    items = [" ".join(make(rng.choice([2, 7, 8, 9, 12, 13, 14, 30]))) for _ in range(40)]
    items += ["red blue grey pink " * 4, "red blue grey pink gold teal " * 3]  # half of 8 or 12 words differ
    items += ["0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16", "a b a b a b a b a b a b a b a"]
    evaluation = write_jsonl(tmp_path / f"mine{n}{piece}.jsonl", [{"text": item} for item in items])
    texts = []
    for _ in range(300):
        words, take = normal(rng.choice(items)), rng.randint(2, 14)
        start = rng.randint(0, max(len(words) - take, 0))
        texts.append(" ".join([*make(rng.randint(0, 20)), *words[start : start + take], *make(rng.randint(0, 20))]))
    expected = [matches(text, items, n) for text in texts]
    assert n == 3 or 30 < sum(expected) < 270
    found = mark(MarkContaminated((evaluation,), n), texts)
    assert ["skipped" in document.metadata for document in found] == expected


def test_an_ngram_does_not_go_on_in_the_next_text(tmp_path):
    words = Words(8)(20)
    first, second, across = " ".join(words[:10]), " ".join(words[10:]), " ".join(words[3:17])
    for rows, expected in (([first, second], None), ([first, second, across], "contaminated")):
        evaluation = write_jsonl(tmp_path / f"{len(rows)}.jsonl", [{"text": row} for row in rows])
        assert mark(MarkContaminated((evaluation,)), [across])[0].metadata.get("skipped") == expected


def test_equal_hashes_of_other_words_drop_nothing(tmp_path, monkeypatch):
    def hash_poorly(text: str) -> np.ndarray:
        return np.array([ord(word[0]) for word in normal(text)], "<u8")

    for module in (hashing, contamination):
        monkeypatch.setattr(module, "hash_words", hash_poorly)
    item = "all bears carry dark eggs from green hills into january"
    evaluation = write_jsonl(tmp_path / "poor.jsonl", [{"text": item}])
    texts = ["any boy can draw every fish goats have in jars", f"{item} and so on", "all bears carry dark eggs"]
    found = mark(MarkContaminated((evaluation,), 10), texts)
    assert [document.metadata.get("detail") for document in found] == [None, f"poor: {item}", None]


def test_runs_of_the_same_words_do_not_count(tmp_path):
    evaluation = write_jsonl(tmp_path / "table.jsonl", [{"question": "sum of 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 is"}])
    table = "\n".join(",".join(str(i * j) for j in range(20)) for i in range(20))
    assert mark(MarkContaminated((evaluation,)), [table])[0].metadata == {}


def test_n_is_how_many_words_must_agree(tmp_path):
    evaluation = write_jsonl(tmp_path / "a.jsonl", [{"q": "one two three four five six seven eight nine ten"}])
    texts = ["x two three four five six y", "x two three four five y"]
    for n, expected in ((4, [True, True]), (5, [True, False]), (6, [False, False])):
        found = mark(MarkContaminated((evaluation,), n), texts)
        assert ["skipped" in document.metadata for document in found] == expected


def test_user_evaluations(tmp_path):
    def long(word: str) -> str:
        return " ".join(f"{word}{letter}" for letter in "abcdefghijklmn")

    rows = [
        {"question": long("q"), "answer": 3, "choices": {"text": [long("c"), "no"], "label": ["A", "B"]}},
        {"ctx": "the first six words of it", "endings": ["and then the seven words at its end", long("e")], "id": "x"},
        {"question": "what?"},
    ]
    plain = write_jsonl(tmp_path / "my.eval.jsonl", rows)
    packed = tmp_path / "packed.jsonl.gz"
    packed.write_bytes(gzip.compress(Path(plain).read_bytes() + b"\n\n"))
    documents = [
        f"x {long('q')} y",
        f"x {long('c')} y",
        f"x {long('e')} y",
        "it: The first six words of it, and then the seven words at its end.",
        "and then the seven words at its end the first six words of it",
        f"{long('q')[:-6]}",
    ]
    for path, name in ((plain, "my.eval"), (str(packed), "packed")):
        details = [document.metadata.get("detail", "")[:9] for document in mark(MarkContaminated((path,)), documents)]
        assert details == [f"{name}: {rest}"[:9] for rest in ("qa", "ca", "ea", "the")] + ["", ""]
    other = write_jsonl(tmp_path / "other.jsonl", [{"text": f"{long('r')} {long('q')}"}])
    both = mark(MarkContaminated((other, plain)), [long("r"), long("c")])
    assert [document.metadata["detail"].split(":")[0] for document in both] == ["other", "my.eval"]
    described = describe_evaluations(["hellaswag", plain], 13)
    assert [(row["name"], row["items"], row["too_short"]) for row in described] == [
        ("hellaswag", 10042, 0),
        ("my.eval", 3, 1),
    ]
    assert described[1]["sha256"] != describe_evaluations([str(packed)], 13)[0]["sha256"]


@pytest.mark.parametrize("content", [b'{"a": "b"}\n[1]\n', b'{"a": "b"}\n{"a"\n', b'{"a": "b"}\n\xff\n'])
def test_a_broken_evaluation_is_named_with_its_line(tmp_path, content):
    path = tmp_path / "broken.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"broken\.jsonl:2: not a JSON object: [^\n]*$"):
        read_items(str(path))


def test_evaluations_that_cannot_be_sought_are_refused(tmp_path):
    with pytest.raises(OSError, match=r"^absent\.jsonl: cannot be read [^\n]* check the path"):
        describe_evaluations(["absent.jsonl"], 13)
    damaged = tmp_path / "damaged.jsonl.gz"
    damaged.write_bytes(gzip.compress(b'{"a": "b"}\n')[:-9])
    with pytest.raises(OSError, match=r"damaged\.jsonl\.gz: cannot be read"):
        describe_evaluations([str(damaged)], 13)
    whole = bytearray(gzip.compress(b'{"a": "b"}\n'))
    whole[10] = 0xFF  # a kind of block that deflate does not have
    damaged.write_bytes(whole)
    with pytest.raises(OSError, match=r"^\S+damaged\.jsonl\.gz: cannot be read [^\n]* check the path"):
        describe_evaluations([str(damaged)], 13)
    short = write_jsonl(tmp_path / "short.jsonl", [{"text": "only seven words are in this item"}])
    with pytest.raises(ValueError, match=r"short\.jsonl: no text of 8 words or more"):
        describe_evaluations([short], 13)
    assert mark(MarkContaminated((short,)), ["only seven words are in this item"])[0].metadata == {}
    with pytest.raises(ValueError, match="choose n >= 1"):
        MarkContaminated(n=0)
    with pytest.raises(ValueError, match="drop or report"):
        MarkContaminated(mode="delete")  # type: ignore[arg-type]


def test_only_a_file_takes_the_place_of_the_shipped_evaluation(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("hellaswag").mkdir()
    assert describe_evaluations(["hellaswag"], 13)[0]["items"] == 10042
    Path("hellaswag").rmdir()
    write_jsonl(Path("hellaswag"), [{"text": "one two three four five six seven eight"}])
    assert read_items("hellaswag") == [["one two three four five six seven eight"]]


def test_steps_travel_to_other_processes(tmp_path):
    steps = [step for stage in minhash_stages(Read(()), str(tmp_path), 1) for step in stage.steps]
    for step in [*steps, MarkNearDuplicates(str(tmp_path)), MarkContaminated()]:
        assert pickle.loads(pickle.dumps(step)) == step


@pytest.mark.realdata
@pytest.mark.skipif(not DATA, reason="GPT2_HF_DATA names no folder of real text")
def test_real_documents_without_a_common_13_gram_stay(tmp_path):
    zstandard = pytest.importorskip("zstandard", reason=NEEDS)
    with zstandard.open(f"{DATA}/corpus/corpus-val.jsonl.zst", "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    assert len(texts) == 1042
    assert [document.metadata for document in mark(MarkContaminated(), texts)] == [{}] * 1042
    assert find_duplicates(texts, tmp_path) == {}
