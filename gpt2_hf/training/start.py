"""Where a run begins: its data, the checkpoint to go on from, and the batches from there."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

from accelerate import Accelerator, PartialState

from .. import runs
from ..config import RunConfig
from ..data.remote import open_folder
from ..data.shards import ShardSet, open_split
from ..data.stream import StepLoader, TokenStream
from ..files import whole_file
from ..knobs import ConfigError
from . import checkpoint
from .run_folder import agree

REWIND = "rewind.json"
SHAPE = ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")


@dataclass(frozen=True)
class Data:
    """The splits of a run; ``val`` is None where no validation loss is asked for."""

    train: ShardSet
    val: ShardSet | None


@dataclass(frozen=True)
class Start:
    """What this start goes on from: ``step`` updates made, their result in ``checkpoint`` (None: from nothing).

    Attributes:
        data_offset: samples that the run has passed over so far: all that follow come by so many earlier.
        rewind: the rewind that led here, if the run came to this step by one.
    """

    checkpoint: Path | None = None
    step: int = 0
    data_offset: int = 0
    rewind: Rewind | None = None


@dataclass(frozen=True)
class Rewind:
    """That the run went back to the checkpoint of ``step``; kept as ``RUN/rewind.json`` until there is another.

    Attributes:
        rewound_from: the step that the run had come to.
        data_offset: of all steps from then on.
        times: rewinds up to this one without a newer checkpoint in between.
    """

    step: int
    rewound_from: int
    data_offset: int
    times: int

    def write(self, run: Path) -> None:
        with whole_file(run / REWIND) as file:
            file.write(json.dumps(asdict(self)).encode())

    def row(self) -> dict[str, int]:
        """For metrics.jsonl, at ``step``."""
        return {"rewound_from": self.rewound_from, "data_offset": self.data_offset}

    @staticmethod
    def forget(run: Path) -> None:
        """Else checkpoints that are made from an earlier one on would be taken for those that led to the rewind."""
        (run / REWIND).unlink(missing_ok=True)

    @staticmethod
    def read(run: Path) -> Rewind | None:
        """The last rewind of a run; None where there was none. Raises ConfigError for a file that cannot be read."""
        try:
            return Rewind(**{k: int(v) for k, v in json.loads((run / REWIND).read_text()).items()})
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{run / REWIND} cannot be read ({error}), and says where the run goes on in its data: put it back, or "
                f"delete it, and the run may train on data again from which it diverged"
            ) from None


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
        run_dir = Path(config.train.run_dir)
        rewind = Rewind.read(run_dir)
        if rewind:
            discard_untrusted(run_dir / "checkpoints", rewind)
        found = runs.newest_whole(run_dir / "checkpoints")
        if found is None:
            Rewind.forget(run_dir)
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
        if rewind and rewind.step > saved["step"]:  # its checkpoint is gone: what comes now was never rewound
            Rewind.forget(run_dir)
        if rewind and rewind.step == saved["step"]:
            return Start(found, saved["step"], rewind.data_offset, rewind)
        return Start(found, saved["step"], saved.get("data_offset", 0))

    return agree(state, look)


def discard_untrusted(checkpoints: Path, rewind: Rewind, say: Callable[[str], None] = print) -> None:
    """Delete, by name, the checkpoints newer than a rewind's that were made before it: they led to where it was."""
    for step, path in runs.saved_steps(checkpoints).items():
        if step <= rewind.step:
            continue
        try:
            is_older = checkpoint.read_state(path).get("data_offset", 0) < rewind.data_offset
        except (OSError, ValueError, AttributeError):
            continue  # damaged, and passed over as such
        if is_older:
            runs.delete(path)
            say(f"checkpoint {path} was made when training had begun to diverge, and is deleted")


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
        data_offset=0 if overfit else start.data_offset,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        pin_memory=accelerator.device.type == "cuda",
    )
    return nullcontext(repeat(next(loader), config.train.steps - start.step)) if overfit else loader
