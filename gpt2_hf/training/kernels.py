"""Whether the fast kernels compute what plain ones do, found out before the first step; others take their place if not.

A kernel that is wrong, for this card, driver, shape or version, seldom says so: the loss falls, only less far. So the
chosen attention, compiled or not, and the loss in chunks go through a few windows of the first step, forward and back,
beside attention written out and ``cross_entropy`` over whole logits.

At the start of training the loss and the norm of all gradients hardly depend on attention: one that sees the future, or
scales by half, changes them by less than rounding to bf16 does. The gradients of the matrices that make queries, keys
and values tell: they are compared one by one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from ..config import RunConfig
from ..data.documents import DocumentMask, dense_mask
from ..data.shards import ShardSet
from ..data.stream import TokenStream, cut
from ..knobs import ConfigError
from ..model import GPTForCausalLM
from ..model.loss import IGNORE, LossKernels
from ..model.versions import untested
from .distributed import local
from .start import Start

# What is compared has at most so many windows, and so many tokens: a second or two of GPT-2 124M on two cores.
WINDOWS, TOKENS = 2, {"cpu": 256, "other": 512}
# Relative differences of the loss, of the norm of all gradients, and of the gradient of any of the matrices that make
# queries, keys and values. Rounding alone makes a fifth of it.
TOLERANCES = {
    torch.float64: (1e-9, 1e-7, 1e-6),
    torch.float32: (1e-4, 1e-3, 1e-2),
    torch.float16: (1e-2, 5e-2, 0.3),
    torch.bfloat16: (1e-2, 5e-2, 0.3),
}
NAMES = ("losses", "norms of all gradients", "gradients of attention's matrices")
# Keeps small gradients in the range of fp16, in which activations have theirs.
SCALE = 1024.0


@dataclass(frozen=True)
class Way:
    """One way to compute a training step."""

    attention: str
    is_compiled: bool

    def __str__(self) -> str:
        return f"attention {self.attention}, {'compiled' if self.is_compiled else 'not compiled'}"


@dataclass(frozen=True)
class Found:
    """What a way makes of the windows: their loss, and of this rank's share of the gradients the norm and some parts.

    Attributes:
        parts: those of the matrices that make queries, keys and values, apart, in the first and the last block.
    """

    loss: float
    norm: float
    parts: list[Tensor]


class KernelCheck:
    """Compares ways to compute a step on the first windows of ``start``, and leaves the model with one that is right.

    Every rank must make and run it: all take the same windows, and decide together. Weights and generators are then as
    before, and there are no gradients. Dropout, which no two kernels draw alike, is left out, and with it the compiler,
    which would have to build everything for this alone.

    Args:
        model: the bare model, which shares its parameters with what is trained.
        dtype: that it computes in.
    """

    def __init__(
        self,
        config: RunConfig,
        start: Start,
        stream: TokenStream,
        data: ShardSet,
        accelerator: Accelerator,
        model: GPTForCausalLM,
        dtype: torch.dtype,
    ):
        self.config, self.data, self.accelerator, self.model, self.dtype = config, data, accelerator, model, dtype
        size, seq_len = config.train.micro_batch_size, config.data.seq_len
        first = start.data_offset + config.train.tokens_before(start.step) // seq_len
        windows = torch.from_numpy(stream.batch(first, size).astype(np.int64))
        seq_len = config.data.seq_len_at(start.step)
        windows = cut(windows, seq_len)
        n_tokens = TOKENS.get(accelerator.device.type, TOKENS["other"])
        self.n_windows = max(1, min(size, WINDOWS, n_tokens // seq_len))
        self.n_positions = min(seq_len, n_tokens)  # what comes later has no part in the loss of these
        # Where documents are kept apart, windows with many of them tell most.
        n_documents = (windows[:, : self.n_positions] == data.eot).sum(dim=1)
        self.windows = windows[n_documents.argsort(descending=True, stable=True)]  # (B, T + 1)

    def run(self) -> None:
        """Raises ConfigError when no way is right."""
        is_compiled = self.model.transformer.h[0]._compiled_call_impl is not None
        chosen = Way(self.model.config._attn_implementation, is_compiled)
        ways = list(dict.fromkeys([chosen, Way("sdpa", is_compiled), Way("sdpa", False), Way("eager", False)]))
        plain = self._plain()
        difference = self._difference(ways[0], plain)
        for way, other in pairwise(ways):
            if difference is None:
                return
            self.accelerator.print(f"{way}: {difference}; taking {other}")
            self._take(other)
            difference = self._difference(other, plain)
        if difference is not None:
            newer = f" (newer than what was tested: {untested()})" if untested() else ""
            raise ConfigError(
                f"{ways[-1]}: {difference}{newer}, and nothing plainer is left; install the tested versions, or train "
                f"all the same with --train.check_kernels false"
            )

    def _difference(self, way: Way, plain: Found) -> str | None:
        """What differs from the plain form too far, on any rank, in words."""
        errors = _errors(self._fast(way), plain)
        bounds: tuple[float, ...] = TOLERANCES[self.dtype]
        if self._is_any_beyond(errors, bounds) and self.dtype != self.model.dtype:
            # Rounding may do as much to weights that attend sharply: see how far it takes the plain form.
            rounding = _errors(plain, self._plain(exact=True))
            bounds = tuple(max(bound, 3 * error) for bound, error in zip(bounds, rounding, strict=True))
        if not self._is_any_beyond(errors, bounds):
            return None
        worst = max(range(len(NAMES)), key=[e / bound for e, bound in zip(errors, bounds, strict=True)].__getitem__)
        return f"{NAMES[worst]} differ by {errors[worst]:.2g} of those of plain kernels"

    def _is_any_beyond(self, errors: Sequence[float], bounds: Sequence[float]) -> bool:
        """Whether this holds on any rank."""
        is_beyond = any(error > bound for error, bound in zip(errors, bounds, strict=True))
        n_beyond = torch.tensor(float(is_beyond), device=self.accelerator.device)
        return bool(float(self.accelerator.reduce(n_beyond, "sum")))

    def _take(self, way: Way) -> None:
        self.model.config._attn_implementation = way.attention
        if not way.is_compiled:
            for module in self.model.modules():
                module._compiled_call_impl = None
            LossKernels.reset()

    def _fast(self, way: Way) -> Found:
        """By the path of training; if that is compiled in its own shapes, as it will be needed so anyway."""
        is_compiled = way.is_compiled and not self.config.model.dropout
        on_host = self.windows if is_compiled else self._compared()
        input_ids, labels = self._on_device(on_host)
        labels[self.n_windows :] = labels[:, self.n_positions :] = IGNORE
        documents = self._documents(way.attention)
        apart = documents(input_ids, on_host[:, :-1]) if documents else {}
        n_items = self.n_windows * self.n_positions
        with self._undisturbed(way.attention, force_eager=not is_compiled):
            return self._found(self.model(input_ids, shift_labels=labels, num_items_in_batch=n_items, **apart).loss)

    def _plain(self, exact: bool = False) -> Found:
        """By attention written out, with its mask as a tensor, and cross-entropy of whole logits.

        Args:
            exact: in the precision of the weights, without what Accelerate has put around the forward pass.
        """
        input_ids, labels = self._on_device(self._compared())
        wide = torch.promote_types(self.dtype, torch.float32)
        if documents := self._documents("eager"):
            masked = documents(input_ids)
        else:
            masked = {
                "attention_mask": dense_mask(torch.arange(input_ids.shape[1], device=input_ids.device)[None], wide)
            }
        with ExitStack() as stack:
            stack.enter_context(self._undisturbed("eager", force_eager=True))
            if exact:
                stack.enter_context(patch.object(self.model, "forward", self.model._original_forward))
            logits = self.model(input_ids, use_cache=False, **masked).logits  # (n, T, V)
            return self._found(F.cross_entropy(logits.flatten(0, 1).to(wide), labels.flatten()))

    def _compared(self) -> Tensor:
        return self.windows[: self.n_windows, : self.n_positions + 1]

    def _on_device(self, windows: Tensor) -> tuple[Tensor, Tensor]:
        windows = windows.to(self.accelerator.device)
        return windows[:, :-1], windows[:, 1:].clone()

    def _documents(self, attention: str) -> DocumentMask | None:
        if not self.config.data.document_mask:
            return None
        return DocumentMask(self.data.eot, self.data.eot_first, attention, self.dtype)

    @contextmanager
    def _undisturbed(self, attention: str, force_eager: bool) -> Iterator[None]:
        """Compute so in here, without dropout; afterwards all is as before."""
        config, device = self.model.config, self.accelerator.device
        chosen = config._attn_implementation
        config._attn_implementation = attention
        self.model.train(not self.config.model.dropout)
        try:
            with (
                torch.random.fork_rng([device] if device.type == "cuda" else []),
                torch.compiler.set_stance("force_eager" if force_eager else "default"),
            ):
                yield
        finally:
            config._attn_implementation = chosen
            self.model.train()
            self.model.zero_grad(set_to_none=True)

    def _found(self, loss: Tensor) -> Found:
        (loss * SCALE).backward()
        gradients = [local(p.grad) for p in self.model.parameters() if p.grad is not None]
        norm = torch.stack([gradient.norm(dtype=torch.float64) for gradient in gradients]).norm() / SCALE
        blocks: Any = self.model.transformer.h
        ends = [blocks[i].attn.c_attn.weight.grad for i in sorted({0, len(blocks) - 1})]
        parts = [part.clone() for gradient in ends for part in local(gradient).chunk(3, dim=1)]
        return Found(loss.item(), norm.item(), parts)


def _errors(found: Found, plain: Found) -> tuple[float, ...]:
    """Relative differences, in the order of NAMES; infinite where there is no number."""
    if not math.isfinite(plain.loss + plain.norm):
        return (0.0,) * len(NAMES)  # bad weights, which no kernel can help; training will say so
    parts = [(a - b).norm() / b.norm().clamp(min=1e-30) for a, b in zip(found.parts, plain.parts, strict=True)]
    errors = (
        abs(found.loss / plain.loss - 1),
        abs(found.norm / max(plain.norm, 1e-30) - 1),
        float(torch.stack(parts).max()),
    )
    return tuple(error if math.isfinite(error) else math.inf for error in errors)
