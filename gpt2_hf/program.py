"""How every command ends: with 0, or with one line that says what was wrong and what to do."""

from __future__ import annotations

import argparse
import functools
import os
import sys
import time
from collections.abc import Callable
from typing import NoReturn


class UserError(ValueError):
    """Something that the user can put right; the message is one line that says what was wrong, and what to do."""


# What a command turns into one line. Anything else is a fault of ours, and its traceback is wanted.
EXPECTED = (UserError, argparse.ArgumentError, FloatingPointError, ImportError, OSError, ValueError)

# Seconds for the launcher to end this process, where the rank that speaks first has met the same error.
PATIENCE = 2.0


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
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):  # a character that the console lacks must not end a run
                stream.reconfigure(errors="backslashreplace")
        try:
            main()
            sys.stdout.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter's last flush complains
            raise SystemExit(1) from None
        except EXPECTED as error:
            fail(error)
        except KeyboardInterrupt as stop:
            say(str(stop) or "stopped")
            raise SystemExit(130) from None

    return run


def fail(error: BaseException | str) -> NoReturn:
    """One line on stderr, and exit status 2."""
    say(f"error: {' '.join(str(error).split()) or type(error).__name__}")
    raise SystemExit(2) from None


def say(line: str) -> None:
    """A line on stderr. A rank other than the first waits, so that what all have met is said once."""
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        time.sleep(PATIENCE)
        line = f"[rank {rank}] {line}"
    print(line, file=sys.stderr, flush=True)
