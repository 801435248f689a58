"""What the machine can do at most, measured, and the least time that a training step can take there."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import hardware
from ..model.loss import CHUNK_BYTES, PAD_MULTIPLE
from ..training.build import DTYPES
from .variants import Shape

# Input and output width of each block's matrices, in channels.
BLOCK = {"c_attn": (1, 3), "c_proj": (1, 1), "fc": (1, 4), "proj": (4, 1)}


def measure_limits(shape: Shape, device: torch.device, seconds: float) -> dict[str, float]:
    """FLOP/s of matrix products in fp32 and in what the device trains in, and bytes/s of a copy (read and written).

    Each is the best of many. A precision that the device only emulates is no limit of it, and is not measured. On a
    GPU, what ``measure_shape`` finds is there too.
    """
    precisions = {hardware.default_precision(device), "fp32"}
    limits = {f"gemm_{name}": hardware.measure_gemm(device, DTYPES[name], seconds / 3) for name in sorted(precisions)}
    source = torch.randn(2**25 if device.type == "cpu" else 2**28, device=device)  # beyond every cache
    target = torch.empty_like(source)
    limits["copy"] = 2 * 4 * source.numel() / hardware.fastest(partial(target.copy_, source), device, seconds / 3)
    return limits if device.type == "cpu" else limits | measure_shape(shape, device, seconds)


def measure_shape(shape: Shape, device: torch.device, seconds: float) -> dict[str, float]:
    """FLOP/s of the products of a training step of this shape, and of its attention, each forward and back together.

    In the precision of training: each block's matrices on a micro-batch, the head on a chunk of tokens, PyTorch's
    attention over the causal half.
    """
    dtype, c = DTYPES[hardware.default_precision(device)], shape.n_embd
    tokens = shape.micro_batch_size * shape.seq_len
    padded = -(-shape.vocab_size // PAD_MULTIPLE) * PAD_MULTIPLE
    chunk = min(tokens, CHUNK_BYTES.get(device.type, 2**28) // (padded * dtype.itemsize))
    sizes = {name: (tokens, n_in * c, n_out * c) for name, (n_in, n_out) in BLOCK.items()}
    found = {}
    for name, (rows, n_in, n_out) in {**sizes, "head": (chunk, c, padded)}.items():
        x, weight, gradient = (
            torch.randn(*size, device=device).to(dtype) for size in ((rows, n_in), (n_in, n_out), (rows, n_out))
        )
        took = hardware.fastest(partial(_multiply, x, weight, gradient), device, seconds / 6)
        found[f"product_{name}"] = 6 * rows * n_in * n_out / took
    size = (shape.micro_batch_size, shape.seq_len, shape.n_head, c // shape.n_head)
    heads = [torch.randn(size, device=device).to(dtype).transpose(1, 2).requires_grad_() for _ in range(3)]
    took = hardware.fastest(partial(_attend, heads, torch.randn_like(heads[0])), device, seconds / 6)
    return found | {"attention": 6 * tokens * c * shape.seq_len / took}


def _multiply(x: Tensor, weight: Tensor, gradient: Tensor) -> None:
    """A product, and those for its input's gradient and its weight's."""
    torch.mm(x, weight)
    torch.mm(gradient, weight.T)
    torch.mm(x.T, gradient)


def _attend(heads: list[Tensor], gradient: Tensor) -> None:
    query, key, value = heads
    torch.autograd.grad(F.scaled_dot_product_attention(query, key, value, is_causal=True), heads, gradient)


def products(limits: dict[str, float]) -> dict[str, float]:
    """FLOP/s of the matrix products that were measured, by precision."""
    return {name.removeprefix("gemm_"): value for name, value in limits.items() if name.startswith("gemm_")}


def floor_seconds(shape: Shape, limits: dict[str, float]) -> dict[str, float]:
    """Seconds that an optimizer step on unmodified GPT-2 takes at the very least, by part.

    matrices: every weight matrix meets every token once forward and twice backward; attention: its two products over
    the causal half, likewise; optimizer: AdamW reads parameter, gradient and two moments and writes three of them, in
    fp32; softmax: the logits, in two bytes, are read and written once between the products that make and take them.

    On a GPU each of these products is priced at the rate that was measured for its own shape, attention at that of
    PyTorch's, and there is a part more, between: in two bytes the residual stream is read and written by each of a
    block's two branches, and what goes into GELU and comes out of it crosses once, forward and backward.

    On a CPU all products have the rate of one large matrix product, which those of attention, small and waiting for a
    softmax, do not reach, and what else happens between them costs nothing.

    A floor, which no implementation need reach.
    """
    c, tokens = shape.n_embd, shape.tokens
    head = shape.vocab_size * c
    blocks = 12 * c * c * shape.n_layer
    copy, attention = limits["copy"], 6 * tokens * shape.n_layer * c * shape.seq_len
    if "attention" in limits:
        in_blocks = sum(n_in * n_out * c * c / limits[f"product_{name}"] for name, (n_in, n_out) in BLOCK.items())
        matrices = 6 * tokens * (shape.n_layer * in_blocks + head / limits["product_head"])
        residual, gelu = 2 * 2 * c, 4 * c + 4 * c  # numbers of a token and block that cross in each direction
        measured = {
            "matrices": matrices,
            "attention": attention / limits["attention"],
            "between": 2 * 2 * (residual + gelu) * tokens * shape.n_layer / copy,
        }
    else:
        gemm = max(products(limits).values())
        measured = {"matrices": 6 * tokens * (head + blocks) / gemm, "attention": attention / gemm}
    return measured | {
        "softmax": 2 * 2 * tokens * shape.vocab_size / copy,
        "optimizer": 7 * 4 * (head + blocks + shape.seq_len * c) / copy,
    }


def peak_of(device: torch.device, limits: dict[str, float], achieved: float) -> tuple[float, str]:
    """FLOP/s that MFU is measured against: a known GPU's data sheet, else the fastest measured matrix product.

    Args:
        achieved: by the fastest variant. Where even this is more, the product was measured in a bad moment.
    """
    if device.type == "cuda":
        peak, source = hardware.peak_flops(device, torch.bfloat16)
    else:
        peak, precision = max((value, name) for name, value in products(limits).items())
        source = f"measured {precision} matrix product"
    return (peak, source) if achieved <= peak else (achieved, f"the fastest variant, which beat the {source}")
