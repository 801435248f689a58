"""What a run reports: FLOPs, throughput, and the rows of metrics.jsonl."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..model.configuration_gpt import GPTConfig
from ..program import print_any_character
from ..runs import read_rows
from .run_folder import RowFile
from .trackers import Trackers


def flops_per_token(n_parameters: int, config: GPTConfig, seq_len: int) -> int:
    """Training FLOPs per token, forward and backward: 6 N + 12 L C T.

    Every parameter multiplies and adds once forward and twice backward (Kaplan et al. 2020, sec. 2.1); attention's two
    products over T positions cost 12 T C per layer (Chowdhery et al. 2022, appendix B, counts all T, not the causal
    half). Recomputed activations do not count.
    """
    return 6 * n_parameters + 12 * config.n_layer * config.n_embd * seq_len


def peak_memory_gb(device: torch.device) -> float:
    """Most memory held so far, in GB: allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def is_due(every: int, step: int, total_steps: int) -> bool:
    """Whether something with this interval (0: never) happens after ``step``; the last step has everything."""
    return bool(every) and (step % every == 0 or step == total_steps)


class Throughput:
    """Tokens per second and MFU of training alone.

    Args:
        tokens_before: over all processes, in the first so many steps.
        flops_per_token: in the step after so many, from which on all up to the next restart are alike.
        peak: of all processes' devices, in FLOP/s. A rate above it, which a peak measured in a bad moment allows, takes
            its place: no machine does more than it can.
        settle: waits for a device that works on while the host goes ahead.
    """

    def __init__(
        self,
        tokens_before: Callable[[int], int],
        flops_per_token: Callable[[int], float],
        peak: float,
        settle: Callable[[], None] | None = None,
    ):
        self.tokens_before = tokens_before
        self.flops_per_token = flops_per_token
        self.peak = peak
        self._settle = settle
        self._since: tuple[int, float] | None = None

    def restart(self, step: int) -> None:
        """Count from after ``step`` on: what came before was compilation, evaluation or saving."""
        if self._settle:
            self._settle()
        self._since = (step, time.perf_counter())

    def measure(self, step: int) -> dict[str, float]:
        """``tokens_per_sec`` and ``mfu`` since the last call or restart; nothing when no step lies between."""
        row = {}
        if self._since and step > self._since[0]:
            n_tokens = self.tokens_before(step) - self.tokens_before(self._since[0])
            rate = n_tokens / (time.perf_counter() - self._since[1])
            flops = rate * self.flops_per_token(self._since[0])
            self.peak = max(self.peak, flops)
            row = {"tokens_per_sec": round(rate, 1), "mfu": round(flops / self.peak, 4)}
        self._since = (step, time.perf_counter())
        return row


class RunLog:
    """A run's progress bar, its metrics.jsonl and trackers; silent on all ranks but the first, which is ``enabled``.

    Each row is a JSON object with ``step``, ``tokens_seen`` and what was measured then. Opening the log for a run that
    resumes after ``start_step`` drops what a killed run wrote later: those steps are made again. With
    ``drops_start`` the row of that step goes too: its measurements were cut short, and are taken again.
    """

    def __init__(
        self,
        run_dir: Path,
        start_step: int,
        total_steps: int,
        tokens_before: Callable[[int], int],
        enabled: bool,
        trackers: Trackers | None = None,
        drops_start: bool = False,
    ):
        self.tokens_before = tokens_before
        self.enabled = enabled
        self.trackers = trackers
        print_any_character()
        # A log file gets a line every 15 seconds, a terminal a live bar.
        self.bar = tqdm(
            total=total_steps,
            initial=start_step,
            desc=run_dir.name,
            unit="step",
            disable=not self.enabled,
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 15,
        )
        self._path = run_dir / "metrics.jsonl"
        if self.enabled:
            kept = self._kept(start_step - drops_start) if start_step else []
            self.rows = RowFile(self._path, kept, self.say)

    def _kept(self, last_step: int) -> list[dict[str, Any]]:
        return [row for row in read_rows(self._path) if _is_up_to(last_step, row)]

    def go_back(self, step: int, row: dict[str, Any]) -> None:
        """Drop what was written after ``step``, and write a row that says why, unless it is there already."""
        if not self.enabled:
            return
        kept = self._kept(step)
        self.rows.replace(kept)
        if not any(row.items() <= old.items() for old in kept):
            self.write(step, row)
        self.bar.n = step
        self.bar.refresh()

    def write(self, step: int, row: dict[str, Any]) -> None:
        """Write a row, if there is anything in it, hand it to the trackers, and show its main figures."""
        if not (row and self.enabled):
            return
        row = {"step": step, "tokens_seen": self.tokens_before(step), **row}
        self.rows.write(row)
        if self.trackers:
            self.trackers.write({key: value for key, value in row.items() if not isinstance(value, list)}, step)
        if "train_loss" in row:
            shown = {"loss": f"{row['train_loss']:.4f}", "lr": f"{row['lr']:.2e}"}
            if "mfu" in row:
                shown |= {"tok/s": f"{row['tokens_per_sec']:,.0f}", "mfu": f"{row['mfu']:.1%}"}
            self.bar.set_postfix(shown, refresh=False)
        if "skipped_steps" in row:
            self.say(f"step {step}: {row['skipped_steps']} updates skipped, as loss or gradients were not finite")
        if "val_loss" in row:
            of_last = (
                f" (the weights' average; the last weights {row['val_loss_raw']:.4f})" if "val_loss_raw" in row else ""
            )
            self.say(f"step {step}: validation loss {row['val_loss']:.4f}, {row['val_bpb']:.4f} bits per byte{of_last}")
        if "hellaswag_items" in row:
            self.say(
                f"step {step}: HellaSwag {row['hellaswag_lecture_acc']:.1%} +- {row['hellaswag_stderr']:.1%} on "
                f"{row['hellaswag_items']:,} items (lm-eval acc {row['hellaswag_acc']:.1%}, "
                f"acc_norm {row['hellaswag_acc_norm']:.1%})"
            )
        for text in row.get("samples", ()):
            self.say(f"step {step}: sample: {text!r}")

    def say(self, text: str) -> None:
        if self.enabled:
            self.bar.write(text, file=sys.stdout)
            sys.stdout.flush()  # or a log file has it after the last words of a run that is told to end

    def close(self) -> None:
        self.bar.close()
        if self.enabled:
            self.rows.close()
        if self.trackers:
            self.trackers.close()


def _is_up_to(step: int, row: Any) -> bool:
    return isinstance(row, dict) and isinstance(row.get("step"), int) and row["step"] <= step
