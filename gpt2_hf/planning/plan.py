"""What a recipe will take on a machine: memory, time, money, room on the disk; on one page, before anything is made."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch

from .. import hardware
from ..config import RunConfig
from ..data.folder import ShardError
from ..data.remote import open_folder
from ..data.shards import ShardSet, open_split
from ..data.stream import training_stream
from ..data.tokenizer import open_tokenizer
from ..knobs import ConfigError, Range
from ..program import UserError
from ..training import preflight
from ..training.memory import WIDTH, Memory, Parameters, Way, largest_that_fits, memory_on, n_averages
from ..training.metrics import flops_per_token
from ..training.micro_batch import first_size
from ..training.start import fitted
from .cards import Card, card_here, parse_gpus
from .speed import BEGIN, cpu_step_seconds, gpu_step_seconds, measure_rates, measuring_tokens, slower_kernels

PER_MACHINE = 8  # GPUs, where more are asked for
TOKENIZER_BYTES = 3.4e6

PARTS = {
    "weights": "weights",
    "averages": "averages of the optimizer",
    "gradients": "gradients",
    "copies": "weights cast or gathered",
    "activations": "activations",
    "loss": "head and a chunk of logits",
    "rest": "libraries, allocator",
    "total": "in all",
}


@dataclass(frozen=True)
class PlanConfig(RunConfig):
    """Say what a recipe takes on a machine: memory, time, money, disk.

    Args:
        gpus: number and kind of the cards, such as 8xH100; without it this machine is meant.
        price: dollars for an hour of one card.
        json: print the figures as JSON.
        check: measure small models here beside their predictions instead (minutes).
    """

    gpus: str | None = None
    price: Annotated[float, Range(0)] | None = None
    json: bool = False
    check: bool = False


@dataclass(frozen=True)
class Sharing:
    """How ranks hold the model, and what that takes of each."""

    name: str
    memory: Memory
    fits: int  # the largest micro-batch that fits; 0: none does


@dataclass(frozen=True)
class Plan:
    """Figures of a run: bytes, seconds, dollars.

    Attributes:
        micro_batch_size: the recipe's, or where that doesn't fit or doesn't divide, or is auto, the largest that does.
        flops: of the whole run; a token's, a step's, and the speed are those after the ramps of lengths and batches.
        why_not: what keeps the recipe's own from being used; "" where it is.
        source: what the time is predicted from.
    """

    machine: str
    n_devices: int
    device_memory: float
    parameters: Parameters
    flops_per_token: int
    flops: int
    tokens: int
    steps: int
    micro_batch_size: int
    micro_steps: int
    why_not: str
    sharings: list[Sharing]
    tokens_per_sec: float
    step_seconds: float
    training_seconds: float
    measuring_seconds: float
    mfu: float
    source: str
    dollars: float | None
    checkpoint_bytes: float
    kept_checkpoints: int
    kept_bytes: float
    data_tokens: int | None
    data_bytes: float
    epochs: float | None


def make_plan(config: RunConfig, gpus: str | None = None, price: float | None = None) -> Plan:
    """The figures of a run of ``config`` on ``gpus``, by default on this machine.

    Raises:
        ConfigError: for a card that is not known, or a batch that does not divide among the devices.
    """
    card: Card | None = None
    if gpus is not None:
        n_devices, card = parse_gpus(gpus)
        way, machine = _way(config, card), f"{n_devices} x {card.name}"
    else:
        device = hardware.pick_device("auto")
        if device.type not in ("cuda", "cpu"):
            raise ConfigError(f"there is no plan for {device.type}: name cards with --gpus, such as --gpus 1xH100")
        n_devices = max(1, torch.cuda.device_count())
        card = card_here(device) if device.type == "cuda" else None
        way, machine = way_here(config, device), hardware.describe(device)
    shards = _open(config)
    if shards:
        config = fitted(config, shards)
    n = Parameters.of(config)
    if any(batch % (config.data.seq_len * n_devices) for batch in config.train.batches):
        config.grad_accum_steps(n_devices)  # raises, naming the batches that divide
    room = card.memory if card else room_here(torch.device("cpu"))
    ways = _ways(way, n_devices)
    fits = {name: largest_that_fits(config, each, n, room, n_devices) for name, each in ways.items()}
    micro_batch_size, why_not = _choose(config, way, n_devices, max(fits.values()))
    micro_steps = config.train.global_batch_tokens // (micro_batch_size * config.data.seq_len * n_devices)
    sharings = [
        Sharing(name, memory_on(config, each, n, micro_batch_size, n_devices), fits[name])
        for name, each in ways.items()
    ]
    if card is not None:
        rates = None
        peak, source = card.peak, f"MFU {card.mfu_of(n.total):.1%} of {card.name}, {card.source}"
        if words := slower_kernels(config)[1]:
            source += f"; {words}, {slower_kernels(config)[0]} of that (assumed)"
        if n_devices > 1:
            source += "; links between cards assumed"
    else:
        rates = measure_rates(way.precision)
        peak = rates.products
        source = f"{rates.products / 1e9:,.0f} GFLOP/s and {rates.copy / 1e9:.0f} GB/s, measured now"

    def flops_of(stage: RunConfig) -> int:  # a token
        return flops_per_token(n.total, config.model.gpt_config(), stage.data.seq_len)

    def seconds_of(stage: RunConfig) -> float:  # an update
        size = micro_batch_size * config.data.seq_len // stage.data.seq_len
        n_micro_steps = stage.train.global_batch_tokens // (size * stage.data.seq_len * n_devices)
        if rates is None:
            assert card is not None
            return gpu_step_seconds(stage, card, n, flops_of(stage), n_devices, n_micro_steps)
        return cpu_step_seconds(stage, way, n, rates, size, n_micro_steps)

    step, flops = seconds_of(config), flops_of(config)
    speed = config.train.global_batch_tokens / step
    training = sum(stage.train.steps * seconds_of(stage) for stage in _stages(config))
    measuring = measuring_tokens(config, way.device) / speed
    hours = (training + measuring + BEGIN[way.device]) / 3600
    size, kept = checkpoints(config, way, n)
    data_tokens, data_bytes, epochs = _data(config, shards)
    return Plan(
        machine=machine,
        n_devices=n_devices,
        device_memory=room,
        parameters=n,
        flops_per_token=flops,
        flops=sum(stage.train.steps * stage.train.global_batch_tokens * flops_of(stage) for stage in _stages(config)),
        tokens=config.train.tokens_before(config.train.steps),
        steps=config.train.steps,
        micro_batch_size=micro_batch_size,
        micro_steps=micro_steps,
        why_not=why_not,
        sharings=sharings,
        tokens_per_sec=speed,
        step_seconds=step,
        training_seconds=training,
        measuring_seconds=measuring + BEGIN[way.device],
        mfu=speed * flops / (peak * n_devices),
        source=source,
        dollars=None if price is None else hours * n_devices * price,
        checkpoint_bytes=size,
        kept_checkpoints=kept,
        kept_bytes=kept * size + WIDTH["fp32"] * n.total + TOKENIZER_BYTES,
        data_tokens=data_tokens,
        data_bytes=data_bytes,
        epochs=epochs,
    )


def _way(config: RunConfig, card: Card) -> Way:
    """How training computes on a card that need not be here."""
    precision, attention = config.train.precision, config.model.attn_implementation
    if precision == "auto":
        precision = "fp16" if card.name == "T4" else "bf16"
    return Way("cuda", precision, config.train.compile != "off", "sdpa" if attention == "auto" else attention)


def room_here(device: torch.device) -> float:
    """Bytes for training. A process on a CPU has libraries in its memory already, as this one has."""
    return preflight.memory_of(device) - (psutil.Process().memory_info().rss if device.type == "cpu" else 0)


def way_here(config: RunConfig, device: torch.device) -> Way:
    """What training chooses on this machine. Raises ConfigError where it cannot do what is asked for."""
    precision = hardware.default_precision(device) if config.train.precision == "auto" else config.train.precision
    is_compiled = {"off": False, "on": True}.get(config.train.compile, hardware.compile_obstacle(device) is None)
    model, mask = config.model, config.data.document_mask
    try:
        attention, _ = hardware.choose_attention(
            model.attn_implementation, device, precision, model.dropout, mask, compiled=is_compiled
        )
    except ValueError as error:
        raise ConfigError(f"model.attn_implementation: {error}") from None
    return Way(device.type, precision, is_compiled, attention)


def _stages(config: RunConfig) -> list[RunConfig]:
    """For each stage of the recipe's ramps one that is all of it, as many steps long."""
    data, train = config.data, config.train
    ramps = ((len(data.seq_len_ramp), data.seq_len_ramp_steps), (len(train.batch_ramp), train.batch_ramp_steps))
    edges = {number * steps for n_stages, steps in ramps for number in range(n_stages + 1)}
    return [
        replace(
            config,
            data=replace(data, seq_len=data.seq_len_at(first), seq_len_ramp=[], seq_len_ramp_steps=0),
            train=replace(
                train,
                steps=last - first,
                global_batch_tokens=train.tokens_of_step(first),
                batch_ramp=[],
                batch_ramp_steps=0,
            ),
        )
        for first, last in pairwise([*sorted(edge for edge in edges if edge < train.steps), train.steps])
    ]


def _ways(way: Way, n_devices: int) -> dict[str, Way]:
    """The ways to share a model that so many cards have."""
    if n_devices == 1:
        return {"": way}
    found = {"whole on each (ddp)": way, f"fsdp2, {n_devices} shares": replace(way, shards=n_devices)}
    if n_devices > PER_MACHINE and n_devices % PER_MACHINE == 0:
        found[f"hsdp, {n_devices // PER_MACHINE} x {PER_MACHINE}"] = replace(way, shards=PER_MACHINE)
    return found


def _choose(config: RunConfig, way: Way, n_devices: int, fits: int) -> tuple[int, str]:
    """The micro-batch to plan with, and what keeps the recipe's own from it."""
    asked = config.train.micro_batch_size
    if not fits:
        return 1, "not even one window fits: try --train.gradient_checkpointing true, or more or larger cards"
    if config.train.finds_micro_batch:
        return first_size(config, way, fits, config.micro_batch_sizes(n_devices)), "auto: what training tries first"
    if any(batch % (asked * config.data.seq_len * n_devices) for batch in config.train.batches):
        why_not = f"the recipe's {asked} does not divide the batch"
    elif asked > fits:
        why_not = f"the recipe's {asked} does not fit"
    else:
        return asked, ""
    return fits, f"{why_not}: --train.micro_batch_size {fits}"


def checkpoints(config: RunConfig, way: Way, n: Parameters) -> tuple[float, int]:
    """Bytes of a checkpoint, and the most of them that are kept at a time, beside the finished model."""
    keep, width = config.checkpoint, 8 if way.precision == "fp64" else 4
    averages = n_averages(config, n)
    size = width * (n.total + averages) + TOKENIZER_BYTES
    n_saved = config.train.steps // keep.save_every if keep.save_every else 0
    n_for_good = config.train.steps // keep.keep_every if keep.keep_every else 0
    is_measured = keep.keep_best and bool(config.eval.val_every)
    return size, min(n_saved, keep.keep_last + n_for_good + is_measured)


def _open(config: RunConfig) -> ShardSet | None:
    """The data to train on, if it is here."""
    if not Path(config.data.path).is_dir():
        return None
    try:
        tokenizer = open_tokenizer(config.data.tokenizer) if config.data.tokenizer else None
        return open_split(open_folder(config.data.path), "train", tokenizer)
    except (UserError, OSError):
        return None


def _data(config: RunConfig, shards: ShardSet | None) -> tuple[int | None, float, float | None]:
    """Tokens to train on, bytes of the data, and epochs; of data that is not here the bytes one epoch would need."""
    needed = config.train.tokens_before(config.train.steps)
    if shards is None:
        return None, 2.0 * needed, None
    try:
        an_epoch = training_stream(config, shards).tokens_an_epoch if config.data.document_starts else shards.n_tokens
    except (ShardError, OSError):
        return None, 2.0 * needed, None
    n_bytes = float(sum(path.stat().st_size for path in Path(config.data.path).rglob("*.*")))
    return shards.n_tokens, n_bytes, needed / an_epoch


def text(plan: Plan, config: RunConfig) -> str:
    """A plan on one page."""
    n, seq_len = plan.parameters, config.data.seq_len
    fewest, most = config.train.batches[0], config.train.batches[-1]
    batches = f"{most:,}" if fewest == most else f"{fewest:,} to {most:,}"
    lines = [
        ("machine", f"{plan.machine}, {plan.device_memory / 2**30:,.1f} GiB" + (" each" if plan.n_devices > 1 else "")),
        (
            "model",
            f"{n.total:,} parameters, {n.total - n.embeddings:,} without embeddings; {plan.flops_per_token / 1e6:,.0f} "
            f"MFLOPs a token (6 N + 12 L C T), {plan.flops:.3g} in all",
        ),
        ("run", f"{plan.steps:,} steps of {batches} tokens = {_short(plan.tokens)} tokens"),
        ("batch", _batch(plan, seq_len)),
        ("", ""),
        *_memory_table(plan),
        ("", ""),
        (
            "speed",
            f"{plan.tokens_per_sec:,.0f} tokens/s, {_seconds(plan.step_seconds)} a step, MFU {plan.mfu:.1%}; "
            f"from {plan.source}",
        ),
        (
            "time",
            f"{_seconds(plan.training_seconds)} of training, {_seconds(plan.measuring_seconds)} of beginning and "
            f"measuring: {_seconds(plan.training_seconds + plan.measuring_seconds)}"
            + (f", ${plan.dollars:,.2f}" if plan.dollars is not None else ""),
        ),
        (
            "checkpoints",
            f"{_bytes(plan.checkpoint_bytes)} each, at most {plan.kept_checkpoints} kept: {_bytes(plan.kept_bytes)} in "
            f"all, with the finished model",
        ),
        ("data", _data_line(plan, config)),
    ]
    return "\n".join(f"{name:<12}{value}".rstrip() for name, value in lines)


def _batch(plan: Plan, seq_len: int) -> str:
    cards = f" x {plan.n_devices} cards" if plan.n_devices > 1 else ""
    words = f"micro-batches of {plan.micro_batch_size} windows x {seq_len}{cards} x {plan.micro_steps} accumulated"
    return words + (f" ({plan.why_not})" if plan.why_not else "")


def _memory_table(plan: Plan) -> list[tuple[str, str]]:
    def row(label: str, cells: Iterable[Any]) -> tuple[str, str]:
        return "", f"{label:<28}" + "".join(f"{cell:>20}" for cell in cells)

    rows = [("memory", "GB on each device, at the moment when most is held")]
    if plan.n_devices > 1:
        rows.append(row("", [sharing.name for sharing in plan.sharings]))
    for name, label in PARTS.items():
        rows.append(row(label, [f"{getattr(sharing.memory, name) / 1e9:.2f}" for sharing in plan.sharings]))
    rows.append(row("micro-batch that fits", [sharing.fits or "none" for sharing in plan.sharings]))
    return rows


def _data_line(plan: Plan, config: RunConfig) -> str:
    if plan.data_tokens is None or plan.epochs is None:
        return (
            f"{config.data.path} is not here: {_bytes(plan.data_bytes)} as tokens if no token is to come twice, and as "
            f"much again while it is prepared"
        )
    held = f"{_short(plan.data_tokens)} tokens in {config.data.path}, {_bytes(plan.data_bytes)}"
    return f"{held}: {plan.epochs:.2f} epochs"


def _short(number: float) -> str:
    for size, name in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.2f}{name}"
    return f"{number:,.0f}"


def _bytes(number: float) -> str:
    return f"{number / 1e9:,.1f} GB" if number >= 1e9 else f"{number / 1e6:,.0f} MB"


def _seconds(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1e3:,.0f} ms"
    if seconds < 120:
        return f"{seconds:,.1f} s"
    return f"{seconds / 60:,.0f} min" if seconds < 2 * 3600 else f"{seconds / 3600:,.1f} h"


def to_json(plan: Plan) -> str:
    figures: dict[str, Any] = asdict(plan)
    for sharing, found in zip(plan.sharings, figures["sharings"], strict=True):
        found["memory"]["total"] = sharing.memory.total
    return json.dumps(figures, indent=1)


def plain(argv: Sequence[str]) -> list[str]:
    """A command line for ``parse_cli``: its recipe may stand first without --config, and its switches without true."""
    named = argv and not argv[0].startswith("-")
    words = ["--config", *argv] if named else list(argv)
    return [f"{word}=true" if word in ("--json", "--check") else word for word in words]
