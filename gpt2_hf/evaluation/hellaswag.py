"""Evaluation on the live model: validation loss, and HellaSwag scored in two ways that are easily taken for each other.

    way       context                              ending         score of an ending
    lm_eval   "label: ctx_a Ctx_b", [tags] cleaned same cleaning  acc: summed log-likelihood
                                                                  acc_norm: that divided by the ending's characters
    lecture   ctx as it is                         as it is       log-likelihood divided by the ending's tokens

The first is lm-evaluation-harness (its task `hellaswag`, version 1.0), the second hellaswag.py of Karpathy's
build-nanogpt. OpenAI's gpt2 gets 0.2892 / 0.3114 and 0.2955.

An item's context is the same for its four endings: a row holds it once, and each ending sees it, but no other ending.

    context "the man sat", endings "down ." and "up"     input_ids      the  man  sat   down  sat
    part 0 is what both see; each sees its own part      part            0    0    1     1     2
    from the context's last token on, which predicts     position_ids    0    1    2     3     2
    the ending's first                                   shift_labels    -    -    down  .     up

Every rank makes the same number of forward calls of the same shapes, with rows of padding where it has nothing left:
sharded models need that.

Shapes in comments: B rows of a batch, T positions, N items.
"""

from __future__ import annotations

import gzip
import json
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import resources
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.tokenizer import gpt2_tokenizer
from .validation import IGNORE, Autocast, Reduce, evaluating, sum_over_ranks, token_losses

HELLASWAG_ITEMS = 10_042
ENDINGS = 4
WAYS = ("lm_eval", "lecture")
JOIN_TRIALS = 64  # texts
MOST_CUT = 0.1  # of the items, in the tokens of another tokenizer than GPT-2's; beyond, scores say little
# Rows are padded to a multiple of so many tokens: attention kernels of GPUs want masks aligned to 8. On CUDA libraries
# choose and build kernels for each new shape: of all items there are 10 for 26, for 7% more tokens.
LENGTH_MULTIPLE = {"cpu": 8, "cuda": 32}


def load_hellaswag(limit: int | None = None) -> list[dict[str, Any]]:
    """HellaSwag's validation items, or always the same `limit` of them, spread evenly over the file.

    The file has all ActivityNet items before the WikiHow items, and the first `limit` would be of one kind.
    Raises ValueError for a limit outside 1 to 10,042.
    """
    path = resources.files("gpt2_hf") / "assets" / "hellaswag_val.jsonl.gz"
    items = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    if limit is None:
        return items
    if not 1 <= limit <= len(items):
        raise ValueError(f"HellaSwag limit is {limit}: choose 1 to {len(items)}, or leave it out for all")
    return [items[i * len(items) // limit] for i in range(limit)]


def _clean(text: str) -> str:
    """Text without the [tags] of the WikiHow items, as lm-evaluation-harness cleans it."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def hellaswag_texts(item: dict[str, Any], way: str) -> tuple[str, list[str]]:
    """An item's context and its four endings, in the wording of "lm_eval" or "lecture"."""
    if way == "lecture":
        return item["ctx"], item["endings"]
    context = f"{item['activity_label']}: {item['ctx_a']} {item['ctx_b'].capitalize()}"
    return _clean(context), [_clean(ending) for ending in item["endings"]]


@dataclass(frozen=True)
class HellaSwagScores:
    """What `HellaSwag.score` found, for each way that was asked for.

    Attributes:
        metrics: hellaswag_acc and hellaswag_acc_norm (way "lm_eval"); hellaswag_lecture_acc; hellaswag_items;
            hellaswag_stderr, the binomial standard error of the lecture's accuracy, or else of acc_norm.
        picks: the ending chosen for each item, (N,), by metric: "acc", "acc_norm", "lecture_acc".
        loglikelihoods: of each ending given its context, (N, 4) in nats, by way.
    """

    metrics: dict[str, float]
    picks: dict[str, np.ndarray]
    loglikelihoods: dict[str, np.ndarray]


def parts_mask(part: Tensor, backend: str) -> Tensor:
    """What each token of rows with these parts, (B, T), may see: (B, 1, T, T), as the backend wants it.

    That is part 0 and its own part, up to itself: so no row is empty, not even of padding.
    """
    place = torch.arange(part.shape[1], device=part.device)
    key, query = part[:, None, :], part[:, :, None]
    seen = (((key == 0) | (key == query)) & (place <= place[:, None]))[:, None]
    return torch.zeros((), device=part.device).where(seen, -torch.inf) if backend == "eager" else seen


def _row(prefix: list[int], texts: Sequence[list[int]]) -> np.ndarray:
    """Texts with a common prefix as one row: input ids, labels, parts and positions, (4, T).

    Args:
        texts: each a prefix, one token more, and then its labels.
    """
    c = len(prefix)
    pieces = [(prefix, [IGNORE] * c, 0, 0)]
    pieces += [(text[c:-1], text[c + 1 :], part, c) for part, text in enumerate(texts, start=1)]
    fields = [[ids, labels, [part] * len(ids), range(first, first + len(ids))] for ids, labels, part, first in pieces]
    return np.concatenate([np.array(f, dtype=np.int32) for f in fields], axis=1)


def _obstacle(joins: bool, cut: float, n_positions: int) -> str | None:
    if joins:
        return "HellaSwag is off: the tokenizer joins an ending to its context, so that neither can be scored alone"
    if cut > MOST_CUT:
        return f"HellaSwag is off: of {cut:.0%} of its items the context does not fit into {n_positions} positions"
    return None


class HellaSwag:
    """HellaSwag items tokenised once, to be scored as often as wanted.

    Args:
        items: from `load_hellaswag`.
        tokenizer: a byte-level BPE, as every GPT-2 has.
        n_positions: longest input of the model; longer ones lose tokens on the left, as in lm-evaluation-harness.
        ways: which of "lm_eval" and "lecture" to score; each costs a row an item, or four if those lose tokens.

    Attributes:
        obstacle: why the scores would say little with this tokenizer, in a line; None where they don't. GPT-2's has
            none.
    """

    def __init__(
        self,
        items: Sequence[dict[str, Any]],
        tokenizer: PreTrainedTokenizerBase,
        *,
        n_positions: int = 1024,
        ways: Sequence[str] = WAYS,
    ):
        if not items or not ways or not set(ways) <= set(WAYS):
            raise ValueError(f"HellaSwag got {len(items)} items and ways {list(ways)}: give items and any of {WAYS}")
        self.ways = tuple(ways)
        self.labels = np.array([item["label"] for item in items])  # (N,)
        texts = [hellaswag_texts(item, way) for way in ways for item in items]
        self._shape = (len(ways), len(items), ENDINGS)
        self._n_chars = np.array([[len(ending) for ending in endings] for _, endings in texts]).reshape(self._shape)

        # Nearly any byte-level BPE cuts before the space, and then the two parts give the tokens of the whole.
        call: Any = tokenizer  # the base class does not declare that it can be called
        encode = partial(call, add_special_tokens=False, return_attention_mask=False, verbose=False)
        contexts = encode([context for context, _ in texts])["input_ids"]
        endings = encode([f" {ending}" for _, endings in texts for ending in endings])["input_ids"]

        whole = encode([f"{context} {endings_of[0]}" for context, endings_of in texts[:JOIN_TRIALS]])["input_ids"]
        joins = any(contexts[i] + endings[ENDINGS * i] != both for i, both in enumerate(whole))
        lengths = [len(contexts[e // ENDINGS]) + len(ending) for e, ending in enumerate(endings)]
        cut = (np.array(lengths) > n_positions + 1).reshape(self._shape).any(-1).mean()
        self.obstacle = None if gpt2_tokenizer().knows(tokenizer.get_vocab()) else _obstacle(joins, cut, n_positions)

        # Ending number e belongs to text e // 4.
        tokens = [(contexts[e // ENDINGS] + ending)[-n_positions - 1 :] for e, ending in enumerate(endings)]
        n_labels = [min(len(ending), len(text) - 1) for ending, text in zip(endings, tokens, strict=True)]
        self._n_tokens = np.array(n_labels).reshape(self._shape)

        # The endings of an item share a row, unless too little was left of the context to be the same for all.
        def sharing(e: int) -> tuple[int, list[int]]:
            return e // ENDINGS, tokens[e][: -n_labels[e] - 1]

        rows = []
        for (_, prefix), group in groupby(range(len(endings)), key=sharing):
            numbers = list(group)
            rows.append((_row(prefix, [tokens[e] for e in numbers]), numbers))
        # The longest first: rows of a batch then differ little, and memory runs out at once or never.
        self._rows = sorted(rows, key=lambda row: -row[0].shape[1])

    def _batches(
        self, tokens_per_batch: int, rank: int, world_size: int, multiple: int = 8
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The fields of `_row` for this rank's rows, (4, B, T), and the number of each part's ending, (B, 4).

        Rows of padding, and missing parts, have the number of endings there. T is a multiple of ``multiple``.
        """
        start = 0
        while start < len(self._rows):
            length = -(-self._rows[start][0].shape[1] // multiple) * multiple
            rows = self._rows[start : start + max(1, tokens_per_batch // length) * world_size]
            rows = [row for row in rows if row[0].shape[1] > 0.85 * length - multiple]  # little padding
            start += len(rows)
            shape = (-(-len(rows) // world_size), length)
            fields = np.stack([np.full(shape, value) for value in (0, IGNORE, 0, 0)])
            numbers = np.full((shape[0], ENDINGS), math.prod(self._shape))
            for i, (row, endings) in enumerate(rows[rank::world_size]):
                fields[:, i, : row.shape[1]] = row
                numbers[i, : len(endings)] = endings
            yield fields, numbers

    def score(
        self,
        model: nn.Module,
        *,
        device: torch.device | str,
        tokens_per_batch: int = 16_384,
        rank: int = 0,
        world_size: int = 1,
        reduce: Reduce | None = None,
        autocast: Autocast = nullcontext,
        show_progress: bool = False,
    ) -> HellaSwagScores:
        """Score all items with the model as it is; every rank returns the scores of all.

        A model on another attention backend than eager computes with sdpa here, the only other one to take such masks.

        Args:
            tokens_per_batch: most tokens, padding included, per rank and forward call (one row at least).
            reduce, autocast: as in `validation_loss`.
            show_progress: draw a bar, on a terminal.
        """
        device = torch.device(device)
        multiple = LENGTH_MULTIPLE.get(device.type, LENGTH_MULTIPLE["cpu"])
        parts = torch.arange(1, ENDINGS + 1, device=device)[:, None]  # (4, 1)
        losses, scored = [], []
        bar = tqdm(total=len(self._rows), desc="HellaSwag", unit="row", disable=None if show_progress else True)
        with bar, evaluating(model), _masked_attention(model) as backend:
            for fields, numbers in self._batches(tokens_per_batch, rank, world_size, multiple):
                input_ids, labels, part, position_ids = torch.from_numpy(fields).to(device)  # each (B, T)
                told = {"input_ids": input_ids, "shift_labels": labels, "position_ids": position_ids}
                loss = token_losses(model, autocast, **told, attention_mask=parts_mask(part, backend))
                losses.append(loss[:, None].where(part[:, None] == parts, 0).sum(-1))  # (B, 4)
                scored.append(numbers)
                bar.update(min(len(numbers) * world_size, len(self._rows) - bar.n))
        loglikelihoods = np.zeros(math.prod(self._shape) + 1)
        loglikelihoods[np.concatenate(scored)] = -torch.cat(losses).cpu().double().numpy()
        return self._scores(sum_over_ranks(loglikelihoods[:-1], device, reduce).reshape(self._shape))

    def _scores(self, loglikelihoods: np.ndarray) -> HellaSwagScores:
        picks = {}
        for way, scores, n_chars, n_tokens in zip(
            self.ways, loglikelihoods, self._n_chars, self._n_tokens, strict=True
        ):
            if way == "lm_eval":
                picks["acc"] = scores.argmax(-1)
                picks["acc_norm"] = (scores / n_chars).argmax(-1)
            else:
                picks["lecture_acc"] = (scores / n_tokens).argmax(-1)
        metrics = {f"hellaswag_{name}": float((pick == self.labels).mean()) for name, pick in picks.items()}
        headline = metrics.get("hellaswag_lecture_acc", metrics.get("hellaswag_acc_norm", 0.0))
        metrics["hellaswag_items"] = len(self.labels)
        metrics["hellaswag_stderr"] = math.sqrt(headline * (1 - headline) / len(self.labels))
        return HellaSwagScores(metrics, picks, dict(zip(self.ways, loglikelihoods, strict=True)))


@contextmanager
def _masked_attention(model: nn.Module) -> Iterator[str]:
    """Compute attention with eager, if that is the model's backend, or else sdpa; yields which.

    Only these two take any mask as a tensor. FlexAttention would build a kernel for each shape.
    """
    config = next(part.config for part in model.modules() if isinstance(part, PreTrainedModel))  # DDP wraps the model
    backend = config._attn_implementation  # the blocks read it at every call
    config._attn_implementation = "eager" if backend == "eager" else "sdpa"
    try:
        yield config._attn_implementation
    finally:
        config._attn_implementation = backend
