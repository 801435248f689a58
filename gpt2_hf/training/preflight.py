"""What a run's settings ask of this machine, checked before anything is made."""

from __future__ import annotations

import importlib.util
import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path

import psutil
import torch
from accelerate import PartialState
from accelerate.utils import DynamoBackend, PrecisionType
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..config import RunConfig
from ..data.tokenizer import Tokenizer
from ..knobs import ConfigError, shown
from .distributed import group_sizes, wants_shards

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")  # of a container on Linux


# Environment variables that hold whole numbers -> their limits.
NUMBERS = {
    "WORLD_SIZE": (1, 10**6),
    "LOCAL_WORLD_SIZE": (1, 10**6),
    "RANK": (0, 10**6),
    "LOCAL_RANK": (-1, 10**6),
    "MASTER_PORT": (0, 65535),
}
WORDS = {
    "ACCELERATE_MIXED_PRECISION": [str(kind) for kind in PrecisionType],
    "ACCELERATE_DYNAMO_BACKEND": [kind.value for kind in DynamoBackend],
}


# Accelerate's engines that would shard or wrap the model in their own way, by the variable that switches each on.
ENGINES = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}


def check_environment() -> None:
    """Refuse what the launcher's environment cannot mean, before Accelerate reads it. Raises ConfigError."""
    for name, (least, most) in NUMBERS.items():
        text = os.environ.get(name, str(least))
        if not re.fullmatch(r"-?\d{1,9}", text) or not least <= int(text) <= most:
            raise ConfigError(f"the environment variable {name} is {shown(text)}: give a number from {least} to {most}")
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    if not re.fullmatch(r"[1-9]\d{0,5}(,[1-9]\d{0,5})*", threads):
        raise ConfigError(f"the environment variable OMP_NUM_THREADS is {shown(threads)}: give a number of threads")
    for name, words in WORDS.items():
        text = os.environ.get(name, words[0])
        if text.lower() not in [word.lower() for word in words]:
            raise ConfigError(f"the environment variable {name} is {shown(text)}: choose {', '.join(words)}")


def check_launcher(environment: Mapping[str, str] = os.environ) -> None:
    """Refuse what a launcher's options or its config file would change about the run. Raises ConfigError."""
    for variable, engine in ENGINES.items():
        if environment.get(variable, "").lower() in ("1", "true", "yes"):
            raise ConfigError(
                f"the launcher asks for {engine} ({variable}), and training here is data parallel only; start with "
                f"--config_file accelerate_configs/ddp.yaml, or unset {variable}"
            )
    if wants_shards(environment) and environment.get("FSDP_VERSION", "2") != "2":
        raise ConfigError(
            "the launcher asks for FSDP's version 1 (FSDP_VERSION), and training here shards by version 2; start with "
            "--config_file accelerate_configs/fsdp2.yaml, or set FSDP_VERSION=2"
        )
    if environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1") != "1":
        raise ConfigError(
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS is set in the environment; unset it: accumulation follows from "
            "train.global_batch_tokens"
        )


def check_devices(n_gpus: int, environment: Mapping[str, str] = os.environ) -> None:
    """Refuse more processes on this machine than it has GPUs. Raises ConfigError."""
    n_processes = int(environment.get("LOCAL_WORLD_SIZE", "1"))
    on_cpu = environment.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    if n_processes > max(1, n_gpus) and not on_cpu:
        found = f"{n_gpus} CUDA device{'s' * (n_gpus != 1)}" if n_gpus else "no CUDA device"
        way = (
            f"--num_processes {n_gpus}"
            if n_gpus > 1
            else f"accelerate_configs/{'single_gpu' if n_gpus else 'cpu'}.yaml"
        )
        raise ConfigError(
            f"the launcher started {n_processes} processes on {socket.gethostname()}, which has {found}: use {way}"
        )


def check_run(config: RunConfig, state: PartialState) -> None:
    """Say what is odd, and refuse what cannot be done here. Raises ConfigError."""
    config.grad_accum_steps(state.num_processes)
    if config.train.finds_micro_batch and wants_shards() and state.num_processes > 1:
        raise ConfigError(
            "train.micro_batch_size auto tries sizes on each device by itself, which a sharded model cannot: give a "
            "number; scripts/plan.py names the largest that fits"
        )
    check_attention(config.model.attn_implementation)
    n_shards = group_sizes(state.num_processes)[1] if wants_shards() else 1
    check_memory(config, memory_of(state.device), state.num_processes, n_shards)
    for line in config.remarks():
        state.print(line)


def check_attention(name: str) -> None:
    known = ["auto", "eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()]
    if "/" in name and importlib.util.find_spec("kernels") is None:
        raise ConfigError(f"model.attn_implementation is {shown(name)}, a kernel of the Hub: pip install kernels")
    if name not in known and "/" not in name:
        plain = ", ".join(item for item in dict.fromkeys(known) if "|" not in item)
        raise ConfigError(f"model.attn_implementation is {shown(name)}: choose {plain}")


def check_memory(config: RunConfig, available: int, n_processes: int, n_shards: int = 1) -> None:
    """Refuse what surely does not fit: only weights, gradients, optimizer state and a step's tokens are counted."""
    model, train = config.model.gpt_config(), config.train
    width, inner = model.n_embd, model.n_inner or 4 * model.n_embd
    block = 4 * width * width + 2 * width * inner + inner + 9 * width
    n_parameters = (model.vocab_size + model.n_positions + 2) * width + model.n_layer * block
    # Weight, gradient, one or two averages of gradients, and perhaps one of the weight.
    copies = (4 if config.optim.name == "adamw" else 3) + bool(config.optim.ema)
    state_bytes = n_parameters * copies * (8 if train.precision == "fp64" else 4) // n_shards
    if state_bytes > available:
        raise ConfigError(
            f"the model has {n_parameters:,} parameters, which with gradients and {config.optim.name}'s state take "
            f"{state_bytes / 1e9:,.1f} GB, and there are {available / 1e9:,.1f} GB here: lower model.n_embd, "
            f"model.n_layer, model.n_positions or model.vocab_size"
        )
    token_bytes = 8 * train.global_batch_tokens // n_processes
    if token_bytes > available:
        raise ConfigError(
            f"the tokens of one step, train.global_batch_tokens {train.global_batch_tokens}, take "
            f"{token_bytes / 1e9:,.1f} GB, and there are {available / 1e9:,.1f} GB here: lower it"
        )


def check_prompt(config: RunConfig, tokenizer: Tokenizer) -> None:
    """Refuse a prompt that leaves the model no position for a sample."""
    if config.eval.sample_every:
        n_tokens = len(tokenizer.hugging_face().encode(config.eval.sample_prompt))
        n_positions = config.model.gpt_config().n_positions
        if n_tokens >= n_positions:
            raise ConfigError(
                f"eval.sample_prompt has {n_tokens} tokens, and the model {n_positions} positions: shorten the prompt, "
                f"or set eval.sample_every 0"
            )


def memory_of(device: torch.device) -> int:
    """Bytes of memory that the device has in all."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    limit = CGROUP_LIMIT.read_text().strip() if CGROUP_LIMIT.is_file() else "max"
    total = psutil.virtual_memory().total
    return min(total, int(limit)) if limit.isdecimal() else total
