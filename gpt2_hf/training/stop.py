"""Ending a run before its last step: signals are heard at once, and obeyed where the weights are a finished step's.

Such safe points lie after each step, between the micro-steps before its update, and between the forward calls of a
measurement. All ranks pass the same ones, and at each they come to agree: a rank tells the others at one safe point
what it has heard, and reads at the next what they have. So nobody waits, and all stop at the same place.

RUN/requeue              what a signal of a batch system leaves: it asks the script to start the run again
    .workers/HOST.RANK   the number of each process, for who wants to signal it; there while it runs
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, NoReturn, Self

import torch
import torch.distributed as dist

from ..files import whole_file
from .distributed import Host
from .heart import Heart, collective_timeout, describe
from .run_folder import FolderGone, RunFolder

# Seconds after a signal in which a safe point must come, or the process ends without it.
GRACE = 30.0
# Exit status that asks for another start. Launchers turn it into 1, so a batch script looks for the marker.
REQUEUE = 85
MARKER = "requeue"
WORKERS = ".workers"
# The batch system's signals, and Ctrl-C.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name))

# In a signal's place: the run's folder was taken away.
GONE = 255


class Stopping(BaseException):
    """Raised on all ranks at the same safe point: the run is to end with the last finished step.

    Attributes:
        number: of the signal, or ``GONE``.
        owed: what was known of a step when its measurements were cut short; None between measurements.
    """

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number
        self.owed: dict[str, Any] | None = None


class Stop:
    """Hears signals for the run in ``folder``, from entering to leaving; every rank has one.

    A handler that the caller has set stays. Outside the main thread, where no handler can be set, nothing is heard.

    Args:
        timeout_s: how long training may stand still before the ``heart`` ends it.
    """

    def __init__(self, folder: RunFolder, host: Host, timeout_s: float):
        self.folder, self.host, self.timeout_s = folder, host, timeout_s
        self.heart = Heart(folder, host, timeout_s)
        self._heard = 0  # the signal's number
        self._is_safe = False  # what is done is being saved, however long that takes
        self._group: dist.ProcessGroup | None = None
        self._asked: tuple[dist.Work, torch.Tensor] | None = None
        self._before: dict[int, Any] = {}  # signal -> the handler to put back

    def __enter__(self) -> Self:
        self.host.first(self._clear)
        if self.host.world_size > 1:
            self._group = dist.new_group(backend="gloo", timeout=collective_timeout(self.timeout_s))
        workers = self.folder.path / WORKERS
        self._worker = workers / f"{socket.gethostname()}.{self.host.rank}"
        with suppress(OSError):  # another machine may not see the folder
            workers.mkdir(exist_ok=True)
            self._worker.write_text(f"{os.getpid()}\n")
        if self.host.rank == 0:
            print(describe(self.heart.workers))
        self.heart.start()
        self._listen()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before:
            for number, handler in self._before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._wakeup_before)
            os.close(self._writer)
        self._asked = self._group = None
        self.heart.stop()
        with suppress(OSError):
            self._worker.unlink()
            self._worker.parent.rmdir()  # when it is empty

    def safe_point(self) -> None:
        """Stop here, if any rank was told to. Every rank must pass it.

        Raises:
            Stopping: on all ranks, or on none.
        """
        self.heart.moved()
        if agreed := self._agreed():
            self._is_safe = True
            raise Stopping(agreed)

    def ask(self, number: int) -> None:
        """Have all ranks stop at the next safe point, as if this one had heard the signal."""
        self._heard = self._heard or number

    def _agreed(self) -> int:
        """The signal that some rank had heard at the last safe point; tells the others what this one has now."""
        if self._group is None:
            return self._heard
        if self._asked is not None:
            work, answer = self._asked
            self._asked = None
            work.wait()
            if agreed := int(answer):
                return agreed
        answer = torch.tensor(self._heard)
        work = dist.all_reduce(answer, dist.ReduceOp.MAX, self._group, async_op=True)
        assert work is not None
        self._asked = work, answer
        return 0

    @contextmanager
    def owing(self, row: dict[str, Any]) -> Iterator[None]:
        """Measurements of a step of which ``row`` is known already: where they are cut short, it is kept for later."""
        try:
            yield
        except Stopping as stopping:
            stopping.owed = row
            raise

    def last_step_made(self) -> None:
        """From here on the run ends by itself, and signals are not obeyed."""
        self._is_safe = True
        if self._asked is not None:
            self._asked[0].wait()
            self._asked = None

    def mark(self, number: int) -> None:
        """Ask for another start, by the marker, if a batch system sent the signal. Every rank must call it."""
        self.host.first(lambda: self._mark(number))

    def end(self, number: int) -> NoReturn:
        """Leave the run after signal ``number``, when all is saved.

        Raises:
            KeyboardInterrupt: after Ctrl-C; its text is what the next start goes on from.
            SystemExit: with status ``REQUEUE``, after a batch system's signal; that text is printed.
            FolderGone: where the run's folder was taken away; it says where the run can go on.
        """
        if number == GONE:
            raise FolderGone(self.folder.what_was_saved_elsewhere())
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.host.rank == 0:
            print(self.folder.last_words(), file=sys.stderr, flush=True)
        raise SystemExit(REQUEUE)

    def _clear(self) -> None:
        """Remove what the last start has left."""
        (self.folder.path / MARKER).unlink(missing_ok=True)
        for path in (self.folder.path / WORKERS).glob("*"):
            path.unlink(missing_ok=True)

    def _mark(self, number: int) -> None:
        if number in (signal.SIGINT, GONE) or self.folder.is_finished:
            return
        row = {
            "signal": signal.Signals(number).name,
            "step": self.folder.step,
            "checkpoint": None if self.folder.newest is None else str(self.folder.newest),
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        with suppress(OSError), whole_file(self.folder.path / MARKER) as file:
            file.write(json.dumps(row).encode())

    def _listen(self) -> None:
        """Start the thread that hears signals.

        A main thread that waits for another rank, or compiles, does not run Python's signal handlers.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        ours = (signal.SIG_DFL, signal.default_int_handler)
        self._before = {number: handler for number in SIGNALS if (handler := signal.getsignal(number)) in ours}
        if not self._before:
            return
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        threading.Thread(target=self._hear, args=(reader,), name="Stop", daemon=True).start()
        self._wakeup_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        for number in self._before:
            signal.signal(number, self._interrupt if number == signal.SIGINT else _heard)

    def _hear(self, reader: int) -> None:
        """Take note of signals, and end the process where none can be obeyed."""
        deadline = None
        while True:
            patience = None if deadline is None else max(0.0, min(1.0, deadline - time.monotonic()))
            if not select.select([reader], [], [], patience)[0]:
                if self._is_safe:
                    deadline = None
                elif self.heart.ended():
                    self._end_with_others()
                elif deadline is not None and time.monotonic() >= deadline:
                    self._end_now(self._heard)
                continue
            numbers = os.read(reader, 64)
            if not numbers:
                return os.close(reader)
            for number in numbers:
                if number not in self._before:
                    continue
                if number == signal.SIGINT and self._heard == signal.SIGINT:
                    self._end_now(number)
                if not self._heard:
                    deadline = time.monotonic() + GRACE
                self._heard = number
                if number == signal.SIGINT:
                    self._say_what_comes()
                elif self._can_end_at_once():
                    self._end_now(number)

    def _unsaved(self) -> bool:
        """Whether there are finished steps that no checkpoint has."""
        return self.folder.step is not None and not self.folder.has_saved(self.folder.step)

    def _can_end_at_once(self) -> bool:
        return self.host.world_size == 1 and not self._unsaved()

    def _interrupt(self, *_: object) -> None:
        """Ctrl-C's handler: where there is nothing to save, what Python does without us."""
        if self._can_end_at_once():
            raise KeyboardInterrupt

    def _say_what_comes(self) -> None:
        if self.host.rank != 0 or self._can_end_at_once():
            return
        newest = self.folder.newest
        lost = f"what was done since {newest.name}" if newest else "all, as nothing was saved yet,"
        what = f"saving step {self.folder.step}, or the one that is being made" if self._unsaved() else "stopping"
        print(f"\n{what}; press again to end at once (then {lost} is lost)", file=sys.stderr, flush=True)

    def _end_with_others(self) -> NoReturn:
        """End the process, which the launcher asks of it because others have ended."""
        try:
            self.heart.end_with(self.heart.verdict())
        finally:
            os._exit(1)

    def _end_now(self, number: int) -> NoReturn:
        """End the process from this thread: what is half written has a temporary name, and is removed later."""
        try:
            self._mark(number)
            if self.host.rank == 0:
                words = f"\nstopped{self.folder.way_on()}" if number == signal.SIGINT else self.folder.last_words()
                print(words, file=sys.stderr, flush=True)
        finally:
            os._exit(130 if number == signal.SIGINT else REQUEUE)


def _heard(*_: object) -> None:
    """A signal's handler: what is to be done, the thread does that reads the pipe."""


def _deaf_child() -> None:
    # A forked child would write what it hears into its parent's pipe.
    if signal.getsignal(signal.SIGTERM) is _heard:
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_deaf_child)
