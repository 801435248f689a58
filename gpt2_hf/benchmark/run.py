"""What scripts/benchmark.py does: each function measures one thing and returns it as text."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
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
from .processes import ROOT, RaceError, Worker, program_with_us
from .race import race
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

LOOP_STEPS = 16

# Both kinds of waiting threads in a CPU's benchmark, by the value of OMP_WAIT_POLICY.
WAITING = {"threads that sleep": "passive", "OpenMP's default": None}
COUNTING = "while True:\n    pass\n"

DEMO = ("scripts/pretrain.py", "--config", "recipes/demo.yaml", "--train.log_every", "1")
RUN_SCRIPT = "import runpy\ndel sys.argv[0]\nrunpy.run_path(sys.argv[0], run_name='__main__')\n"

CURVE_SHAPE = Shape(n_layer=4, n_embd=128, n_head=4, seq_len=128, micro_batch_size=4)
CURVE_STEPS, CURVE_END = 300, 50  # in all, and those whose mean loss is compared


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
    raced = ladder(device.type, bf16) if ladder_instead else variants(device.type, peers, bf16)
    if only:
        raced = [one for one in raced if one.model == "ours" or any(part in one.label for part in only)]
    found = summarize(race(raced, shape, device, rounds, seconds, out / "logs"), shape, device)
    written = write(found, out)
    return f"{as_text(found)}\nwritten: {', '.join(map(str, written))}"


def race_loop(shape: Shape, device: torch.device, rounds: int) -> str:
    """The share of train()'s time that is spent in optimizer steps; the rest is data, logging and the loop itself.

    The first steps, which compile, do not count. A step is waited for before the clock is read, so on a GPU this asks
    more of the loop than training does.
    """
    shares = []
    for _ in range(rounds):
        spans = _spans_of_steps(shape, device)[LOOP_STEPS // 4 :]
        shares.append(sum(end - start for start, end in spans) / (spans[-1][1] - spans[0][0]))
    return (
        f"{shape.tokens:,} tokens a step ({shape.grad_accum_steps} accumulated), a row logged every step: "
        f"{median(shares):.2%} of the loop's time is computing ({min(shares):.2%} to {max(shares):.2%}, {rounds} runs)"
    )


def _spans_of_steps(shape: Shape, device: torch.device) -> list[tuple[float, float]]:
    """When each optimizer step of a short run began and ended."""
    spans: list[tuple[float, float]] = []
    train_step = training.train_step

    def timed(*args: Any) -> Any:
        start = time.perf_counter()
        found = train_step(*args)
        if device.type == "cuda":
            torch.cuda.synchronize()
        spans.append((start, time.perf_counter()))
        return found

    with (
        data_folder(shape) as folder,
        patch.dict(os.environ, ACCELERATE_USE_CPU=str(device.type == "cpu")),
        patch.object(training, "train_step", timed),
    ):
        config = run_config(shape, run_dir=f"{folder}/run", steps=LOOP_STEPS, log_every=1)
        nothing_else = EvalSection(val_every=0, hellaswag_every=0, sample_every=0)
        data, checkpoint = replace(config.data, path=folder), CheckpointSection(save_every=0)
        training.train(replace(config, data=data, eval=nothing_else, checkpoint=checkpoint))
    return spans


def race_busy(shape: Shape, device: torch.device, rounds: int, seconds: float, out: Path) -> str:
    """What is left of our speed beside other programs, when waiting threads sleep, as ours do, and by OpenMP's default.

    The other programs count, on a thread each. In each round both kinds train in turns, alone and beside them; shares
    are medians over the rounds, of what was left in the same round.

    Raises:
        RaceError: on a GPU, whose speed other programs on the CPUs hardly touch; or when our step fails.
    """
    if device.type != "cpu":
        raise RaceError(f"--what busy is about CPUs, this is {device.type}; add --device cpu")
    n_cpus = hardware.usable_cpus()
    rates: dict[tuple[str, int], list[float]] = {}  # tokens/s by round
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for name, policy in WAITING.items():
            worker = Worker(replace(OURS, label=name), shape, device, out / "logs", {"OMP_WAIT_POLICY": policy})
            workers[name] = stack.enter_context(closing(worker))
            if error := worker.answer().get("error"):
                raise RaceError(f"our own step fails: {error}")
        for _ in range(rounds):
            for n_others in sorted({0, 1, n_cpus}):
                with counting_programs(n_others):
                    for name, worker in workers.items():
                        steps = worker.ask(f"run {seconds}")["seconds"]
                        rates.setdefault((name, n_others), []).append(shape.tokens * len(steps) / sum(steps))
    return f"{n_cpus} CPUs, {rounds} rounds\n{_busy_table(rates, n_cpus)}"


def _busy_table(rates: dict[tuple[str, int], list[float]], n_cpus: int) -> str:
    alone = [f"{median(rates[name, 0]):,.0f}" for name in WAITING]
    lines = [_cells("beside", "fair share", *WAITING), "|---|---|---|---|", _cells("nothing, tokens/s", "", *alone)]
    for n_others in sorted({1, n_cpus}):
        shares = [
            median(beside / before for beside, before in zip(rates[name, n_others], rates[name, 0], strict=True))
            for name in WAITING
        ]
        fair = n_cpus / (n_cpus + n_others)
        lines.append(_cells(f"{n_others} counting", *(f"{share:.0%}" for share in (fair, *shares))))
    return "\n".join(lines)


def _cells(*texts: str) -> str:
    return f"| {' | '.join(texts)} |"


@contextmanager
def counting_programs(count: int) -> Iterator[None]:
    """So many other programs that each keep a thread busy."""
    with ExitStack() as others:
        for _ in range(count):
            others.enter_context(program_with_us(COUNTING))
        yield


def race_start(rounds: int) -> str:
    """Seconds from the command to the first step of the demo, with its measurements before that, in fresh processes."""
    found: dict[str, list[float]] = {"nothing compiled before": [], "compiled before": []}
    for _ in range(rounds):
        with data_folder(shape_of("demo", "cpu")) as folder:
            for name, seconds in found.items():
                seconds.append(_first_step(Path(folder), Path(folder, name.replace(" ", "_"))))
    return "\n".join(
        f"demo, {name}: first step after {median(seconds):.1f} s ({min(seconds):.1f} to {max(seconds):.1f})"
        for name, seconds in found.items()
    )


def _first_step(data: Path, run_dir: Path) -> float:
    command = (*DEMO, "--data.path", str(data), "--train.run_dir", str(run_dir))
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(data / "compiled"), "PYTHONPATH": str(ROOT)}
    printed = run_dir.with_suffix(".log")
    start = time.perf_counter()
    with (
        printed.open("w") as log,
        program_with_us(RUN_SCRIPT, *command, cwd=ROOT, env=environment, stdout=log, stderr=log) as process,
    ):
        while process.poll() is None:
            if any("train_loss" in row for row in read_rows(run_dir / "metrics.jsonl")):
                return time.perf_counter() - start
            time.sleep(0.02)
    raise RaceError(f"pretrain.py ended: {(printed.read_text().strip().splitlines() or ['without a word'])[-1]}")


def compare_curves(device: torch.device, seeds: int) -> str:
    """Our step against the plain fp32 loop on stock GPT-2: the loss after 300 steps, beside the noise of seeds.

    A small model on the packaged plays; a seed is one of initial weights, the same for both.
    """
    batches = read_batches(CURVE_SHAPE)

    def end(variant: Variant, seed: int) -> float:
        step = build(variant, CURVE_SHAPE, device, seed)
        losses = [float(step(batches[number % len(batches)])) for number in range(CURVE_STEPS)]
        return float(np.mean(losses[-CURVE_END:]))

    pairs = np.array([[end(variant, seed) for variant in (OURS, PLAIN)] for seed in range(seeds)])  # (seeds, 2)
    apart = pairs[:, 0] - pairs[:, 1]
    noise = f"{pairs[:, 1].std(ddof=1):.4f}" if seeds > 1 else "unknown of one"
    return (
        f"mean loss of the last {CURVE_END} of {CURVE_STEPS} steps, ours and plain fp32, by seed: "
        f"{pairs.round(4).tolist()}\n"
        f"ours - plain: {apart.mean():+.4f} (by seed {apart.round(4).tolist()}); "
        f"standard deviation between seeds: {noise}"
    )


def race_scoring(shape: Shape, device: torch.device, n_items: int, rounds: int) -> str:
    """HellaSwag by our scorer and by lm-evaluation-harness, on a model of this shape with random weights."""
    sizes = {"n_layer": shape.n_layer, "n_embd": shape.n_embd, "n_head": shape.n_head, "n_positions": shape.seq_len}
    with tempfile.TemporaryDirectory() as folder:
        found = race_hellaswag(write_random_model(Path(folder), **sizes), n_items, rounds, str(device))
    lines = [f"HellaSwag, {n_items} items, {found['parameters']:,} parameters, {found['precision']}, seconds:"]
    lines += [f"{name}: {_spread(seconds)}" for name, seconds in found["seconds"].items()]
    lines += [f"ours is {_spread(found['speedup'])} times as fast as the harness at its best batch size"]
    lines += [
        f"{metric}: " + (f"other picks for items {items}" if items else "the same picks")
        for metric, items in found["different_picks"].items()
    ]
    return "\n".join(lines)


def _spread(values: dict[str, float]) -> str:
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
