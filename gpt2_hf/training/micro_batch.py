"""``train.micro_batch_size auto``: which micro-batch is the fastest, found out before the first step.

Only how much goes through the model at once is open: the update stays that of the same global batch, and so does the
curve. What was found is kept with the checkpoints, so that a resumed run takes the same.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import count
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from .. import hardware
from ..config import RunConfig
from ..data.documents import DocumentMask
from ..data.stream import TokenStream
from ..knobs import ConfigError
from ..model import GPTForCausalLM
from . import preflight
from .distributed import Host
from .memory import WIDTH, Parameters, Way, largest_that_fits, n_averages
from .start import Start
from .watch import NO_SMALLER, is_out_of_memory

# Of sizes whose tokens/s differ by no more than this share, the smallest is taken: it leaves memory for other things.
TIE = 0.01
SECONDS = 0.5  # for which a size is timed, after its first micro-step
# So much of a device's memory must be left: for measurements on the way, and in pieces that fit no tensor.
SPARE = 0.03
# A CPU is soon as fast as it gets, and where its memory runs out the process ends without a word: there the first size
# to be tried has so many tokens, and none is tried that is predicted not to fit.
CPU_TOKENS = 4096


class MicroBatchTrial:
    """Tries micro-batches, each for some micro-steps on the run's own windows, and settles on one.

    Every rank must make and run it: each tries the same sizes on its own device, and all decide together, by the
    slowest. Weights and generators are then as before, and there are no gradients.

    Args:
        start: whether optimizers have their state yet; also what a run that goes on has found before.
        stream: that the windows come from.
        model: the bare model, ready for training, which shares its parameters with what is trained.
        documents: of training.
        moved: called after each size, as training stands still meanwhile.
    """

    def __init__(
        self,
        config: RunConfig,
        start: Start,
        stream: TokenStream,
        accelerator: Accelerator,
        model: GPTForCausalLM,
        precision: str,
        documents: DocumentMask | None,
        host: Host,
        moved: Callable[[], None],
    ):
        self.config, self.start, self.stream, self.documents = config, start, stream, documents
        self.accelerator, self.model, self.host, self.moved = accelerator, model, host, moved
        is_compiled = model.transformer.h[0]._compiled_call_impl is not None
        self.way = Way(accelerator.device.type, precision, is_compiled, model.config._attn_implementation)
        self.sizes, self.n = config.micro_batch_sizes(host.world_size), Parameters.of(config)

    def run(self) -> dict[str, Any]:
        """What was found, to be kept: its ``size``, and the ``conditions`` under which it holds.

        Raises:
            ConfigError: when not even one window fits.
        """
        conditions = asdict(self.way) | {
            "device": hardware.describe(self.accelerator.device),
            "processes": self.host.world_size,
            "gradient_checkpointing": self.config.train.gradient_checkpointing,
        }
        conditions = self.host.first(lambda: conditions)
        if (saved := self.start.micro_batch) is not None:
            changed = [name for name, value in conditions.items() if saved["conditions"].get(name) != value]
            if not changed and saved["size"] in self.sizes:
                self.accelerator.print(f"micro_batch_size {saved['size']}, as this run has found before")
                return saved
            other = " and ".join(changed) or "batch"
            self.accelerator.print(
                f"this run's micro_batch_size {saved['size']} was found with another {other}: trying again"
            )
        sizes, first = self.host.first(self._plan)
        self.accelerator.print(f"trying sizes of micro-batches, {first} first, which may take half a minute each")
        rates, too_large = search(sizes, first, self._rate)
        size = fastest(rates)
        words = [f"{size} {rate:,.0f}" for size, rate in sorted(rates.items())]
        words += [f"{too_large} does not fit"] if too_large else []
        self.accelerator.print(f"micro_batch_size {size}; tokens/s a process in a trial: {', '.join(words)}")
        return {"size": size, "conditions": conditions, "tokens_per_sec": {str(k): v for k, v in sorted(rates.items())}}

    def _plan(self) -> tuple[list[int], int]:
        """The sizes that may be tried, and the first."""
        room = preflight.memory_of(self.accelerator.device)
        fits = largest_that_fits(self.config, self.way, self.n, room, self.host.world_size)
        most = max(fits, 1) if self.way.device == "cpu" else self.sizes[-1]
        return [size for size in self.sizes if size <= most], first_size(self.config, self.way, fits, self.sizes)

    def _rate(self, size: int) -> float | None:
        """Tokens/s of the slowest rank; None where the memory of any runs out."""
        torch._dynamo.config.recompile_limit += 1  # each size is a graph of its own
        seconds = self._seconds(size)
        self.model.zero_grad(set_to_none=True)
        gc.collect()
        if self.way.device == "cuda":
            torch.cuda.empty_cache()  # in pieces of this size
            torch.cuda.reset_peak_memory_stats()  # of which the run reports its own
        self.moved()
        all_seconds = self.host.gather(seconds)
        slowest = max((s for s in all_seconds if s is not None), default=0.0)
        return None if None in all_seconds else size * self.config.data.seq_len / slowest

    def _seconds(self, size: int) -> float | None:
        """Of a micro-step here, while all else that training holds has its place; None where memory runs out."""
        device, n_micro_steps, number = self.accelerator.device, self.sizes[-1] // size, count()
        first = self.start.data_offset + self.config.train.tokens_before(self.start.step) // self.config.data.seq_len
        on_host = torch.from_numpy(self.stream.batch(first, size).astype(np.int64))

        def micro_step() -> None:
            if next(number) % n_micro_steps == 0:  # gradients of earlier micro-steps of the update are held
                self.model.zero_grad(set_to_none=True)
            windows = on_host.to(device)
            input_ids, labels = windows[:, :-1], windows[:, 1:]
            apart = self.documents(input_ids, on_host[:, :-1]) if self.documents else {}
            self.model(input_ids, shift_labels=labels, num_items_in_batch=labels.numel(), **apart).loss.backward()

        try:
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                kept_free = torch.empty(self._kept_free(), dtype=torch.uint8, device=device)
                seconds = hardware.fastest(micro_step, device, SECONDS)
            del kept_free
            return seconds
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return None

    def _kept_free(self) -> int:
        """Bytes for what comes later: the optimizers' state, which a new run has not made yet, and what is spared."""
        whole = WIDTH["fp64"] if self.way.precision == "fp64" else WIDTH["fp32"]
        state = 0 if self.start.checkpoint else whole * n_averages(self.config, self.n)
        return state + int(SPARE * preflight.memory_of(self.accelerator.device))


def first_size(config: RunConfig, way: Way, fits: int, sizes: Sequence[int]) -> int:
    """The micro-batch with which a trial begins: the largest that is predicted to fit, on a CPU one of few tokens."""
    few = [size for size in sizes if size * config.data.seq_len <= CPU_TOKENS]
    return max(1, min(fits, max(few, default=1)) if way.device == "cpu" else fits)


def search(
    sizes: Sequence[int], first: int, rate_of: Callable[[int], float | None]
) -> tuple[dict[int, float], int | None]:
    """Try sizes from ``first`` upwards while more is faster, then from there downwards while less is as fast.

    Tokens/s are taken to rise with the size, then to stay or fall: so what lies beyond is not tried.

    Args:
        sizes: from small to large.
        rate_of: a size -> tokens/s, None where it does not fit.

    Returns:
        The rates of those that fit, and the smallest that was seen not to, if any.

    Raises:
        ConfigError: when none fits.
    """
    rates: dict[int, float] = {}
    too_large: int | None = None
    at = list(sizes).index(first)
    for size in sizes[at:]:
        rate, best = rate_of(size), max(rates.values(), default=0.0)
        if rate is None:
            too_large = size
            break
        rates[size] = rate
        if rate <= (1 + TIE) * best:
            break
    for size in reversed(sizes[:at]):
        if rates and rates[min(rates)] < (1 - TIE) * max(rates.values()):
            break
        if (rate := rate_of(size)) is None:
            too_large = size
        else:
            rates[size] = rate
    if not rates:
        raise ConfigError(f"out of memory with micro-batches of one window; {NO_SMALLER}")
    return rates, too_large


def fastest(rates: dict[int, float]) -> int:
    """The smallest size of those that are as good as the fastest."""
    return min(size for size, rate in rates.items() if rate >= (1 - TIE) * max(rates.values()))
