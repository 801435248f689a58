"""The update: which parameter is treated how, AdamW, Muon, the learning rate of a step, and the average of weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from .. import hardware
from ..config import OptimSection
from ..schedules import SCHEDULES
from .distributed import local, settle, share_of, whole


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


def role_of(name: str, parameter: Tensor) -> str:
    """What a parameter is to the optimizer: ``vector``, ``position``, ``matrix`` (of a block), or ``embedding``.

    The token embedding is the head too; a head of its own would be treated alike.
    """
    if parameter.ndim < 2:
        return "vector"
    return "position" if ".wpe." in name else "matrix" if ".h." in name else "embedding"


def build_optimizers(model: nn.Module, config: OptimSection, device: torch.device) -> list[Optimizer]:
    """AdamW over all parameters, or Muon for the blocks' matrices and AdamW for the rest.

    Each role has a group, which keeps its peak rate in ``peak_lr`` and its peak decay in ``peak_decay``.
    """
    roles: dict[str, list[nn.Parameter]] = {"embedding": [], "position": [], "vector": [], "matrix": []}
    for name, p in sorted(model.named_parameters()):  # a tied head appears once
        roles[role_of(name, p)].append(p)

    def group(role: str, lr: float) -> dict[str, Any]:
        def chosen(setting: str, otherwise: Any) -> Any:
            own = getattr(config, f"{role}_{setting}", None)
            return otherwise if own is None else own

        decay, peak = chosen("weight_decay", config.weight_decay), chosen("lr", lr)
        return {
            "params": roles[role],
            "lr": peak,
            "peak_lr": peak,
            "betas": chosen("betas", config.betas),
            "weight_decay": decay,
            "peak_decay": decay,
            "decay_follows_lr": config.decay_follows_lr,
        }

    by_muon = ["matrix"] if config.name == "muon" else []
    # Fused AdamW is one kernel per group instead of a dozen per tensor, and the only kind that can be told on the
    # device to skip a step.
    kind = CautiousAdamW if config.cautious_decay else AdamW
    adam_groups = [group(role, config.lr) for role in roles if role not in by_muon]
    optimizers: list[Optimizer] = [kind(adam_groups, eps=config.eps, fused=True)]
    if by_muon:
        optimizers.append(
            Muon(
                [group("matrix", config.muon_lr)],
                momentum=config.muon_momentum,
                cautious_decay=config.cautious_decay,
                split_qkv=config.muon_split_qkv,
            )
        )
    grouped = [id(p) for optimizer in optimizers for g in optimizer.param_groups for p in g["params"]]
    assert sorted(grouped) == sorted(map(id, model.parameters())), "every parameter belongs to exactly one group"
    return optimizers


def set_lr(optimizers: Iterable[Optimizer], share: float) -> None:
    """Set every group's learning rate to ``share`` of its peak, and its decay where that follows the rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = share * group["peak_lr"]
            if group["decay_follows_lr"]:
                group["weight_decay"] = share * group["peak_decay"]


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


class CautiousAdamW(AdamW):
    """AdamW that lets only those weights decay that its update makes smaller too (Chen et al. 2025, "Cautious Weight
    Decay"); the decay is taken after the update."""

    found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        decays = [group["weight_decay"] for group in self.param_groups]
        for group in self.param_groups:
            group["weight_decay"] = 0.0
        loss = super().step(closure)
        for group, decay in zip(self.param_groups, decays, strict=True):
            group["weight_decay"] = decay
            taken = group["lr"] * decay * (1.0 if self.found_inf is None else 1 - self.found_inf)
            for p in group["params"] if decay else ():
                if p.grad is not None:
                    weights, average = local(p), local(self.state[p]["exp_avg"])
                    weights.mul_(1 - taken * (weights * average > 0))
        return loss


class Muon(Optimizer):
    """Momentum, orthogonalised (Jordan et al. 2024), for the [in, out] matrices of GPT-2's blocks.

    An update is ``lr sqrt(max(1, out / in)) O``: O has the singular vectors of the gradients' average, and singular
    values of about 1. So ``lr`` is in spectral units: whatever the width, it bounds how much a step changes a layer's
    output. For an input of root mean square 1 that is about ``lr`` at most, in root mean square too (twice that in the
    MLP's ``c_proj``, which has four inputs an output), and rates that were tuned at one width hold at others. It is the
    "original" adjustment of ``torch.optim.Muon``.

    ``c_attn`` holds three matrices side by side (query, key, value), each orthogonalised by itself. Matrices of one
    shape go through the iteration as one batch, of which each of several ranks takes its share, whether it has those
    matrices whole or in part.

    Args:
        params: groups of 2-D parameters with ``lr`` and ``weight_decay`` (decoupled).
        momentum: of the Nesterov average of gradients.
        cautious_decay: decay only weights that the update makes smaller too.
        split_qkv: False orthogonalises ``c_attn`` as the one matrix it is stored as.

    Attributes:
        found_inf: as fused AdamW's: where this tensor, (), holds 1, a step changes neither weights nor momentum.
    """

    found_inf: Tensor | None = None

    def __init__(
        self,
        params: Any,
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        cautious_decay: bool = False,
        split_qkv: bool = True,
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self._cautious_decay, self._split_qkv = cautious_decay, split_qkv

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for shape, parameters in by_shape.items():
                is_qkv = shape[1] == 3 * shape[0] and self._split_qkv
                side_by_side = 3 if is_qkv else 1
                size = math.sqrt(max(1, shape[1] / side_by_side / shape[0]))
                updates = [self._average(p, group["momentum"]) for p in parameters]
                for p, direction in zip(parameters, self._directions(updates, side_by_side), strict=True):
                    part = local(p)
                    mine = share_of(direction, p).to(part.dtype)
                    decay: float | Tensor = group["lr"] * group["weight_decay"]
                    if self._cautious_decay:
                        decay = decay * (part * mine > 0)
                    self._replace(part, (part * (1 - decay)).add_(mine, alpha=-group["lr"] * size))
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


class WeightAverage(Optimizer):
    """The exponential moving average of the weights, which follows the optimizers that change them.

    An optimizer itself, so that what it has accumulated is saved, resumed and sharded as theirs.

    Args:
        params: every parameter of the model.
        decay: what the average keeps of itself in a step.

    Attributes:
        found_inf: as fused AdamW's: a skipped step does not count.
    """

    found_inf: Tensor | None = None

    def __init__(self, params: Iterable[nn.Parameter], decay: float):
        super().__init__(params, {"lr": 0.0, "peak_lr": 0.0, "decay_follows_lr": False})
        self.decay = decay

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = closure() if closure is not None else None
        parameters = self.param_groups[0]["params"]
        for p in parameters:
            if not self.state[p]:
                self.state[p]["average"] = p.detach().clone()
        rate = 1 - self.decay if self.found_inf is None else (1 - self.decay) * (1 - self.found_inf)
        for p in parameters:
            average = local(self.state[p]["average"])
            average.lerp_(local(p), rate if isinstance(rate, float) else rate.to(average.dtype))
        return loss

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the weights and their average; a second call puts both back."""
        for p, state in self.state.items():
            weights, average = local(p), local(state["average"])
            kept = weights.clone()
            weights.copy_(average)
            average.copy_(kept)


@contextmanager
def averaged(model: nn.Module, optimizers: Sequence[Optimizer]) -> Iterator[bool]:
    """Inside, the model has the average of its weights, where the run keeps one; yields whether it does."""
    average = next((optimizer for optimizer in optimizers if isinstance(optimizer, WeightAverage)), None)
    if average is None or not average.state:
        yield False
        return
    settle(model)  # weights that are gathered would not change with a rank's share of them
    average.swap()
    try:
        yield True
    finally:
        settle(model)
        average.swap()
