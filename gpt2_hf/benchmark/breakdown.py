"""Where the time of our own step goes, by PyTorch's profiler."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

# The first part wins of which a word stands in the name of the operator or of one that called it.
PARTS = (
    ("head + loss", ("_SummedLoss",)),
    ("optimizer", ("Optimizer.", "_foreach_norm", "_foreach_mul_", "linalg_vector_norm")),
    ("attention", ("scaled_dot_product", "aten::bmm", "flash", "flex_attention")),
    ("matrices", ("aten::mm", "aten::addmm", "aten::linear")),
    ("between them, fused", ("CompiledFxGraph", "triton_")),
)


def profile_step(one_step: Callable[[], object], device: torch.device, steps: int = 3) -> dict[str, float]:
    """Milliseconds of a step by part, with "rest" for all other operators and "python" for the time outside them.

    On a CPU the bmm of attention's own products counts as attention, and its softmax among what is fused. The
    profiler itself slows small operators a little.
    """
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiled:
        for _ in range(steps):
            one_step()
        if on_gpu:
            torch.cuda.synchronize()
    parts = dict.fromkeys([*(name for name, _ in PARTS), "rest"], 0.0)
    begin, end = float("inf"), 0.0
    for event in profiled.events() or []:
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue  # kernels are counted with the operator that launched them
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        parts[_part(event)] += spent / 1e3 / steps
        begin, end = min(begin, event.time_range.start), max(end, event.time_range.end)
    parts["python"] = max(0.0, (end - begin) / 1e3 / steps - sum(parts.values()))
    return parts


def _part(event: Any) -> str:
    names = list(_with_callers(event))
    for part, words in PARTS:
        if any(word in name for name in names for word in words):
            return part
    return "rest"


def _with_callers(event: Any) -> Iterator[str]:
    while event is not None:
        yield event.name
        event = event.cpu_parent
