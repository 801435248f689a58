"""On real prose, where the folder that GPT2_HF_DATA names is at hand: see the README of that folder for its files."""

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest
from test_tokenizer import assert_all_agree
from test_train import losses, run, tiny

from gpt2_hf.corpus.prepare import PrepareConfig, prepare
from gpt2_hf.data.shards import open_split
from gpt2_hf.data.tokenizer import load_tokenizer

zstandard = pytest.importorskip("zstandard")

DATA = os.environ.get("GPT2_HF_DATA")
pytestmark = [
    pytest.mark.realdata,
    pytest.mark.skipif(not DATA, reason="GPT2_HF_DATA names no folder of real text"),
]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("real") / "small"
    prepare(PrepareConfig(inputs=(f"{DATA}/small_train.jsonl.gz",), out=str(out), workers=1, val_documents=20))
    return out


def test_shards_hold_every_document_as_the_slow_tokenizer_sees_it(prepared):
    with gzip.open(f"{DATA}/small_train.jsonl.gz", "rt") as file:
        texts = [json.loads(line)["text"] for line in file]
    expected = sorted(tuple([*ids, 50256]) for ids in load_tokenizer()(texts, verbose=False)["input_ids"])
    found = []
    for split in ("train", "val"):
        for shard in open_split(prepared, split).shards:
            tokens, ends = shard.tokens(), shard.document_ends()
            found += [tuple(part.tolist()) for part in np.split(tokens, ends[:-1])]
    assert sorted(found) == expected


def test_20_megabytes_of_books_law_and_documentation_agree():
    """encode_document, tiktoken with GPT-2's published files and pattern, and `tokenizers` give the same ids."""
    texts, sources, n_bytes = [], set(), 0
    with zstandard.open(f"{DATA}/corpus/corpus-train-00-of-08.jsonl.zst", "rt", encoding="utf-8") as file:
        for row in map(json.loads, file):
            texts.append(row["text"])
            sources.add(row["set"])
            n_bytes += len(row["text"].encode())
            if n_bytes >= 20e6:
                break
    assert {"gutenberg-cmpe226", "frus", "dc-law", "ms-win32", "mdn-archive"} <= sources
    assert assert_all_agree(texts) >= 20e6


def test_a_small_model_learns_prose(prepared, tmp_path):
    model = {"model__vocab_size": None, "model__n_embd": 64}
    rate = {"optim__name": "muon", "optim__lr": 1e-2, "optim__muon_lr": 0.02}
    rows = run(tiny(prepared, tmp_path / "run", train__steps=60, eval__val_every=30, **model, **rate))
    assert losses(rows)[0] == pytest.approx(np.log(50257), rel=0.01)
    assert [row["val_loss"] for row in rows if "val_loss" in row][-1] < 9
