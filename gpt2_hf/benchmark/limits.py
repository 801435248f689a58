"""What the machine can do at most, measured, and the least time that a training step can take there."""

from __future__ import annotations

from functools import partial

import torch

from .. import hardware
from ..training.build import DTYPES
from .variants import Shape


def measure_limits(device: torch.device, seconds: float) -> dict[str, float]:
    """FLOP/s of matrix products in fp32 and in what the device trains in, and bytes/s of a copy (read and written).

    Each is the best of many. A precision that the device only emulates is no limit of it, and is not measured.
    """
    precisions = {hardware.default_precision(device), "fp32"}
    limits = {f"gemm_{name}": hardware.measure_gemm(device, DTYPES[name], seconds / 3) for name in sorted(precisions)}
    source = torch.randn(2**25 if device.type == "cpu" else 2**28, device=device)  # beyond every cache
    target = torch.empty_like(source)
    limits["copy"] = 2 * 4 * source.numel() / hardware.fastest(partial(target.copy_, source), device, seconds / 3)
    return limits


def products(limits: dict[str, float]) -> dict[str, float]:
    """FLOP/s of the matrix products that were measured, by precision."""
    return {name.removeprefix("gemm_"): value for name, value in limits.items() if name.startswith("gemm_")}


def floor_seconds(shape: Shape, limits: dict[str, float]) -> dict[str, float]:
    """Seconds that an optimizer step on unmodified GPT-2 takes at the very least, by part.

    matrices: every weight matrix meets every token once forward and twice backward; attention: its two products over
    the causal half, likewise; optimizer: AdamW reads parameter, gradient and two moments and writes three of them, in
    fp32; softmax: the logits, in two bytes, are read and written once between the products that make and take them.

    A floor, which no implementation need reach: attention is priced at the rate of one large matrix product, though
    its own are small and wait for a softmax, and whatever else happens between the products costs nothing here.
    """
    c, tokens = shape.n_embd, shape.tokens
    head = shape.vocab_size * c
    blocks = 12 * c * c * shape.n_layer
    gemm, copy = max(products(limits).values()), limits["copy"]
    return {
        "matrices": 6 * tokens * (head + blocks) / gemm,
        "attention": 6 * tokens * shape.n_layer * c * shape.seq_len / gemm,
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
