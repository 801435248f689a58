"""Trackers (wandb, trackio, tensorboard) at arm's length: what befalls them must not befall training.

All that concerns them happens in a thread of its own: a tracker that is slow, full, down or hanging loses rows of its
own, while metrics.jsonl has them all. RUN/tracker.json keeps the name by which they know the run, so that a resumed run
goes on with its curve there.
"""

from __future__ import annotations

import json
import queue
import secrets
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm.auto import tqdm

from .. import runs
from ..files import whole_file

WAITING = 1000  # rows that a slow tracker may leave behind
# Seconds that training waits for a tracker: to begin, where it may have to ask for a password, and to end.
PATIENCE = 20.0


def run_id(run_dir: Path, is_new: bool) -> str:
    """By what trackers know this run: kept with it, and another where it starts over."""
    path = run_dir / runs.TRACKER
    if not is_new:
        try:
            return str(json.loads(path.read_text())["id"])
        except (OSError, ValueError, KeyError, TypeError):
            pass  # begun without a tracker
    found = secrets.token_hex(4)
    with suppress(OSError), whole_file(path) as file:
        file.write(json.dumps({"id": found}).encode())
    return found


class Trackers:
    """A run's trackers, behind a queue. Nothing here raises, and nothing waits longer than PATIENCE.

    Args:
        accelerator: built with ``log_with``; only one process should have this.
        settings: what the run was asked for, by name.
        is_new: whether the run begins at step 0.
    """

    def __init__(self, accelerator: Accelerator, run_dir: Path, settings: dict[str, str], is_new: bool):
        self._accelerator = accelerator
        self._rows: queue.Queue[tuple[dict[str, Any], int] | None] = queue.Queue(WAITING)
        self._has_begun = threading.Event()
        self._complained: set[str] = set()
        name = run_id(run_dir, is_new)
        known = {
            "wandb": {"id": name, "name": run_dir.name, "resume": "allow"},
            "trackio": {"name": f"{run_dir.name}-{name}", "resume": "allow"},
        }  # tensorboard knows a run by its folder
        # One thread for all: some keep the current run in a variable of the thread.
        self._thread = threading.Thread(target=self._work, args=(settings, known), name="trackers", daemon=True)
        self._thread.start()
        if not self._has_begun.wait(PATIENCE):
            self._complain("slow", "does not answer")

    def write(self, row: dict[str, Any], step: int) -> None:
        """Hand a row to the trackers, or drop it where they have too many to do."""
        if not self._thread.is_alive():
            return
        try:
            self._rows.put_nowait((row, step))
        except queue.Full:
            self._complain("slow", "does not keep up, and misses rows")

    def close(self) -> None:
        """Give the trackers time to take in what is left, and end them."""
        deadline = time.monotonic() + PATIENCE
        with suppress(queue.Full):
            self._rows.put(None, timeout=PATIENCE)
            self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._complain("end", "did not take in its last rows in time")
        self._accelerator.trackers = []  # ending training must not wait for them

    def _work(self, settings: dict[str, str], known: dict[str, dict[str, Any]]) -> None:
        try:
            self._accelerator.init_trackers("gpt2_hf", config=settings, init_kwargs=known)
            trackers = list(self._accelerator.trackers)
        except BaseException as error:
            self._complain("failed", f"cannot be used ({_in_short(error)})")
            return
        finally:
            self._has_begun.set()
        while (item := self._rows.get()) is not None:
            for tracker in trackers:
                self._try(tracker.log, item[0], step=item[1])
        for tracker in trackers:
            self._try(tracker.finish)

    def _try(self, call: Any, *args: Any, **kwargs: Any) -> None:
        try:
            call(*args, **kwargs)
        except Exception as error:
            self._complain("failed", f"fails ({_in_short(error)})")

    def _complain(self, kind: str, what: str) -> None:
        if kind not in self._complained:
            self._complained.add(kind)
            tqdm.write(f"a tracker {what}: training goes on, and metrics.jsonl has every row")


def _in_short(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
