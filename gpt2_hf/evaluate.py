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
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import resources
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from gpt2_hf import hardware
from gpt2_hf.checkpoint import find_model
from gpt2_hf.data.remote import open_folder
from gpt2_hf.data.shards import open_split
from gpt2_hf.data.stream import TokenStream
from gpt2_hf.data.tokenizer import load_tokenizer, token_byte_lengths
from gpt2_hf.documents import DocumentMask
from gpt2_hf.knobs import PathName, Range, checked

if TYPE_CHECKING:
    from gpt2_hf.model import GPTForCausalLM

Reduce = Callable[[Tensor], Tensor]  # sums a tensor over all ranks
Autocast = Callable[[], AbstractContextManager]

IGNORE = -100
ENDINGS = 4
WAYS = ("lm_eval", "lecture")
LENGTH_MULTIPLE = 8  # of HellaSwag's rows: attention kernels of GPUs want masks aligned so


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout and no gradients in here; the model's mode comes back, even after an error."""
    was_training = model.training
    model.eval()
    try:
        # Not inference_mode: torch.compile would build every graph again for inference tensors.
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def _token_losses(model: nn.Module, autocast: Autocast, **told: Any) -> Tensor:
    """Negative log-likelihood of each label in nats, (B, T), 0 where there is none; to be summed, so in float64."""
    with autocast():
        loss = model(**told, use_cache=False, reduction="none").loss
    return loss if loss.device.type == "mps" else loss.double()  # MPS has no float64


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
    losses, totals = [], np.zeros(3)  # nats, tokens, bytes
    with _evaluating(model):
        for first in range(0, n_windows, batch_size * world_size):
            start = first + rank * batch_size
            count = max(0, min(batch_size, n_windows - start))
            windows = np.zeros((batch_size, stream.seq_len + 1), dtype=np.int64)
            windows[:count] = stream.batch(start, count)
            input_ids, labels = torch.from_numpy(windows[:, :-1].copy()), windows[:, 1:].copy()
            totals[1:] += count * stream.seq_len, byte_lengths[labels[:count]].sum()
            labels[count:] = IGNORE
            told: dict[str, Any] = {"input_ids": input_ids.to(device)}
            if documents is not None:
                told |= documents(told["input_ids"], input_ids)
            told["shift_labels"] = torch.from_numpy(labels).to(device)
            losses.append(_token_losses(model, autocast, **told).sum(-1))
    totals[0] = torch.cat(losses).cpu().double().sum()  # read only now, so that no call waited for the one before
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


class HellaSwag:
    """HellaSwag items tokenised once, to be scored as often as wanted.

    Args:
        items: from `load_hellaswag`.
        tokenizer: a byte-level BPE, as every GPT-2 has.
        n_positions: longest input of the model; longer ones lose tokens on the left, as in lm-evaluation-harness.
        ways: which of "lm_eval" and "lecture" to score; each costs a row an item, or four if those lose tokens.
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

    def _batches(self, tokens_per_batch: int, rank: int, world_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The fields of `_row` for this rank's rows, (4, B, T), and the number of each part's ending, (B, 4).

        Rows of padding, and missing parts, have the number of endings there.
        """
        start = 0
        while start < len(self._rows):
            length = -(-self._rows[start][0].shape[1] // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
            rows = self._rows[start : start + max(1, tokens_per_batch // length) * world_size]
            rows = [row for row in rows if row[0].shape[1] > 0.85 * length - LENGTH_MULTIPLE]  # little padding
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
    ) -> HellaSwagScores:
        """Score all items with the model as it is; every rank returns the scores of all.

        A model on another attention backend than eager computes with sdpa here, the only other one to take such masks.

        Args:
            tokens_per_batch: most tokens, padding included, per rank and forward call (one row at least).
            reduce, autocast: as in `validation_loss`.
        """
        device = torch.device(device)
        parts = torch.arange(1, ENDINGS + 1, device=device)[:, None]  # (4, 1)
        losses, scored = [], []
        with _evaluating(model), _masked_attention(model) as backend:
            for fields, numbers in self._batches(tokens_per_batch, rank, world_size):
                input_ids, labels, part, position_ids = torch.from_numpy(fields).to(device)  # each (B, T)
                told = {"input_ids": input_ids, "shift_labels": labels, "position_ids": position_ids}
                loss = _token_losses(model, autocast, **told, attention_mask=parts_mask(part, backend))
                losses.append(loss[:, None].where(part[:, None] == parts, 0).sum(-1))  # (B, 4)
                scored.append(numbers)
        loglikelihoods = np.zeros(math.prod(self._shape) + 1)
        loglikelihoods[np.concatenate(scored)] = -torch.cat(losses).cpu().double().numpy()
        return self._scores(_sum_over_ranks(loglikelihoods[:-1], device, reduce).reshape(self._shape))

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
    """A GPT-2 checkpoint, stock or ours, or a run's, in float32 and eval mode, and its tokenizer (or the packaged one).

    Raises:
        ValueError: one line, when there is no such folder or model, when it is not a GPT-2, lacks weights or is an
            adapter.
    """
    from gpt2_hf.model import GPTForCausalLM

    name = str(folder_or_hub_id)
    if (Path(name) / "checkpoints").is_dir() or (Path(name) / "final").is_dir():
        try:
            name = str(find_model(Path(name)))
        except FileNotFoundError as error:
            raise ValueError(str(error)) from None
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
    if model._hf_peft_config_loaded:
        raise ValueError(
            f"{name} is an adapter, not a whole model: merge it (peft's merge_and_unload) and give the folder that "
            "save_pretrained makes of the result"
        )
    if len(tokenizer) <= 1:  # transformers makes an empty vocabulary of a folder without tokenizer files
        tokenizer = load_tokenizer()
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"{name} has {model.config.vocab_size} tokens in its model and {len(tokenizer)} in its tokenizer: "
            "put the model's own tokenizer files in the folder"
        )
    return model.to(device).eval(), tokenizer


@checked
def evaluate_folder(
    folder_or_hub_id: str | Path,
    data: Annotated[str | Path, PathName(remote=True)] | None = None,
    *,
    n_windows: Annotated[int, Range(1)] | None = None,
    hellaswag_items: Annotated[int, Range(0, 10_042)] | None = None,
    document_mask: bool = False,
    tokens_per_batch: Annotated[int, Range(1, 10**9)] = 16_384,
    device: str = "auto",
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
) -> dict[str, float]:
    """Evaluate a checkpoint folder or hub model.

    Args:
        data: prepared data folder whose split "val" gives val_loss and val_bpb; without it there is neither.
        n_windows: validation windows to use, from the first (default: all); each as long as the model's n_positions.
        hellaswag_items: size of the fixed HellaSwag subset (default: all 10,042); 0 leaves HellaSwag out.
        document_mask: let validation tokens see only their own document, as a run with data.document_mask does.
        tokens_per_batch: tokens of a forward call; lower it if memory runs out. On a CPU 2048 are a little faster.
        device: "auto" takes an accelerator if there is one.
        dtype: what to compute in; "auto" is bfloat16 on CUDA where supported, as in training.

    Raises:
        ValueError: one line, for a folder, data or number that cannot be used.
    """
    where = hardware.pick_device(device)
    if where.type == "cpu":
        hardware.reuse_freed_memory()
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
