"""Whether training can work here, and what to do where it can't: a line for each thing that it needs."""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
import torch.distributed as dist
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from .. import hardware
from ..config import RunConfig
from ..model.versions import NEWEST_TESTED, untested
from ..training import preflight
from ..training.memory import Parameters, largest_that_fits
from .plan import room_here, way_here

# Least Python by setup.cfg, which has to be known where the package is not installed.
LEAST_PYTHON = (3, 11)
# Of packages that are not required: releases that work, and are better not used.
KNOWN_BAD = {"tiktoken": ("<0.13", "takes quadratic time on long words while data is prepared")}
DISK_BYTES, SLOW_DISK, LITTLE_ROOM = 64 * 2**20, 50e6, 10e9
# Of a loss that begins near ln 50257 = 10.8, in some seconds of the trial.
LEAST_FALL = 1.0

Mark = Literal["ok", "note", "do"]


@dataclass(frozen=True)
class Finding:
    """A line. ``note``: training works, and could do better; ``do``: it does not work until this is done."""

    mark: Mark
    what: str
    text: str

    def __str__(self) -> str:
        return f"{self.mark:<6}{self.what:<12}{self.text}"


def examine(run_dir: Path, smoke_s: float = 20.0) -> Iterator[Finding]:
    """All findings, as they come; the last few take seconds each.

    Args:
        run_dir: where runs are to be kept.
        smoke_s: seconds of the trial; 0 leaves it out.
    """
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (
        packages,
        devices,
        precision,
        attention,
        compiler,
        memory,
        threads,
        lambda: disk(run_dir),
        hub,
        processes,
        *([lambda: trial(smoke_s)] if smoke_s else []),
    )
    for check in checks:
        try:
            yield from check()
        except Exception as error:  # whatever a machine's oddity brings up is itself a finding
            name = getattr(check, "__name__", "doctor").strip("<>")
            yield Finding(
                "note", name, f"could not be examined: {type(error).__name__}: {' '.join(str(error).split())}"
            )


def packages() -> Iterator[Finding]:
    """Python, what the package requires, and releases that are known to go wrong."""
    least = ".".join(map(str, LEAST_PYTHON))
    if sys.version_info[:2] < LEAST_PYTHON:
        yield Finding("do", "python", f"{platform.python_version()} is too old: install {least} or newer")
    else:
        yield Finding("ok", "python", platform.python_version())
    wrong = [line for requirement in _required() if (line := _wrong(requirement))]
    for line in wrong:
        yield Finding("do", "packages", line)
    if not wrong:
        yield Finding("ok", "packages", ", ".join(f"{name} {version(name)}" for name in NEWEST_TESTED))
    if newer := untested():
        text = f"newer than what was tested (in brackets): {newer}; first results are compared with slower ways to them"
        yield Finding("note", "packages", text)
    for name, (bad, consequence) in KNOWN_BAD.items():
        if (found := _version(name)) is not None and SpecifierSet(bad).contains(found, prereleases=True):
            yield Finding("note", "packages", f"{name} {found} {consequence}: pip install -U {name}")


def _required() -> list[Requirement]:
    """What an installed gpt2_hf needs always; nothing where it is not installed."""
    try:
        lines = requires("gpt2_hf") or []
    except PackageNotFoundError:
        return []
    found = [Requirement(line) for line in lines]
    return [requirement for requirement in found if requirement.marker is None]


def _wrong(requirement: Requirement) -> str | None:
    found = _version(requirement.name)
    if found is None:
        return f"{requirement.name} is not installed: pip install '{requirement}'"
    if not requirement.specifier.contains(found, prereleases=True):
        return f"{requirement.name} is {found}, and {requirement.specifier} is needed: pip install '{requirement}'"
    return None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def devices() -> Iterator[Finding]:
    """Each card with its memory and driver, or the CPU; a card that PyTorch does not see."""
    driver = _driver()
    if not torch.cuda.is_available():
        if driver is not None:
            build = "is built without CUDA" if torch.version.cuda is None else f"is built for CUDA {torch.version.cuda}"
            text = f"there is a card (driver {driver}), and this torch {torch.__version__} {build} and cannot use it"
            yield Finding("do", "device", f"{text}: install a build for that driver (pytorch.org/get-started)")
        device = hardware.pick_device("auto")
        memory = preflight.memory_of(device) / 2**30
        yield Finding("ok", "device", f"{hardware.describe(device)}, {memory:.1f} GiB")
        return
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        text = f"{properties.name}, {total / 2**30:.1f} GiB, driver {driver or 'unknown'}, CUDA {torch.version.cuda}"
        if free < 0.8 * total:
            text += f"; other programs hold {(total - free) / 2**30:.1f} GiB of it: see nvidia-smi"
        yield Finding("ok" if free >= 0.8 * total else "note", f"device {number}", text)


def _driver() -> str | None:
    """The version of NVIDIA's driver, where there is a card."""
    with suppress(OSError):
        for line in Path("/proc/driver/nvidia/version").read_text().splitlines():
            return next((word for word in line.split() if word[:1].isdigit() and "." in word), None)
    if shutil.which("nvidia-smi"):
        with suppress(OSError, subprocess.SubprocessError):
            command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            found = subprocess.run(command, capture_output=True, text=True, timeout=20)
            return found.stdout.splitlines()[0].strip() if found.returncode == 0 and found.stdout.strip() else None
    return None


def precision() -> Iterator[Finding]:
    device = hardware.pick_device("auto")
    chosen = hardware.default_precision(device)
    if chosen == "bf16":
        yield Finding("ok", "precision", "bf16, which this device computes in")
    else:
        lacks = "no bf16 in this device: " if device.type != "mps" else ""
        recipe = "; recipes/demo_fp32.yaml is the demo for it" if device.type == "cpu" else ""
        yield Finding("note", "precision", f"{lacks}training takes {chosen}, which is slower{recipe}")


def attention() -> Iterator[Finding]:
    """What training chooses, and why each of the others is not to be had."""
    device = hardware.pick_device("auto")
    chosen = hardware.default_precision(device)
    is_compiled = hardware.compile_obstacle(device) is None
    name, why = hardware.choose_attention("auto", device, chosen, 0.0, compiled=is_compiled)
    usable = [other for other in ("sdpa", "eager") if other != name]
    without = []
    if is_compiled:
        usable.append("flex_attention")
    else:
        without.append("flex_attention needs torch.compile")
    for other in hardware.FLASH_ATTENTION:
        if obstacle := hardware.flash_obstacle(other, device, chosen, 0.0):
            without.append(f"{other} {obstacle}")
        else:
            usable.append(other)
    yield Finding("ok", "attention", f"{name} ({why}); also {', '.join(usable)}")
    if device.type == "cuda":
        yield Finding("ok", "", "; ".join(without) + ": only --data.document_mask would gain")
    else:
        yield Finding("ok", "", f"FlashAttention needs CUDA, this is {device.type}")


def compiler() -> Iterator[Finding]:
    if (obstacle := hardware.compile_obstacle(hardware.pick_device("auto"))) is None:
        yield Finding("ok", "compiler", "torch.compile has what it needs")
    else:
        yield Finding(
            "note", "compiler", f"{obstacle}: training works without torch.compile, at half to three quarters"
        )


def memory() -> Iterator[Finding]:
    """How much of the smallest GPT-2 goes through one device at once, predicted."""
    device, config = hardware.pick_device("auto"), RunConfig()
    if device.type not in ("cuda", "cpu"):
        return
    n = Parameters.of(config)
    fits = largest_that_fits(config, way_here(config, device), n, room_here(device), 1)
    if fits:
        text = f"micro-batches of up to {fits} windows x {config.data.seq_len} of GPT-2 124M should fit"
        yield Finding("ok", "memory", f"{text}; --train.micro_batch_size auto tries which is fastest")
    else:
        text = f"not even one window of {config.data.seq_len} tokens of GPT-2 124M should fit"
        yield Finding("note", "memory", f"{text}: try a smaller model, or --train.gradient_checkpointing true")


def threads() -> Iterator[Finding]:
    usable, at_work = hardware.usable_cpus(), torch.get_num_threads()
    asked = os.environ.get("OMP_NUM_THREADS")
    text = f"{at_work} for operators, of {usable} CPUs that this process may use ({os.cpu_count()} in the machine)"
    on_cpu = hardware.pick_device("auto").type == "cpu"
    if asked is not None and at_work < usable and on_cpu:
        yield Finding("note", "threads", f"{text}: OMP_NUM_THREADS is {asked}, unset it to use all")
    else:
        yield Finding("ok", "threads", text)
    load = psutil.getloadavg()[0]
    if on_cpu and load > 0.5 * usable:
        yield Finding(
            "note", "threads", f"other programs are at work (load average {load:.1f}), and will slow training"
        )


def disk(run_dir: Path) -> Iterator[Finding]:
    """Room for checkpoints where runs are kept, and how fast they are written."""
    place = next(folder for folder in (run_dir.absolute(), *run_dir.absolute().parents) if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            block = os.urandom(2**20)
            begin = time.perf_counter()
            for _ in range(DISK_BYTES // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            speed = DISK_BYTES / (time.perf_counter() - begin)
    except OSError as error:
        yield Finding("do", "disk", f"nothing can be written in {place} ({error.strerror}): choose another --run_dir")
        return
    free = shutil.disk_usage(place).free
    text = f"{free / 1e9:,.0f} GB free in {place}, written at {speed / 1e6:,.0f} MB/s"
    if free < LITTLE_ROOM:
        text += ": GPT-2 124M keeps 9.5 GB of checkpoints, its data 20 GB; scripts/plan.py names yours"
    elif speed < SLOW_DISK:
        text += ": slow, so save seldom (--checkpoint.save_every)"
    yield Finding("note" if free < LITTLE_ROOM or speed < SLOW_DISK else "ok", "disk", text)


def hub() -> Iterator[Finding]:
    """The network is for data sets, models of others and publishing: training does without."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        yield Finding("ok", "hub", "HF_HUB_OFFLINE is set: nothing is looked for on the network")
        return
    from huggingface_hub import constants, get_token

    host = constants.ENDPOINT.partition("://")[2].partition("/")[0]
    name, _, port = host.partition(":")
    try:
        socket.create_connection((name, int(port or 443)), timeout=3).close()
    except (OSError, ValueError):
        yield Finding("ok", "hub", f"{host} cannot be reached: training from files of this machine works all the same")
        return
    token = "a token is there" if get_token() else "no token: hf auth login, before you publish"
    yield Finding("ok", "hub", f"{host} answers; {token}")


# Two of them find each other on this machine and add up their numbers.
PEER = """
import sys, datetime, torch, torch.distributed as dist
rank, port, backend = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
store = dist.TCPStore("127.0.0.1", port, 2, rank == 0, timeout=datetime.timedelta(seconds=60))
device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
dist.init_process_group(backend, store=store, rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60))
number = torch.full((1000,), rank + 1.0, device=device)
dist.all_reduce(number)
assert number.tolist() == [3.0] * 1000, "the sum is wrong"
dist.destroy_process_group()
"""


def processes() -> Iterator[Finding]:
    """Whether two processes of this machine can exchange gradients, by the backends that training would use."""
    backends = ["gloo"] if dist.is_gloo_available() else []
    n_cards = torch.cuda.device_count()
    if n_cards > 1 and dist.is_nccl_available():
        backends.append("nccl")
    for backend in backends:
        if (problem := _exchange(backend)) is None:
            yield Finding("ok", "processes", f"{backend}: two processes on this machine added up a tensor")
        else:
            text = f"{backend}: two processes could not exchange a tensor ({problem}): training in one still works"
            yield Finding("note", "processes", f"{text}; look for a firewall on the loopback, or NCCL_DEBUG=INFO")
    if n_cards > 1 and "nccl" not in backends:
        yield Finding("do", "processes", f"{n_cards} cards, and this torch has no NCCL: install a build for CUDA")


def _exchange(backend: str) -> str | None:
    """What keeps two processes from each other, or None."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    commands = [[sys.executable, "-c", PEER, str(rank), str(port), backend] for rank in (0, 1)]
    peers = [subprocess.Popen(c, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for c in commands]
    problem = None
    try:
        for peer in peers:
            _, errors = peer.communicate(timeout=90)
            if peer.returncode and problem is None:
                problem = (errors.strip().splitlines() or [f"ended with {peer.returncode}"])[-1][:160]
    except subprocess.TimeoutExpired:
        problem = "no answer in 90 seconds"
    finally:
        for peer in peers:
            peer.kill()
            peer.wait()
    return problem


def trial(seconds: float) -> Iterator[Finding]:
    """Train a small model for some seconds, in a process of its own: what crashes there is a finding."""
    command = [sys.executable, "-m", "gpt2_hf.planning.smoke", str(seconds)]
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, timeout=seconds + 300
        )
    except subprocess.TimeoutExpired:
        yield Finding(
            "do", "training", f"a small model was not trained in {seconds + 300:.0f} s: try --train.compile off"
        )
        return
    if result.returncode:
        yield Finding("do", "training", _why_it_ended(result))
        return
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    text = (
        f"loss {found['first_loss']:.2f} -> {found['last_loss']:.2f} in {seconds:.0f} s on the packaged plays, "
        f"{found['tokens_per_sec']:,.0f} tokens/s (2 layers, 64 wide), first step after {found['first_s']:.0f} s"
    )
    fell = found["first_loss"] - found["last_loss"] >= LEAST_FALL
    advice = "" if fell else ": it should fall by 1 at least; try --train.precision fp32, --train.compile off"
    yield Finding("ok" if fell else "do", "training", text + advice)


def _why_it_ended(result: subprocess.CompletedProcess[str]) -> str:
    if result.returncode < 0:
        try:
            name = signal.Signals(-result.returncode).name
        except ValueError:
            name = f"signal {-result.returncode}"
        return f"a small model's training was ended by {name}: try --train.compile off, another --train.precision"
    last = (result.stderr.strip().splitlines() or [f"status {result.returncode}"])[-1]
    return f"a small model's training failed: {last[:200]}"


def report(findings: Iterator[Finding], say: Callable[[str], None] = print) -> bool:
    """Say each finding as it comes, and at the end what they amount to; whether training can work."""
    marks = []
    for finding in findings:
        say(str(finding))
        marks.append(finding.mark)
    n_to_do, n_notes = marks.count("do"), marks.count("note")
    if n_to_do:
        say(f"\n{n_to_do} thing{'s' * (n_to_do > 1)} to do before training can work")
    else:
        say("\ntraining can work here" + (f"; {n_notes} note{'s' * (n_notes > 1)}" if n_notes else ""))
    return not n_to_do
