"""What this machine has: precision, peak FLOP/s, attention backends, compiler, allocator."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import math
import os
import platform
import re
import shutil
import sysconfig
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend

# Dense bf16 matrix products' peaks in FLOP/s, from the vendors' data sheets; an eighth of sparse FP4 where a sheet has
# only that (RTX PRO 6000, GB10). First match by name wins.
_PEAK_BF16 = (
    ("GB300", 2500e12),
    ("GB200", 2500e12),
    ("B300", 2250e12),
    ("B200", 2250e12),
    ("GH200", 989e12),
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("MI355X", 2517e12),
    ("MI325X", 1307e12),
    ("MI300X", 1307e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
    ("A10G", 70e12),
    ("RTX PRO 6000 Blackwell Max-Q", 439e12),
    ("RTX PRO 6000", 504e12),
    ("RTX 5090", 210e12),
    ("RTX 4090", 165e12),
    ("RTX 3090", 71e12),
    ("GB10", 125e12),
    ("T4", 65e12),
)

# What ONEDNN_MAX_CPU_ISA may name whose bf16 products are emulated.
_ISA_WITHOUT_BF16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")

# Newest first -> major compute capabilities that it has kernels for, whether it can drop out, and how to install it.
FLASH_ATTENTION = {
    "flash_attention_4": ((9, 10), False, "pip install flash-attn-4"),
    "flash_attention_3": (
        (9,),
        False,
        "pip install --no-build-isolation 'git+https://github.com/Dao-AILab/flash-attention#subdirectory=hopper'",
    ),
    "flash_attention_2": ((8, 9, 10, 12), True, "pip install 'gpt2_hf[flash]'"),
}


def pick_device(name: str) -> torch.device:
    """The device of that name, or for "auto" an accelerator if there is one. Raises ValueError where it is not here."""
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise ValueError(f"device {name!r} cannot be used ({str(error).splitlines()[0]}): try cpu") from None
    if device.type == "meta":
        raise ValueError("device 'meta' has no memory and computes nothing: try cpu")
    return device


def default_precision(device: torch.device) -> str:
    """The fastest precision that trains well here: bf16 where the device computes in it, else fp16 or fp32."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device.type == "cpu":
        return "bf16" if _cpu_has_bf16() else "fp32"
    return "fp32"


def has_narrow_residual(requested: str, device: str, precision: str) -> bool:
    """Whether the residual stream is bf16, as the matrix products are, and not fp32."""
    return precision == "bf16" and (requested == "bf16" or (requested == "auto" and device == "cuda"))


@functools.cache
def _cpu_has_bf16() -> bool:
    # Without these instructions bf16 products are emulated, and many times slower than fp32.
    if os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() in _ISA_WITHOUT_BF16:  # the library's own limit
        return False
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """FLOP/s to measure utilisation against, and where the figure comes from.

    Known GPUs have their data sheet's dense bf16 peak (fp32 without TF32 is not told apart: MFU is against bf16).
    Anything else is measured with a matrix product, so there MFU is a share of what the machine really does; in fp32
    where bf16 is emulated, as that would be no limit of the machine.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        if (peak := data_sheet_peak(name)) is not None:
            return peak, f"{name}, data sheet bf16"
    if dtype == torch.bfloat16 and default_precision(device) != "bf16":
        dtype = torch.float32
    return measure_gemm(device, dtype), f"measured {str(dtype).removeprefix('torch.')} matrix product"


def data_sheet_name(device_name: str) -> str | None:
    """The name in the table of peaks of a GPU that its driver calls so, or None when it isn't there."""
    # An A1000 is no A100, and a GB300 no B300.
    return next((key for key, _ in _PEAK_BF16 if re.search(rf"\b{key}\b", device_name)), None)


def data_sheet_peak(device_name: str) -> float | None:
    """FLOP/s of dense bf16 products of a GPU by its data sheet, or None for one that is not in the table."""
    return dict(_PEAK_BF16).get(data_sheet_name(device_name) or "")


def measure_gemm(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """FLOP/s of a square matrix product, the best of as many as fit in the time."""
    size = 2048 if device.type == "cpu" else 8192  # far beyond where launching the kernel counts
    a = torch.randn(size, size, device=device).to(dtype)
    product = torch.empty_like(a)
    return 2 * size**3 / fastest(partial(torch.mm, a, a, out=product), device, seconds)


def fastest(run: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Seconds of the fastest run, the device waited for, of those that fit in the time: at least one, after a first.

    On a CPU seconds of processor time, shared out to the threads: what other programs take at the moment is not this
    machine's limit.
    """
    if device.type == "cpu":
        n_threads = torch.get_num_threads()

        def clock() -> float:
            return time.process_time() / n_threads
    else:

        def clock() -> float:
            torch.accelerator.synchronize(device)
            return time.perf_counter()

    run()
    best, end = math.inf, time.perf_counter() + seconds
    while best == math.inf or time.perf_counter() < end:
        start = clock()
        run()
        best = min(best, clock() - start)
    return best


def choose_attention(
    requested: str,
    device: torch.device,
    precision: str,
    dropout: float,
    document_mask: bool = False,
    compiled: bool = False,
) -> tuple[str, str]:
    """The attention backend to use, and why: ``(name, reason)``, by what is known of cards in general.

    "auto" takes PyTorch's own fused attention, but for compiled bf16 on a CPU our "blockwise". For whole windows an
    installed FlashAttention adds nothing to PyTorch's: its kernel is FlashAttention 2 itself, or cuDNN's on Hopper and
    Blackwell, which with heads of 64 is published to be as fast as FlashAttention 3 (Shah et al. 2024). A document mask
    would slow it down; then "auto" takes what skips the hidden blocks: the newest FlashAttention that is installed and
    has kernels for the card, else FlexAttention. (Where training compiles, training/attention.py tries them before.)

    Raises:
        ValueError: one line, when a FlashAttention is asked for by name that cannot work, or is not installed.
    """
    if requested in FLASH_ATTENTION:
        if obstacle := flash_obstacle(requested, device, precision, dropout, by_name=True):
            raise ValueError(f"{requested} {obstacle}; or leave it at auto")
        return requested, "asked for"
    if requested != "auto":
        return requested, "asked for"
    if device.type == "cpu" and precision == "bf16" and compiled and not dropout and not document_mask:
        return "blockwise", "compiled matrix products, faster than PyTorch's fused attention on a CPU in bf16"
    if device.type != "cuda" or precision not in ("bf16", "fp16"):
        return "sdpa", f"PyTorch's fused attention, on {device.type} in {precision}"
    if document_mask:
        major = torch.cuda.get_device_capability(device)[0]
        for name, (majors, _, _) in FLASH_ATTENTION.items():
            if major in majors and flash_obstacle(name, device, precision, dropout) is None:
                return name, "the newest FlashAttention installed that fits"
        if not dropout and compile_obstacle(device) is None:
            return "flex_attention", "skips what the document mask hides, as an installed FlashAttention would"
    return "sdpa", f"PyTorch's fused attention, {_sdpa_kernel(device, precision, dropout, document_mask)} kernel"


def flash_obstacle(
    name: str, device: torch.device, precision: str, dropout: float, by_name: bool = False
) -> str | None:
    """Why a FlashAttention cannot be used, or None when it can; ``by_name`` lets transformers fetch its kernels."""
    import transformers.utils as hf

    _, has_dropout, install = FLASH_ATTENTION[name]
    if device.type != "cuda":
        return f"needs CUDA, this is {device.type}"
    if precision not in ("bf16", "fp16"):
        return f"computes in bf16 and fp16, not in {precision}"
    if dropout and not has_dropout:  # it would leave dropout out without a word
        return f"has no dropout, and model.dropout is {dropout}"
    available = getattr(hf, f"is_flash_attn_{name[-1]}_available", None)
    if (available is not None and available()) or (by_name and hf.is_kernels_available()):
        return None
    return f"is not installed: {install}"


def _sdpa_kernel(device: torch.device, precision: str, dropout: float, masked: bool) -> str:
    """Which of its kernels PyTorch takes for GPT-2's heads: cudnn, flash, efficient or math."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    heads = torch.empty(1, 1, 128, 64, dtype=dtype, device=device, requires_grad=True)
    mask = torch.empty(1, 1, 128, 128, dtype=dtype, device=device) if masked else None
    choice = torch._fused_sdp_choice(heads, heads, heads, mask, dropout, not masked)
    return SDPBackend(choice).name.lower().removesuffix("_attention")


def compile_obstacle(device: torch.device) -> str | None:
    """Why torch.compile cannot work here, or None when it can."""
    if device.type == "mps":
        return "torch.compile is not mature on MPS"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "no Python headers found (Debian and Ubuntu: the package python3-dev)"
    if device.type == "cpu":
        from torch._inductor import config, exc
        from torch._inductor.cpp_builder import get_cpp_compiler

        try:
            get_cpp_compiler()
        except exc.InvalidCxxCompiler:
            return f"no C++ compiler found (looked for {', '.join(str(c) for c in config.cpp.cxx if c)})"
        return None
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if shutil.which("gcc") is None and shutil.which("cc") is None and shutil.which("clang") is None:
        return "no C compiler found, which Triton needs"
    return None


def keep_kernels_apart() -> None:
    """Have compiled kernels kept by the vector width of the CPU that they are made for, too.

    PyTorch keeps generated code by what it computes alone, and compiles it for the CPU at hand. In a cache that CPUs
    with and without AVX-512 have used, or one CPU with and without ATEN_CPU_CAPABILITY, code made for narrower vectors
    would write past the ends of its buffers. Settings are part of what tells entries apart: so the width is made one.
    """
    from torch._inductor import config, cpu_vec_isa

    if config.cpp.simdlen is None:
        config.cpp.simdlen = cpu_vec_isa.pick_vec_isa().bit_width()


def share_the_seeded_generator() -> None:
    """Let compiled blocks that are checkpointed draw their dropout from the device's generator, on CUDA.

    By default such a graph has generators of its own, so that the recomputed forward can draw the same again. They are
    seeded once a process and never after, so a resumed run would drop out other units than one that ran through.
    Without them the state of the device's generator is saved and set back around the recomputation.
    """
    torch._functorch.config.graphsafe_rng_functionalization = False


def usable_cpus(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """CPUs that this process may keep busy, at least one: by its affinity, and by its control group's share of time."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # version 2: "max 100000" or microseconds allowed of a period
        quota, period = (cgroup / "cpu.max").read_text().split()
        return max(1, min(count, int(quota) // int(period)))
    with contextlib.suppress(OSError, ValueError):
        quota, period = ((cgroup / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        if int(quota) > 0:
            return max(1, min(count, int(quota) // int(period)))
    return count


def fit_threads() -> None:
    """No more threads for operators than CPUs that this process may use: the others would hold up every operator.

    PyTorch and launchers count the machine's cores, whatever a container or a batch system has left of them.
    """
    if usable_cpus() < torch.get_num_threads():
        torch.set_num_threads(usable_cpus())


def reuse_freed_memory() -> None:
    """Make glibc reuse freed memory instead of returning it to the system after every step, for training on a CPU.

    Tensors of some megabytes are otherwise mapped and unmapped, page by page, each time: without it CPU training is
    about a quarter slower. No effect on other C libraries.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
    libc.mallopt(m_mmap_max, 0)
    libc.mallopt(m_trim_threshold, 2**31 - 1)


def describe(device: torch.device) -> str:
    """The device in words, for logs and records."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{name}, {torch.get_num_threads()} threads" if device.type == "cpu" else f"{name} ({device.type})"


def demo_files() -> tuple[str, str]:
    """For the Makefile: which of accelerate_configs/ and which of the demo's recipes fit this machine."""
    device = pick_device("auto")
    if device.type != "cpu":
        return "single_gpu", "demo"
    return "cpu", "demo" if default_precision(device) == "bf16" else "demo_fp32"


if __name__ == "__main__":
    print(*demo_files())
