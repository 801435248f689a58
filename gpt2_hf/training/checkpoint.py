"""Saving a run and going on with it: the weights as a stock gpt2 folder, and beside them what only a resume needs.

    step-00001000/model.safetensors    the weights; above 2 GB in several files with an index, as transformers has it
                  trainer_state/       the optimizers' state by parameter name, as torch.distributed.checkpoint writes
                                       it, and state.json: the step and the identity of the run

All ranks write, each its share, while training goes on: what they write is a copy in host memory. Any number of
processes can read it, however weights were and will be distributed. The folder gets its name when every rank's files
are on the disk, and only then is it said to be saved.
"""

from __future__ import annotations

import errno
import json
import os
import re
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed.checkpoint as dcp
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers import PreTrainedTokenizerBase

from ..data.tokenizer import save_tokenizer
from ..model import GPTForCausalLM
from ..runs import (
    LAST_WEIGHTS,
    STATE,
    TRAINER_STATE,
    begin_folder,
    best_step,
    describe_files,
    drop_unfinished,
    finish_folder,
    prune,
    read_manifest,
    step_name,
)
from .distributed import Host, put, settle, settled, whole
from .optim import WeightAverage, averaged
from .stop import GONE, Stopping

if TYPE_CHECKING:
    from .build import Parts

# It says so of every single process.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

OLD_STATE = f"{TRAINER_STATE}/optimizer.pt"  # until the end of 2026: all of it, by torch.save
WEIGHT_FILE_BYTES = 2 * 10**9


def save(parts: Parts, step: int) -> None:
    """Begin to write the checkpoint after ``step``; older ones go when it is whole. Every rank must call it.

    Raises:
        Exception: a fault of ours in the writing of the last one. A disk that took no more of it is only warned of.
    """
    folder, keep, scaler = parts.folder, parts.config.checkpoint, parts.accelerator.scaler
    place = folder.checkpoints / step_name(step)
    state = parts.identity | parts.watch.state()
    state |= {"step": step, "data_offset": parts.start.data_offset, "scaler": scaler and scaler.state_dict()}

    def saved() -> None:
        folder.newest = place
        if parts.accelerator.is_main_process:
            best = best_step(folder.path) if keep.keep_best else None
            prune(folder.checkpoints, keep.keep_last, keep.keep_every, best, warn=parts.log.say)

    parts.saver.wait()
    check_folder(parts)
    parts.saver.begin(place, state, saved)


def save_final(parts: Parts) -> None:
    """Write the finished model, ``RUN/final``, after the checkpoints. Every rank must call it. Raises OSError."""
    if parts.start.step == parts.config.train.steps:  # no step of this start has tried these weights
        parts.watch.try_weights(parts.start.step, parts.optimizers, None)
    parts.saver.wait()
    check_folder(parts)
    with averaged(parts.bare_model, parts.optimizers) as is_average:
        newest = parts.folder.newest
        is_last = newest is not None and newest.name == step_name(parts.config.train.steps)
        parts.saver.begin(parts.folder.final, average_of=newest if is_average and is_last else None)
    problem = parts.saver.wait()
    check_folder(parts)
    if problem:
        raise problem
    parts.folder.is_finished = True


def check_folder(parts: Parts) -> None:
    """Raise Stopping on all ranks where the run's folder was taken away. Every rank must call it."""
    if any(parts.host.gather(parts.folder.is_gone())):
        raise Stopping(GONE)


class Saver:
    """Writes model folders in the background, one at a time; every rank has one, and must call it as the others do.

    Args:
        warn: hears, on the first rank, of a folder that the disk did not take.
        waiting: is called every few seconds while this rank waits for the disk.
    """

    def __init__(
        self,
        host: Host,
        model: GPTForCausalLM,
        optimizers: Sequence[Optimizer],
        tokenizer: PreTrainedTokenizerBase,
        warn: Callable[[str], None] = print,
        waiting: Callable[[], None] = lambda: None,
    ):
        self._host, self._model, self._optimizers, self._tokenizer = host, model, optimizers, tokenizer
        self._warn, self._waiting = warn, waiting
        self._pinned: dict[str, Tensor] = {}  # name -> host memory that a GPU copies to, got once
        self._settings: dict[str, bytes] = {}  # the files beside the weights, once they were written
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def begin(
        self,
        place: Path,
        state: dict[str, Any] | None = None,
        saved: Callable[[], None] = lambda: None,
        average_of: Path | None = None,
    ) -> None:
        """Copy this rank's share to the host and start to write it to the folder ``place``.

        Args:
            state: of the run; None for a model alone, without what a resume needs.
            saved: is called, on every rank, when the folder has its name.
            average_of: the checkpoint with the last of the weights that the model is the average of.
        """
        if self._host.rank == 0:  # here, where the run's folder was just looked for: it must not be made again
            with suppress(OSError):
                place.parent.mkdir(exist_ok=True)
        settle(self._model)
        files = weight_files(self._model)
        weights = self._copy_weights(files)
        tensors = self._copy_trainer_state() if state is not None else {}
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # until then the next update must not change what is being copied

        def work() -> None:
            try:
                self._write(place, files, weights, tensors, state, average_of)
                saved()
            except Exception as error:
                self._error = error

        # A process that is told to end must not wait for peers that may be gone: close() does, for a while.
        self._thread = threading.Thread(target=work, name="Saver", daemon=True)
        self._thread.start()

    def wait(self) -> OSError | None:
        """Wait for the folder that is being written; returns why it could not be, which has been warned of.

        Raises:
            Exception: any other error in writing.
        """
        if self._thread is None:
            return None
        while self._thread.is_alive():
            self._thread.join(5)
            self._waiting()  # a large model on a slow disk is no hang
        self._thread, error, self._error = None, self._error, None
        if error is None or isinstance(error, OSError):
            return error
        raise error

    def close(self, seconds: float = 60) -> None:
        """Let what is being written be finished, where that is possible."""
        if self._thread is not None:
            self._thread.join(seconds)

    def _copy_weights(self, files: Mapping[str, Sequence[str]]) -> dict[str, dict[str, Tensor]]:
        """The files that this rank writes. Every rank takes part in gathering each weight, and its writer keeps it."""
        named = dict(self._model.named_parameters())
        mine: dict[str, dict[str, Tensor]] = {}
        for number, (file, names) in enumerate(files.items()):
            if is_mine := number % self._host.world_size == self._host.rank:
                mine[file] = {}
            for name in names:
                tensor = whole(named[name].detach())
                if is_mine:
                    mine[file][name] = self._copy(name, tensor)
        return mine

    def _copy_trainer_state(self) -> dict[str, Tensor]:
        """This rank's share: of what is sharded its own part, of what each rank has whole some tensors."""
        mine: dict[str, Tensor] = {}
        for number, (name, tensor) in enumerate(optimizer_tensors(self._model, self._optimizers).items()):
            if isinstance(tensor, DTensor):
                mesh = DeviceMesh("cpu", tensor.device_mesh.mesh, _init_backend=False)
                mine[name] = DTensor.from_local(
                    self._copy(name, tensor.to_local()),
                    mesh,
                    tensor.placements,
                    run_check=False,
                    shape=tensor.shape,
                    stride=tensor.stride(),
                )
            elif number % self._host.world_size == self._host.rank:
                mine[name] = self._copy(name, tensor)
        return mine

    def _copy(self, name: str, tensor: Tensor) -> Tensor:
        if tensor.device.type != "cuda":
            return tensor.to("cpu", copy=True)
        if name not in self._pinned:
            self._pinned[name] = torch.empty_like(tensor, device="cpu", pin_memory=True)
        return self._pinned[name].copy_(tensor, non_blocking=True)

    def _write(
        self,
        place: Path,
        files: Mapping[str, Sequence[str]],
        weights: Mapping[str, dict[str, Tensor]],
        tensors: dict[str, Tensor],
        state: dict[str, Any] | None,
        average_of: Path | None,
    ) -> None:
        """Raises on all ranks what one of them met: an OSError, or a fault of ours."""
        try:
            temporary, begun = self._host.first(lambda: _begin(place))
            if state is not None:
                write_trainer_state(temporary, tensors, state, self._host)
            outcomes = self._host.gather(self._write_share(temporary, files, weights))
            entries = {name: entry for share in settled(outcomes) for name, entry in share.items()}
            self._host.first(lambda: _finish(place, temporary, begun, dict(sorted(entries.items())), average_of))
        except (Exception, CheckpointException) as met:
            error = _cause(met)
            if self._host.rank == 0:
                drop_unfinished(place)
                with suppress(OSError):  # of a run's folder that was taken away this may have made a new one
                    place.parent.rmdir()
                    place.parent.parent.rmdir()
                if isinstance(error, OSError):
                    self._warn(f"{place} could not be written ({error.strerror or error})")
            raise error from None

    def _write_settings(self, folder: Path, files: Mapping[str, Sequence[str]]) -> list[str]:
        """A stock gpt2 folder's other files: the same each time, and a tokenizer is long to put in text."""
        if not self._settings:
            names = write_settings(folder, self._model, self._tokenizer, files)
            self._settings = {name: (folder / name).read_bytes() for name in names}
        else:
            for name, content in self._settings.items():
                (folder / name).write_bytes(content)
        return list(self._settings)

    def _write_share(
        self, folder: Path, files: Mapping[str, Sequence[str]], weights: Mapping[str, dict[str, Tensor]]
    ) -> dict[str, dict[str, Any]] | Exception:
        """Write this rank's files of a model; the manifest's entries for all that it has written, or what failed."""
        rank = self._host.rank
        try:
            for file, named in weights.items():
                save_file(named, folder / file, metadata={"format": "pt"})
            mine = [
                *weights,
                *(f"{TRAINER_STATE}/{path.name}" for path in (folder / TRAINER_STATE).glob(f"__{rank}_*")),
            ]
            if rank == 0:
                mine += self._write_settings(folder, files)
                if (folder / TRAINER_STATE).is_dir():
                    mine += [f"{TRAINER_STATE}/.metadata", STATE]
            return describe_files(folder, mine)
        except OSError as error:
            return error
        except Exception as error:  # of the writer of safetensors, whose kind other processes may not be able to read
            return _cause(error)


def weight_files(model: nn.Module) -> dict[str, list[str]]:
    """File -> names of the weights in it, as transformers divides a model."""
    shapes = {name: torch.empty(p.shape, dtype=p.dtype, device="meta") for name, p in model.named_parameters()}
    split = split_torch_state_dict_into_shards(
        shapes, filename_pattern="model{suffix}.safetensors", max_shard_size=WEIGHT_FILE_BYTES
    )
    return split.filename_to_tensors


def write_settings(
    folder: Path, model: GPTForCausalLM, tokenizer: PreTrainedTokenizerBase, files: Mapping[str, Sequence[str]]
) -> list[str]:
    """What a stock gpt2 folder has beside its weights; returns the files' names."""
    before = {path.name for path in folder.iterdir()}
    model.config.dtype = next(model.parameters()).dtype
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    save_tokenizer(tokenizer, folder, model.config.n_positions)
    if len(files) > 1:
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        index = {
            "metadata": {"total_size": size, "total_parameters": sum(p.numel() for p in model.parameters())},
            "weight_map": {name: file for file, names in files.items() for name in names},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return sorted({path.name for path in folder.iterdir() if path.is_file()} - before)


def load_model(folder: Path, model: nn.Module) -> None:
    """Put a checkpoint's weights into a model that trains, whoever holds what of it. Every rank must call it."""
    settle(model)
    named = dict(model.named_parameters())
    for file in sorted(folder.glob("model*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            names = weights.keys()
            for name in names:
                put(weights.get_tensor(name), into=named[name])


def optimizer_tensors(model: nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, Tensor]:
    """What the optimizers have accumulated, as ``parameter.state``: sharded where the parameter is."""
    found: dict[str, Tensor] = {}
    for name, p in model.named_parameters():
        for optimizer in optimizers:
            found |= {f"{name}.{key}": value for key, value in optimizer.state.get(p, {}).items()}
    return found


def write_trainer_state(folder: Path, tensors: dict[str, Tensor], state: dict[str, Any], host: Host) -> None:
    """Write ``trainer_state``, all ranks together.

    Args:
        tensors: this rank's share of ``optimizer_tensors``, on the CPU.
    """
    path = folder / TRAINER_STATE
    host.first(lambda: path.mkdir())
    writer = dcp.FileSystemWriter(path, sync_files=False)  # they are flushed when they are described
    dcp.save(tensors, storage_writer=writer, process_group=host.group, no_dist=host.group is None)
    host.first(lambda: (folder / STATE).write_text(json.dumps(state, indent=1)))


def load_trainer_state(folder: Path, model: nn.Module, optimizers: Sequence[Optimizer], host: Host) -> dict[str, Any]:
    """Put a checkpoint's optimizer state back and return its ``state.json``. Every rank must call it.

    Only what the optimizers have accumulated comes from the file: rates, betas and decay are those of the present
    configuration, so that a run can go on with others.
    """
    settle(model)
    for optimizer in optimizers:
        if isinstance(optimizer, WeightAverage):
            optimizer.state.clear()  # the checkpoint may be from before there was one
    if (folder / OLD_STATE).exists():
        _load_old_state(folder / OLD_STATE, model, optimizers)
        return read_state(folder)
    reader = dcp.FileSystemReader(folder / TRAINER_STATE)
    saved: Any = reader.read_metadata().state_dict_metadata
    owners = _owners(optimizers)
    wanted = {}
    for name, p in model.named_parameters():
        for key in [full.removeprefix(f"{name}.") for full in saved if full.rpartition(".")[0] == name]:
            if (owner := owners.get((p, key == "average"))) is None:
                continue  # the average of a run that no longer keeps one
            like = saved[f"{name}.{key}"]
            value = torch.zeros_like(p) if like.size == p.shape else p.new_zeros(like.size, dtype=like.properties.dtype)
            wanted[f"{name}.{key}"] = owner.state[p][key] = value.detach()
    dcp.load(wanted, storage_reader=reader, process_group=host.group, no_dist=host.group is None)
    return read_state(folder)


def read_state(folder: Path) -> dict[str, Any]:
    """The step and the identity of the run that wrote a checkpoint. Raises OSError or ValueError."""
    return json.loads((folder / STATE).read_text())


def _begin(place: Path) -> tuple[Path, os.stat_result]:
    temporary = begin_folder(place)
    return temporary, temporary.stat()


def _finish(
    place: Path,
    temporary: Path,
    begun: os.stat_result,
    entries: dict[str, dict[str, Any]],
    average_of: Path | None,
) -> None:
    # Where a run's folder was renamed, what writes files has made a new one of its name.
    if not os.path.samestat(begun, temporary.stat()):
        raise FileNotFoundError(errno.ENOENT, "the folder was taken away", str(place.parent))
    for name, entry in read_manifest(average_of).items() if average_of else ():
        if name.endswith(".safetensors") and name in entries:
            entries[name][LAST_WEIGHTS] = entry["sha256"]
    finish_folder(place, temporary, entries)


def _owners(optimizers: Sequence[Optimizer]) -> dict[tuple[Any, bool], Optimizer]:
    """Parameter, and whether it is about its average -> the optimizer whose state holds that."""
    return {
        (p, isinstance(optimizer, WeightAverage)): optimizer
        for optimizer in optimizers
        for group in optimizer.param_groups
        for p in group["params"]
    }


def _load_old_state(file: Path, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    saved = torch.load(file, map_location="cpu", weights_only=True, mmap=True)["state"]
    owners = _owners(optimizers)
    for name, p in model.named_parameters():
        for key, tensor in saved.get(name, {}).items():
            value = torch.zeros_like(p) if tensor.ndim else torch.zeros((), dtype=tensor.dtype, device=p.device)
            owners[p, False].state[p][key] = value.detach()
            put(tensor, into=owners[p, False].state[p][key])


def _cause(error: BaseException) -> Exception:
    """What a library's error is at bottom, for all processes to read: what the system said, or a text."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, OSError):
        return error
    number = re.search(r"\(os error (\d+)\)", str(error))  # what is written in Rust gives it only in its text
    if number:
        return OSError(int(number[1]), os.strerror(int(number[1])))
    is_plain = type(error).__module__ == "builtins"
    return error if isinstance(error, Exception) and is_plain else RuntimeError(f"{type(error).__name__}: {error}")
