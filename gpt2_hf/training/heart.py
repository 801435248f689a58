"""A hang becomes an error that names who hangs.

Each rank has a thread that tells the others, through the store by which they found each other, that it is alive and how
many safe points its training has passed. Where training stands still for too long, the thread compares what all have
told, says who is behind or silent, and ends the process; the launcher then ends the others.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import psutil
import torch.distributed as dist
from accelerate import PartialState

from ..program import PATIENCE, say
from .distributed import Host
from .run_folder import RunFolder

BEAT = 2.0  # seconds
SILENT = 3  # beats that a rank may miss
# How many times the usual patience there is until the first step is made: data is read and compiled for then.
BEGINNING = 3


@dataclass(frozen=True)
class Worker:
    """A process of the run, and whether this one could see it: the same machine, the same container."""

    rank: int
    host: str
    pid: int
    space: int

    @staticmethod
    def here(rank: int) -> Worker:
        space = Path("/proc/self/ns/pid")
        return Worker(rank, socket.gethostname(), os.getpid(), space.stat().st_ino if space.exists() else 0)

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host}, process {self.pid})"

    def has_ended(self, seen_from: Worker) -> bool:
        """Whether it has, as far as this machine knows."""
        if (self.host, self.space) != (seen_from.host, seen_from.space):
            return False
        try:
            return psutil.Process(self.pid).status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
        except psutil.NoSuchProcess:
            return True


@dataclass(frozen=True)
class Told:
    """What a rank has told last: how often it has spoken, and the safe points that its training has passed."""

    beats: int
    passed: int


class Heart:
    """This rank's thread; does nothing where there is one process only. Every rank must start it.

    Args:
        timeout_s: how long training may stand still, once the first step is made.
    """

    def __init__(self, folder: RunFolder, host: Host, timeout_s: float):
        self.folder, self.host, self.timeout_s = folder, host, timeout_s
        self.workers = host.gather(Worker.here(host.rank))
        self.me = self.workers[host.rank]
        self.n_passed = 0
        self._moved_at = time.monotonic()
        self._over = threading.Event()
        self._store: dist.Store | None = None

    def start(self) -> None:
        if self.host.world_size == 1:
            return
        address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
        if address and port:
            # A connection of its own: training's may be busy waiting for the very rank that is to be found.
            with suppress(RuntimeError):
                store = dist.TCPStore(address, int(port), wait_for_workers=False, timeout=timedelta(seconds=30))
                self._store = dist.PrefixStore(f"heart/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        for act in (self._beat, self._watch):
            threading.Thread(target=act, name="Heart", daemon=True).start()

    def stop(self) -> None:
        self._over.set()

    def moved(self) -> None:
        """Training has passed a safe point."""
        self.n_passed += 1
        self._moved_at = time.monotonic()

    def ended(self) -> list[Worker]:
        """The other processes of this machine that are no more."""
        return [worker for worker in self.workers if worker != self.me and worker.has_ended(self.me)]

    def end_with(self, verdict: str) -> None:
        """Say, if no lower rank can, why this process ends; at once, as the launcher is about to end it too."""
        ended = self.ended()
        if self.me == next(worker for worker in self.workers if worker not in ended):
            line = (
                f"error: {verdict}, and so must this process{self.folder.way_on()}; its own message, if any, says why"
            )
            say(line, patience=0)

    def verdict(self) -> str:
        """Who keeps the others waiting; takes some seconds."""
        if ended := self.ended():
            return f"{_names(ended)} ended"
        before = self._in_time(self._read)
        time.sleep(SILENT * BEAT)
        now = self._in_time(self._read)
        if before is None or now is None:
            return f"{self.workers[0]}, or the launcher that keeps the run's store, does not answer"
        most = max(told.passed for told in now.values())
        at = f"the furthest have passed {most} safe points"
        silent = [w for w in self.workers if w != self.me and not _has_spoken(before.get(w.rank), now.get(w.rank))]
        if silent:
            passed = ", ".join(str(now[w.rank].passed) if w.rank in now else "none" for w in silent)
            return f"{_names(silent)} gives no sign of life, having passed {passed}; {at}"
        least = min(told.passed for told in now.values())
        if least < most:
            behind = [worker for worker in self.workers if now[worker.rank].passed == least]
            return f"{_names(behind)} has not moved since it passed {least} safe points; {at}"
        return f"all ranks wait for each other, having passed {most} safe points"

    @contextmanager
    def advice_on_peers(self) -> Iterator[None]:
        """Name the process that ended, where this one only lost its connection to it, or waited in vain."""
        try:
            yield
        except RuntimeError as error:
            if not _is_lost(error):
                raise
            deadline = time.monotonic() + 3 * PATIENCE
            while not self.ended() and time.monotonic() < deadline:  # what it met, it says first
                time.sleep(0.2)
            self.end_with(self.verdict())
            raise SystemExit(1) from None

    def _beat(self) -> None:
        beats = 0
        while self._store is not None:
            beats += 1
            with suppress(RuntimeError):  # the store's keeper has ended
                self._store.set(str(self.me.rank), f"{beats} {self.n_passed}")
            if self._over.wait(BEAT):
                return

    def _watch(self) -> None:
        first_step = None
        has_made_one = False
        alone_since = None
        while not self._over.wait(min(BEAT, self.timeout_s / 4)):
            if ended := self.ended():  # what waits for a GPU doesn't notice; the launcher, or an error, comes first
                alone_since = alone_since or time.monotonic()
                if time.monotonic() - alone_since > 3 * PATIENCE:
                    self._end(f"{_names(ended)} ended")
            step = self.folder.step
            first_step = step if first_step is None else first_step
            has_made_one = has_made_one or step != first_step
            still = time.monotonic() - self._moved_at
            if still < self.timeout_s * (1 if has_made_one else BEGINNING):
                continue
            verdict = self.verdict()
            if self._over.is_set() or time.monotonic() - self._moved_at < still:  # in the meantime it went on
                continue
            self._end(f"training has stood still for {still:.0f} s, longer than train.timeout_s: {verdict}")

    def _end(self, why: str) -> NoReturn:
        try:
            say(f"error: {why}; start again, and the run goes on from {self.folder.newest or 'step 0'}")
        finally:
            os._exit(1)

    def _read(self) -> dict[int, Told]:
        """What each rank has told last; those that never spoke are missing."""
        assert self._store is not None
        keys = [str(rank) for rank in range(len(self.workers)) if self._store.check([str(rank)])]
        return {int(key): Told(*map(int, self._store.get(key).split())) for key in keys}

    def _in_time(self, read: Callable[[], dict[int, Told]]) -> dict[int, Told] | None:
        """What ``read()`` returns, or None where it fails or takes many beats: the store's keeper may hang too."""
        answers: list[dict[int, Told]] = []

        def ask() -> None:
            with suppress(RuntimeError, AssertionError):
                answers.append(read())

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(SILENT * BEAT)
        return answers[0] if answers else None


# What the libraries say where a connection is gone, or nothing came over it.
LOST = ("by peer", "Timed out waiting", "timed out")


def _is_lost(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or any(word in str(error) for word in LOST)


@contextmanager
def advice_on_strangers() -> Iterator[None]:
    """As ``Heart.advice_on_peers``, where the processes do not know each other yet."""
    try:
        yield
    except RuntimeError as error:
        if not _is_lost(error):
            raise
        say("error: another process of the run ended; its own message, if any, says why", patience=0)
        raise SystemExit(1) from None


def meet(cpu: bool, timeout_s: float) -> PartialState:
    """Find the other processes that the launcher has started."""
    timeout = collective_timeout(timeout_s)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt != "0" and os.environ.get("GROUP_WORLD_SIZE") == "1" and not dist.is_initialized():
        # torchrun's store still has the addresses that the processes before had; who is fast would take them for new.
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout=timeout)
        dist.init_process_group(
            "gloo" if cpu else "nccl",
            store=dist.PrefixStore(f"attempt/{attempt}", store),
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
            timeout=timeout,
        )
    return PartialState(cpu=cpu, timeout=timeout)


def collective_timeout(timeout_s: float) -> timedelta:
    """How long a collective may wait: longer than the heart, which can say for whom."""
    return timedelta(seconds=BEGINNING * timeout_s + 60)


def describe(workers: list[Worker]) -> str:
    """One line with the processes of a run, by rank, for who wants to signal them."""
    hosts = dict.fromkeys(worker.host for worker in workers)
    by_host = (f"{host} " + ", ".join(str(worker.pid) for worker in workers if worker.host == host) for host in hosts)
    return f"{'process' if len(workers) == 1 else 'processes by rank'}: {'; '.join(by_host)}"


def _has_spoken(before: Told | None, now: Told | None) -> bool:
    return now is not None and (before is None or now.beats > before.beats)


def _names(workers: list[Worker]) -> str:
    return " and ".join(map(str, workers))
