"""A CUDA device that is not there: PyTorch, its compiler and Accelerate find one card, and nothing is ever run on it.

``load`` comes before the first import of PyTorch, ``install`` after it. From then on a process is good for nothing
else: tensors "on cuda" work under FakeTensorMode only, and torch.cuda answers from a table.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ..program import UserError

SOURCE = Path(__file__).parent.parent / "assets" / "budget" / "stand_in.cpp"


def load() -> ctypes.CDLL:
    """The library that answers for CUDA in C++, compiled where it is not yet. PyTorch asks when it is imported.

    Raises:
        UserError: without a C++ compiler, or where this version of PyTorch wants other answers.
    """
    assert "torch" not in sys.modules, "PyTorch has been imported, and has found no CUDA"
    found = importlib.util.find_spec("torch")
    assert found is not None and found.submodule_search_locations
    torch_folder = Path(found.submodule_search_locations[0])
    version = importlib.metadata.version("torch")
    key = hashlib.sha256(SOURCE.read_bytes() + f"{torch_folder} {version}".encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpt2_hf"
    library = cache / f"stand_in-{key}.so"
    if not library.exists():
        _compile(library, torch_folder, version)
    return ctypes.CDLL(str(library))


def _compile(library: Path, torch_folder: Path, version: str) -> None:
    compiler = next(filter(shutil.which, (os.environ.get("CXX", ""), "c++", "g++", "clang++")), None)
    if compiler is None:
        raise UserError("the budget of a GPU needs a C++ compiler, and there is none: install g++, or set CXX")
    library.parent.mkdir(parents=True, exist_ok=True)
    includes = (torch_folder / "include", torch_folder / "include" / "torch" / "csrc" / "api" / "include")
    libraries = torch_folder / "lib"
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder) / library.name
        command = [compiler, "-std=c++20", "-shared", "-fPIC", str(SOURCE), "-o", str(made)]
        command += [word for path in includes for word in ("-isystem", str(path))]
        command += [f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-lc10", "-ltorch_cpu"]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            reason = next((line for line in result.stderr.splitlines() if "error" in line), result.stderr[-200:])
            raise UserError(f"{compiler} cannot compile {SOURCE.name} for torch {version}: {reason}")
        os.replace(made, library)


def install(library: ctypes.CDLL, properties: Any, attention: str) -> None:
    """Let torch.cuda answer as for one card, for the rest of this process.

    Args:
        properties: what get_device_properties returns.
        attention: the kernel of scaled_dot_product_attention: cudnn or flash.
    """
    import torch

    assert "torch._dynamo.device_interface" not in sys.modules, "the compiler has torch.cuda's own functions already"
    library.stand_in(ctypes.c_int64({"flash": 1, "cudnn": 3}[attention]))
    answers: dict[str, Any] = {
        "is_available": True,
        "is_initialized": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_properties": properties,
        "get_device_capability": (properties.major, properties.minor),
        "get_device_name": properties.name,
        "is_bf16_supported": properties.major >= 8,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
        **dict.fromkeys(("_lazy_init", "synchronize", "set_device", "set_rng_state", "manual_seed", "manual_seed_all")),
    }
    put(torch.cuda, **{name: _answering(answer) for name, answer in answers.items()})

    class Generator(torch.Generator):  # whose state a compiled function may take along
        device = torch.device("cuda", 0)

        def clone_state(self) -> Generator:
            return self

        graphsafe_get_state = clone_state

        def graphsafe_set_state(self, new_state: torch.Generator) -> Generator:
            return self

    put(torch.cuda, default_generators=(Generator(),))
    put(torch.version, cuda="13.0")
    asked = ("getDevice", "setDevice", "exchangeDevice", "maybeExchangeDevice", "getCurrentRawStream")
    put(torch._C, **{f"_cuda_{name}": _answering(0) for name in asked})

    try:
        import triton
    except ImportError:
        raise UserError("the budget of a GPU needs Triton, which writes its kernels: use make gpu-budget") from None
    from torch._subclasses import fake_tensor
    from triton.backends.compiler import GPUTarget

    put(fake_tensor, init_gpu_context=_answering(None))
    target = GPUTarget("cuda", 10 * properties.major + properties.minor, properties.warp_size)
    driver = {"get_current_target": target, "get_active_torch_device": torch.device("cuda", 0), "is_active": True}
    triton.runtime.driver.set_active(SimpleNamespace(**{name: _answering(answer) for name, answer in driver.items()}))


def put(owner: Any, **values: Any) -> None:
    """Replace what a module or class has, for the rest of this process."""
    for name, value in values.items():
        setattr(owner, name, value)


def _answering(value: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: value
