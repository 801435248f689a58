"""Shards for other projects to read."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..data.formats import LLMC_HEADER_BYTES, LLMC_MAGIC, LLMC_VERSION
from ..data.shards import ShardSet, SplitMissing, open_split, outside_vocabulary

BLOCK_TOKENS = 2**22


def export_llmc(folder: str | Path, out: str | Path, shard_tokens: int = 100_000_000) -> list[Path]:
    """Write what `open_split` reads in `folder` as llm.c's token files into a new folder; returns their paths.

    OUT/OUT_train_000001.bin, ... and OUT/OUT_val_000000.bin, ..., each of shard_tokens tokens but the last, with
    documents in the stored order, begun by <|endoftext|> and cut where a file is full. The folder appears when all is
    written. Raises ShardError for data that cannot be read, ValueError if `out` holds something already.
    """
    target = Path(out).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{out} is there already: choose another folder, or delete it")
    if shard_tokens < 2:
        raise ValueError(f"shard_tokens is {shard_tokens}: choose at least 2")
    splits = [(open_split(folder, "train"), 1)]
    try:
        splits.append((open_split(folder, "val"), 0))
    except SplitMissing:
        print(f"{folder} has no validation split: exporting train alone")
    if (tokenizer := splits[0][0].tokenizer).dtype.itemsize > 2:
        raise ValueError(
            f"{folder} has tokens of the tokenizer {tokenizer.name}, whose vocabulary of {tokenizer.vocab_size:,} does "
            "not fit into the uint16 of llm.c's files: its .ds shards are datatrove's, which other programs read"
        )
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    names = [
        path.name for shards, number in splits for path in _write(shards, partial, target.name, number, shard_tokens)
    ]
    os.replace(partial, target)
    return [target / name for name in names]


def _write(shards: ShardSet, folder: Path, name: str, number: int, shard_tokens: int) -> Iterator[Path]:
    from tqdm import tqdm

    todo = _n_tokens(shards)
    blocks = _blocks(shards)
    block = np.empty(0, "<u2")
    with tqdm(total=todo, unit="tok", unit_scale=True, desc=f"export {shards.split}", disable=None, delay=1) as bar:
        while todo:
            n_tokens = min(shard_tokens, todo)
            header = np.zeros(LLMC_HEADER_BYTES // 4, "<i4")
            header[:3] = LLMC_MAGIC, LLMC_VERSION, n_tokens
            path = folder / f"{name}_{shards.split}_{number:06d}.bin"
            with path.open("wb") as file:
                file.write(header.data)
                room = n_tokens
                while room:
                    if not len(block):
                        block = next(blocks)
                    file.write(block[:room].data)
                    written = min(room, len(block))
                    block, room = block[written:], room - written
                    bar.update(written)
            yield path
            todo, number = todo - n_tokens, number + 1


def _n_tokens(shards: ShardSet) -> int:
    """How many tokens there are with <|endoftext|> before each document, and none after the last."""
    full = [shard for shard in shards.shards if shard.n_tokens]
    if shards.eot_first or not full:
        return shards.n_tokens
    return shards.n_tokens + (full[-1].tokens()[-1] != shards.eot)


def _blocks(shards: ShardSet) -> Iterator[np.ndarray]:
    """The split's tokens in pieces of uint16; documents that end with <|endoftext|> are shifted behind it."""
    if not shards.eot_first:
        yield np.array([shards.eot], "<u2")
    for shard in shards.shards:
        tokens = shard.tokens()
        for start in range(0, len(tokens), BLOCK_TOKENS):
            block = tokens[start : start + BLOCK_TOKENS]
            if (largest := int(block.max())) >= shards.vocab_size:
                raise outside_vocabulary(shard, largest, shards.vocab_size)
            yield np.ascontiguousarray(block, "<u2")
