"""What scripts/benchmark.py does: each function measures one thing and returns it as text."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from .. import hardware
from ..config import CheckpointSection, EvalSection
from ..runs import read_rows
from ..training import loop as training
from .hellaswag import race_hellaswag, write_random_model
from .race import RaceError, Worker, race
from .results import as_text, summarize, write
from .variants import (
    OURS,
    PLAIN,
    Shape,
    Variant,
    build,
    ladder,
    read_batches,
    read_tokens,
    run_config,
    shape_of,
    variants,
)

ROOT = Path(__file__).parents[2]
# Runs the script named next, and ends it when its standard input ends: when this program does, in whatever way.
WITH_US = (
    sys.executable,
    "-c",
    "import os, runpy, sys, threading\n"
    "threading.Thread(target=lambda: (sys.stdin.read(), os._exit(1)), daemon=True).start()\n"
    "del sys.argv[0]\n"
    "runpy.run_path(sys.argv[0], run_name='__main__')",
)


def race_steps(
    shape: Shape,
    device: torch.device,
    rounds: int,
    seconds: float,
    out: Path,
    peers: Sequence[str] = (),
    only: Sequence[str] = (),
    ladder_instead: bool = False,
) -> str:
    """Optimizer steps of ours and of the peers, in turns; table, JSON and picture go to `out`.

    Raises:
        RaceError: when our losses are not stock's, or our step fails.
    """
    bf16 = hardware.default_precision(device) == "bf16"
    rows = ladder(device.type, bf16) if ladder_instead else variants(device.type, peers, bf16)
    if only:
        rows = [row for row in rows if row.model == "ours" or any(part in row.label for part in only)]
    found = summarize(race(rows, shape, device, rounds, seconds, out / "logs"), shape, device)
    written = write(found, out)
    return f"{as_text(found)}\nwritten: {', '.join(map(str, written))}"


def race_loop(shape: Shape, device: torch.device, rounds: int) -> str:
    """The share of train()'s time that is spent in optimizer steps; the rest is data, logging and the loop itself.

    The first steps, which compile, do not count. A step is waited for before the clock is read, so on a GPU this asks
    more of the loop than training does.
    """
    shares = []
    steps = 16
    for _ in range(rounds):
        with data_folder(shape) as folder:
            config = run_config(shape, run_dir=f"{folder}/run", steps=steps, log_every=1)
            config = replace(
                config,
                data=replace(config.data, path=folder),
                eval=EvalSection(val_every=0, hellaswag_every=0, sample_every=0),
                checkpoint=CheckpointSection(save_every=0),
            )
            spans: list[tuple[float, float]] = []

            def timed(*args: Any, step: Any = training.train_step, spans: Any = spans) -> Any:
                start = time.perf_counter()
                found = step(*args)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                spans.append((start, time.perf_counter()))
                return found

            with patch.object(training, "train_step", timed):
                training.train(config)
        spans = spans[steps // 4 :]
        shares.append(sum(end - start for start, end in spans) / (spans[-1][1] - spans[0][0]))
    return (
        f"{shape.tokens:,} tokens a step ({shape.grad_accum_steps} accumulated), a row logged every step: "
        f"{median(shares):.2%} of the loop's time is computing ({min(shares):.2%} to {max(shares):.2%}, {rounds} runs)"
    )


def race_busy(
    shape: Shape, device: torch.device, rounds: int, seconds: float, out: Path, variant: Variant = OURS
) -> str:
    """What is left of our speed beside other programs, when waiting threads sleep, as ours do, and by OpenMP's default.

    The other programs count, on a thread each. In each round both kinds train in turns, alone and beside them; shares
    are medians over the rounds, of what was left in the same round.

    Raises:
        RaceError: on a GPU, whose speed other programs on the CPUs hardly touch.
    """
    if device.type != "cpu":
        raise RaceError(f"--what busy is about CPUs, this is {device.type}; add --device cpu")
    n_cpus = hardware.usable_cpus()
    policies = {"threads that sleep": "passive", "OpenMP's default": None}
    rates: dict[tuple[str, int], list[float]] = {}  # tokens/s by round
    workers: dict[str, Worker] = {}
    try:
        for name, policy in policies.items():
            named = replace(variant, label=name)
            workers[name] = Worker(named, shape, device, out / "logs", {"OMP_WAIT_POLICY": policy})
            if error := workers[name].answer().get("error"):
                raise RaceError(f"our own step fails: {error}")
        for _ in range(rounds):
            for n_others in (0, 1, n_cpus):
                with busy_programs(n_others):
                    for name, worker in workers.items():
                        steps = worker.ask(f"run {seconds}")["seconds"]
                        rates.setdefault((name, n_others), []).append(shape.tokens * len(steps) / sum(steps))
    finally:
        for worker in workers.values():
            worker.close()
    lines = [
        f"{n_cpus} CPUs, {rounds} rounds",
        "| beside | fair share | " + " | ".join(policies) + " |",
        "|---|---|---|---|",
    ]
    lines.append("| nothing, tokens/s | | " + " | ".join(f"{median(rates[name, 0]):,.0f}" for name in policies) + " |")
    for n_others in sorted({1, n_cpus}):
        shares = (
            median(beside / alone for beside, alone in zip(rates[name, n_others], rates[name, 0], strict=True))
            for name in policies
        )
        lines.append(
            f"| {n_others} counting | {n_cpus / (n_cpus + n_others):.0%} | "
            + " | ".join(f"{s:.0%}" for s in shares)
            + " |"
        )
    return "\n".join(lines)


@contextmanager
def busy_programs(count: int) -> Iterator[None]:
    """So many other programs that each keep a thread busy."""
    with tempfile.NamedTemporaryFile("w", suffix=".py") as script:
        script.write("while True:\n    pass\n")
        script.flush()
        others = [subprocess.Popen([*WITH_US, script.name], stdin=subprocess.PIPE) for _ in range(count)]
        try:
            yield
        finally:
            for other in others:
                other.kill()
                other.wait()


def race_start(rounds: int) -> str:
    """Seconds from the command to the first step of the demo, with its measurements before that, in fresh processes."""
    found: dict[str, list[float]] = {"nothing compiled before": [], "compiled before": []}
    shape = shape_of("demo", "cpu")
    for _ in range(rounds):
        with data_folder(shape) as folder:
            for name, seconds in found.items():
                seconds.append(_first_step(Path(folder), f"{folder}/{name.replace(' ', '_')}"))
    return "\n".join(
        f"demo, {name}: first step after {median(seconds):.1f} s ({min(seconds):.1f} to {max(seconds):.1f})"
        for name, seconds in found.items()
    )


def _first_step(folder: Path, run_dir: str) -> float:
    command = [*WITH_US, "scripts/pretrain.py", "--config", "recipes/demo.yaml", "--train.log_every", "1"]
    command += ["--data.path", str(folder), "--train.run_dir", run_dir]
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(folder / "compiled"), "PYTHONPATH": str(ROOT)}
    start = time.perf_counter()
    printed = Path(f"{run_dir}.log")
    with printed.open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=log, stderr=log)
    try:
        while process.poll() is None:
            if any("train_loss" in row for row in read_rows(Path(run_dir, "metrics.jsonl"))):
                return time.perf_counter() - start
            time.sleep(0.02)
        raise RaceError(f"pretrain.py ended: {(printed.read_text().strip().splitlines() or ['without a word'])[-1]}")
    finally:
        process.kill()
        process.wait()


def compare_curves(device: torch.device, seeds: int, steps: int = 300) -> str:
    """Our step against the plain fp32 loop on stock GPT-2: the loss after 300 steps, beside the noise of seeds.

    A small model on the packaged plays; a seed is one of initial weights, the same for both.
    """
    shape = Shape(n_layer=4, n_embd=128, n_head=4, seq_len=128, micro_batch_size=4)
    batches = read_batches(shape)

    def end(variant: Variant, seed: int) -> float:
        step = build(variant, shape, device, seed)
        losses = [float(step(batches[number % len(batches)])) for number in range(steps)]
        return float(np.mean(losses[-50:]))

    pairs = np.array([[end(variant, seed) for variant in (OURS, PLAIN)] for seed in range(seeds)])  # (seeds, 2)
    apart = pairs[:, 0] - pairs[:, 1]
    return (
        f"mean loss of the last 50 of {steps} steps, ours and plain fp32, by seed: {pairs.round(4).tolist()}\n"
        f"ours - plain: {apart.mean():+.4f} (by seed {apart.round(4).tolist()}); "
        f"standard deviation between seeds: {pairs[:, 1].std(ddof=1):.4f}"
    )


def race_scoring(shape: Shape, device: torch.device, n_items: int, rounds: int) -> str:
    """HellaSwag by our scorer and by lm-evaluation-harness, on a model of this shape with random weights."""
    sizes = {"n_layer": shape.n_layer, "n_embd": shape.n_embd, "n_head": shape.n_head, "n_positions": shape.seq_len}
    with tempfile.TemporaryDirectory() as folder:
        found = race_hellaswag(write_random_model(Path(folder), **sizes), n_items, rounds, str(device))
    lines = [f"HellaSwag, {n_items} items, {found['parameters']:,} parameters, {found['dtype']}, seconds:"]
    lines += [f"{name}: {spread(seconds)}" for name, seconds in found["seconds"].items()]
    lines += [f"ours is {spread(found['speedup'])} times as fast as the harness at its best batch size"]
    lines += [
        f"{metric}: " + ("the same picks" if not items else f"other picks for items {items}")
        for metric, items in found["different_picks"].items()
    ]
    return "\n".join(lines)


def spread(values: dict[str, float]) -> str:
    return f"{values['median']:.2f} ({values['min']:.2f} to {values['max']:.2f})"


@contextmanager
def data_folder(shape: Shape) -> Iterator[str]:
    """A folder with the packaged plays in shards, as build-nanogpt writes them."""
    with tempfile.TemporaryDirectory() as folder:
        tokens = read_tokens().astype(np.uint16)
        tokens = np.resize(tokens, max(len(tokens), 40 * shape.tokens))
        np.save(f"{folder}/train_000001.npy", tokens)
        np.save(f"{folder}/val_000000.npy", tokens[: max(70_000, shape.tokens)])
        yield folder
