"""How well a tokenizer fits text that it was not trained on, beside GPT-2's."""

import functools
import random
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..data.tokenizer import ASSETS

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BATCH = 64  # texts that are encoded at a time
LONGEST, SAMPLES = 20, 30
WIDTH = 72  # characters of a token or line that are shown
ENOUGH = 40  # of a line that shows something


def write_report(path: Path, tokenizer: "Tokenizer", texts: list[str], trained: str, seed: int) -> list[str]:
    """Write a tokenizer's report, for people, and return the lines of it that a terminal shows.

    Args:
        path: file to write, in Markdown.
        tokenizer: byte-level BPE whose last entry is its end of text.
        texts: what it was not trained on.
        trained: words for what it was trained on.
        seed: draws the lines that are shown.
    """
    both = (tokenizer, _gpt2())
    for each in both:
        each.encode_special_tokens = True  # a text's own "<|endoftext|>" is text
    n_bytes = sum(len(text.encode()) for text in texts)
    counts = [_count(each, texts) for each in both]
    tokens = [int(count.sum()) for count in counts]
    fits = [n_bytes / n for n in tokens]
    unused = [float((count[:-1] == 0).mean()) for count in counts]
    rows = (
        ("entries", [f"{len(count):,}" for count in counts]),
        ("tokens", [f"{n:,}" for n in tokens]),
        ("bytes per token", [f"{fit:.4f}" for fit in fits]),
        ("entries that do not occur", [f"{share:.2%}" for share in unused]),
    )
    lines = ["# Tokenizer report", ""]
    lines += [f"Trained on {trained}, and measured on {n_bytes:,} bytes that were held out.", ""]
    lines += ["| | this tokenizer | GPT-2's |", "|---|---|---|"]
    lines += [f"| {name} | {ours} | {theirs} |" for name, (ours, theirs) in rows]
    lines += ["", "## Longest tokens", "", "Bytes, how often in the text that was held out, and the token.", "", "```"]
    by_length = sorted(tokenizer.get_vocab().items(), key=lambda item: (-len(item[0]), item[1]))
    for token, number in [item for item in by_length if item[1] != len(counts[0]) - 1][:LONGEST]:
        shown = tokenizer.decode([number])
        shown = shown if len(shown) <= WIDTH else shown[:WIDTH] + "..."
        lines.append(f"{len(token):5,} {counts[0][number]:9,}  {shown!r}")
    lines += [
        "```",
        "",
        "## How lines are split",
        "",
        "The number of tokens, and these; \ufffd is part of a character.",
    ]
    lines += ["", "```"]
    for line in _sample_lines(texts, random.Random(seed)):
        lines += [f"{name:<6}{_split(each, line)}" for name, each in zip(("this", "GPT-2"), both, strict=True)]
    path.write_text("\n".join([*lines, "```", ""]), encoding="utf-8")
    return [
        f"trained on {trained}",
        f"{fits[0]:.3f} bytes per token on {n_bytes / 1e6:,.2f} MB held out; GPT-2's tokenizer has {fits[1]:.3f} there",
        f"{unused[0]:.1%} of the entries do not occur there, of GPT-2's {unused[1]:.1%}",
    ]


@functools.cache
def _gpt2() -> "Tokenizer":
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(ASSETS / "tokenizer" / "tokenizer.json"))


def _count(tokenizer: "Tokenizer", texts: list[str]) -> np.ndarray:
    """How often each entry occurs, int64 (entries,)."""
    counts = np.zeros(tokenizer.get_vocab_size(), np.int64)
    for first in range(0, len(texts), BATCH):
        for found in tokenizer.encode_batch_fast(texts[first : first + BATCH], add_special_tokens=False):
            counts += np.bincount(found.ids, minlength=len(counts))
    return counts


def _sample_lines(texts: list[str], rng: random.Random) -> list[str]:
    lines = list(dict.fromkeys(line.rstrip() for text in texts for line in text.splitlines() if line.strip()))
    lines = [line for line in lines if len(line) >= ENOUGH] or lines
    return [line[:WIDTH] for line in rng.sample(lines, min(SAMPLES, len(lines)))]


def _split(tokenizer: "Tokenizer", line: str) -> str:
    ids = tokenizer.encode(line, add_special_tokens=False).ids
    text = "│".join(tokenizer.decode([token]) for token in ids)
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return f"{len(ids):3}  {shown}"
