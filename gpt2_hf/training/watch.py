"""What can go wrong while training, and what the user is told then."""

from __future__ import annotations

import errno
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.optim import Optimizer

from ..config import RunConfig
from ..data.documents import DocumentMask
from ..knobs import ConfigError
from ..model import GPTForCausalLM
from ..program import PATIENCE, UserError
from .run_folder import RunFolder

# A model has diverged when it gives the right token this many nats less than who knows nothing and guesses ...
MARGIN = 5.0
# ... in so many steps on end. One batch may be odd.
STEPS_ON_END = 10
# Windows on which weights are tried before they are saved.
TRIAL_WINDOWS = 8

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Watch:
    """Tells a model that has diverged, so that no checkpoint is made of it.

    Per step it only counts on the device. Losses are looked at when they are logged; weights before they are saved or
    measured, because the loss of a step says nothing about the update that the step ends with.
    """

    def __init__(
        self, accelerator: Accelerator, model: GPTForCausalLM, folder: RunFolder, finish_saving: Callable[[], object]
    ):
        self.accelerator, self.model, self.folder = accelerator, model, folder
        self._finish_saving = finish_saving  # so that the folder knows its newest checkpoint
        self.limit = math.log(model.config.vocab_size) + MARGIN
        self._high = torch.zeros((), device=accelerator.device)  # steps on end whose loss is above the limit
        self._first: Tensor | None = None

    def note(self, loss: Tensor) -> None:
        """Take in a step's loss; nothing waits for the device."""
        self._high = (self._high + 1) * (loss > self.limit)
        self._first = loss if self._first is None else self._first

    def look(self, step: int, loss: float, grad_norm: float) -> None:
        """Raise FloatingPointError when training no longer works. Every rank must call it.

        Under a gradient scaler an infinite norm is a step that was skipped.
        """
        for name, value in (("train_loss", loss), ("grad_norm", grad_norm)):
            if not math.isfinite(value) and (name == "train_loss" or self.accelerator.scaler is None):
                self._stop(f"{name} is {value} at step {step}")
        if float(self.accelerator.reduce(self._high, "mean")) >= STEPS_ON_END:
            self._stop(f"train_loss is {loss:.4g} at step {step}, above {self.limit:.1f} for {STEPS_ON_END} steps")

    def try_weights(
        self, step: int, optimizers: Sequence[Optimizer], batch: Tensor | None, documents: DocumentMask | None = None
    ) -> None:
        """Raise FloatingPointError when the weights after ``step`` are not worth saving. Every rank must call it.

        Args:
            batch: (grad_accum_steps, B, T + 1), what was just trained on; None to look at the numbers alone.
        """
        states = (value for optimizer in optimizers for state in optimizer.state.values() for value in state.values())
        tensors = [*self.model.parameters(), *(t for t in states if isinstance(t, Tensor) and t.ndim)]
        if not bool(torch.stack([t.detach().isfinite().all() for t in tensors]).all()):
            self._stop(f"the weights or the optimizer's state are not finite after step {step}")
        if batch is None:
            return
        on_host = batch[0, :TRIAL_WINDOWS]
        windows = on_host.to(self.accelerator.device)
        input_ids, labels = windows[:, :-1], windows[:, 1:]
        apart = documents(input_ids, on_host[:, :-1]) if documents else {}
        self.model.eval()
        # Compiling for this shape would take longer than it saves.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), self.accelerator.autocast():
            told = {"input_ids": input_ids, "shift_labels": labels, "use_cache": False, "reduction": "none"}
            loss = self.model(**told, **apart).loss.float().mean()
        self.model.train()
        if not (value := float(self.accelerator.reduce(loss, "mean"))) <= self.limit:
            self._stop(f"the weights after step {step} give a loss of {value:.4g} on what they were just trained on")

    def _stop(self, what: str) -> None:
        advice = "a lower --optim.lr and --optim.muon_lr, or look at the data near this step"
        self._finish_saving()
        newest = self.folder.newest
        if newest is None:
            way_on = f"no checkpoint was saved: start again with {advice}"
        elif self._first is not None and not float(self._first) <= self.limit:
            way_on = f"so it was at the first step after {newest}: delete that one, and the run goes on from another"
        else:
            way_on = f"{newest} is good, and the next start goes on from it: start again with {advice}"
        raise FloatingPointError(f"{what}, so this is not saved; {way_on}")


@contextmanager
def advice_on_memory(config: RunConfig, world_size: int) -> Iterator[None]:
    """Turn out-of-memory errors into the micro-batch to try next, for the same global batch and curve."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one; the CPU's allocator raises the plain kind
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        size = config.train.micro_batch_size
        samples = config.train.global_batch_tokens // config.data.seq_len // world_size
        smaller = max((b for b in range(1, size) if samples % b == 0), default=None)
        same = "the global batch stays the same, and so does the curve but for what dropout drops"
        same = same if config.model.dropout else "the global batch and the curve stay the same"
        advice = (
            f"try --train.micro_batch_size {smaller}: {same}"
            if smaller
            else "micro_batch_size is 1 already: try --train.gradient_checkpointing true, or a shorter data.seq_len"
        )
        raise ConfigError(f"out of memory with micro_batch_size {size}; {advice}") from error


@contextmanager
def advice_on_peers() -> Iterator[None]:
    """Let the process speak first that met an error, where this one only lost its connection to it."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.distributed.DistError) and "by peer" not in str(error):
            raise
        time.sleep(3 * PATIENCE)  # in which the launcher should end this process too
        raise UserError("another process of this run ended, and so must this one; its own message says why") from error


@contextmanager
def advice_on_disk(folder: RunFolder) -> Iterator[None]:
    """Turn the many errors of a full disk into one that says so, and what is left."""
    try:
        yield
    except Exception as error:
        if not _is_disk_full(error):
            raise
        raise UserError(
            f"the disk of {folder.path} is full, or this user's share of it (writing stopped{folder.way_on()}); free "
            f"some space there and start again, or keep less: --checkpoint.keep_last 1"
        ) from error


def _is_disk_full(error: BaseException | None) -> bool:
    """Whether there is no space behind an error; what is written in Rust gives the number only in its text."""
    while error is not None:
        number = error.errno if isinstance(error, OSError) else None
        in_text = re.search(r"\(os error (\d+)\)", str(error))
        if number in _DISK_FULL or (in_text and int(in_text[1]) in _DISK_FULL):
            return True
        error = error.__cause__ or error.__context__
    return False
