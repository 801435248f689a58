"""A page that follows runs while they go on."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from ..files import lock, unlock
from .measured import ReportError
from .page import write_page

IDLE_S = 600.0  # without a row, after which a run counts as ended where its lock cannot be tried


def watch(run_dirs: Sequence[Path], out: Path, price: float | None, every_s: int) -> None:
    """Write the page anew every ``every_s`` seconds, as long as any of the runs goes on.

    The page loads itself as often. Raises KeyboardInterrupt, with a line to print, for Ctrl-C.
    """
    shown = ", ".join(map(str, run_dirs))
    said = ""
    try:
        while any(map(is_running, run_dirs)):
            try:
                write_page(run_dirs, out, price, refresh_s=every_s)
                news = f"{out} is written every {every_s} s while training goes on; Ctrl-C ends that"
            except ReportError:
                news = f"nothing was measured in {shown} yet; {out} is written as soon as there is"
            if news != said:
                print(news, flush=True)
                said = news
            time.sleep(every_s)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"no longer watching {shown}; {out} stays as it was written last") from None
    print(f"nothing trains in {shown} (any more)")


def is_running(run: Path) -> bool:
    """Whether a process has the run's folder, by its lock; where that cannot be tried, whether rows still come."""
    try:
        with (run / ".lock").open("r+") as file:
            if free := lock(file, wait=False):  # given back at once: a start in just this moment would be refused
                unlock(file)
            return not free
    except FileNotFoundError:
        return False
    except OSError:
        rows = run / "metrics.jsonl"
        return rows.is_file() and time.time() - rows.stat().st_mtime < IDLE_S
