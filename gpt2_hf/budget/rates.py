"""The cards that budgets are made for: what the compiler asks of them, and how fast they are taken to be."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

from ..planning.cards import CARDS, Card

KIB, MIB = 2**10, 2**20


@dataclass(frozen=True)
class Build:
    """What the compiler asks of a card, by the vendor's documentation.

    Args:
        capability: compute capability.
        shared: bytes of shared memory that a block of threads may have at most; a multiprocessor has a KiB more.
        threads: of a multiprocessor.
        attention: the kernel that scaled_dot_product_attention takes for GPT-2's heads.
    """

    capability: tuple[int, int]
    multiprocessors: int
    shared: int
    cache: int
    threads: int
    attention: str


BUILDS = {
    "H100": Build((9, 0), 132, 227 * KIB, 50 * MIB, 2048, "cudnn"),
    "H200": Build((9, 0), 132, 227 * KIB, 50 * MIB, 2048, "cudnn"),
    "A100": Build((8, 0), 108, 163 * KIB, 40 * MIB, 2048, "flash"),
    "B200": Build((10, 0), 148, 227 * KIB, 126 * MIB, 2048, "cudnn"),
    "RTX-4090": Build((8, 9), 128, 99 * KIB, 72 * MIB, 1536, "flash"),
}


@dataclass(frozen=True)
class Rates:
    """What turns bytes and FLOPs into time. None of it is measured where a budget is made.

    Args:
        products: FLOP/s of matrix products in bf16, in the shapes of a training step.
        attention: FLOP/s of fused attention, forward and backward, of the causal half.
        wide: bytes/s of kernels that read and write 16 bytes at once.
        narrow: bytes/s of those that must go by 2 bytes.
        gap: seconds between one kernel and the next.
    """

    products: float
    attention: float
    wide: float
    narrow: float
    gap: float
    source: str


RATES = {
    "H100": Rates(600e12, 265e12, 2.6e12, 2.2e12, 1.1e-6, "estimated from published kernels"),
    # A step of 124M there, in ms: products of the blocks 46.3, attention 17.1, what is fused between them 22.9, head
    # and loss 37.2, of which these rates leave 13 to the two kernels that go by 2 bytes.
    "H200": Rates(720e12, 253e12, 3.9e12, 1.5e12, 1.1e-6, "fitted to the profile of 124M in docs/results.md"),
}


def card_of(name: str) -> Card:
    """The card of the table of plans."""
    return next(card for card in CARDS if card.name == name.replace("-", " "))


def rates_of(name: str) -> Rates:
    """Those of the card, or the H100's in the proportion of the data sheets."""
    if name in RATES:
        return RATES[name]
    base, card, h100 = RATES["H100"], card_of(name), card_of("H100")
    computing, moving = card.peak / h100.peak, card.bandwidth / h100.bandwidth
    return Rates(
        base.products * computing,
        base.attention * computing,
        base.wide * moving,
        base.narrow * moving,
        base.gap,
        "the H100's, in proportion to the data sheets",
    )


def properties_of(name: str) -> SimpleNamespace:
    """What torch.cuda.get_device_properties says of the card."""
    build = BUILDS[name]
    return SimpleNamespace(
        name=f"NVIDIA {name.replace('-', ' ')}",
        major=build.capability[0],
        minor=build.capability[1],
        total_memory=int(card_of(name).memory),
        multi_processor_count=build.multiprocessors,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=build.threads,
        max_threads_per_block=1024,
        warp_size=32,
        shared_memory_per_block=48 * KIB,
        shared_memory_per_block_optin=build.shared,
        shared_memory_per_multiprocessor=build.shared + KIB,
        L2_cache_size=build.cache,
        is_integrated=0,
        is_multi_gpu_board=0,
        gcnArchName="",
    )
