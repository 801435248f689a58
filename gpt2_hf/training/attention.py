"""The fastest attention of a card, measured once and remembered.

Which kernel that is depends on the card, on the versions of PyTorch, cuDNN and FlashAttention, and on the shape: by a
few percent on an H100, by two to three times on newer cards. So "auto" tries what can run, in one block of the model,
forward and back, and keeps the answer in the user's cache folder.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from .. import hardware
from ..config import RunConfig
from ..data.documents import DocumentMask
from ..files import whole_file
from ..knobs import ConfigError
from ..model import GPTConfig
from ..model.attention import SDPA_KERNELS
from ..model.modeling_gpt import GPTModel

# PyTorch's own choice stays unless another takes less than this share of its time.
WORTH = 0.98
WINDOWS = 16  # that the trial has at most: enough for every card to be busy
DOCUMENT = 400  # tokens of a document in the trial
SECONDS = 0.15  # for each candidate, beside compiling
PACKAGES = ("torch", "transformers", "flash-attn", "flash-attn-4", "flash_attn_3", "kernels")


def choose_attention(config: RunConfig, accelerator: Accelerator, precision: str, is_compiled: bool) -> tuple[str, str]:
    """The backend to train with, and why: on all ranks what the first one finds.

    Raises:
        ConfigError: when one is asked for by name that cannot work here.
    """
    device, model, masked = accelerator.device, config.model, config.data.document_mask
    try:
        chosen = hardware.choose_attention(
            model.attn_implementation, device, precision, model.dropout, masked, compiled=is_compiled
        )
    except ValueError as error:
        raise ConfigError(f"model.attn_implementation: {error}") from None
    # Whose runs must be the same bit for bit cannot have a clock decide.
    if model.attn_implementation != "auto" or device.type != "cuda" or config.train.deterministic:
        return chosen
    names = candidates(device, precision, model.dropout, masked, is_compiled)
    if len(names) < 2:
        return chosen
    found = [chosen]
    if accelerator.is_main_process:
        accelerator.print(f"trying attention: {', '.join(names)}")
        with suppress(RuntimeError, OSError):  # a trial is not worth a run
            found = [fastest(names, config, device, precision, is_compiled)]
    return broadcast_object_list(found)[0]


def candidates(device: torch.device, precision: str, dropout: float, masked: bool, is_compiled: bool) -> list[str]:
    """What may be fastest here; PyTorch's own choice is first where it is among them."""
    if precision not in ("bf16", "fp16"):
        return []
    flash = [name for name in hardware.FLASH_ATTENTION if _fits(name, device, precision, dropout)]
    if masked:
        return [*(["flex_attention"] if is_compiled and not dropout else []), *flash]
    return ["sdpa", *SDPA_KERNELS, *flash]


def _fits(name: str, device: torch.device, precision: str, dropout: float) -> bool:
    majors = hardware.FLASH_ATTENTION[name][0]
    can_run = hardware.flash_obstacle(name, device, precision, dropout, by_name=True) is None
    return can_run and torch.cuda.get_device_capability(device)[0] in majors


def fastest(
    names: Sequence[str], config: RunConfig, device: torch.device, precision: str, is_compiled: bool
) -> tuple[str, str]:
    """The fastest of the candidates, by an earlier trial on such a card if there was one, and its figures in words.

    Raises:
        RuntimeError: when none of them runs.
    """
    key = " | ".join([*names, hardware.describe(device), *_versions(), *map(str, _shape(config)), precision])
    key += f" | {'compiled' if is_compiled else 'not compiled'}"
    remembered = _remembered()
    if key not in remembered:
        trials = {name: _milliseconds(name, config, device, precision, is_compiled) for name in names}
        remembered[key] = {name: ms for name, ms in trials.items() if math.isfinite(ms)}
        with suppress(OSError), whole_file(_cache_file()) as file:
            file.write(json.dumps(remembered, indent=1).encode())
    found = remembered[key]
    if not found:
        raise RuntimeError(f"none of {', '.join(names)} runs")
    best = min(found, key=found.__getitem__)
    first = next(iter(found))
    if found[best] > WORTH * found[first]:
        best = first
    figures = ", ".join(f"{name} {ms:.3g}" for name, ms in sorted(found.items(), key=lambda item: item[1]))
    return best, f"fastest of those tried here, ms a block: {figures}"


def _shape(config: RunConfig) -> tuple[object, ...]:
    model = config.model.gpt_config()
    return (
        _n_windows(config),
        config.data.seq_len,
        model.n_head,
        model.n_embd,
        config.model.dropout,
        config.data.document_mask,
    )


def _n_windows(config: RunConfig) -> int:
    return WINDOWS if config.train.finds_micro_batch else min(config.train.micro_batch_size, WINDOWS)


def _versions() -> list[str]:
    found = [f"cudnn {torch.backends.cudnn.version()}"]
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found.append(f"{package} {version(package)}")
    return found


def _cache_file() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "gpt2_hf", "attention.json")


def _remembered() -> dict[str, dict[str, float]]:
    try:
        found = json.loads(_cache_file().read_text())
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


def _milliseconds(name: str, config: RunConfig, device: torch.device, precision: str, is_compiled: bool) -> float:
    """Of one block with hardly an MLP, forward and back, as training calls it; infinite where that cannot be."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    run = config.model.gpt_config()
    windows, seq_len = _n_windows(config), config.data.seq_len
    sizes: dict[str, Any] = {
        "n_embd": run.n_embd,
        "n_head": run.n_head,
        "n_positions": seq_len,
        "attn_pdrop": run.attn_pdrop,
    }
    try:
        tiny = GPTConfig(n_layer=1, n_inner=8, vocab_size=2, bos_token_id=1, eos_token_id=1, **sizes)
        tiny._attn_implementation = name
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            model = GPTModel(tiny).train()
            model.to(device=device)
            if is_compiled:
                # Whole, as a block that the compiler must leave in the middle is slower than its attention tells.
                model.h[0].compile(dynamic=False, fullgraph=True)
            tokens = torch.zeros(windows, seq_len, dtype=torch.int64)
            tokens[:, DOCUMENT::DOCUMENT] = 1
            on_device = tokens.to(device)
            apart = DocumentMask(1, False, name, dtype)(on_device, tokens) if config.data.document_mask else {}
            x = model.wte(on_device).detach().requires_grad_()

            def step() -> None:
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    y = model(inputs_embeds=x, use_cache=False, **apart).last_hidden_state
                y.sum().backward()

            return 1e3 * hardware.fastest(step, device, SECONDS)
    except Exception:  # whatever a kernel of another package may raise: then it is not the fastest
        return math.inf
    finally:
        if is_compiled:
            torch._dynamo.reset()  # the run's own blocks shall not count as compiled once more
