"""What only a resumed run needs, beside the weights: the optimizers' state and where the run was."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from ..runs import TRAINER_STATE


def trainer_state(model: nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, Any]:
    """The optimizers' state by parameter name, whole and on the CPU, so that any number of processes can read it.

    Every rank must call it (sharded state is gathered); the others than rank 0 may drop the result.
    """
    return get_optimizer_state_dict(model, optimizers, options=_WHOLE)


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
    return json.loads((folder / TRAINER_STATE / "state.json").read_text())


def write_trainer_state(folder: Path, optimizer_state: dict[str, Any], state: dict[str, Any]) -> None:
    path = folder / TRAINER_STATE
    path.mkdir()
    with (path / "optimizer.pt").open("wb") as file:  # by its name alone, torch.save would not say that a disk is full
        torch.save(optimizer_state, file)
    (path / "state.json").write_text(json.dumps(state, indent=1))


_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
