"""What the machine can do at most, measured, and the least time that a training step can take there."""

from __future__ import annotations

from functools import partial

import torch

from .. import hardware
from .variants import Shape


def measure_limits(device: torch.device, seconds: float) -> dict[str, float]:
    """FLOP/s of bf16 and fp32 matrix products and bytes/s of a copy (read and written), each the best of many."""
    dtypes = {"gemm_bf16": torch.bfloat16, "gemm_fp32": torch.float32}
    limits = {name: hardware.measure_gemm(device, dtype, seconds / 3) for name, dtype in dtypes.items()}
    source = torch.randn(2**25 if device.type == "cpu" else 2**28, device=device)  # beyond every cache
    target = torch.empty_like(source)
    limits["copy"] = 2 * 4 * source.numel() / hardware.fastest(partial(target.copy_, source), device, seconds / 3)
    return limits


def floor_seconds(shape: Shape, limits: dict[str, float]) -> dict[str, float]:
    """The least seconds of an optimizer step on unmodified GPT-2, by part.

    matrices: every weight matrix meets every token once forward and twice backward; attention: its two products over
    the causal half, likewise; optimizer: AdamW reads parameter, gradient and two moments and writes three of them, in
    fp32; softmax: the logits, in bf16, are read and written once between the products that make and take them.
    """
    c, tokens = shape.n_embd, shape.tokens
    head = shape.vocab_size * c
    blocks = 12 * c * c * shape.n_layer
    gemm, copy = limits["gemm_bf16"], limits["copy"]
    return {
        "matrices": 6 * tokens * (head + blocks) / gemm,
        "attention": 6 * tokens * shape.n_layer * c * shape.seq_len / gemm,
        "softmax": 2 * 2 * tokens * shape.vocab_size / copy,
        "optimizer": 7 * 4 * (head + blocks + shape.seq_len * c) / copy,
    }


def peak_of(device: torch.device, limits: dict[str, float]) -> tuple[float, str]:
    """FLOP/s that MFU is measured against: a known GPU's data sheet, else the measured bf16 matrix product."""
    if device.type == "cuda":
        return hardware.peak_flops(device, torch.bfloat16)
    return limits["gemm_bf16"], "measured bf16 matrix product"
