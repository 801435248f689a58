"""Evaluation on the live model: validation loss, and HellaSwag scored in two ways that are easily taken for each other.

    way       context                              ending         score of an ending
    lm_eval   "label: ctx_a Ctx_b", [tags] cleaned same cleaning  acc: summed log-likelihood
                                                                  acc_norm: that divided by the ending's characters
    lecture   ctx as it is                         as it is       log-likelihood divided by the ending's tokens

The first is lm-evaluation-harness (its task `hellaswag`, version 1.0), the second hellaswag.py of Karpathy's
build-nanogpt. OpenAI's gpt2 gets 0.2892 / 0.3114 and 0.2955.

Every rank makes the same number of forward calls of the same shapes, with rows of padding where it has nothing left:
sharded models need the first, compiled models the second.

Shapes in comments: B rows of a batch, T positions, N items.
"""

from __future__ import annotations

import gzip
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from gpt2_hf.data.remote import open_folder
from gpt2_hf.data.shards import open_split
from gpt2_hf.data.stream import TokenStream
from gpt2_hf.data.tokenizer import load_tokenizer, token_byte_lengths
from gpt2_hf.documents import DocumentMask

if TYPE_CHECKING:
    from gpt2_hf.model import GPTForCausalLM

Reduce = Callable[[Tensor], Tensor]  # sums a tensor over all ranks
Autocast = Callable[[], AbstractContextManager]

IGNORE = -100
ENDINGS = 4
WAYS = ("lm_eval", "lecture")
# HellaSwag rows are padded to one of these lengths, so that a compiled model meets few shapes.
BUCKETS = (48, 96, 128, 192, 256, 512, 1024)


def _row_losses(
    model: nn.Module,
    batches: Iterable[tuple[np.ndarray, np.ndarray]],
    device: torch.device,
    autocast: Autocast,
    documents: DocumentMask | None = None,
) -> np.ndarray:
    """Negative log-likelihood of each row's labels, in nats and float64, in the order of the batches.

    A batch is input_ids and shift_labels, both (B, T). Rows are padded on the right, where causal attention never
    looks, so there is no mask but the one that ``documents`` makes.
    """
    dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
    was_training = model.training
    model.eval()
    losses = []
    try:
        # Not inference_mode: torch.compile would build every graph again for inference tensors.
        with torch.no_grad():
            for input_ids, shift_labels in batches:
                on_host = torch.from_numpy(input_ids)
                tensors = {"input_ids": on_host.to(device), "shift_labels": torch.from_numpy(shift_labels).to(device)}
                if documents is not None:
                    tensors |= documents(tensors["input_ids"], on_host)
                with autocast():
                    loss = model(**tensors, use_cache=False, reduction="none").loss  # (B, T)
                losses.append(loss.sum(-1, dtype=dtype))
    finally:
        model.train(was_training)
    return torch.cat(losses).cpu().double().numpy()


def _sum_over_ranks(values: np.ndarray, device: torch.device, reduce: Reduce | None) -> np.ndarray:
    return values if reduce is None else reduce(torch.from_numpy(values).to(device)).cpu().numpy()


def validation_loss(
    model: nn.Module,
    stream: TokenStream,
    *,
    n_windows: int,
    batch_size: int,
    device: torch.device | str,
    rank: int = 0,
    world_size: int = 1,
    reduce: Reduce | None = None,
    autocast: Autocast = nullcontext,
    documents: DocumentMask | None = None,
) -> dict[str, float]:
    """Mean loss over the first `n_windows` windows of a validation stream; the same on any batch size and rank count.

    Args:
        batch_size: windows per rank and forward call.
        reduce: sums a float64 tensor over the ranks; needed when world_size > 1.
        autocast: makes the context that each forward call runs in.
        documents: for a model trained with a document mask: then no token sees another document here either.

    Returns:
        val_loss, nats per target token, and val_bpb, bits per UTF-8 byte of the targets' text. <|endoftext|> has no
        bytes, but its loss counts.

    Raises:
        ValueError: when the stream has fewer windows.
    """
    if not 1 <= n_windows <= stream.n_windows:
        raise ValueError(
            f"n_windows is {n_windows}, the validation split has {stream.n_windows}: choose from 1 to that"
        )
    device = torch.device(device)
    byte_lengths = token_byte_lengths()
    totals = np.zeros(3)  # nats, tokens, bytes

    def batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for first in range(0, n_windows, batch_size * world_size):
            start = first + rank * batch_size
            count = max(0, min(batch_size, n_windows - start))
            windows = np.zeros((batch_size, stream.seq_len + 1), dtype=np.int64)
            windows[:count] = stream.batch(start, count)
            input_ids, labels = windows[:, :-1].copy(), windows[:, 1:].copy()
            totals[1:] += count * stream.seq_len, byte_lengths[labels[:count]].sum()
            labels[count:] = IGNORE
            yield input_ids, labels

    totals[0] = _row_losses(model, batches(), device, autocast, documents).sum()
    nats, n_tokens, n_bytes = _sum_over_ranks(totals, device, reduce)
    return {"val_loss": float(nats / n_tokens), "val_bpb": float(nats / math.log(2) / n_bytes)}


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


class HellaSwag:
    """HellaSwag items tokenised once, to be scored as often as wanted.

    Args:
        items: from `load_hellaswag`.
        tokenizer: a byte-level BPE, as every GPT-2 has.
        n_positions: longest input of the model; longer ones lose tokens on the left, as in lm-evaluation-harness.
        ways: which of "lm_eval" and "lecture" to score; each costs four rows an item.
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

        # A byte-level BPE always cuts before the space, so the two parts give the tokens of the whole.
        call: Any = tokenizer  # the base class does not declare that it can be called
        encode = partial(call, add_special_tokens=False, return_attention_mask=False, verbose=False)
        contexts = encode([context for context, _ in texts])["input_ids"]
        endings = encode([f" {ending}" for _, endings in texts for ending in endings])["input_ids"]

        # Row r is ending r % 4 of text r // 4. Its first tokens are the inputs, all but the first the labels.
        rows = [(contexts[r // ENDINGS] + ending)[-n_positions - 1 :] for r, ending in enumerate(endings)]
        lengths = np.array([len(row) for row in rows])
        n_tokens = np.minimum([len(ending) for ending in endings], lengths - 1)
        self._n_tokens = n_tokens.reshape(self._shape)
        sizes = [*(size for size in BUCKETS if size < n_positions), n_positions]
        bucket_of = np.searchsorted(sizes, lengths - 1)
        self._buckets = []
        for bucket in np.unique(bucket_of):
            numbers = np.flatnonzero(bucket_of == bucket)
            tokens = np.zeros((len(numbers), sizes[bucket] + 1), dtype=np.int32)
            for row, number in zip(tokens, numbers, strict=True):
                row[: lengths[number]] = rows[number]
            last = lengths[numbers] - 1  # labels are the positions first ... last - 1
            self._buckets.append((numbers, tokens, last - n_tokens[numbers], last))

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
    ) -> HellaSwagScores:
        """Score all items with the model as it is; every rank returns the scores of all.

        Args:
            tokens_per_batch: most tokens, padding included, per rank and forward call (one row at least).
            reduce, autocast: as in `validation_loss`.
        """
        device = torch.device(device)
        scored: list[np.ndarray] = []  # row numbers, -1 where a row is padding

        def batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for numbers, tokens, first, last in self._buckets:
                length = tokens.shape[1] - 1
                rows_per_rank = -(-len(numbers) // world_size)
                n_calls = -(-rows_per_rank // max(1, tokens_per_batch // length))
                batch_size = -(-rows_per_rank // n_calls)  # calls of equal size: one shape a bucket, least padding
                mine = np.full(n_calls * batch_size, -1)
                found = np.arange(rank, len(numbers), world_size)
                mine[: len(found)] = found
                for rows in mine.reshape(n_calls, batch_size):
                    windows = tokens[rows].astype(np.int64)  # (B, T + 1)
                    position = np.arange(length)
                    labelled = (position >= first[rows, None]) & (position < last[rows, None]) & (rows >= 0)[:, None]
                    scored.append(np.where(rows >= 0, numbers[rows], -1))
                    yield windows[:, :-1].copy(), np.where(labelled, windows[:, 1:], IGNORE)

        losses = _row_losses(model, batches(), device, autocast)
        numbers = np.concatenate(scored)
        loglikelihoods = np.zeros(math.prod(self._shape))
        loglikelihoods[numbers[numbers >= 0]] = -losses[numbers >= 0]
        return self._scores(_sum_over_ranks(loglikelihoods, device, reduce).reshape(self._shape))

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


def load_folder(
    folder_or_hub_id: str | Path, device: torch.device | str = "cpu"
) -> tuple[GPTForCausalLM, PreTrainedTokenizerBase]:
    """A GPT-2 checkpoint, stock or ours, in float32 and eval mode, and its tokenizer (the packaged one if it has none).

    Raises:
        ValueError: one line, when there is no such folder or model, when it is not a GPT-2, or lacks weights.
    """
    from gpt2_hf.model import GPTForCausalLM

    name = str(folder_or_hub_id)
    # A hub id has at most one slash and never starts with a dot or a slash.
    if not Path(name).is_dir() and not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise ValueError(f"no folder {name}: give a checkpoint folder (with config.json), or a model id of the Hub")
    try:
        model: Any = GPTForCausalLM.from_pretrained(name, dtype=torch.float32)
        tokenizer: Any = AutoTokenizer.from_pretrained(name)
    except OSError as error:
        where = "" if Path(name).is_dir() else " (no such folder, so looked for on the Hub)"
        why = str(error).strip().splitlines()[0].removeprefix(f"cannot load {name}: ")
        raise ValueError(f"cannot load {name}{where}: {why}") from None
    if len(tokenizer) <= 1:  # transformers makes an empty vocabulary of a folder without tokenizer files
        tokenizer = load_tokenizer()
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"{name} has {model.config.vocab_size} tokens in its model and {len(tokenizer)} in its tokenizer: "
            "put the model's own tokenizer files in the folder"
        )
    return model.to(device).eval(), tokenizer


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise ValueError(f"device {name!r} cannot be used ({str(error).splitlines()[0]}): try cpu") from None


def evaluate_folder(
    folder_or_hub_id: str | Path,
    data: str | Path | None = None,
    *,
    n_windows: int | None = None,
    hellaswag_items: int | None = None,
    document_mask: bool = False,
    tokens_per_batch: int = 16_384,
    device: str = "auto",
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
) -> dict[str, float]:
    """Evaluate a checkpoint folder or hub model.

    Args:
        data: prepared data folder whose split "val" gives val_loss and val_bpb; without it there is neither.
        n_windows: validation windows to use, from the first (default: all); each as long as the model's n_positions.
        hellaswag_items: size of the fixed HellaSwag subset (default: all 10,042); 0 leaves HellaSwag out.
        document_mask: let validation tokens see only their own document, as a run with data.document_mask does.
        tokens_per_batch: tokens of a forward call; lower it if memory runs out.
        device: "auto" takes an accelerator if there is one.
        dtype: what to compute in; "auto" is bfloat16 on CUDA where supported, as in training.

    Raises:
        ValueError: one line, for a folder, data or number that cannot be used.
    """
    where = _device(device)
    if dtype == "auto":
        dtype = "bfloat16" if where.type == "cuda" and torch.cuda.is_bf16_supported(False) else "float32"
    autocast = partial(torch.autocast, where.type, dtype=getattr(torch, dtype), enabled=dtype != "float32")

    model, tokenizer = load_folder(folder_or_hub_id, where)
    n_positions = model.config.n_positions
    results: dict[str, float] = {}
    if data is not None:
        shards = open_split(open_folder(data), "val")
        if shards.vocab_size > model.config.vocab_size:
            raise ValueError(
                f"{data} has a vocabulary of {shards.vocab_size}, the model one of {model.config.vocab_size}: "
                "evaluate on data made with the model's tokenizer"
            )
        stream = TokenStream(shards, n_positions, seed=0, shuffle=False)
        documents = None
        if document_mask:
            attention = model.config._attn_implementation
            documents = DocumentMask(shards.eot, shards.eot_first, attention, getattr(torch, dtype))
        results |= validation_loss(
            model,
            stream,
            n_windows=stream.n_windows if n_windows is None else n_windows,
            batch_size=max(1, tokens_per_batch // n_positions),
            device=where,
            autocast=autocast,
            documents=documents,
        )
    if hellaswag_items != 0:
        task = HellaSwag(load_hellaswag(hellaswag_items), tokenizer, n_positions=n_positions)
        results |= task.score(model, device=where, tokens_per_batch=tokens_per_batch, autocast=autocast).metrics
    return results
