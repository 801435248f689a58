"""Where a run begins: its data, the checkpoint to go on from, and the batches from there."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import repeat
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from .. import runs
from ..config import RunConfig
from ..data.folder import ShardError
from ..data.remote import open_folder
from ..data.shards import ShardSet, open_split
from ..data.storage import Storage
from ..data.stream import StepLoader, training_stream
from ..data.tokenizer import open_tokenizer
from ..files import whole_file
from ..knobs import ConfigError
from . import checkpoint, stored_run
from .distributed import Host
from .initial import SHAPE

MICRO_BATCH = "micro_batch"  # in a checkpoint's state
MOST_NAMED = 5  # bad checkpoints in an error
RESTART_COUNTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")

# With another one of these the weights or the optimizers' state would not load.
UNFORCEABLE = {"model.n_layer", "model.n_embd", "model.n_positions", "model.vocab_size", "optim.name"}

# What older checkpoints don't name, as their runs had it.
# Of checkpoints of Muon's since November 2026: before, updates were scaled to AdamW's size.
MUON_UNIT = "optim.muon_lr's unit"

NOT_NAMED = {
    "data.document_starts": False,
    "data.document_mask": False,
    "data.seq_len_ramp": [],
    "data.seq_len_ramp_steps": 0,
    "train.batch_ramp": [],
    "train.batch_ramp_steps": 0,
    "model.init_from": None,
    "model.zero_init": False,
}


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
        rewind: the last rewind of the run, which may have led here.
        micro_batch: what ``train.micro_batch_size auto`` has found for the checkpoint's run; None where that was given.
        owed: what is known of a step whose measurements were cut short, and are still to be made; None otherwise.
    """

    checkpoint: Path | None = None
    step: int = 0
    data_offset: int = 0
    rewind: Rewind | None = None
    micro_batch: dict[str, Any] | None = None
    owed: dict[str, Any] | None = None


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
        with whole_file(run / runs.REWIND) as file:
            file.write(json.dumps(asdict(self)).encode())

    def row(self) -> dict[str, int]:
        """For metrics.jsonl, at ``step``."""
        return {"rewound_from": self.rewound_from, "data_offset": self.data_offset}

    @staticmethod
    def forget(run: Path) -> None:
        """Else checkpoints that are made from an earlier one on would be taken for those that led to the rewind."""
        (run / runs.REWIND).unlink(missing_ok=True)

    @staticmethod
    def read(run: Path) -> Rewind | None:
        """The last rewind of a run; None where there was none. Raises ConfigError for a file that cannot be read."""
        try:
            return Rewind(**{k: int(v) for k, v in json.loads((run / runs.REWIND).read_text()).items()})
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{run / runs.REWIND} cannot be read ({error}), and says where the run goes on in its data: put it "
                f"back, or delete it, and the run may train on data again from which it diverged"
            ) from None


def open_data(config: RunConfig) -> Data:
    """The training and validation splits, checked against the model. Raises ConfigError or ShardError."""
    folder = open_folder(config.data.path, config.data.cache_dir, config.data.cache_gb)
    tokenizer = None if config.data.tokenizer is None else open_tokenizer(config.data.tokenizer)
    train_data = open_split(folder, "train", tokenizer)
    val_data = open_split(folder, "val", tokenizer) if config.eval.val_every else None
    vocab_size = fitted(config, train_data).model.gpt_config().vocab_size
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


def fitted(config: RunConfig, data: ShardSet) -> RunConfig:
    """The run with a model that has a row for each token of its data, if it doesn't say how many it has."""
    if config.model.vocab_size is not None or data.tokenizer.is_gpt2:
        return config
    return replace(config, model=replace(config.model, vocab_size=data.vocab_size))


def identity(config: RunConfig, data: ShardSet) -> dict[str, Any]:
    """What must not change in the middle of a run, because its curve would then mean nothing."""
    return {
        **{f"model.{name}": getattr(config.model.gpt_config(), name) for name in SHAPE},
        "data": data.fingerprint,
        "data.tokenizer": data.tokenizer.fingerprint[:16],
        "data.seq_len": config.data.seq_len,
        "data.seq_len_ramp": config.data.seq_len_ramp,
        "data.seq_len_ramp_steps": config.data.seq_len_ramp_steps,
        "data.document_starts": config.data.document_starts,
        "data.document_mask": config.data.document_mask,
        "train.seed": config.train.seed,
        "train.global_batch_tokens": config.train.global_batch_tokens,
        "train.batch_ramp": config.train.batch_ramp,
        "train.batch_ramp_steps": config.train.batch_ramp_steps,
        "train.overfit_batch": config.train.overfit_batch,
        "optim.name": config.optim.name,
        "model.init_from": config.model.init_from,
        "model.zero_init": config.model.zero_init,
        **({MUON_UNIT: "spectral"} if config.optim.name == "muon" else {}),
    }


def find_start(config: RunConfig, data: ShardSet, host: Host) -> Start:
    """The newest whole checkpoint of the run, or what ``resume`` asks for, looked up by one rank so that all agree.

    Raises:
        ConfigError: when it belongs to another run than ``config`` describes, or cannot be gone on from; also when
            there are checkpoints and none is whole: then a run does not begin anew by itself.
    """
    return host.first(lambda: _look(config, data))


def _look(config: RunConfig, data: ShardSet) -> Start:
    run, resume = Path(config.train.run_dir), config.resume
    _check_mirror(config)
    taken, taken_step = _read_taken(run)
    if resume.mode == "never" and not _is_restarted():
        Rewind.forget(run)
        (run / runs.TAKEN).unlink(missing_ok=True)
        if aside := runs.set_aside(run):
            print(f"resume.mode is never: beginning at step 0; what {run} had so far is in {aside}")
        return Start()
    if rewind := Rewind.read(run):
        discard_untrusted(run / "checkpoints", rewind)
    newest, bad = _newest(run)
    if config.checkpoint.mirror and newest is None:
        newest = _fetch(config, data)
        if rewind := Rewind.read(run):
            discard_untrusted(run / "checkpoints", rewind)
        taken, taken_step = _read_taken(run)
    if resume.from_ is None:
        if newest is None and bad:
            shown = "; ".join(bad[:MOST_NAMED]) + (f"; and {n} more" if (n := len(bad) - MOST_NAMED) > 0 else "")
            raise ConfigError(
                f"{run} has checkpoints, and no run can go on from any of them ({shown}); repair one, or begin at step "
                f"0 with --resume.mode never, which moves them aside"
            )
        start = Start() if newest is None else _check(config, data, newest, rewind)
        if rewind and rewind.step > start.step:  # its checkpoint is gone: what comes now was never rewound
            Rewind.forget(run)
        (run / runs.TAKEN).unlink(missing_ok=True)
        return start

    chosen = _chosen(run, resume.from_)
    if taken == str(chosen) and newest and checkpoint.read_state(newest)["step"] > taken_step:
        print(f"resume.from {resume.from_} was taken by an earlier start, and the run goes on from where it has come")
        return _check(config, data, newest, rewind)
    if reason := unusable(chosen):
        steps = ", ".join(map(str, runs.saved_steps(run / "checkpoints"))) or "none"
        raise ConfigError(
            f"resume.from {resume.from_}: no run can go on from {chosen}: {reason}; steps with a checkpoint in {run}: "
            f"{steps}"
        )
    start = _check(config, data, chosen)
    if taken != str(chosen):
        Rewind.forget(run)  # it was of steps that are made anew
        is_own = _is_own(config, chosen)
        if aside := runs.set_aside(run, start.step if is_own else None):
            print(f"resume.from {resume.from_}: what {run} had {'after it' if is_own else 'so far'} is in {aside}")
        with whole_file(run / runs.TAKEN) as file:
            file.write(json.dumps({"from": str(chosen), "step": start.step}).encode())
    return start


def _check_mirror(config: RunConfig) -> None:
    """Refuse a mirror that cannot be, before training; whether it answers is seen later."""
    if (url := config.checkpoint.mirror) is None:
        return
    try:
        Storage.open(url, stored_run.AT_START)
    except (ShardError, ImportError) as error:
        raise ConfigError(f"checkpoint.mirror: {error}") from None
    path = Path(url.removeprefix("file://"))
    if path.is_dir() and path.samefile(config.train.run_dir):
        raise ConfigError(f"checkpoint.mirror {url} is the run's own folder: choose one on another disk")


def _newest(run: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that a run can go on from, and a line for each that was passed over, printed already."""
    folder = run / "checkpoints"
    passed_over: list[str] = []
    try:
        newest = runs.newest_whole(folder, passed_over.append, _without_state)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be read ({error.strerror}); choose another --train.run_dir") from None
    for line in passed_over:
        print(line)
    return newest, passed_over


def _fetch(config: RunConfig, data: ShardSet) -> Path | None:
    """The checkpoint that a run without a whole one goes on from, brought from its mirror; None: there is none."""
    run, resume, url = Path(config.train.run_dir), config.resume, config.checkpoint.mirror
    assert url is not None
    only = None
    try:
        if resume.from_ is not None:
            taken, _ = _taken(stored_run.read_record(url, runs.TAKEN))
            if taken != str(_chosen(run, resume.from_)):
                if not resume.from_.isdecimal():
                    return None
                only = int(resume.from_)
        found = stored_run.fetch_newest(run, url, lambda saved, where: _refuse_other(config, data, saved, where), only)
    except (ShardError, ImportError) as error:
        raise ConfigError(
            f"checkpoint.mirror: {error}; {run} has no whole checkpoint, and may go on from one there: to begin at "
            f"step 0 all the same, --resume.mode never"
        ) from None
    return found if found is not None and found.name != "final" else None


def _chosen(run: Path, name: str) -> Path:
    """The folder that ``resume.from`` names: a step of the run, or a path."""
    if name.isdecimal():
        return run / "checkpoints" / runs.step_name(int(name))
    own = run / "checkpoints" / name
    return own if not Path(name).exists() and own.is_dir() else Path(name).absolute()


def _is_own(config: RunConfig, folder: Path) -> bool:
    return folder.resolve().parent == (Path(config.train.run_dir) / "checkpoints").resolve()


def unusable(folder: Path) -> str | None:
    """Why no run can go on from a checkpoint, or None."""
    return runs.problem(folder) or _without_state(folder)


def _without_state(folder: Path) -> str | None:
    """Why no run can go on from a whole checkpoint, or None: it is a model without a trainer's state."""
    try:
        checkpoint.read_state(folder)
    except (OSError, ValueError) as error:
        return f"no run can go on from it: {checkpoint.STATE} cannot be read ({error})"
    return None


def _check(config: RunConfig, data: ShardSet, found: Path, rewind: Rewind | None = None) -> Start:
    """A start from a checkpoint, to which ``rewind`` may have gone back.

    Raises:
        ConfigError: when it cannot be gone on from.
    """
    saved = checkpoint.read_state(found)
    run_dir = config.train.run_dir
    place = run_dir if _is_own(config, found) else str(found)
    _refuse_other(config, data, saved, place)
    if saved["step"] > config.train.steps:
        raise ConfigError(
            f"train.steps is {config.train.steps}, and {found} is {saved['step']} steps along already: raise "
            f"train.steps, or choose another --train.run_dir"
        )
    if rewind and rewind.step == saved["step"]:
        return Start(found, saved["step"], rewind.data_offset, rewind, saved.get(MICRO_BATCH))
    offset = saved.get("data_offset", 0)
    return Start(found, saved["step"], offset, rewind, saved.get(MICRO_BATCH), owed=saved.get("owed"))


def _refuse_other(config: RunConfig, data: ShardSet, saved: dict[str, Any], place: str) -> None:
    """Raise ConfigError when a checkpoint's state is that of another run, naming all that differs and is not forced."""
    saved = NOT_NAMED | saved
    now = identity(config, data)
    if unknown := set(config.resume.force) - now.keys():
        raise ConfigError(f"resume.force: {', '.join(sorted(unknown))} is not among {', '.join(now)}")
    different = [name for name in now if saved.get(name, now[name]) != now[name]]
    refused = [name for name in different if name not in config.resume.force or name in UNFORCEABLE]
    if refused:
        listed = ", another ".join(f"{name} ({saved[name]}, now {now[name]})" for name in refused)
        forced = ",".join(name for name in refused if name not in UNFORCEABLE)
        way_on = f", or go on all the same with --resume.force {forced}" if forced else ""
        way_on += f"; {', '.join(fixed)} cannot be forced" if (fixed := sorted(UNFORCEABLE & {*refused})) else ""
        is_own = place == config.train.run_dir
        choose = "choose another --train.run_dir, delete that folder, or " if is_own else ""
        them = "it" if len(refused) == 1 else "them"
        raise ConfigError(f"{place} holds a run with another {listed}; {choose}set {them} back{way_on}")
    if saved.get("optim.name") == "muon" == config.optim.name and MUON_UNIT not in saved:
        factor = 0.2 * math.sqrt(config.model.gpt_config().n_embd)
        print(
            f"{place} was begun when optim.muon_lr had another unit: what it was begun with is {factor:.3g} times as "
            f"much now, and this start has {config.optim.muon_lr:g}"
        )
    for name in different:
        print(f"resume.force: {name} was {saved[name]} in {place}, and is {now[name]} from now on")


def _read_taken(run: Path) -> tuple[str | None, int]:
    """The checkpoint that ``resume.from`` named and the run has begun from, and its step; None when there is none."""
    try:
        return _taken((run / runs.TAKEN).read_bytes())
    except OSError:
        return None, 0


def _taken(record: bytes | None) -> tuple[str | None, int]:
    try:
        taken = json.loads(record or b"")
        return str(taken["from"]), int(taken["step"])
    except (ValueError, TypeError, LookupError, RecursionError):
        return None, 0


def _is_restarted() -> bool:
    """Whether torchrun or Slurm has started this command again by itself: then it goes on, whatever it was told."""
    return any(os.environ.get(name, "0") not in ("", "0") for name in RESTART_COUNTS)


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
        training_stream(config, data),
        0 if overfit else start.step,
        1 if overfit else config.train.steps,
        global_batch_size=config.train.global_batch_tokens // config.data.seq_len,
        batch_ramp=[tokens // config.data.seq_len for tokens in config.train.batch_ramp],
        batch_ramp_steps=config.train.batch_ramp_steps,
        micro_batch_size=config.train.micro_batch_size,
        data_offset=0 if overfit else start.data_offset,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        pin_memory=accelerator.device.type == "cuda",
    )
    return nullcontext(repeat(next(loader), config.train.steps - start.step)) if overfit else loader
