"""The budget of a training step: a trace from a process of its own, priced at a card's rates, as a page of text."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Annotated, ClassVar

from ..config import RunConfig
from ..knobs import ConfigError, OneOf, PathName
from ..program import UserError
from ..training.memory import Parameters
from ..training.metrics import flops_per_token
from .launches import REST, UPDATE, Launch, Trace
from .rates import BUILDS, Rates, card_of, rates_of

# Kernels of a part that take less than this share of the micro-step stand in one row together.
SMALL = 0.001


@dataclass(frozen=True)
class BudgetConfig(RunConfig):
    """Say what a training step launches on one card, without one; every knob of a run applies.

    Args:
        card: the kind of card.
        json: print the trace and the figures as JSON.
        code: folder that the compiler's code for the card goes to.
    """

    ALIASES: ClassVar[dict[str, str]] = RunConfig.ALIASES | {
        "preset": "model.preset",
        "micro_batch_size": "train.micro_batch_size",
    }

    card: Annotated[str, OneOf(tuple(BUILDS))] = "H100"
    json: bool = False
    code: Annotated[str, PathName()] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train.precision not in ("auto", "bf16"):
            raise ConfigError(f"train.precision {self.train.precision}: the cards' rates are those of bf16; use that")
        if self.model.attn_implementation not in ("auto", "sdpa", "eager"):
            raise ConfigError(
                f"model.attn_implementation {self.model.attn_implementation}: what its kernels compute is not in their "
                f"code; leave it at auto, or use sdpa or eager"
            )
        if self.data.document_mask:
            raise ConfigError("data.document_mask: where documents end is in the data, and there is none; leave it out")

    def without_ramps(self) -> RunConfig:
        """The run at full length and batch, with nothing in it that needs a file."""
        train = replace(self.train, precision="bf16", batch_ramp=[], batch_ramp_steps=0, trackers=[])
        data = replace(self.data, seq_len_ramp=[], seq_len_ramp_steps=0)
        return RunConfig(model=replace(self.model, init_from=None), data=data, optim=self.optim, train=train)


@dataclass(frozen=True)
class Row:
    """A kind of kernel in a part of the step; seconds are estimated, all else is counted."""

    part: str
    name: str
    launches: int
    n_bytes: int
    flops: int
    seconds: float
    is_narrow: bool


@dataclass(frozen=True)
class Budget:
    """What a step takes.

    Attributes:
        rows: of the last micro-step, and of the update that follows it.
        calls: part -> calls of its compiled function in a micro-step.
        launches: of the whole step.
        seconds: of the whole step.
    """

    rows: list[Row]
    calls: dict[str, int]
    micro_steps: int
    launches: int
    seconds: float
    tokens_per_sec: float
    mfu: float
    peak_bytes: int
    host_waits: list[str]
    graph_breaks: list[str]
    recompilations: list[str]


def make_budget(config: BudgetConfig) -> Budget:
    """Trace a step of ``config`` and price it.

    Raises:
        UserError: what the traced process says in its last line.
    """
    run, rates = config.without_ramps(), rates_of(config.card)
    micro_steps = run.grad_accum_steps(1)
    trace = trace_in_process(run, config.card)
    if config.code is not None:
        Path(config.code).mkdir(parents=True, exist_ok=True)
        for name, code in trace.code.items():
            Path(config.code, f"{name}.py").write_text(code)
    last = trace.last_micro_step

    def times(launch: Launch) -> int:
        """All but the first micro-step are alike: they add to gradients that are there. The update comes once."""
        return micro_steps - last if launch.micro_step == last and launch.part != UPDATE else 1

    seconds = sum(times(launch) * seconds_of(launch, rates) for launch in trace.launches)
    tokens_per_sec = run.train.global_batch_tokens / seconds
    flops = flops_per_token(Parameters.of(run).total, run.model.gpt_config(), run.data.seq_len)
    return Budget(
        rows=_rows([launch for launch in trace.launches if launch.micro_step == last], rates),
        calls=trace.calls,
        micro_steps=micro_steps,
        launches=sum(map(times, trace.launches)),
        seconds=seconds,
        tokens_per_sec=tokens_per_sec,
        mfu=tokens_per_sec * flops / card_of(config.card).peak,
        peak_bytes=trace.peak_bytes,
        host_waits=trace.host_waits,
        graph_breaks=trace.graph_breaks,
        recompilations=trace.recompilations,
    )


def trace_in_process(run: RunConfig, card: str) -> Trace:
    """The trace of a step of ``run``, from a process that believes in the card. Raises UserError in its words."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder, "config.yaml")
        recipe.write_text(run.to_yaml())
        command = [sys.executable, "-m", f"{__package__}.worker", card, "--config", str(recipe)]
        result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode == 2:
        raise UserError(result.stderr.strip().splitlines()[-1].removeprefix("error: "))
    if result.returncode:
        print(result.stderr, file=sys.stderr)
        raise RuntimeError("the process that traces the step has failed")
    return Trace.from_json(result.stdout)


def seconds_of(launch: Launch, rates: Rates) -> float:
    """Of a kernel: what its FLOPs or its bytes take, whichever is longer, and the gap before the next."""
    computed = launch.flops / (rates.attention if launch.kind == "attention" else rates.products)
    moved = launch.n_bytes / (rates.narrow if launch.is_narrow else rates.wide)
    return max(computed, moved) + rates.gap


def _rows(launches: list[Launch], rates: Rates) -> list[Row]:
    """Launches of one kind in one row; parts in the order in which they begin."""
    grouped: dict[tuple[str, str], list[Launch]] = {}
    for launch in launches:
        grouped.setdefault((launch.part, launch.name), []).append(launch)
    rows = [
        Row(
            part=part,
            name=name,
            launches=len(each),
            n_bytes=sum(launch.n_bytes for launch in each),
            flops=sum(launch.flops for launch in each),
            seconds=sum(seconds_of(launch, rates) for launch in each),
            is_narrow=any(launch.is_narrow for launch in each),
        )
        for (part, name), each in grouped.items()
    ]
    order = [*dict.fromkeys(part for part, _ in grouped if part not in (REST, UPDATE)), REST, UPDATE]
    return sorted(rows, key=lambda row: order.index(row.part))


def to_json(budget: Budget) -> str:
    return json.dumps(asdict(budget), indent=2)


def text(budget: Budget, config: BudgetConfig) -> str:
    """The page: a table of the micro-step, its sums, and what must not be."""
    run, rates, card = config.without_ramps(), rates_of(config.card), card_of(config.card)
    model = run.model.gpt_config()
    micro_step = sum(row.seconds for row in budget.rows if row.part != UPDATE)
    lines = [
        f"One step of GPT-2 with {model.n_layer} blocks, {model.n_embd} wide, on one {config.card}: "
        f"{budget.micro_steps} x {run.train.micro_batch_size} windows of {run.data.seq_len} tokens, then the update.",
        "Launches, bytes and FLOPs are counted from the code for this card; times are estimated, nothing was run.",
        "",
        f"{'of a micro-step':<70} {'launches':>8} {'GB':>8} {'TFLOP':>7} {'ms':>8}",
    ]
    for part, rows_of_part in groupby(budget.rows, key=lambda row: row.part):
        rows = list(rows_of_part)
        calls = f", {budget.calls[part]} calls" if part in budget.calls else ", once a step" if part == UPDATE else ""
        lines += ["", _line(f"{part}{calls}", rows)]
        large = [row for row in rows if row.seconds >= SMALL * micro_step]
        lines += [_line(f"  {row.name}", [row]) + "  by 2 bytes" * row.is_narrow for row in large]
        if small := [row for row in rows if row.seconds < SMALL * micro_step]:
            lines.append(_line(f"  {len(small)} smaller kinds", small))
    lines += ["", _line("micro-step", [row for row in budget.rows if row.part != UPDATE])]
    lines += [
        "",
        f"A step: {budget.seconds * 1e3:,.1f} ms, {budget.launches:,} launches; "
        f"{budget.tokens_per_sec:,.0f} tokens/s, MFU {budget.mfu:.1%} of {card.peak / 1e12:,.0f} TFLOP/s",
        f"Peak memory (max allocated): {budget.peak_bytes / 1e9:.2f} GB of the {card.memory / 1e9:.0f} of the card",
        f"Host waits {_count(budget.host_waits)}; graph breaks {_count(budget.graph_breaks)}; "
        f"recompilations {_count(budget.recompilations)}",
        f"Rates, {rates.source}: products {rates.products / 1e12:.0f} TFLOP/s, attention "
        f"{rates.attention / 1e12:.0f}, bytes {rates.wide / 1e12:.2g} TB/s, by 2 at a time {rates.narrow / 1e12:.2g}, "
        f"{rates.gap * 1e6:.1f} us between kernels",
    ]
    return "\n".join(lines)


def _line(name: str, rows: list[Row]) -> str:
    launches, n_bytes, flops, seconds = (
        sum(getattr(row, key) for row in rows) for key in ("launches", "n_bytes", "flops", "seconds")
    )
    product = f"{flops / 1e12:.2f}" if flops else ""
    if len(name) > 70:
        name = f"{name[:57]}...{name[-10:]}"  # kernels are told apart by the number at their end
    return f"{name:<70} {launches:>8,} {n_bytes / 1e9:>8.2f} {product:>7} {seconds * 1e3:>8.2f}"


def _count(found: list[str]) -> str:
    return f"{len(found)}: {'; '.join(found)}" if found else "0"
