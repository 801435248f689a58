"""How every command ends: with 0, or with one line that says what was wrong and what to do."""

from __future__ import annotations

import argparse
import functools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn


class UserError(ValueError):
    """Something that the user can put right; the message is one line that says what was wrong, and what to do."""


# What a command turns into one line. Anything else is a fault of ours, and its traceback is wanted.
EXPECTED = (UserError, argparse.ArgumentError, FloatingPointError, ImportError, OSError, ValueError)

# What starts training processes, by the name of the script or module.
LAUNCHERS = {
    "accelerate",
    "accelerate-launch",
    "accelerate.commands.launch",
    "torchrun",
    "torch.distributed.run",
    "sweep.py",
}

# Seconds for the launcher to end this process, where the rank that speaks first has met the same error. (Accelerate's
# looks every five.)
PATIENCE = 8.0


def program(main: Callable[[], None]) -> Callable[[], None]:
    """Make a script's ``main`` end as a command should; decorate it, and import what is heavy inside it.

    Exit status 2 after one line on stderr for an error that was expected, 130 after Ctrl-C, 1 in silence when the
    reader of a pipe went away. Of several processes the first rank speaks; another only about what it alone has met.
    """

    @functools.wraps(main)
    def run() -> None:
        # A thread that has done its part of an operator sleeps until the others have, instead of holding its core, as
        # OpenMP's threads do by default: that core may be what they wait for. Read when PyTorch loads.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        print_any_character()
        try:
            main()
            sys.stdout.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter's last flush complains
            raise SystemExit(1) from None
        except (Exception, KeyboardInterrupt) as error:
            if stop := _interruption(error):
                signal.signal(signal.SIGINT, signal.SIG_IGN)  # pressed again, it would litter the interpreter's end
                if _rank() == "0":
                    say(str(stop) or "stopped")
                raise SystemExit(130) from None
            if isinstance(error, EXPECTED):
                fail(error)
            raise

    return run


def print_any_character() -> None:
    """Let stdout and stderr write characters that the console lacks, as escapes: they must not end a run."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def fail(error: BaseException | str) -> NoReturn:
    """One line on stderr, and exit status 2."""
    line = " ".join(str(error).split()) or type(error).__name__
    tell_launcher(line)
    say(f"error: {line}")
    raise SystemExit(2) from None


def tell_launcher(line: str) -> None:
    """Leave an error where torchrun looks for it: the report that it adds to ours then ends with the same line."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        message = {"message": line, "extraInfo": {"py_callstack": line, "timestamp": str(int(time.time()))}}
        with suppress(OSError), open(file, "w") as report:
            json.dump({"message": message}, report)


def say(line: str, patience: float = PATIENCE) -> None:
    """A line on stderr. A rank other than the first waits, so that what all have met is said once."""
    if (rank := _rank()) != "0":
        time.sleep(patience)
        line = f"[rank {rank}] {line}"
    print(line, file=sys.stderr, flush=True)


def serve_parent() -> tuple[threading.Event, threading.Event]:
    """Work beside the process that has started this one: at low priority, until it says to finish, or is gone.

    Returns:
        Events that are set when a line comes on stdin: that the work is to be finished, and one to wait for.
    """
    parent = os.getppid()
    finishing, wake = threading.Event(), threading.Event()

    def listen() -> None:
        for _ in sys.stdin:
            finishing.set()
            wake.set()
        os._exit(0)

    def watch_parent() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(0)

    for target in (listen, watch_parent):
        threading.Thread(target=target, daemon=True).start()
    with suppress(OSError, AttributeError):
        os.nice(10)
    return finishing, wake


def end_with_launcher() -> None:
    """Have Linux send SIGTERM to this process when its parent, ``accelerate launch``, torchrun or a sweep, is gone.

    Otherwise a launcher that was killed would leave training running unseen. Any other parent may go: nohup, tmux.
    """
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    try:
        command = Path(f"/proc/{parent}/cmdline").read_text().split("\0")
    except (OSError, ValueError):
        return
    is_launcher = bool({os.path.basename(word) for word in command[1:5]} & LAUNCHERS)
    if "python" not in os.path.basename(command[0]) or not is_launcher:
        return
    import ctypes

    pr_set_pdeathsig = 1  # linux/prctl.h
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
    if os.getppid() != parent:  # it went in the meantime
        os.kill(os.getpid(), signal.SIGTERM)


def _rank() -> str:
    return os.environ.get("RANK", "0")


def _interruption(error: BaseException | None) -> KeyboardInterrupt | None:
    """The Ctrl-C that ``error`` is or comes from: pressed during an import it turns into that import's error."""
    seen = 0
    while error is not None and not isinstance(error, KeyboardInterrupt) and seen < 20:
        error, seen = error.__cause__ or (None if error.__suppress_context__ else error.__context__), seen + 1
    return error if isinstance(error, KeyboardInterrupt) else None
