"""How fast text becomes tokens: our encoder, our pipeline and the usual alternatives, in turns on one machine.

Every comparison runs its variants one after the other, several times over, so that a busy machine slows all alike;
figures are medians, ratios are taken within a round.
"""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

from ..corpus.inputs import find_files
from ..corpus.prepare import PrepareConfig, prepare
from ..corpus.read import Piece, ReadDocuments, Source, plan
from ..corpus.write import WriteTokens
from ..data.tokenizer import ASSETS, EOT, gpt2_tokenizer, load_tokenizer

if TYPE_CHECKING:
    from datatrove.data import Document
    from tiktoken import Encoding

GPT2_PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""

# Each makes itself ready and returns what is to be timed.
Variants = dict[str, Callable[[], Callable[[], object]]]


def encoders() -> dict[str, Callable[[list[str]], object]]:
    """Functions of a list of texts that give the same ids, as the tests show; ours also ends each text."""
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}  # read when tokenizers is imported

    def each(function: Callable[[str], object]) -> Callable[[list[str]], object]:
        return lambda texts: [function(text) for text in texts]

    found = {"encode_document": each(gpt2_tokenizer().encode_document)}
    for name, pattern in (("GPT-2's pattern", GPT2_PATTERN), ("its own pattern", None)):
        raw = _tiktoken_alone(pattern)
        found[f"tiktoken encode_ordinary, {name}"] = each(raw.encode_ordinary)
        found[f"tiktoken encode_to_numpy, {name}"] = each(partial(raw.encode_to_numpy, disallowed_special=()))
    return found | {"tokenizers encode_batch": load_tokenizer().backend_tokenizer.encode_batch}


def race(variants: Variants, rounds: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds of each variant in each round; a first round warms up and does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn, (name, ready) in itertools.product(range(rounds + 1), variants.items()):
        run = ready()
        began = clock()
        run()
        seconds[name] += [clock() - began] * (turn > 0)
    return seconds


def fresh(run: Callable[[list[str]], object], texts: list[str]) -> Callable[[], Callable[[], object]]:
    """`run` on texts that nobody has encoded yet: Python keeps the UTF-8 of a str once it was asked for."""
    return lambda: partial(run, [text.encode().decode() for text in texts])


def show(title: str, size: float, seconds: dict[str, list[float]], base: str) -> None:
    """Print megabytes per second of each variant, and the ratio to `base` within a round."""
    print(f"\n{title}\n{'MB per second':<41} median    min    max   ratio to {base}")
    for name, spent in seconds.items():
        speeds = sorted(size / each for each in spent)
        ratios = sorted(other / each for other, each in zip(seconds[base], spent, strict=True))
        of_base = f"{median(ratios):.1%} ({ratios[0]:.1%} to {ratios[-1]:.1%})"
        print(f"{name:<41} {median(speeds):6.2f} {speeds[0]:6.2f} {speeds[-1]:6.2f}   {of_base}")


def benchmark_encoding(texts: list[str], rounds: int) -> None:
    """Encoders on whole documents and on short ones; processor time of one thread, against the fastest tiktoken."""
    size = megabytes(texts)
    short = [text[i : i + 200] for text in texts for i in range(0, len(text), 200)]
    for title, given in (("encoding whole documents", texts), ("encoding pieces of 200 characters", short)):
        seconds = race({name: fresh(run, given) for name, run in encoders().items()}, rounds, time.process_time)
        raw = min((name for name in seconds if "tiktoken" in name), key=lambda name: median(seconds[name]))
        show(f"{title}: {len(given):,} texts, {size:.1f} MB, one thread", size, seconds, raw)


def benchmark_worker(source: Source, rounds: int, documents: int | None = None) -> None:
    """One worker from end to end (read, tokenize, write) against raw tiktoken on the same texts, already in memory.

    Processor time, all threads of the process: what the work costs, whoever else is using the machine.
    """
    _, source, tasks = plan(source)
    texts = [document.text for document in read_documents(source, tasks, documents)]
    raw = next(run for name, run in encoders().items() if "encode_to_numpy, its own" in name)

    with tempfile.TemporaryDirectory() as folder:

        def worker() -> None:
            WriteTokens(folder, ())(read_documents(source, tasks, documents), 0, 1)

        variants = {"raw tiktoken": fresh(raw, texts), "one worker": lambda: worker}
        seconds = race(variants, rounds, time.process_time)
    size = megabytes(texts)
    show(f"one worker, {len(texts):,} texts, {size:.1f} MB", size, seconds, "raw tiktoken")


def benchmark_preparation(source: Source, rounds: int) -> None:
    """The whole preparation with one worker and with two, and the lecture's way with two processes; wall time."""
    size = megabytes(read_texts(source))
    files = [str(path) for path in find_files(source.inputs)]
    with tempfile.TemporaryDirectory() as folder:

        def ours(workers: int) -> None:
            out = Path(folder, "ours")
            prepare(PrepareConfig(source.inputs, out=str(out), workers=workers, val_fraction=0))
            shutil.rmtree(out)

        def lecture() -> None:
            out = Path(folder, "lecture")
            prepare_as_in_the_lecture(files, out, 2)
            shutil.rmtree(out)

        variants: Variants = {
            "one worker": lambda: partial(ours, 1),
            "two workers": lambda: partial(ours, 2),
            "lecture, two processes": lambda: lecture,
        }
        seconds = race(variants, rounds, time.perf_counter)
    show(
        f"whole preparation of {', '.join(source.inputs)}, {size:.1f} MB of text, wall time",
        size,
        seconds,
        "one worker",
    )


def read_texts(source: Source, documents: int | None = None) -> list[str]:
    """The texts of a source, or its first documents."""
    _, source, tasks = plan(source)
    return [document.text for document in read_documents(source, tasks, documents)]


def read_documents(source: Source, tasks: list[list[Piece]], count: int | None = None) -> Iterator[Document]:
    """The documents of a source as planned, or the first of them, in order."""
    read = ReadDocuments(source, tasks)
    found = itertools.chain.from_iterable(read(None, rank, len(tasks)) for rank in range(len(tasks)))
    return itertools.islice(found, count)


def megabytes(texts: Iterable[str]) -> float:
    """Of their UTF-8."""
    return sum(len(text.encode()) for text in texts) / 1e6


def prepare_as_in_the_lecture(files: Iterable[str], out: Path, processes: int, shard_tokens: int = 10**8) -> None:
    """What build-nanogpt's fineweb.py does, on local .jsonl: datasets reads, a pool encodes, one process writes .npy.

    Each document begins with <|endoftext|>; a shard holds exactly `shard_tokens`, whichever document that cuts.
    """
    import datasets

    out.mkdir(parents=True)
    cache = str(out / "cache")
    rows = datasets.load_dataset("json", data_files=list(files), split="train", streaming=True, cache_dir=cache)
    texts = (row["text"] for row in rows)
    shard, filled, number = np.empty(shard_tokens, np.uint16), 0, 0
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for tokens in pool.imap(_encode_as_in_the_lecture, texts, chunksize=16):
            while filled + len(tokens) >= shard_tokens:
                room = shard_tokens - filled
                shard[filled:] = tokens[:room]
                np.save(out / f"train_{number:06d}.npy", shard)
                tokens, filled, number = tokens[room:], 0, number + 1
            shard[filled : filled + len(tokens)] = tokens
            filled += len(tokens)
    np.save(out / f"train_{number:06d}.npy", shard[:filled])


def _encode_as_in_the_lecture(text: str) -> np.ndarray:
    return np.array([EOT, *_tiktoken_alone().encode_ordinary(text)], dtype=np.uint16)


@functools.cache
def _tiktoken_alone(pattern: str | None = None) -> Encoding:
    """GPT-2 as tiktoken has it, with its pattern if no other is given."""
    from tiktoken import Encoding
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    from tiktoken_ext.openai_public import r50k_pat_str

    ranks = data_gym_to_mergeable_bpe_ranks(f"{ASSETS}/tokenizer/merges.txt", f"{ASSETS}/tokenizer/vocab.json")
    # Without a special token encode_to_numpy takes half as long again, which would flatter us.
    special = {"<|endoftext|>": EOT}
    return Encoding("raw", pat_str=pattern or r50k_pat_str, mergeable_ranks=ranks, special_tokens=special)
