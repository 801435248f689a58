"""Tokens as text for people."""

from collections.abc import Sequence
from functools import cache
from itertools import groupby
from typing import Any

import numpy as np

from ..data.tokenizer import VOCAB_SIZE, load_tokenizer


@cache
def _tokenizer() -> Any:
    return load_tokenizer()


def decode(tokens: Sequence[int] | np.ndarray) -> str:
    """Text of GPT-2 tokens; numbers that are none appear as <|number|>."""
    text = ""
    for known, group in groupby(map(int, tokens), lambda token: token < VOCAB_SIZE):
        ids = list(group)
        text += _tokenizer().decode(ids) if known else "".join(f"<|{token}|>" for token in ids)
    return text


def beginning(tokens: Sequence[int] | np.ndarray, n_characters: int) -> str:
    text = decode(tokens[:n_characters])  # most tokens are longer than a character
    cut = len(text) > n_characters or len(tokens) > n_characters
    return text[:n_characters] + (" [...]" if cut else "")
