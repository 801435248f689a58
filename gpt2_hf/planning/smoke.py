"""A training step of a run's own parts, for short trials; and the trial that doctor.py makes in a process of its own.

python -m gpt2_hf.planning.smoke SECONDS trains a small model on the packaged plays, and prints what came of it as JSON.
"""

from __future__ import annotations

import gzip
import json
import sys
import time
from collections.abc import Callable
from importlib import resources
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor

from .. import hardware
from ..config import DataSection, ModelSection, OptimSection, RunConfig, TrainSection
from ..data.tokenizer import load_tokenizer
from ..training.build import build_accelerator, build_model, set_precision
from ..training.loop import train_step
from ..training.optim import build_optimizers, set_lr


def training_step(config: RunConfig, device: torch.device, lr_share: float = 1.0) -> Callable[[Tensor], float]:
    """One process's update as a run makes it: a batch (grad_accum_steps, B, T + 1) int64 -> its loss, waited for."""
    PartialState(cpu=device.type == "cpu")
    accelerator = build_accelerator(config, precision := set_precision(config, device))
    bare_model = build_model(config, None, accelerator, precision)
    optimizers = build_optimizers(bare_model, config.optim, device)
    model = accelerator.prepare_model(bare_model)
    accelerator.prepare(*optimizers)
    set_lr(optimizers, lr_share)
    return lambda batch: float(train_step(accelerator, model, optimizers, batch, 0, config)[0])


def small_run() -> RunConfig:
    """A model of 2 layers that learns the plays' commonest words in a few steps."""
    return RunConfig(
        model=ModelSection("gpt2", n_layer=2, n_head=2, n_embd=64, n_positions=128),
        data=DataSection(seq_len=128),
        optim=OptimSection(lr=1e-2),
        train=TrainSection(global_batch_tokens=8 * 128, micro_batch_size=8),
    )


def batches(config: RunConfig, n_plays: int = 2) -> Tensor:
    """Steps' batches of the packaged plays, (steps, 1, B, T + 1)."""
    packed = (resources.files("gpt2_hf") / "assets" / "shakespeare.jsonl.gz").read_bytes()
    plays = [json.loads(line)["text"] for line in gzip.decompress(packed).splitlines()[:n_plays]]
    tokenizer: Any = load_tokenizer()
    tokens = np.concatenate([tokenizer(play, verbose=False)["input_ids"] for play in plays])
    size, length = config.train.micro_batch_size, config.data.seq_len + 1
    n_steps = len(tokens) // (size * length)
    return torch.from_numpy(tokens[: n_steps * size * length].reshape(n_steps, 1, size, length))


def smoke(seconds: float) -> dict[str, float]:
    """Train for so long after the first step: losses at both ends, tokens/s, and how long the first step took."""
    config = small_run()
    windows = batches(config)
    begin = time.perf_counter()
    step = training_step(config, hardware.pick_device("auto"))
    losses = [step(windows[0])]
    first = time.perf_counter() - begin
    step(windows[1])
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds or len(losses) < 10:
        losses.append(step(windows[len(losses) % len(windows)]))
    rate = (len(losses) - 1) * config.train.global_batch_tokens / (time.perf_counter() - begin)
    return {"first_loss": losses[0], "last_loss": float(np.mean(losses[-5:])), "tokens_per_sec": rate, "first_s": first}


if __name__ == "__main__":
    print(json.dumps(smoke(float(sys.argv[1]))))
