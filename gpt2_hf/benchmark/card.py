"""What a card is, beyond its name: its form, driver and clocks, without which a figure of it says little."""

from __future__ import annotations

import re
import subprocess
from typing import Any

import torch

from .. import hardware
from ..training.build import DTYPES

# What nvidia-smi calls them.
FIELDS = {
    "name": "name",
    "driver": "driver_version",
    "memory_mib": "memory.total",
    "sm_mhz": "clocks.sm",
    "most_sm_mhz": "clocks.max.sm",
    "memory_mhz": "clocks.mem",
    "power_limit_w": "power.limit",
}
BUSY_S, SIZE = 1.5, 8192


def card_at_work(device: torch.device) -> dict[str, Any]:
    """What nvidia-smi says of the card while matrix products keep it busy; {} where it says nothing."""
    if device.type != "cuda":
        return {}
    dtype = DTYPES[hardware.default_precision(device)]
    n_products = BUSY_S * hardware.measure_gemm(device, dtype, 0.1) / (2 * SIZE**3)
    a = torch.randn(SIZE, SIZE, device=device).to(dtype)
    product = torch.empty_like(a)
    for _ in range(int(n_products)):  # which are queued at once
        torch.mm(a, a, out=product)
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    which = ["-i", f"GPU-{uuid}"] if uuid else []
    command = ["nvidia-smi", f"--query-gpu={','.join(FIELDS.values())}", "--format=csv,noheader,nounits", *which]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    finally:
        torch.cuda.synchronize(device)
    return read_card(answer)


def read_card(answer: str) -> dict[str, Any]:
    """The first line of nvidia-smi's answer, by the names of FIELDS; figures as numbers, None where it has none."""
    cells = [cell.strip() for cell in answer.partition("\n")[0].split(",")]
    if len(cells) != len(FIELDS):
        return {}
    found: dict[str, Any] = dict(zip(FIELDS, cells, strict=True))
    for key in found.keys() - {"name", "driver"}:
        found[key] = float(found[key]) if re.fullmatch(r"\d+(\.\d+)?", found[key]) else None
    return found | {"form": form_of(found["name"])}


def form_of(name: str) -> str | None:
    """SXM, PCIe or NVL, as far as a driver's name tells."""
    told = re.search(r"SXM|PCIe|NVL", name, re.IGNORECASE)
    if told:
        return {"sxm": "SXM", "pcie": "PCIe", "nvl": "NVL"}[told[0].lower()]
    return "SXM" if re.search(r"\b(H100.*HBM3|H200|B200)\b", name) else None  # of these only the others are told
