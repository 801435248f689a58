"""The validation loss of the live model, and what every measurement on it needs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data.documents import DocumentMask
from ..data.stream import TokenStream

Reduce = Callable[[Tensor], Tensor]  # sums a tensor over all ranks
Autocast = Callable[[], AbstractContextManager]
IGNORE = -100


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout and no gradients in here; the model's mode comes back, even after an error."""
    was_training = model.training
    model.eval()
    try:
        # Not inference_mode: torch.compile would build every graph again for inference tensors.
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def token_losses(model: nn.Module, autocast: Autocast, **told: Any) -> Tensor:
    """Negative log-likelihood of each label in nats, (B, T), 0 where there is none; to be summed, so in float64."""
    with autocast():
        loss = model(**told, use_cache=False, reduction="none").loss
    return loss if loss.device.type == "mps" else loss.double()  # MPS has no float64


def sum_over_ranks(values: np.ndarray, device: torch.device, reduce: Reduce | None) -> np.ndarray:
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
    window_losses: np.ndarray | None = None,
) -> dict[str, float]:
    """Mean loss over the first `n_windows` windows of a validation stream; the same on any batch size and rank count.

    Args:
        batch_size: windows per rank and forward call.
        reduce: sums a float64 tensor over the ranks; needed when world_size > 1.
        autocast: makes the context that each forward call runs in.
        documents: for a model trained with a document mask: then no token sees another document here either.
        window_losses: is filled with the mean loss of each window, (n_windows,) float64, in nats per token.

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
    byte_lengths = stream.tokenizer.token_byte_lengths
    losses, scored, totals = [], [], np.zeros(3)  # nats, tokens, bytes
    with evaluating(model):
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
            losses.append(token_losses(model, autocast, **told).sum(-1))
            scored.append(np.where(np.arange(batch_size) < count, start + np.arange(batch_size), n_windows))
    totals[0] = torch.cat(losses).cpu().double().sum()  # read only now, so that no call waited for the one before
    if window_losses is not None:
        nats_of = np.zeros(n_windows + 1)  # the last is what padding came to
        nats_of[np.concatenate(scored)] = torch.cat(losses).cpu().double().numpy()
        window_losses[:] = sum_over_ranks(nats_of[:-1], device, reduce) / stream.seq_len
    nats, n_tokens, n_bytes = sum_over_ranks(totals, device, reduce)
    return {"val_loss": float(nats / n_tokens), "val_bpb": float(nats / math.log(2) / n_bytes)}
