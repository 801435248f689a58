"""Linear head and cross-entropy in one, without the (tokens, vocabulary) matrix of logits.

For GPT-2 124M at 64 x 1024 tokens the fp32 logits alone are 13 GB. Here the tokens go through in chunks: each chunk
computes its logits, log-sum-exp, loss, and at once the gradients that the backward pass will ask for; its logits are
then dropped. Same mathematics as ``cross_entropy(hidden @ weight.T)``, differently ordered.

Letters: N tokens with a label, n tokens of a chunk, C channels, V vocabulary, P vocabulary padded for the hardware.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
# Matrix units work on tiles: 50257 columns (29 x 1733) run 1.3 to 1.7 times slower than 50304 = 393 * 128.
PAD_MULTIPLE = 128
# Most bytes of a chunk's logits (not compiled, their copy in fp32 comes on top). The gradient of the weight is added up
# once a chunk, which costs a GPU more than its memory; on a CPU 512 tokens of GPT-2 in bf16 are as fast as more.
CHUNK_BYTES = {"cpu": 50 * 2**20, "cuda": 2**30}
STRIPE = 8192  # columns of such a chunk that a product takes at once
# Tokens and columns of a tile of logits that stays in a CPU's cache from the GEMM to the sum over its columns.
TILE = (512, 1024)


def exponentiate(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Turn logits into the numerators of their softmax, e = exp(logit - row's maximum), in place: for a CPU.

    Args:
        logits: (n, V).
        labels: (n,), valid column numbers. (To look their logits up in here makes the compiler keep e, instead of
            computing it once for the sum and once more for its place.)

    Returns:
        Each row's sum of e, and its negative log-likelihood, both (n,), in fp32 (fp64 for fp64 logits).
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    wanted = _of_labels(wide, labels)
    top, total = _sum_of_exponentials(wide)
    if wide is not logits:
        logits.copy_(wide)
    return total[:, 0], (total.log() + top)[:, 0] - wanted


def softmax(logits: Tensor, wanted: Tensor, counts: Tensor, vocab_size: int) -> Tensor:
    """Turn logits into ``counts`` times their softmax, in place: for a GPU.

    Compiled, this is one kernel that reads the chunk twice, the second time from the card's cache, and writes it once.
    So that it can be one, the labels' logits come from outside; and so that its accesses are wide, the padded columns
    come along.

    Args:
        logits: (n, P), of which the columns from ``vocab_size`` on are padding, and become 0.
        wanted: (n,) fp32 or fp64, the logit of each row's label.
        counts: (n,).

    Returns:
        Each row's negative log-likelihood, (n,), in fp32 (fp64 for fp64 logits).
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    wide[:, vocab_size:] = float("-inf")
    top, total = _sum_of_exponentials(wide)
    wide.mul_(counts[:, None] / total)
    if wide is not logits:
        logits.copy_(wide)
    return (total.log() + top)[:, 0] - wanted


def likelihood(logits: Tensor, wanted: Tensor, vocab_size: int) -> Tensor:
    """Negative log-likelihood of each row's label, (n,), as ``softmax`` gives it; ``logits`` are spent."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    wide[:, vocab_size:] = float("-inf")
    top, total = _sum_of_exponentials(wide)
    return (total.log() + top)[:, 0] - wanted


def _sum_of_exponentials(wide: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's maximum and sum of e, both (n, 1); ``wide``, (n, V), becomes e. In place, as without a compiler each
    step would hold the chunk once more."""
    top = wide.amax(dim=-1, keepdim=True)
    return top, wide.sub_(top).exp_().sum(dim=-1, keepdim=True)


def _of_labels(logits: Tensor, labels: Tensor) -> Tensor:
    """The logit of each row's label, (n,), in the precision of the softmax."""
    return logits.gather(1, labels[:, None])[:, 0].to(torch.promote_types(logits.dtype, torch.float32))


class LossKernels:
    """The elementwise parts of the loss. ``compile()`` fuses each into one pass over the chunk."""

    exponentiate: Callable[..., tuple[Tensor, Tensor]]
    softmax: Callable[..., Tensor]
    likelihood: Callable[..., Tensor]

    @classmethod
    def compile(cls, **options: Any) -> None:
        for kernel in (exponentiate, softmax, likelihood):
            setattr(cls, kernel.__name__, staticmethod(torch.compile(kernel, **options)))

    @classmethod
    def reset(cls) -> None:
        """Without the compiler, as in the beginning."""
        for kernel in (exponentiate, softmax, likelihood):
            setattr(cls, kernel.__name__, staticmethod(kernel))


LossKernels.reset()


@functools.cache
def _adds_in_fp32(device: str, dtype: torch.dtype) -> bool:
    """Whether a product of 16-bit factors can be added to an fp32 matrix at once, without rounding it first."""
    if device != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return False
    factor, total = torch.ones(16, 16, dtype=dtype, device=device), torch.ones(16, 16, device=device)
    try:
        torch.addmm(total, factor, factor, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):  # before torch 2.12 or so the matrix must be of 16 bits too
        return False
    return True


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, added up in total's precision, not in that of the GEMM."""
    if _adds_in_fp32(total.device.type, a.dtype):
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += a @ b


def _pad_rows(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The head's weight (V, C) cast for compute, as (P, C) with rows of zeros at the end."""
    padding = -weight.shape[0] % PAD_MULTIPLE
    return F.pad(weight.to(dtype), (0, 0, 0, padding))


def _chunks(x: Tensor, padded_vocab: int) -> list[slice]:
    """Cut the tokens (N, C) into chunks of one size where that is possible: one shape to compile."""
    n_tokens = len(x)
    limit = max(128, CHUNK_BYTES.get(x.device.type, 2**28) // (padded_vocab * x.element_size()))
    fewest = -(-n_tokens // limit)
    count = next((n for n in range(fewest, 2 * fewest) if n_tokens % n == 0), fewest)
    size = -(-n_tokens // count)
    return [slice(start, min(start + size, n_tokens)) for start in range(0, n_tokens, size)]


class _SummedLoss(torch.autograd.Function):
    """Summed negative log-likelihood times ``factor``; both gradients are made during the forward pass.

    The factor, which may be as small as 1 / 524288, and the upstream gradient, which may be a gradient scaler's 65536,
    meet in fp32 in the backward pass: either alone would leave the range of fp16.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        counts: Tensor,
        factor: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        vocab_size = weight.shape[0]
        padded = _pad_rows(weight, dtype)  # (P, C)
        x = hidden.to(dtype)  # (N, C)
        need_dx, need_dw = ctx.needs_input_grad[:2]
        dx = torch.empty_like(x) if need_dx else None
        dw = torch.zeros_like(weight) if need_dw else None
        # On a CPU the narrower products add to dw in the cache, and need less room to arrange their factors.
        stripes = range(0, vocab_size, STRIPE if x.device.type == "cpu" else vocab_size)
        # The division by each row's sum costs a compiled kernel on a GPU nothing. A CPU would compute exponentials a
        # second time: there it goes to the narrow sides of the products. fp16's range does not hold the numerators.
        divides = x.device.type != "cpu" or dtype == torch.float16
        losses = []
        for rows in _chunks(x, len(padded)):
            e, chunk, count, label = x[rows] @ padded.T, x[rows], counts[rows], labels[rows]  # (n, P), logits at first
            # d(loss)/d(logits) is count * (softmax - onehot) = share * (e - total * onehot).
            if divides:
                share, height = None, count
                chunk_nll = LossKernels.softmax(e, _of_labels(e, label), count, vocab_size)
            else:  # padded columns are 0, as the weight's padded rows are, and stay so
                height, chunk_nll = LossKernels.exponentiate(e[:, :vocab_size], label)
                share = (count / height)[:, None]
            losses.append(chunk_nll @ count)
            # At the label that is height * (p - 1), computed in fp32. (By index: scatter_ copies the chunk on a CPU.)
            e[torch.arange(len(e), device=e.device), label] = (torch.expm1(-chunk_nll) * height).to(dtype)
            if dx is not None:
                if share is None:
                    torch.mm(e, padded, out=dx[rows])
                else:
                    dx[rows] = (e @ padded) * share
            if dw is not None:
                if share is not None:
                    chunk = (chunk * share).to(dtype)
                for start in stripes:
                    columns = slice(start, min(start + stripes.step, vocab_size))
                    _add_product(dw[columns], e[:, columns].T, chunk)
            del e  # before the next one is made
        ctx.save_for_backward(dx, dw, factor)
        ctx.hidden_dtype = hidden.dtype
        return torch.stack(losses).sum() * factor

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dx, dw, factor = ctx.saved_tensors
        factor = factor * grads[0]
        if dx is not None:
            is_wide = dx.dtype != torch.float16 and dx.dtype == ctx.hidden_dtype
            dx = dx.mul_(factor) if is_wide else (dx.to(factor.dtype) * factor).to(ctx.hidden_dtype)
        # In place, as it is as large as any parameter. Autograd sees that and refuses a second backward pass.
        dw = dw.mul_(factor) if dw is not None else None
        return dx, dw, None, None, None, None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    num_items_in_batch: int | Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy of ``softmax(hidden @ weight.T)`` against ``labels``.

    Without gradients the head is computed only where there is a label. GEMMs run in the autocast dtype if there is
    one, else in ``hidden``'s; the softmax in fp32.

    Args:
        hidden: (..., C).
        weight: (V, C), the head's parameter.
        labels: (...) int64; -100 is ignored.
        num_items_in_batch: divisor of the summed loss instead of the count of labels ("mean" only).
        reduction: "mean", "sum", or "none" for per-token losses of the labels' shape, 0 where ignored.

    Returns:
        fp32 (fp64 for fp64 input): a scalar, or (...) for "none", which has no gradient.

    Raises:
        ValueError: for another reduction, or "none" where a gradient is wanted.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be mean, sum or none, not {reduction!r}")
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    wants_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    flat, flat_labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)

    with torch.autocast(device, enabled=False):
        if not wants_grad:
            nll = _nll(flat, weight, flat_labels, dtype)
            if reduction == "none":
                return nll.view(labels.shape)
            total = nll.sum()
            return total if reduction == "sum" else total / _count(flat_labels, num_items_in_batch)
        if reduction == "none":
            raise ValueError('reduction="none" is for evaluation: call it under torch.no_grad()')
        divisor = _count(flat_labels, num_items_in_batch) if reduction == "mean" else 1
        # Ignored rows are computed and counted 0 times: leaving them out would need their number on the host.
        counts = (flat_labels != IGNORE).to(torch.promote_types(dtype, torch.float32))
        if not isinstance(divisor, Tensor):  # filled in on the device: a copy would wait for it
            divisor = torch.full((), divisor, dtype=counts.dtype, device=counts.device)
        factor = divisor.to(counts).reciprocal()
        return _SummedLoss.apply(flat, weight, flat_labels.clamp(min=0), counts, factor, dtype)


def _count(labels: Tensor, num_items_in_batch: int | Tensor | None) -> int | Tensor:
    return (labels != IGNORE).sum() if num_items_in_batch is None else num_items_in_batch


def _nll(hidden: Tensor, weight: Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor:
    """Negative log-likelihood per token, (N,), 0 where ignored; nothing is kept for a backward pass."""
    keep = (labels != IGNORE).nonzero()[:, 0]
    nll = torch.zeros(len(labels), dtype=torch.promote_types(dtype, torch.float32), device=hidden.device)
    x, kept_labels = hidden[keep].to(dtype), labels[keep]
    if x.device.type == "cpu":
        nll[keep] = _nll_by_tiles(x, weight, kept_labels).to(nll.dtype)
        return nll
    padded = _pad_rows(weight, dtype)
    # Full batches have training's shapes; a count of labels that varies would build a kernel for each.
    measure = LossKernels.likelihood if len(keep) == len(labels) else likelihood
    for rows in _chunks(x, len(padded)) if len(x) else []:
        logits = x[rows] @ padded.T
        nll[keep[rows]] = measure(logits, _of_labels(logits, kept_labels[rows]), len(weight))
    return nll


def _nll_by_tiles(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood, (N,), for a CPU: as fast without a compiler as whole rows of logits are with one, which
    would go to memory and back for each step of the softmax."""
    buffer, nll = x.new_empty(TILE[0] * TILE[1]), []
    for rows, wanted in zip(x.split(TILE[0]), labels.split(TILE[0]), strict=True):
        sums = []  # log-sum-exp over the columns of each tile
        for columns in weight.split(TILE[1]):
            tile = buffer[: len(rows) * len(columns)].view(len(rows), len(columns))
            torch.mm(rows, columns.to(x.dtype).T, out=tile)
            logits = tile.to(torch.promote_types(x.dtype, torch.float32))
            top = logits.amax(dim=-1)
            sums.append(logits.sub_(top[:, None]).exp_().sum(dim=-1).log_().add_(top))
        nll.append(torch.stack(sums).logsumexp(dim=0) - (rows * weight[wanted]).sum(dim=-1, dtype=sums[0].dtype))
    return torch.cat(nll) if nll else x.new_empty(0)
