"""What can go wrong while training, and what the user is told then."""

from __future__ import annotations

import errno
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.optim import Optimizer

from ..config import RunConfig
from ..data.documents import DocumentMask
from ..data.stream import cut
from ..knobs import ConfigError
from ..model import GPTForCausalLM
from ..program import UserError
from .distributed import local
from .run_folder import RunFolder

# A model has diverged when it gives the right token this many nats less than who knows nothing and guesses.
MARGIN = 5.0
# A loss is judged by those of the last so many good steps, once there are enough of them.
PAST, ENOUGH = 100, 20
# It is a spike above their mean plus so many standard deviations, and so many nats at least; and far off above:
SPIKE, FAR_OFF = (6.0, 0.1), (10.0, 1.0)
# A gradient scaler finds its scale by skipping steps; on end it needs no more than this.
SCALER_SKIPS = 50
# Steps whose figures may wait on the device to be read.
UNREAD = 100
# Windows on which weights are tried before they are saved.
TRIAL_WINDOWS = 8

NO_SMALLER = "try --train.gradient_checkpointing true, or a shorter data.seq_len"

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Diverged(FloatingPointError):
    """Training no longer works; ``step`` is the first whose update is not to be trusted."""

    def __init__(self, what: str, step: int):
        super().__init__(what)
        self.step = step


@dataclass
class Past:
    """What a step is judged by; saved with a checkpoint, so that a resumed run judges as one that ran through.

    Attributes:
        losses: of the last good steps.
        trouble: the first step whose update is not to be trusted, while losses are spikes or steps are skipped.
        n_odd, n_bad, n_skipped: steps on end, up to now, with a spike; skipped or far off; skipped.
    """

    losses: list[float] = field(default_factory=list)
    trouble: int | None = None
    n_odd: int = 0
    n_bad: int = 0
    n_skipped: int = 0

    def above(self, threshold: tuple[float, float], n_fewer: float = 1.0) -> float:
        """The loss that lies so far above the past; infinite while there is too little of it.

        Args:
            threshold: in standard deviations, and in nats at least.
            n_fewer: how many times fewer windows the loss is the mean of.
        """
        if len(self.losses) < ENOUGH:
            return math.inf
        n_sigmas, nats = threshold
        sigma = float(np.std(self.losses)) * math.sqrt(n_fewer)
        return float(np.mean(self.losses)) + max(n_sigmas * sigma, nats)


class Watch:
    """Tells a model that has diverged, so that no checkpoint is made of it.

    Every step is judged, and none is waited for: a step whose gradients are not finite is skipped on the device, and
    its figures are read there together with those of the steps around it.
    """

    def __init__(self, config: RunConfig, accelerator: Accelerator, model: GPTForCausalLM):
        self.config, self.accelerator, self.model = config, accelerator, model
        self.limit = math.log(model.config.vocab_size) + MARGIN
        self.past = Past()
        self._unread: list[tuple[Tensor, Tensor]] = []
        self._last: tuple[float, float] = (math.nan, math.nan)
        self._counts = {"skipped_steps": 0, "loss_spikes": 0}

    def restart(self, state: dict[str, Any]) -> None:
        """Forget what was seen, and go on from what ``state`` says of it, a checkpoint's ``state.json``."""
        self.past = Past(**state.get("past", {}))
        self._unread = []
        self._counts = dict.fromkeys(self._counts, 0) | state.get("counts", {})

    def state(self) -> dict[str, Any]:
        """What ``restart`` wants to hear, for ``state.json``."""
        return {"past": asdict(self.past), "counts": dict(self._counts)}

    def note(self, loss: Tensor, grad_norm: Tensor) -> None:
        """Take in a step's loss on this rank and its gradient's global norm, both (); nothing waits for the device."""
        self._unread.append((loss, grad_norm))

    def must_look(self) -> bool:
        """Whether so many steps are unread that they should be, though no row is due."""
        return len(self._unread) >= UNREAD

    def look(self, step: int) -> None:
        """Judge all steps up to ``step``. Every rank must call it.

        Raises:
            Diverged: when training no longer works.
        """
        if not self._unread:
            return
        losses, norms = zip(*self._unread, strict=True)
        self._unread = []
        loss = self.accelerator.reduce(torch.stack(losses), "mean")
        read = torch.stack([loss, torch.stack(norms).to(loss.dtype)], dim=1).tolist()
        for number, (loss, norm) in enumerate(read, step - len(read) + 1):
            self._judge(number, loss, norm)

    def figures(self) -> dict[str, Any]:
        """The last step's loss and norm, if they are numbers, and how many steps were odd since the last call."""
        figures = {name: v for name, v in zip(("train_loss", "grad_norm"), self._last, strict=True) if math.isfinite(v)}
        counts = {name: count for name, count in self._counts.items() if count}
        self._counts = dict.fromkeys(self._counts, 0)
        return figures | counts

    def _judge(self, step: int, loss: float, norm: float) -> None:
        self._last = loss, norm
        past = self.past
        if step > 1 and self.config.data.begins_seq_len(step - 1):
            past.losses.clear()  # at positions that the model has not seen yet, losses are higher
        if not math.isfinite(norm):  # nor is the loss, or it is no matter
            self._counts["skipped_steps"] += 1
            past.n_skipped += 1
            if self.accelerator.scaler is not None and past.n_skipped <= SCALER_SKIPS:
                return
            past.trouble = step if past.trouble is None else past.trouble
            past.n_bad += 1
            self._give_up(f"loss or gradients were not finite in {past.n_bad} steps on end, up to step {step}")
            return
        ceiling = min(self.limit, past.above(FAR_OFF))
        is_odd = loss > min(self.limit, past.above(SPIKE))
        if is_odd:
            self._counts["loss_spikes"] += 1
            # The loss speaks of the update before it, unless that was skipped.
            before = step - past.n_skipped - 1
            past.trouble = before if past.trouble is None else min(past.trouble, before)
            past.n_odd += 1
        past.n_bad = past.n_bad + 1 if loss > ceiling else 0
        past.n_skipped = 0
        self._give_up(f"train_loss is {loss:.4g} at step {step}, above {ceiling:.1f} for {past.n_bad} steps")
        if is_odd and past.n_odd > PAST:  # high, and no higher: that is how the data is now
            past.losses.clear()
        if not is_odd or past.n_odd > PAST:
            past.losses = [*past.losses, loss][-PAST:]
            past.trouble, past.n_odd = None, 0

    def _give_up(self, what: str) -> None:
        if self.past.n_bad >= self.config.train.max_bad_steps:
            assert self.past.trouble is not None
            raise Diverged(what, self.past.trouble)

    def try_weights(
        self, step: int, optimizers: Sequence[Optimizer], batch: Tensor | None, documents: DocumentMask | None = None
    ) -> bool:
        """Whether the weights after ``step`` are as good as those before. Every rank must call it.

        Args:
            batch: (grad_accum_steps, B, T + 1), what was just trained on; None to look at the numbers alone.

        Returns:
            False when they may be on their way to diverge, and should not be saved now.

        Raises:
            Diverged: when they are worth nothing, or doubtful and the last.
        """
        first = step if self.past.trouble is None else min(step, self.past.trouble)
        if not self.all_finite(optimizers):
            raise Diverged(f"the weights or the optimizer's state are not finite after step {step}", first)
        if batch is None:
            return not self.past.n_bad
        on_host = cut(batch[0, :TRIAL_WINDOWS], self.config.data.seq_len_at(step - 1))  # as it was trained on
        windows = on_host.to(self.accelerator.device)
        input_ids, labels = windows[:, :-1], windows[:, 1:]
        apart = documents(input_ids, on_host[:, :-1]) if documents else {}
        self.model.eval()
        # Compiling for this shape would take longer than it saves.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), self.accelerator.autocast():
            told = {"input_ids": input_ids, "shift_labels": labels, "use_cache": False, "reduction": "none"}
            loss = self.model(**told, **apart).loss.float().mean()
        self.model.train()
        value = float(self.accelerator.reduce(loss, "mean"))
        n_windows = self.config.train.tokens_of_step(step - 1) / self.config.data.seq_len
        n_fewer = max(1.0, n_windows / (min(TRIAL_WINDOWS, batch.shape[1]) * self.accelerator.num_processes))
        is_doubtful = value > self.past.above(FAR_OFF, n_fewer)
        is_last = step == self.config.train.steps
        if not value <= self.limit or (is_doubtful and is_last):
            what = f"the weights after step {step} give a loss of {value:.4g} on what they were just trained on"
            raise Diverged(what, first)
        # While trouble may have begun, a checkpoint could push out the last one from before it.
        return is_last or not (is_doubtful or self.past.n_bad or self.past.trouble is not None)

    def all_finite(self, optimizers: Sequence[Optimizer]) -> bool:
        """Whether weights and optimizer states are, all ranks' shares of them. Every rank must call it."""
        states = (value for optimizer in optimizers for state in optimizer.state.values() for value in state.values())
        tensors = [*self.model.parameters(), *(t for t in states if isinstance(t, Tensor) and t.ndim)]
        shares = [local(t) for t in tensors]
        n_bad = torch.stack([t.detach().isfinite().all().logical_not() for t in shares]).sum().float()
        return not float(self.accelerator.reduce(n_bad, "sum"))


def is_out_of_memory(error: RuntimeError) -> bool:
    """Also on the CPU, whose allocator raises the plain kind."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


@contextmanager
def advice_on_memory(config: RunConfig, world_size: int, is_found: bool = False) -> Iterator[None]:
    """Turn out-of-memory errors into the micro-batch to try next, for the same global batch and curve.

    Args:
        is_found: the micro-batch is what ``auto`` has found.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        size = config.train.micro_batch_size
        smaller = max((b for b in config.micro_batch_sizes(world_size) if b < size), default=None)
        same = "the global batch stays the same, and so does the curve but for what dropout drops"
        same = same if config.model.dropout else "the global batch and the curve stay the same"
        advice = (
            f"try --train.micro_batch_size {smaller}: {same}"
            + ("" if is_found else "; auto finds the fastest that fits")
            if smaller
            else f"micro_batch_size is 1 already: {NO_SMALLER}"
        )
        raise ConfigError(f"out of memory with micro_batch_size {size}; {advice}") from error


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
