"""Saving a run and going on with it: the weights as a stock gpt2 folder, and beside them what only a resume needs.

That is ``trainer_state``: the optimizers' state by parameter name, whole, so that any number of processes can read it,
and ``state.json`` with the step and the identity of the run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer
from transformers import PreTrainedTokenizerBase

from ..data.tokenizer import save_tokenizer
from ..model import GPTForCausalLM
from ..runs import TRAINER_STATE, best_step, prune, step_name, write_folder

if TYPE_CHECKING:
    from .build import Parts

STATE = f"{TRAINER_STATE}/state.json"
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def save(parts: Parts, step: int) -> None:
    """Write the checkpoint after ``step``, and delete those that need not be kept. Every rank must call it."""
    accelerator, folder, keep = parts.accelerator, parts.folder, parts.config.checkpoint
    optimizer_state = trainer_state(parts.bare_model, parts.optimizers)
    weights = accelerator.get_state_dict(parts.model)
    place = folder.checkpoints / step_name(step)

    def write(path: Path) -> None:
        write_model(path, parts.bare_model, weights, parts.tokenizer)
        scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
        write_trainer_state(path, optimizer_state, parts.identity | {"step": step, "scaler": scaler})

    if accelerator.is_main_process:
        write_folder(place, write)
        folder.newest = place
        best = best_step(folder.path) if keep.keep_best else None
        prune(folder.checkpoints, keep.keep_last, keep.keep_every, best)
    accelerator.wait_for_everyone()
    folder.newest = place


def save_final(parts: Parts) -> None:
    """Write the finished model, ``RUN/final``. Every rank must call it."""
    if parts.start.step == parts.config.train.steps:  # no step of this start has tried these weights
        parts.watch.try_weights(parts.start.step, parts.optimizers, None)
    weights = parts.accelerator.get_state_dict(parts.model)
    parts.folder.check()
    if parts.accelerator.is_main_process:
        write_folder(parts.folder.final, lambda path: write_model(path, parts.bare_model, weights, parts.tokenizer))
        parts.folder.is_finished = True


def write_model(
    folder: Path, model: GPTForCausalLM, weights: dict[str, Tensor], tokenizer: PreTrainedTokenizerBase
) -> None:
    """A stock gpt2 folder: weights, configurations, tokenizer."""
    model.save_pretrained(folder, state_dict=weights)
    save_tokenizer(tokenizer, folder, model.config.n_positions)


def trainer_state(model: nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, Any]:
    """The optimizers' state by parameter name, on the CPU.

    Every rank must call it (sharded state is gathered); the others than rank 0 may drop the result.
    """
    return get_optimizer_state_dict(model, optimizers, options=_WHOLE)


def write_trainer_state(folder: Path, optimizer_state: dict[str, Any], state: dict[str, Any]) -> None:
    path = folder / TRAINER_STATE
    path.mkdir()
    with (path / "optimizer.pt").open("wb") as file:  # by its name alone, torch.save would not say that a disk is full
        torch.save(optimizer_state, file)
    (folder / STATE).write_text(json.dumps(state, indent=1))


def load_trainer_state(folder: Path, model: nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, Any]:
    """Put a checkpoint's optimizer state back and return its ``state.json``.

    Only what the optimizers have accumulated comes from the file: rates, betas and decay are those of the present
    configuration, so that a run can go on with others.
    """
    settings = [
        {k: v for k, v in group.items() if k != "params"}
        for optimizer in optimizers
        for group in optimizer.param_groups
    ]
    state = torch.load(folder / TRAINER_STATE / "optimizer.pt", map_location="cpu", weights_only=True, mmap=True)
    set_optimizer_state_dict(model, optimizers, state, options=_WHOLE)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    for group, setting in zip(groups, settings, strict=True):
        group.update(setting)
    return read_state(folder)


def read_state(folder: Path) -> dict[str, Any]:
    """The step and the identity of the run that wrote a checkpoint. Raises OSError or ValueError."""
    return json.loads((folder / STATE).read_text())
