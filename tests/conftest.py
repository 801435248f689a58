import hashlib
import json
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in whatever a script starts with &; children inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

EOT = 50256


def write_shards(parent: Path, splits: dict[str, list[list[list[int]]]], name: str = "data") -> Path:
    """Write a data folder from {split: [shard: [document: [token, ...]]]} and return its path.

    Written from the format's description, not with prepare.py; <|endoftext|> is added to each document.
    """
    root = parent / name
    manifest = {
        "format": "gpt2_hf/shards",
        "version": 2,
        "tokenizer": "gpt2",
        "vocab_size": 50257,
        "dtype": "uint16",
        "eot": EOT,
        "config": {},
        "splits": {},
        "dropped": {},
    }
    for split, shards in splits.items():
        (root / split).mkdir(parents=True)
        entries = []
        for number, documents in enumerate(shards):
            tokens = [token for document in documents for token in [*document, EOT]]
            raw = np.array(tokens, dtype="<u2").tobytes()
            ends = np.cumsum([len(document) + 1 for document in documents])
            file = f"{split}/{number:05d}.ds"
            (root / file).write_bytes(raw)
            index = ends.astype("<u8").tobytes()
            (root / f"{file}.index").write_bytes(index)
            entries.append(
                {
                    "file": file,
                    "tokens": len(tokens),
                    "documents": len(documents),
                    "bytes": 4 * len(tokens),
                    "sha256": hashlib.sha256(raw).hexdigest(),
                    "index_sha256": hashlib.sha256(index).hexdigest(),
                }
            )
        totals = {key: sum(entry[key] for entry in entries) for key in ("tokens", "documents", "bytes")}
        manifest["splits"][split] = {**totals, "shards": entries}
    (root / "manifest.json").write_text(json.dumps(manifest))
    return root


@pytest.fixture
def make_shards(tmp_path: Path) -> Callable[..., Path]:
    """``write_shards`` into the test's folder."""
    return partial(write_shards, tmp_path)
