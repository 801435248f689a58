"""Documents -> a byte-level BPE tokenizer like GPT-2's, and a report on how well it fits them.

    inputs -> passages -> held out for the report
                       -> a sample, if one is asked for -> pre-tokens and their counts -> merges: OUT/

A passage is a document, or a part of a long one. Which are held out and which are sampled follows from hashes of their
text, and the merges follow from counts: files may be read in any order, and by any number of threads.
"""

import hashlib
import heapq
import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from ..knobs import ConfigError, PathName, Range
from ..program import UserError
from ..runs import MANIFEST, write_folder
from .audit import Tally, add_line_numbers, sentence
from .inputs import listing, unread_files
from .read import ReadDocuments, Source, plan
from .tokenizer_report import write_report

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_TEXT = "<|endoftext|>"
N_BYTES = 256
LARGEST_VOCABULARY = 2**24  # no model has so many, and training takes time and memory for each
MIN_FREQUENCY = 2  # of a pair of tokens that becomes one
HELD_OUT_BYTES = 4_000_000
HELD_OUT_SHARE = 0.1  # of a small corpus
PASSAGE = 2**16  # characters; a longer document is several passages
FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "report.md")
_BETWEEN = re.compile(r"(?<=\S)[ \n]")  # GPT-2's pre-tokenizer never joins what stands before it to what follows


@dataclass(frozen=True)
class TokenizerConfig(Source):
    """What to train a tokenizer on, and how.

    Args:
        inputs: .txt, .json, .jsonl, .ndjson (also .gz, .zst, .bz2, .xz) or .parquet files, folders or globs;
            "shakespeare" is built in.
        dataset: instead of inputs, a dataset on the Hub (streamed) or a folder that save_to_disk wrote.
        name: configuration of the Hub dataset, such as sample-10BT.
        revision: commit, tag or branch of the Hub dataset.
        split: split of the dataset to read.
        text_field: field or column that has the text, data.text for one inside another; a .txt file is one document.
        encoding: of text files, such as latin-1 or utf-16.
        separator: or a .txt is cut into documents at this text, such as "<|endoftext|>".
        exclude_wikipedia: leave out Wikipedia's pages.
        out: folder to write the tokenizer to.
        vocab_size: entries, with the 256 bytes and <|endoftext|>, which is the last; 257 is bytes alone.
        sample_bytes: train on about so many bytes of text, drawn from all; they are held in memory.
        seed: draws the sample, and the lines that the report shows.
        overwrite: replace the tokenizer that the folder holds.
    """

    out: Annotated[str, PathName()] = ""
    vocab_size: Annotated[int, Range(N_BYTES + 1, LARGEST_VOCABULARY)] = 32_000
    sample_bytes: Annotated[int, Range(1)] | None = None
    seed: Annotated[int, Range(0)] = 1337
    overwrite: bool = False

    def __post_init__(self) -> None:
        if not self.out:
            raise ConfigError("out is empty: name the folder to write to, such as --out tokenizers/mine")
        super().__post_init__()


def train_tokenizer(config: TokenizerConfig) -> Path:
    """Write a tokenizer and its report into the folder `config.out`, all or nothing; return the folder.

    Raises ValueError or OSError with one line that says what to do.
    """
    out = Path(config.out)
    _refuse_output(out, config.overwrite)
    _, source, tasks = plan(config.source(), out)
    tally = Tally()
    held_out = Smallest(HELD_OUT_BYTES, HELD_OUT_SHARE)
    sample = Smallest(config.sample_bytes, seed=config.seed) if config.sample_bytes else None

    def write(folder: Path) -> None:
        stop = threading.Event()
        texts = training_text(_read(ReadDocuments(source, tasks), tally, stop), held_out, sample)
        tokenizer = _heeding_ctrl_c(lambda: learn(texts, config.vocab_size), stop)
        read = tally.counts["read"]
        if not read["documents"]:
            where = ", ".join(config.inputs) or config.dataset
            said = f"; {dropped}" if (dropped := _dropped(tally)) else ""
            raise UserError(f"no text in {where} (text field {config.text_field!r}, --text_field){said}")
        if (size := tokenizer.get_vocab_size()) < config.vocab_size:
            raise UserError(
                f"vocab_size is {config.vocab_size}, and this text supports {size}, after which no pair of tokens "
                f"occurs twice: pass --vocab_size {size} or less, or more text"
            )
        save(tokenizer, folder)
        used = sample.size if sample else read["bytes"] - held_out.size
        trained = f"{used / 1e6:,.1f} of {read['bytes'] / 1e6:,.1f} MB of text ({read['documents']:,} documents)"
        text = [raw.decode() for raw in held_out.kept()]
        print(*write_report(folder / "report.md", tokenizer, text, trained, config.seed), sep="\n")

    write_folder(out, write)
    if dropped := _dropped(tally):
        print(dropped)
    if unread := unread_files(config.inputs, out):
        print(f"not read, by their ending: {listing(unread)}")
    if surplus := -config.vocab_size % 128:
        padded = f"{config.vocab_size + surplus:,}"
        print(f"{config.vocab_size:,} entries are no multiple of 128: the loss works with {padded}, so it does no harm")
    print(f"{out}: written, see {out / 'report.md'}")
    return out


def _refuse_output(out: Path, overwrite: bool) -> None:
    """Refuse a folder that is taken, and one with anything but a tokenizer in it even if it may be replaced."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    others = sorted({path.name for path in out.iterdir()} - {*FILES, MANIFEST}) if out.is_dir() else []
    if others or not (out / FILES[0]).exists():
        what = f"has {others[0]} in it" if others else "is no tokenizer"
        raise UserError(f"{out} is there and {what}, so it is not replaced: choose another --out")
    if not overwrite:
        raise UserError(f"{out} is there already: choose another --out, or pass --overwrite true")


# --- text ---------------------------------------------------------------------------------------------------------


class Smallest:
    """Keeps the passages with the smallest hashes: until they have `n_bytes`, or `share` of all bytes if that is less.

    Which these are does not depend on the order of the passages; equal ones stay together. With a seed the hashes are
    others. `size` is the number of bytes kept.
    """

    def __init__(self, n_bytes: int, share: float = 1.0, seed: int | None = None) -> None:
        self.size = 0
        self._n_bytes, self._share = n_bytes, share
        self._key = b"" if seed is None else seed.to_bytes(8, "little")
        self._found: dict[int, tuple[bytes, int]] = {}  # a passage and how often it came, by its hash
        self._largest: list[int] = []  # heap of hashes, as negative numbers

    def sift(self, passages: Iterable[bytes]) -> Iterator[bytes]:
        """The passages that are not kept, each once it is sure."""
        total = 0
        for raw in passages:
            key = int.from_bytes(hashlib.blake2b(raw, digest_size=8, key=self._key).digest(), "little")
            if key not in self._found:
                heapq.heappush(self._largest, -key)
            self._found[key] = raw, self._found.get(key, (raw, 0))[1] + 1
            self.size += len(raw)
            total += len(raw)
            yield from self._surplus(self._n_bytes)
        yield from self._surplus(min(self._n_bytes, max(self._share * total, 1)))

    def _surplus(self, n_bytes: float) -> Iterator[bytes]:
        while self._largest:
            raw, copies = self._found[-self._largest[0]]
            if self.size - len(raw) * copies < n_bytes:
                return
            del self._found[-heapq.heappop(self._largest)]
            self.size -= len(raw) * copies
            yield from repeat(raw, copies)

    def divide(self) -> Iterator[bytes]:
        """Most of the passage with the largest hash; its end stays."""
        for key in self._largest[:1]:
            raw, copies = self._found[-key]
            text = raw.decode()
            cut = int(len(text) * (1 - self._share))
            if between := _BETWEEN.search(text, cut):
                cut = between.start()
            begin = text[:cut].encode()
            self._found[-key] = raw[len(begin) :], 1
            self.size -= len(raw) * (copies - 1) + len(begin)
            yield begin

    def kept(self) -> Iterator[bytes]:
        """What is kept, by its hash."""
        for key in sorted(self._found):
            yield from repeat(*self._found[key])


def _read(step: ReadDocuments, tally: Tally, stop: threading.Event) -> Iterator[bytes]:
    """The passages of all documents, in UTF-8; the tally counts documents, their bytes and what cannot be used."""
    from tqdm import tqdm

    read = tally.counts["read"]
    with tqdm(total=len(step.tasks), unit="task", desc="read", disable=None) as bar:
        for task in range(len(step.tasks)):
            for document in step(None, task, len(step.tasks)):
                if stop.is_set():
                    raise KeyboardInterrupt
                text, place = document.text, document.metadata
                try:
                    n_bytes = len(text.encode())
                except UnicodeEncodeError:
                    place["skipped"] = "surrogate"
                if reason := place.get("skipped"):
                    tally.add(reason, place, text)
                    continue
                read.update(documents=1, bytes=n_bytes)
                yield from passages(text)
            bar.update()
            bar.set_postfix_str(f"{read['bytes'] / 1e6:,.1f} MB of text")
    print(f"read {read['documents']:,} documents, {read['bytes'] / 1e6:,.1f} MB of text", flush=True)


def passages(text: str) -> Iterator[bytes]:
    """A text in parts of at least PASSAGE characters, cut where pre-tokens end, so that these stay what they are."""
    start = 0
    while len(text) - start > PASSAGE and (between := _BETWEEN.search(text, start + PASSAGE)):
        yield text[start : between.start()].encode()
        start = between.start()
    yield text[start:].encode()


def training_text(found: Iterable[bytes], held_out: Smallest, sample: Smallest | None = None) -> Iterator[str]:
    """The passages to train on: without those that go into `held_out`, or a sample of these."""

    def others() -> Iterator[bytes]:
        there = False
        for raw in held_out.sift(found):
            there = True
            yield raw
        if not there:
            yield from held_out.divide()

    rest = others()
    if sample:
        for _ in sample.sift(rest):
            pass
        rest = sample.kept()
    for raw in rest:
        yield raw.decode()


def _dropped(tally: Tally) -> str:
    """A line about the documents that were left out, if there were any."""
    if not tally.reports:
        return ""
    counts = ", ".join(f"{count:,} {reason}" for reason, count in tally.counts["dropped"].most_common())
    add_line_numbers(tally.reports[:1])
    return f"left out {counts}; the first: {sentence(tally.reports[0])}"


# --- training -----------------------------------------------------------------------------------------------------


def learn(texts: Iterable[str], vocab_size: int) -> "Tokenizer":
    """A byte-level BPE tokenizer in GPT-2's layout: the 256 bytes in its order, a token for each merge, <|endoftext|>.

    The end of text comes last, not first as is usual with this trainer: a byte then has the number that it has in
    GPT-2, and a merge's rank is its token's number less 256. There are fewer entries than `vocab_size` when no pair
    occurs MIN_FREQUENCY times.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        min_frequency=MIN_FREQUENCY,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bare.train_from_iterator(texts, trainer)
    model = json.loads(bare.to_str())["model"]
    vocab = model["vocab"] | {END_OF_TEXT: len(model["vocab"])}
    tokenizer = Tokenizer(models.BPE(vocab, [(left, right) for left, right in model["merges"]]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer


def save(tokenizer: "Tokenizer", folder: Path) -> None:
    """Write what transformers and tokenizers of any age load: of 2019 the vocabulary and merges, and since then all."""
    tokenizer.model.save(str(folder))  # vocab.json and merges.txt
    content = json.loads(tokenizer.to_str())
    # tokenizers before 0.20 reads merges in this form alone. No token has a space in it: a character stands for it.
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    config = {
        "add_prefix_space": False,
        "bos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "eos_token": END_OF_TEXT,
        "errors": "replace",
        "tokenizer_class": "GPT2Tokenizer",
        "unk_token": END_OF_TEXT,
    }
    for name, value in (("tokenizer.json", content), ("tokenizer_config.json", config)):
        (folder / name).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _heeding_ctrl_c(work: "Callable[[], Tokenizer]", stop: threading.Event) -> "Tokenizer":
    """Do the work in another thread: Python hears of Ctrl-C in the first, which tokenizers would keep to itself."""
    outcome: Future[Tokenizer] = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)

    thread = threading.Thread(target=run, daemon=True)
    try:
        thread.start()
        return outcome.result()
    except KeyboardInterrupt:
        stop.set()  # or its threads would ask an interpreter that is going down for more text
        thread.join(timeout=2)
        raise
