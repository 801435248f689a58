"""What the optimizers' part of a step costs."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch
from torch import nn

from ..config import OptimSection
from ..model import GPTForCausalLM
from ..training.optim import WeightAverage, build_optimizers, step_optimizers
from .variants import OURS, Shape, build, read_batches

BATCH = 524_288  # tokens of a step of the 124M recipes

# What is timed, by its settings.
KINDS = {
    "AdamW": OptimSection("adamw"),
    "Muon": OptimSection("muon"),
    "Muon, cautious decay": OptimSection("muon", cautious_decay=True),
    "Muon, average of weights": OptimSection("muon", ema=0.99),
}


def race_updates(shape: Shape, device: torch.device, rounds: int) -> str:
    """Milliseconds of each optimizer's update, in turns, and their share of a step of 524,288 tokens on this device.

    Gradients are there already: clipping is not counted here, but in the rest of the step.
    """
    updates = {label: _update(shape, device, config) for label, config in KINDS.items()}
    step = build(OURS, shape, device)
    batch = read_batches(shape)[0]
    seconds: dict[str, list[float]] = {label: [] for label in (*updates, "step")}
    for turn in range(rounds + 1):
        for label, act in (*updates.items(), ("step", lambda: step(batch))):
            took = _timed(act, device)
            if turn:  # the first compiles
                seconds[label].append(took)
    passes = (median(seconds["step"]) - median(seconds["AdamW"])) * BATCH / shape.tokens
    lines = [f"{'update of':<26}{f'ms, median of {rounds}':>18}{f'of a step of {BATCH:,} tokens':>36}"]
    for label in updates:
        took = median(seconds[label])
        lines.append(f"{label:<26}{1000 * took:>18,.1f}{took / (passes + took):>36.2%}")
    return "\n".join(lines)


def _update(shape: Shape, device: torch.device, config: OptimSection) -> Callable[[], object]:
    model: nn.Module = GPTForCausalLM(shape.model_section().gpt_config())
    model.to(device)
    optimizers = build_optimizers(model, config, device)
    if config.ema:
        optimizers.append(WeightAverage(model.parameters(), config.ema))
    gradients = [0.01 * torch.randn_like(p) for p in model.parameters()]
    norm = torch.ones((), device=device)

    def update() -> None:
        for p, gradient in zip(model.parameters(), gradients, strict=True):
            p.grad = gradient
        step_optimizers(optimizers, None, norm)

    return update


def _timed(act: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    act()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
