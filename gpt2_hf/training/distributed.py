"""What several processes do together: who holds which weights, when gradients cross the wire, how all come to agree.

Two ways, by the launcher's settings: each rank has the whole model and gradients are averaged (DDP), or each rank has
a share of every weight, gradient and average of the optimizer, and weights are gathered where they are needed (FSDP2).
PyTorch's ``fully_shard`` is called here for the second, not Accelerate's engine around it: that one ignores the CPU,
where the tests run, so there would be two ways to one thing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.parallel import DistributedDataParallel

from ..knobs import ConfigError
from ..model import GPTForCausalLM

T = TypeVar("T")

# How a launcher asks Accelerate to shard. Accelerate itself must not see it (see above).
SHARDS = "ACCELERATE_USE_FSDP"
# With these, groups of dp_shard_size ranks hold one model each, and dp_replicate_size of them are copies (HSDP).
GROUPS = "ACCELERATE_USE_PARALLELISM_CONFIG"
GROUP_SIZES = ("PARALLELISM_CONFIG_DP_REPLICATE_SIZE", "PARALLELISM_CONFIG_DP_SHARD_SIZE")


class Host:
    """The ranks' talk about small things, on the CPU, apart from what the devices exchange.

    With one process each call returns at once.
    """

    def __init__(self, state: PartialState, timeout: timedelta | None = None):
        self.rank, self.world_size = state.process_index, state.num_processes
        self.group = dist.new_group(backend="gloo", timeout=timeout) if self.world_size > 1 else None

    def gather(self, value: T) -> list[T]:
        """Every rank's value, by rank."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def first(self, act: Callable[[], T]) -> T:
        """What ``act()`` returns on the first rank, for all; an error that it raises there is raised on all."""
        outcome: Any = None
        if self.rank == 0:
            try:
                outcome = act()
            except Exception as error:
                outcome = error
        return settled(self.gather(outcome)[:1])[0]


def settled(outcomes: list[Any]) -> list[Any]:
    """The outcomes, unless one of them is an error: that is raised."""
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            raise outcome
    return outcomes


def sharding_mesh(state: PartialState) -> DeviceMesh | None:
    """The ranks that share each weight, as the launcher asks for; None where each has the whole model.

    Returns:
        1-D, or for HSDP 2-D: copies, then the ranks of a copy.

    Raises:
        ConfigError: when the groups asked for are not the processes that there are.
    """
    if not wants_shards():
        return None
    n_copies, n_shards = group_sizes(state.num_processes)
    if state.num_processes == 1:
        state.print("one process: there is nothing to shard")
        return None
    if n_copies * n_shards != state.num_processes:
        raise ConfigError(
            f"the launcher asks for {n_copies} copies of the model over {n_shards} processes each, and there are "
            f"{state.num_processes} processes: change parallelism_config, or the number of processes"
        )
    if n_copies == 1:
        return init_device_mesh(state.device.type, (n_shards,), mesh_dim_names=("shard",))
    return init_device_mesh(state.device.type, (n_copies, n_shards), mesh_dim_names=("copy", "shard"))


def wants_shards(environment: Mapping[str, str] = os.environ) -> bool:
    return environment.get(SHARDS, "").lower() in ("1", "true", "yes")


def group_sizes(n_processes: int, environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Copies of the model, and the processes over which each is sharded."""
    if environment.get(GROUPS, "").lower() not in ("1", "true", "yes"):
        return 1, n_processes
    n_copies, n_shards = (int(environment.get(name, "1")) for name in GROUP_SIZES)
    return n_copies, n_shards


def hide_shards_from_accelerate() -> None:
    """Its engine would shard too, where it can."""
    os.environ.pop(SHARDS, None)
    os.environ.pop(GROUPS, None)


def distribute(
    model: GPTForCausalLM, accelerator: Accelerator, mesh: DeviceMesh | None, dtype: torch.dtype
) -> nn.Module:
    """The model as it is called in training: its gradients, when ``exchange`` says so, are those of all ranks.

    Args:
        mesh: of ``sharding_mesh``.
        dtype: that blocks compute in. Sharded, their weights cross the wire in it; gradients in the weights' own.
    """
    if mesh is None:
        return accelerator.prepare_model(model)
    weight_dtype = next(model.parameters()).dtype
    # Inputs keep their type: the sum that runs through all blocks is fp32 under autocast, and would be rounded here.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=weight_dtype, cast_forward_inputs=False)
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    # Embeddings, the head that is one of them, and the last norm. The loss wants the head as it is.
    fully_shard(model, mesh=mesh)
    return accelerator.prepare_model(model, evaluation_mode=True)  # which adds autocast alone


def exchange(model: nn.Module, now: bool) -> AbstractContextManager[Any]:
    """Around a micro-step: whether its backward pass gives gradients to the other ranks, or keeps them for the next.

    Once a step is enough. Sharded weights, too, are gathered once a step and stay whole until gradients are given away.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(now)
        model.set_reshard_after_backward(now)
        return nullcontext()
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not now else nullcontext()


def clip(accelerator: Accelerator, model: nn.Module, max_norm: float) -> Tensor:
    """Scale gradients down to this global L2 norm; returns the norm they had, (), the same on all ranks."""
    norm = accelerator.clip_grad_norm_(model.parameters(), max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def settle(model: nn.Module) -> None:
    """Have each rank hold its share alone: after an evaluation weights are still gathered, and would be saved so."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which ranks may hold shares, gathered. Every rank must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank has, to read or to write."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def share_of(whole_tensor: Tensor, like: Tensor) -> Tensor:
    """Of a tensor that every rank has the part that this rank has of ``like``, of the same shape; nothing is sent."""
    if not isinstance(like, DTensor):
        return whole_tensor
    everywhere = [Replicate()] * like.device_mesh.ndim
    replicated = DTensor.from_local(whole_tensor.to(like.device), like.device_mesh, everywhere, run_check=False)
    return replicated.redistribute(placements=like.placements).to_local()


def put(whole_tensor: Tensor, into: Tensor) -> None:
    """Copy a tensor that every rank has into one of which ranks may hold parts."""
    with torch.no_grad():
        local(into).copy_(share_of(whole_tensor, into))
