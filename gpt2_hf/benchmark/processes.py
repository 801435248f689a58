"""Processes that end when this program does, in whatever way it ends: variants' workers, and other programs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..program import UserError

if TYPE_CHECKING:
    import torch

    from .variants import Shape, Variant

ROOT = Path(__file__).parents[2]
WORKER = ("-m", "gpt2_hf.benchmark.worker")

# Its standard input is a pipe of ours, which ends with us.
END_WITH_US = """
import os, sys, threading
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(1)), daemon=True).start()
"""


class RaceError(UserError):
    """The benchmark cannot run, or its result is worthless; the message is one line."""


class Worker:
    """A process with one variant in it; see worker.py for what it understands.

    Args:
        logs: folder for what it prints.
        settings: environment variables for it; None takes one away.
    """

    def __init__(
        self,
        variant: Variant,
        shape: Shape,
        device: torch.device,
        logs: Path,
        settings: Mapping[str, str | None] | None = None,
    ):
        logs.mkdir(parents=True, exist_ok=True)
        self._log = logs / (re.sub(r"\W+", "_", variant.label) + ".log")
        request = json.dumps({"variant": asdict(variant), "shape": asdict(shape), "device": str(device)})
        # Where the package is not installed, the processes find it as this one did.
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", **(settings or {})}
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, *WORKER, request],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={name: value for name, value in environment.items() if value is not None},
            )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._questions, self._answers = self._process.stdin, self._process.stdout

    def ask(self, question: str) -> dict[str, Any]:
        self._questions.write(f"{question}\n")
        self._questions.flush()
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """The next answer. Raises RaceError when the process has ended instead."""
        line = self._answers.readline()
        if not line:
            code = self._process.wait()
            last = (self._log.read_text().strip().splitlines() or [""])[-1]
            raise RaceError(f"a process ended with {code}, see {self._log}: {last[:200]}")
        return json.loads(line)

    def close(self) -> None:
        """End the process, which does so by itself unless it hangs."""
        self._questions.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()


@contextmanager
def program_with_us(code: str, *arguments: str, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A Python program that runs until it is left, if it has not ended; `options` are Popen's."""
    command = [sys.executable, "-c", END_WITH_US + code, *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, **options) as process:
        try:
            yield process
        finally:
            process.kill()
