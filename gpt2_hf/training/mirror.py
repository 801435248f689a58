"""The process that copies a run to object storage, and its other end in training.

    python -m gpt2_hf.training.mirror RUN URL       copies what is not there yet, and ends

Training starts the same as a child that follows the run (`mirroring`). It never waits for it but at the end, for a
bounded time: a storage that is slow, hangs, fails or is full costs the copies, and nothing else. The child loads no
PyTorch.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import runs
from ..data.folder import ShardError
from ..data.storage import Retry, Storage
from ..files import mask
from ..program import program, serve_parent
from .stored_run import SAY_EVERY_S, Copy, Keep

if TYPE_CHECKING:
    from ..config import CheckpointSection

logger = logging.getLogger(__name__)

LOG = "mirror.log"
POLL_S = 2.0
WAITS_S = (5.0, 300.0)  # after an error: at first, and at most
PATIENT = Retry(give_up=86_400.0)  # nobody waits for the copying process


# While a run trains


@contextmanager
def mirroring(run: Path, keep: CheckpointSection, start_step: int | None, is_first: bool) -> Iterator[None]:
    """Have the run copied to ``keep.mirror``, if it has one, by a process that the first rank starts.

    What is there of steps later than ``start_step`` is moved aside (None: nothing is, as nothing is to be trained).
    Leaving in order, also by SystemExit, waits for it at most ``keep.mirror_wait_s`` seconds.
    """
    if not (keep.mirror and is_first):
        yield
        return
    mirror = Mirror(run, keep, start_step)
    try:
        yield
        mirror.finish(keep.mirror_wait_s)
    except SystemExit:
        mirror.finish(keep.mirror_wait_s)
        raise
    finally:
        mirror.stop()


class Mirror:
    """The copying process, for the one that trains: started again when it ends, and ended with it."""

    def __init__(self, run: Path, keep: CheckpointSection, start_step: int | None):
        self.run = run
        self._settings = {
            "url": keep.mirror,
            "keep": [keep.keep_last, keep.keep_every, keep.keep_best],
            "start_step": start_step,
        }
        self._location = mask(keep.mirror or "")
        self._process: subprocess.Popen[str] | None = None
        self._finishing, self._stopping = threading.Event(), threading.Event()
        self._there: set[str] = set()  # folders that are copied
        self._note = "it has not begun"
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._supervise, name="mirror", daemon=True)
        self._thread.start()

    def finish(self, wait_s: float) -> None:
        """Wait until all is copied, at most so many seconds; say what is left."""
        self._finishing.set()
        self._send("finish")
        deadline, next_line = time.monotonic() + wait_s, time.monotonic() + SAY_EVERY_S
        while self._thread.is_alive() and time.monotonic() < deadline:
            self._thread.join(0.1)
            if time.monotonic() > next_line:
                print(f"waiting for the mirror {self._location}: {self._note}", flush=True)
                next_line = time.monotonic() + SAY_EVERY_S
        if self._thread.is_alive():
            print(
                f"the mirror {self._location} lacks {', '.join(self._left()) or 'nothing of weight'} after "
                f"{wait_s:.0f} s ({self._note}); copy the rest with: python -m gpt2_hf.training.mirror {self.run} URL",
                flush=True,
            )

    def stop(self) -> None:
        self._stopping.set()
        with self._lock:
            if self._process is not None and self._process.poll() is None:
                self._process.kill()
        self._thread.join(5)

    def _left(self) -> list[str]:
        checkpoints = [f"checkpoints/{path.name}" for path in runs.saved_steps(self.run / "checkpoints").values()]
        names = [*checkpoints, *(["final"] if (self.run / "final").is_dir() else [])]
        return [name.rpartition("/")[2] for name in names if name not in self._there]

    def _send(self, line: str) -> None:
        with self._lock, suppress(OSError, ValueError):
            if self._process is not None and self._process.stdin is not None:
                self._process.stdin.write(line + "\n")
                self._process.stdin.flush()

    def _supervise(self) -> None:
        wait = 1.0
        while not self._stopping.is_set():
            try:
                status = self._run_once()
            except OSError as error:
                status, self._note = -1, str(error)
            if status == 0 and self._finishing.is_set():
                return
            if not self._stopping.wait(0):
                print(
                    f"the mirror's process ended ({self._note}; see {self.run / LOG}): it is started again", flush=True
                )
            self._stopping.wait(wait)
            wait = min(2 * wait, WAITS_S[1])

    def _run_once(self) -> int:
        try:
            log: Any = (self.run / LOG).open("a")
        except OSError:
            log = subprocess.DEVNULL
        package = str(Path(__file__).parents[2])
        path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
        with self._lock:
            if self._stopping.is_set():
                return 0
            # In a session of its own, so that a Ctrl-C in the terminal is for training, which then ends this one.
            self._process = process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(self.run), "--follow"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": path},
            )
        self._send(json.dumps(self._settings))  # not as arguments, which everyone on this machine can read
        if self._finishing.is_set():
            self._send("finish")
        assert process.stdout is not None
        for line in process.stdout:
            with suppress(ValueError):
                told = json.loads(line)
                self._there, self._note = set(told["there"]), told["note"]
        return process.wait()


# The copying process


def follow(run: Path) -> None:
    """Copy what the run writes until training says on stdin that it has ended, and all is copied."""
    settings = json.loads(sys.stdin.readline())
    finishing, wake = serve_parent()

    def tell(note: str) -> None:
        print(json.dumps({"there": copy.there() if copy else [], "note": note}), flush=True)

    copy: Copy | None = None
    pause = WAITS_S[0]
    while True:
        try:
            if copy is None:
                tell("asking what is there")
                copy = Copy(
                    run, Storage.open(settings["url"], PATIENT), Keep(*settings["keep"]), settings["start_step"]
                )
            if left := copy.left():
                tell(f"copying {left[0]}" + (f", then {len(left) - 1} more" if len(left) > 1 else ""))
                copy.add(left[0])
                tell(f"copied {left[0]}")
                pause = WAITS_S[0]
                continue
            if finishing.is_set():
                return
            wake.clear()
            wake.wait(POLL_S)
        except Exception as error:  # whatever it is, it may be over the next time
            reason = mask(" ".join(str(error).split())) or type(error).__name__
            logger.error("%s; next try in %.0f s", reason, pause)
            tell(reason)
            wake.clear()
            wake.wait(1.0 if finishing.is_set() else pause)
            pause = min(2 * pause, WAITS_S[1])


@program
def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m gpt2_hf.training.mirror", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="the run's folder")
    parser.add_argument("url", metavar="URL", nargs="?", help="the mirror, as in checkpoint.mirror")
    parser.add_argument("--follow", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%Y-%m-%dT%H:%M:%S%z")
    for name in ("botocore", "aiobotocore", "urllib3", "httpx"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if arguments.follow:
        follow(arguments.run)
        return
    if arguments.url is None or not arguments.run.is_dir():
        raise ShardError(f"give a run's folder that exists, and the URL of its mirror (run: {arguments.run})")
    copy = Copy(arguments.run, Storage.open(arguments.url, Retry()))
    for name in copy.left():
        copy.add(name)


if __name__ == "__main__":
    main()
