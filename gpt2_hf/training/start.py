"""Where a run begins: its data, the checkpoint to go on from, and the batches from there."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

from accelerate import Accelerator, PartialState

from .. import runs
from ..config import RunConfig
from ..data.remote import open_folder
from ..data.shards import ShardSet, open_split
from ..data.stream import StepLoader, TokenStream
from ..knobs import ConfigError
from . import checkpoint
from .run_folder import agree

SHAPE = ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")


@dataclass(frozen=True)
class Data:
    """The splits of a run; ``val`` is None where no validation loss is asked for."""

    train: ShardSet
    val: ShardSet | None


@dataclass(frozen=True)
class Start:
    """What this start goes on from: ``step`` updates made, their result in ``checkpoint`` (None: from nothing)."""

    checkpoint: Path | None = None
    step: int = 0


def open_data(config: RunConfig) -> Data:
    """The training and validation splits, checked against the model. Raises ConfigError or ShardError."""
    folder = open_folder(config.data.path, config.data.cache_dir, config.data.cache_gb)
    train_data = open_split(folder, "train")
    val_data = open_split(folder, "val") if config.eval.val_every else None
    vocab_size = config.model.gpt_config().vocab_size
    if train_data.vocab_size > vocab_size:
        raise ConfigError(
            f"{config.data.path} has a vocabulary of {train_data.vocab_size}, the model has {vocab_size} rows for it; "
            f"leave out model.vocab_size, or prepare the data with the model's tokenizer"
        )
    for data in (train_data, val_data):
        if data is not None and data.n_tokens <= config.data.seq_len:
            raise ConfigError(
                f"{config.data.path}: the {data.split} split has {data.n_tokens:,} tokens, less than one window of "
                f"data.seq_len + 1 = {config.data.seq_len + 1}; prepare more documents, lower data.seq_len"
                + (", or train without validation: --eval.val_every 0" if data.split == "val" else "")
            )
        if data is not None and config.data.verify:
            data.verify()
    return Data(train_data, val_data)


def identity(config: RunConfig, data: ShardSet) -> dict[str, Any]:
    """What must not change in the middle of a run, because its curve would then mean nothing."""
    return {
        **{f"model.{name}": getattr(config.model.gpt_config(), name) for name in SHAPE},
        "data": data.fingerprint,
        "data.seq_len": config.data.seq_len,
        "data.document_mask": config.data.document_mask,
        "train.seed": config.train.seed,
        "train.global_batch_tokens": config.train.global_batch_tokens,
        "train.overfit_batch": config.train.overfit_batch,
        "optim.name": config.optim.name,
    }


def find_start(config: RunConfig, data: ShardSet, state: PartialState) -> Start:
    """The newest whole checkpoint of the run, looked up by one rank so that all agree.

    Raises:
        ConfigError: when it belongs to another run than ``config`` describes, or cannot be gone on from.
    """

    def look() -> Start:
        found = runs.newest_whole(Path(config.train.run_dir) / "checkpoints")
        if found is None:
            return Start()
        try:
            state_of_run = checkpoint.read_state(found)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{found} is whole, and no run can go on from it: {checkpoint.STATE} cannot be read ({error}); delete "
                f"that checkpoint, or choose another --train.run_dir"
            ) from None
        saved = {"data.document_mask": False} | state_of_run  # older checkpoints don't name it
        for name, now in identity(config, data).items():
            if saved.get(name, now) != now:
                raise ConfigError(
                    f"{config.train.run_dir} holds a run with another {name} ({saved[name]}, now {now}); choose "
                    f"another --train.run_dir, delete that folder, or set {name} back"
                )
        if saved["step"] > config.train.steps:
            raise ConfigError(
                f"train.steps is {config.train.steps}, and {found} is {saved['step']} steps along already: raise "
                f"train.steps, or choose another --train.run_dir"
            )
        return Start(found, saved["step"])

    return agree(state, look)


def is_finished(config: RunConfig, start: Start) -> bool:
    """Whether ``final`` is what the run would end with: the newest checkpoint's weights, or all that was kept."""
    has_all_steps = start.checkpoint is None or start.step >= config.train.steps
    return has_all_steps and runs.final_problem(Path(config.train.run_dir), start.checkpoint) is None


def load_steps(
    config: RunConfig, data: ShardSet, start: Start, accelerator: Accelerator
) -> AbstractContextManager[Any]:
    """The batches of this rank, (grad_accum_steps, B, T + 1), for all steps to come.

    With ``overfit_batch`` that is the first one over and over.
    """
    overfit = config.train.overfit_batch
    loader = StepLoader(
        TokenStream(data, config.data.seq_len, config.train.seed),
        0 if overfit else start.step,
        1 if overfit else config.train.steps,
        global_batch_size=config.train.global_batch_tokens // config.data.seq_len,
        micro_batch_size=config.train.micro_batch_size,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        pin_memory=accelerator.device.type == "cuda",
    )
    return nullcontext(repeat(next(loader), config.train.steps - start.step)) if overfit else loader
