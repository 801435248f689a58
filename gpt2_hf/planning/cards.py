"""What cards can do: memory, bandwidth, links, and the share of their peak that training GPT-2 reaches on them."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

import torch

from .. import hardware
from ..knobs import ConfigError, shown

GIB = 2**30
# Parameters of OpenAI's four sizes.
M124, M355, M774, M1558 = 124_439_808, 354_823_168, 774_030_080, 1_557_611_200
# Of a GPU in another machine: 400 Gbit/s for each, as in the usual machines of eight.
NETWORK = 50e9

ASSUMED = "assumed"


@dataclass(frozen=True)
class Card:
    """A kind of GPU.

    Args:
        memory: bytes that its driver reports.
        bandwidth: bytes a second from its memory.
        link: bytes a second to another card of the machine, in each direction.
        mfu: parameters of a model -> model FLOPs utilisation in training, by 6 N + 12 L C T.
        source: where ``mfu`` comes from.
        measured_peak: of a card whose data sheet is not known here.
    """

    name: str
    memory: float
    bandwidth: float
    link: float
    mfu: dict[int, float]
    source: str
    measured_peak: float | None = None

    @property
    def peak(self) -> float:
        """FLOP/s of dense bf16 products by the data sheet; of a card without one, measured."""
        found = self.measured_peak or hardware.data_sheet_peak(self.name)
        assert found is not None
        return found

    def mfu_of(self, n_parameters: int) -> float:
        """Between two sizes by the logarithm of the size; beyond the table's ends as at its ends."""
        sizes = sorted(self.mfu)
        below = max((size for size in sizes if size <= n_parameters), default=sizes[0])
        above = min((size for size in sizes if size >= n_parameters), default=sizes[-1])
        if below >= above:
            return self.mfu[above if n_parameters < sizes[0] else below]
        share = math.log(n_parameters / below) / math.log(above / below)
        return self.mfu[below] + share * (self.mfu[above] - self.mfu[below])


# Ours on the H100 and H200: 124M, micro-batches of 64, docs/results.md. Published: llm.c's rates on A100s and H100s,
# and those of plain PyTorch training a model of 12 layers x 768 (modded-nanogpt, track 3). On the H100, where there
# are all three, ours is 0.98 times llm.c's and 1.02 times the other, so they stand here as they were published.
_LARGER = "measured with this code for 124M, published for llm.c on larger models"
CARDS = (
    Card("B300", 268 * GIB, 8.0e12, 900e9, {M124: 0.24}, ASSUMED),
    Card("B200", 178 * GIB, 8.0e12, 900e9, {M124: 0.237}, "published for plain PyTorch, 12 layers x 768"),
    Card("H200", 139 * GIB, 4.8e12, 450e9, {M124: 0.436, M1558: 0.487}, f"{_LARGER} of the H100"),
    Card("H100", 79 * GIB, 3.35e12, 450e9, {M124: 0.397, M1558: 0.487}, _LARGER),
    Card("H100 PCIe", 79 * GIB, 2.0e12, 64e9, {M124: 0.40}, ASSUMED),
    Card("H100 NVL", 93 * GIB, 3.9e12, 300e9, {M124: 0.40}, ASSUMED),
    Card(
        "A100",
        79 * GIB,
        2.0e12,
        300e9,
        {M124: 0.60, M355: 0.62, M774: 0.635},
        "published for llm.c",
    ),
    Card("A100 40GB", 39 * GIB, 1.55e12, 300e9, {M124: 0.60, M355: 0.62, M774: 0.635}, "published for llm.c, 80 GB"),
    Card("MI355X", 287 * GIB, 8.0e12, 537e9, {M124: 0.22}, ASSUMED),
    Card("MI325X", 255 * GIB, 6.0e12, 448e9, {M124: 0.25}, ASSUMED),
    Card("MI300X", 191 * GIB, 5.3e12, 448e9, {M124: 0.25}, ASSUMED),
    Card("L40S", 44 * GIB, 0.86e12, 32e9, {M124: 0.18}, "published for plain PyTorch, 12 layers x 768"),
    Card("L40", 44 * GIB, 0.86e12, 32e9, {M124: 0.30}, ASSUMED),
    Card("L4", 22 * GIB, 0.30e12, 16e9, {M124: 0.30}, ASSUMED),
    Card("A10G", 22 * GIB, 0.60e12, 32e9, {M124: 0.40}, ASSUMED),
    Card("RTX PRO 6000", 95 * GIB, 1.79e12, 64e9, {M124: 0.33}, ASSUMED),
    Card("RTX PRO 6000 Blackwell Max-Q", 95 * GIB, 1.79e12, 64e9, {M124: 0.35}, ASSUMED),
    Card("RTX 5090", 31 * GIB, 1.79e12, 32e9, {M124: 0.50}, ASSUMED),
    Card("RTX 4090", 23.5 * GIB, 1.01e12, 16e9, {M124: 0.57}, "published for a PyTorch port of llm.c"),
    Card("RTX 3090", 23.5 * GIB, 0.94e12, 16e9, {M124: 0.50}, ASSUMED),
    Card("GB10", 119 * GIB, 0.27e12, 25e9, {M124: 0.25}, ASSUMED),  # memory that is the processor's too
    Card("T4", 14.5 * GIB, 0.32e12, 16e9, {M124: 0.25}, f"{ASSUMED}, in fp16"),
)


def parse_gpus(text: str) -> tuple[int, Card]:
    """ "8xH100" as a number and a card; "4090" and "h100" are enough of a name.

    Raises:
        ConfigError: for a card that is not in the table, naming those that are.
    """
    found = re.fullmatch(r"\s*(?:(\d{1,6})\s*[x*]\s*)?(\S.*?)\s*", text, re.IGNORECASE)
    wanted = _letters(found[2]) if found else ""
    card = next((card for card in CARDS if wanted and wanted in (_letters(card.name), _digits(card.name))), None)
    if card is None:
        known = ", ".join(card.name.replace(" ", "-") for card in CARDS)
        raise ConfigError(f"--gpus {shown(text)} names no card that is known here: write 8xH100; known are {known}")
    number = int(found[1] or 1) if found else 0
    if number < 1:
        raise ConfigError(f"--gpus {shown(text)}: give a number of cards from 1, such as 8x{card.name}")
    return number, card


def card_here(device: torch.device) -> Card:
    """The card of this machine, from the table or, where it is not there, by its own measurements."""
    name, memory = torch.cuda.get_device_name(device), float(torch.cuda.get_device_properties(device).total_memory)
    key = hardware.data_sheet_name(name)
    known = next((card for card in CARDS if card.name == key), None)
    if known is not None:
        return replace(known, memory=memory)
    if key is not None:
        return Card(name, memory, math.nan, 16e9, {M124: 0.40}, ASSUMED)
    peak = hardware.measure_gemm(device, torch.bfloat16)
    return Card(name, memory, math.nan, 16e9, {M124: 0.40}, f"{ASSUMED}; its peak is that of a product here", peak)


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower()).removeprefix("nvidia")


def _digits(name: str) -> str:
    """RTX 4090 is the 4090."""
    return _letters(name).removeprefix("rtx")
