"""One variant in one process: python -m gpt2_hf.benchmark.worker JSON, told by lines of standard input what to do.

    (begin)        answers, once warm, with the losses of the first steps, or with an error
    run SECONDS    train for about so long; answers with the seconds of each step, on a GPU of steps timed together
    profile        answers with where the time of a step goes
    (end)          ends at once, whatever it is doing: so it does when the benchmark is killed

Its own process, because allocator settings, TF32 and compiled code are the process's; and a process that waits
costs nothing, so the variants can take turns.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from queue import SimpleQueue
from threading import Thread
from typing import Any

import torch

from ..training.metrics import peak_memory_gb
from .breakdown import profile_step
from .variants import Shape, Step, Variant, build, read_batches

WARM_UP_STEPS = 3
# On a GPU so many steps are timed together as take this long: in training too the host seldom waits for the device.
SPAN_S = 1.0


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print must not get between the answers
    questions: SimpleQueue[str] = SimpleQueue()
    Thread(target=listen, args=(questions,), daemon=True).start()
    for answer in conversation(json.loads(sys.argv[1]), iter(questions.get, None)):
        print(json.dumps(answer), file=answers, flush=True)


def listen(questions: SimpleQueue[str]) -> None:
    for line in sys.stdin:
        questions.put(line)
    os._exit(0)


def conversation(request: dict[str, Any], questions: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The answers, first the one to what was asked for; its error, if it cannot be made, is the only one."""
    device = torch.device(request["device"])
    try:
        racer = Racer(Variant(**request["variant"]), Shape(**request["shape"]), device)
    except Exception as error:
        yield {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        return
    yield racer.ready
    for question in questions:
        what, *seconds = question.split()
        yield profile_step(racer.step_once, device) if what == "profile" else racer.run(float(seconds[0]))


class Racer:
    """A variant that is warm: its model built, its kernels compiled.

    On a GPU too small for a peer its micro-batch is halved, and accumulated, until it fits.
    """

    def __init__(self, variant: Variant, shape: Shape, device: torch.device):
        self.device = device
        while True:
            try:
                self._warm_up(variant, shape)
                break
            except torch.OutOfMemoryError:
                if shape.micro_batch_size == 1:
                    raise
            self._step: Step | None = None
            gc.collect()
            torch.cuda.empty_cache()
            size = shape.micro_batch_size // 2
            shape = replace(shape, micro_batch_size=size, grad_accum_steps=shape.grad_accum_steps * 2)

    def _warm_up(self, variant: Variant, shape: Shape) -> None:
        start = time.perf_counter()
        self._batches = itertools.cycle(read_batches(shape))
        self._step = build(variant, shape, self.device)
        losses = [self.step_once()]
        first_step = time.perf_counter() - start
        losses += [self.step_once() for _ in range(WARM_UP_STEPS - 1)]
        size = shape.micro_batch_size
        self.ready: dict[str, Any] = {"losses": losses, "first_step_s": first_step, "micro_batch_size": size}
        self._rest()

    def step_once(self) -> float:
        """One optimizer step, waited for; its loss."""
        assert self._step is not None
        return float(self._step(next(self._batches)))

    def run(self, seconds: float) -> dict[str, Any]:
        self._span(1)  # takes again the memory that others may have used meanwhile
        n_steps = 1 if self.device.type == "cpu" else max(1, round(SPAN_S / self._span(1)))
        times: list[float] = []
        start, cpu = time.perf_counter(), time.process_time()
        while time.perf_counter() - start < seconds or len(times) < 2:
            times.append(self._span(n_steps))
        load = (time.process_time() - cpu) / (n_steps * sum(times))
        self._rest()
        peak = peak_memory_gb(self.device)
        return {"seconds": times, "steps_together": n_steps, "load": load, "peak_memory_gb": peak}

    def _span(self, n_steps: int) -> float:
        """Seconds of a step, of so many that are waited for at their end alone."""
        assert self._step is not None
        began = time.perf_counter()
        for _ in range(n_steps):
            loss = self._step(next(self._batches))
        float(loss)
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # the update comes after the loss
        return (time.perf_counter() - began) / n_steps

    def _rest(self) -> None:
        """Give back what the next variant may need."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        elif sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)


if __name__ == "__main__":
    main()
