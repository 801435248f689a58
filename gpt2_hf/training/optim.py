"""The update: which parameter is treated how, AdamW, Muon, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from .. import hardware
from ..config import OptimSection
from ..schedules import SCHEDULES
from .distributed import local, share_of, whole


def lr_at(step: int, total_steps: int, config: OptimSection) -> float:
    """Learning rate of update ``step`` (0-based) as a share of its peak, in [0, 1].

    Linear warm-up that reaches the peak at update ``warmup_steps - 1``; then the schedule, down to ``min_lr_ratio`` at
    ``total_steps``, where it stays.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if step >= total_steps:
        return config.min_lr_ratio
    height = SCHEDULES[config.schedule](step, config.warmup_steps, total_steps, config.decay_ratio)
    return config.min_lr_ratio + height * (1 - config.min_lr_ratio)


def build_optimizers(model: nn.Module, config: OptimSection, device: torch.device) -> list[Optimizer]:
    """AdamW over all parameters, or Muon for the blocks' matrices and AdamW for the rest.

    Matrices and embeddings decay, vectors (biases, norms) do not. Each group keeps its peak rate in ``peak_lr``.
    """
    named = dict(model.named_parameters())  # a tied head appears once
    matrices = {name for name, p in named.items() if p.ndim >= 2}
    for_muon = {name for name in matrices if ".h." in name} if config.name == "muon" else set()

    def group(names: Iterable[str], decay: float, lr: float) -> dict[str, Any]:
        return {"params": [named[n] for n in sorted(names)], "weight_decay": decay, "lr": lr, "peak_lr": lr}

    adam_groups = [
        group(matrices - for_muon, config.weight_decay, config.lr),
        group(named.keys() - matrices, 0.0, config.lr),
    ]
    # Fused AdamW is one kernel per group instead of a dozen per tensor, and the only kind that can be told on the
    # device to skip a step.
    optimizers: list[Optimizer] = [AdamW(adam_groups, betas=config.betas, eps=config.eps, fused=True)]
    if for_muon:
        optimizers.append(Muon([group(for_muon, config.weight_decay, config.muon_lr)], momentum=config.muon_momentum))
    grouped = [id(p) for optimizer in optimizers for g in optimizer.param_groups for p in g["params"]]
    assert len(grouped) == len(set(grouped)) == len(named), "every parameter belongs to exactly one group"
    return optimizers


def set_lr(optimizers: Iterable[Optimizer], share: float) -> None:
    """Set every group's learning rate to ``share`` of its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = share * group["peak_lr"]


def step_optimizers(optimizers: Sequence[Optimizer], scaler: torch.amp.GradScaler | None, grad_norm: Tensor) -> None:
    """Update with each optimizer and clear its gradients; a step whose gradients are not finite changes nothing.

    The host does not wait to hear whether it did: each optimizer finds the verdict in ``found_inf``, where a gradient
    scaler would put its own. The scaler is only told to go on: it judges each optimizer's gradients apart, while
    clipping has divided all of them by one norm. (Nor do Accelerate's wrappers step: each would update the scaler.)

    Args:
        grad_norm: of all parameters, (), on every rank the same; of unscaled gradients.
    """
    found_inf = (~grad_norm.isfinite()).float()
    for optimizer in optimizers:
        optimizer.found_inf = found_inf  # type: ignore[attr-defined]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if scaler is not None:
        scaler.update()


def orthogonalize(matrices: Tensor, steps: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    """Push all singular values of each matrix towards 1, keeping its singular vectors, without an SVD.

    Newton-Schulz iteration with the quintic of Jordan et al. 2024 ("Muon"), whose coefficients trade exactness
    (values end between about 0.7 and 1.2) for speed.

    Args:
        matrices: (n, rows, cols).
        dtype: to compute in; bf16 is as good, and faster where the device has it.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if wide else matrices  # fewer rows than columns makes the Gram matrix small
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).to(dtype)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if wide else x


class Muon(Optimizer):
    """Momentum, orthogonalised (Jordan et al. 2024), scaled to AdamW's usual update size (Liu et al. 2025, sec. 2.2).

    For the [in, out] matrices of GPT-2's blocks. ``c_attn`` holds three matrices side by side (query, key, value),
    each orthogonalised by itself. Matrices of one shape go through the iteration as one batch, of which each of several
    ranks takes its share, whether it has those matrices whole or in part.

    Args:
        params: groups of 2-D parameters with ``lr`` and ``weight_decay`` (decoupled).
        momentum: of the Nesterov average of gradients.

    Attributes:
        found_inf: as fused AdamW's: where this tensor, (), holds 1, a step changes neither weights nor momentum.
    """

    found_inf: Tensor | None = None

    def __init__(self, params: Any, lr: float = 6e-4, momentum: float = 0.95, weight_decay: float = 0.1):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for shape, parameters in by_shape.items():
                side_by_side = shape[1] // shape[0] if shape[1] == 3 * shape[0] else 1
                # AdamW's updates have a root mean square of 0.2 to 0.4; an orthogonal matrix has 1 / sqrt(longer side).
                scale = 0.2 * math.sqrt(max(shape[0], shape[1] // side_by_side))
                updates = [self._average(p, group["momentum"]) for p in parameters]
                for p, direction in zip(parameters, self._directions(updates, side_by_side), strict=True):
                    part, mine = local(p), share_of(direction, p)
                    decayed = part * (1 - group["lr"] * group["weight_decay"])
                    self._replace(part, decayed.add_(mine.to(part.dtype), alpha=-group["lr"] * scale))
        return loss

    def _average(self, p: Tensor, momentum: float) -> Tensor:
        """Nesterov's average of the gradients so far."""
        state = self.state[p]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p)
        buffer, gradient = state["momentum_buffer"], p.grad
        assert gradient is not None
        self._replace(local(buffer), local(buffer).lerp(local(gradient), 1 - momentum))
        return gradient.lerp(buffer, momentum)

    def _directions(self, updates: Sequence[Tensor], side_by_side: int) -> list[Tensor]:
        """The updates of parameters of one shape, orthogonalised: whole on every rank, and the same to the last bit."""
        n_ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        n_matrices = len(updates) * side_by_side
        n_each = -(-n_matrices // n_ranks)
        mine = range(rank * n_each, (rank + 1) * n_each)
        matrices = (matrix for update in updates for matrix in whole(update).chunk(side_by_side, dim=1))
        share = [matrix for number, matrix in enumerate(matrices) if number in mine]
        rows, columns = updates[0].shape
        nothing = local(updates[0]).new_zeros(rows, columns // side_by_side)
        share += [nothing] * (n_each - len(share))  # all ranks send as much
        directions = orthogonalize(torch.stack(share), dtype=self._compute_dtype(nothing))
        if n_ranks > 1:
            gathered = directions.new_empty(n_ranks * n_each, *nothing.shape)
            dist.all_gather_into_tensor(gathered, directions.contiguous())
            directions = gathered[:n_matrices]
        return [torch.cat(list(parts), dim=1) for parts in directions.split(side_by_side)]

    @staticmethod
    def _compute_dtype(update: Tensor) -> torch.dtype:
        if update.dtype == torch.float64:
            return torch.float64
        return torch.bfloat16 if hardware.default_precision(update.device) == "bf16" else torch.float32

    def _replace(self, old: Tensor, new: Tensor) -> None:
        """Put ``new`` in the place of ``old``, unless the step is skipped."""
        old.copy_(new if self.found_inf is None else torch.where(self.found_inf > 0, old, new))
