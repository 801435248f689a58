"""Tokens as text for people."""

from collections.abc import Sequence

import numpy as np

from ..data.tokenizer import Tokenizer


def beginning(tokenizer: Tokenizer, tokens: Sequence[int] | np.ndarray, n_characters: int) -> str:
    """The first characters of a document, and whether there are more."""
    text = tokenizer.decode(tokens[: 4 * n_characters])  # no character has more bytes, and most tokens have several
    cut = len(text) > n_characters or len(tokens) > 4 * n_characters
    return text[:n_characters] + (" [...]" if cut else "")
