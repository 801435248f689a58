"""Attention backends of our own, beside those of transformers.

Shapes in comments: B batch, T positions (query), S positions (key), H heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface


def eager_attention(
    module: nn.Module,
    query: Tensor,  # (B, H, T, D)
    key: Tensor,  # (B, H, S, D)
    value: Tensor,  # (B, H, S, D)
    attention_mask: Tensor | None,  # (B, 1, T, S), added to the scores
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention written out (Vaswani et al. 2017, eq. 1); the backend that can return its weights."""
    if module.upcast:
        query, key = query.float(), key.float()
    with torch.autocast(query.device.type, enabled=False) if module.upcast else nullcontext():
        scores = query @ key.transpose(-1, -2) * scaling  # (B, H, T, S)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1).to(value.dtype)
    weights = nn.functional.dropout(weights, dropout, module.training)
    return (weights @ value).transpose(1, 2), weights  # (B, T, H, D)


def blockwise_attention(
    module: nn.Module,
    query: Tensor,  # (B, H, T, D)
    key: Tensor,  # (B, H, S, D)
    value: Tensor,  # (B, H, S, D)
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Causal attention as a few plain matrix products, for compiled training in bf16 on a CPU.

    There PyTorch's fused attention spends its time outside the matrix units. Queries go in blocks, each with the keys
    up to its end, so that little of the hidden half is computed. Anything but plain training is left to "sdpa".
    """
    n_positions = query.shape[2]
    if attention_mask is not None or dropout or key.shape[2] != n_positions or not torch.compiler.is_compiling():
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    size = max(128, -(-n_positions // 4))  # each block is compiled by itself: few of them, so that this is quick
    outputs = []
    for start in range(0, n_positions, size):
        stop = min(start + size, n_positions)
        scores = query[:, :, start:stop] @ key[:, :, :stop].transpose(-1, -2) * scaling  # (B, H, size, stop)
        place = torch.arange(stop, device=query.device)
        future = place[start:, None] < place[None]
        weights = scores.float().masked_fill(future, float("-inf")).softmax(dim=-1)
        outputs.append(weights.to(value.dtype) @ value[:, :, :stop])
    return torch.cat(outputs, dim=2).transpose(1, 2), None  # (B, T, H, D)


def _sdpa_preferring(kernel: SDPBackend) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """PyTorch's attention by one of its kernels, by others only where that one cannot."""
    order = [kernel, SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    order = [*dict.fromkeys(order), SDPBackend.MATH]

    def attention(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        with sdpa_kernel(order, set_priority=True):
            return sdpa_attention_forward(*args, **kwargs)

    return attention


# PyTorch's own kernels by name, as its own choice is not the fastest on every card. ("flash" in a name would mean the
# package to transformers.)
SDPA_KERNELS = {"sdpa_cudnn": SDPBackend.CUDNN_ATTENTION, "sdpa_fa": SDPBackend.FLASH_ATTENTION}
# Name of a backend of ours -> its function, and the backend of transformers whose kind of mask it takes.
BACKENDS: dict[str, tuple[Callable[..., tuple[Tensor, Tensor | None]], str]] = {
    "blockwise": (blockwise_attention, "sdpa")
}
BACKENDS |= {name: (_sdpa_preferring(kernel), "sdpa") for name, kernel in SDPA_KERNELS.items()}
# Backends that are causal by themselves when no mask is given, as ours must be. The others want it as a tensor, or as
# FlexAttention's block mask.
CAUSAL_WITHOUT_MASK = ("sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", *BACKENDS)
for _name, (_attend, _takes_mask_of) in BACKENDS.items():
    AttentionInterface.register(_name, _attend)
    AttentionMaskInterface.register(_name, ALL_MASK_ATTENTION_FUNCTIONS[_takes_mask_of])
