"""A sweep's runs, each a process of its own, until all are made or the sweep is told to stop."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .candidates import Candidate, Sweep
from .outcomes import STARTED, Outcome, read_outcome

ROOT = Path(__file__).parents[2]
POLL_S = 0.1


@dataclass
class Job:
    """A run whose process is there."""

    run: tuple[Candidate, int]  # and its seed
    process: subprocess.Popen[bytes]
    began: float


class Told:
    """How often the sweep was told to stop."""

    times = 0

    def hear(self, *_: object) -> None:
        self.times += 1


def run_all(sweep: Sweep, command: Sequence[str], jobs: int, again: bool) -> list[tuple[Candidate, int, Outcome]]:
    """Make the runs that are not finished, seed by seed over all candidates; returns those that failed.

    Args:
        command: that pretrains; a run's arguments are added.
        jobs: so many at a time.
        again: make those too in which training has diverged.

    Raises:
        KeyboardInterrupt: after Ctrl-C or SIGTERM, when all processes have saved what they had and ended; its text says
            how to go on.
    """
    every = [(candidate, seed) for seed in sweep.seeds for candidate in sweep.candidates]
    made = ("finished",) if again else ("finished", "diverged")
    waiting = deque(run for run in every if read_outcome(sweep.run_dir(*run), sweep.log(*run)).state not in made)
    n_made = len(every) - len(waiting)
    size = f"{len(sweep.candidates)} x {len(sweep.seeds)} (candidates x seeds)"
    print(f"{sweep.out}: of {size} runs {n_made} are there already", flush=True)
    running: list[Job] = []
    failed = []
    began, n_ended, times_told = time.monotonic(), 0, 0
    with hearing() as told, ending(running):
        while running or (waiting and not told.times):
            while waiting and len(running) < jobs and not told.times:
                running.append(start(sweep, *waiting.popleft(), command, jobs))
            if told.times > times_told:
                times_told = told.times
                stop(running, by_force=times_told > 1)
            for job in [job for job in running if job.process.poll() is not None]:
                running.remove(job)
                outcome = read_outcome(sweep.run_dir(*job.run), sweep.log(*job.run))
                is_made = outcome.state in ("finished", "diverged")
                if told.times and not is_made:
                    continue  # it ended because it was told to
                n_made, n_ended = n_made + is_made, n_ended + 1
                failed += [] if is_made else [(*job.run, outcome)]
                line = f"[{n_made} of {len(every)}] {_result(sweep, job, outcome)}"
                n_left = len(waiting) + len(running)
                each = (time.monotonic() - began) / n_ended
                print(f"{line}; about {_duration(each * n_left)} left" if n_left else line, flush=True)
            time.sleep(POLL_S)
    if told.times and n_made < len(every):
        raise KeyboardInterrupt(
            f"stopped: {n_made} of {len(every)} runs are there, and of the others what was saved is kept in "
            f"{sweep.out}; the same command goes on from there"
        )
    return failed


@contextmanager
def ending(running: Sequence[Job]) -> Iterator[None]:
    """Whatever happens, no run's process is left behind."""
    try:
        yield
    finally:
        for job in running:
            job.process.terminate()
        for job in running:
            job.process.wait()


@contextmanager
def hearing() -> Iterator[Told]:
    """Note signals to stop instead of ending by them; one that is ignored, as behind a shell's &, stays so."""
    told = Told()
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, told.hear) for number in numbers}
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def start(sweep: Sweep, candidate: Candidate, seed: int, command: Sequence[str], jobs: int) -> Job:
    """A run's process; it goes on from the run's newest checkpoint by itself."""
    log = sweep.log(candidate, seed)
    log.parent.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path}
    if jobs > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, _n_cores() // jobs)))
    with log.open("ab") as file:
        file.write(f"{STARTED}{time.strftime('%Y-%m-%dT%H:%M:%S%z')}\n".encode())
        file.flush()
        process = subprocess.Popen(
            [*command, *sweep.arguments(candidate, seed)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C comes to the sweep alone: heard twice it would end a run unsaved
        )
    return Job((candidate, seed), process, time.monotonic())


def stop(running: Sequence[Job], by_force: bool) -> None:
    """Have processes save and end, or end them at once."""
    if running:
        how = "ending them at once" if by_force else "waiting until what they have is saved; press again to end at once"
        print(f"\n{len(running)} {'run is' if len(running) == 1 else 'runs are'} being made: {how}", flush=True)
    for job in running:
        job.process.send_signal(signal.SIGKILL if by_force else signal.SIGTERM)


def _result(sweep: Sweep, job: Job, outcome: Outcome) -> str:
    candidate, seed = job.run
    if outcome.state == "finished":
        what = f"val_loss {outcome.loss:.4f}"
    elif outcome.state == "diverged":
        what = "diverged"
    else:
        why = outcome.error or f"its process ended with status {job.process.returncode}"
        what = f"failed: {why} (all it said: {sweep.log(candidate, seed)})"
    return f"{candidate.name} seed {seed}: {what} ({_duration(time.monotonic() - job.began)})"


def _n_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 2 * 3600 else f"{seconds / 3600:.1f} h"
