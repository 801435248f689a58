"""Measure how shards of full size are opened and read: python scripts/benchmark_reading.py [folder on a fast disk]

The token files have holes in place of tokens, so this measures the program and the page cache, not the disk. Each row
is a fresh process. Memory leaves out the pages of mapped files, which the system takes back when it needs them.
"""

import json
import os
import tempfile
import time
from argparse import ArgumentParser
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from gpt2_hf.data.shards import FORMAT, VERSION, open_split
from gpt2_hf.data.stream import StepLoader, TokenStream

TOKENS, DOCUMENTS, SEQ_LEN, BATCH = 100_000_000, 100_000, 1024, 64


def write_shards(root: Path, n: int) -> Path:
    """n shards of 100M tokens in 100,000 documents each, of lengths as uneven as the web's."""
    lengths = np.random.default_rng(0).lognormal(0, 1, DOCUMENTS).cumsum()
    ends = np.floor(lengths / lengths[-1] * (TOKENS - DOCUMENTS)) + np.arange(1, DOCUMENTS + 1)
    (root / "train").mkdir(parents=True)
    (root / "index").write_bytes(ends.astype("<u8").tobytes())
    entry = {"tokens": TOKENS, "documents": DOCUMENTS, "bytes": 0, "sha256": "", "index_sha256": ""}
    entries = [entry | {"file": f"train/{number:05d}.ds"} for number in range(n)]
    for entry in entries:
        with (root / str(entry["file"])).open("wb") as file:
            file.truncate(2 * TOKENS)
        os.link(root / "index", root / f"{entry['file']}.index")
    manifest = {"format": FORMAT, "version": VERSION, "tokenizer": "gpt2", "dtype": "uint16", "vocab_size": 50257}
    manifest |= {"eot": 50256, "splits": {"train": {"bytes": 0, "shards": entries}}}
    (root / "manifest.json").write_text(json.dumps(manifest))
    return root


def memory() -> float:
    return int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0]) / 1000


def measure(root: Path, what: str) -> str:
    before, clock = memory(), time.perf_counter()
    stream = TokenStream(open_split(root, "train"), SEQ_LEN, seed=0)
    if what == "open":
        return f"{time.perf_counter() - clock:.2f} s, {memory():.0f} MB, {memory() - before:.0f} of them for the data"
    if what == "window":
        clock, cpu = time.perf_counter(), time.process_time()
        stream.window(0, stream.n_windows // 2)
        return f"{1e3 * (time.perf_counter() - clock):.0f} ms, {1e3 * (time.process_time() - cpu):.0f} ms of CPU"
    found = []
    if what == "epoch":
        for place in range(200):
            stream.batch(stream.n_windows * place // 200, BATCH)
            found.append(memory())
        return f"{found[0]:.0f} MB at its begin, {found[100]:.0f} in the middle, {found[-1]:.0f} at its end"
    with StepLoader(stream, 0, 3000, global_batch_size=BATCH, micro_batch_size=BATCH) as steps:
        for number, _ in enumerate(steps):
            if number in (0, 500, 2999):  # a group's files come into the page cache in the first 500
                found.append(time.perf_counter())
    first, later = (n * BATCH * SEQ_LEN / 1e6 / (b - a) for n, (a, b) in ((500, found[:2]), (2499, found[1:])))
    return f"{first:.1f}M tokens/s while the page cache is filled, then {later:.1f}M"


def main() -> None:
    parser = ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("folder", nargs="?", help="on a fast disk, for the shards; they take 2 MB of it")
    with tempfile.TemporaryDirectory(dir=parser.parse_args().folder) as folder:
        small, large = (write_shards(Path(folder) / str(n), n) for n in (100, 10_000))
        with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
            for title, root in (("10B tokens, 100 shards", small), ("1T tokens, 10,000 shards", large)):
                for what in ("open", "window", "batches", "epoch") if root == small else ("open", "window"):
                    print(f"{title:<26} {what:<8} {pool.submit(measure, root, what).result()}", flush=True)


if __name__ == "__main__":
    main()
