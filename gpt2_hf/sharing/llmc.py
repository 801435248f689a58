"""llm.c's .bin: a header of 256 int32, then one block of numbers; rows of tokens are padded to a multiple of 128.

As train_gpt2.py's write_model and train_gpt2.cu's gpt2_write_to_checkpoint write it. The activation is the tanh GELU.
Letters: L layers, T positions, C channels, V vocabulary, P vocabulary with padding.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import torch

from ..files import whole_file
from ..model import GPTConfig
from .weights import DROPOUTS, TOKENS, ConversionError, Settings, Weights, linear_shapes

MAGIC = 20240326
HEADER_LENGTH = 256
HEADER_BYTES = 4 * HEADER_LENGTH
DTYPES = {3: torch.float32, 5: torch.bfloat16}  # by version


def is_llmc(start: bytes) -> bool:
    """Whether a file that starts so is llm.c's."""
    return int.from_bytes(start[:4], "little") == MAGIC


def read_llmc(path: str) -> tuple[Weights, Settings]:
    """Weights, mapped from the file, with the padding still there, and settings, whose ``vocab_size`` is without."""
    size = os.path.getsize(path)
    if size < HEADER_BYTES:
        raise ConversionError(f"{path} is cut off after {size} bytes, in its header: copy it again")
    version, T, V, L, n_head, C, P = np.fromfile(path, "<i4", HEADER_LENGTH)[1:8].tolist()
    if version not in DTYPES:
        known = "3 (float32) and 5 (bfloat16) can be read"
        raise ConversionError(f"{path} has llm.c's version {version}, and {known}: write it again with present llm.c")
    dtype, shapes = DTYPES[version], linear_shapes(L, T, C, P)
    lengths = [math.prod(shape) for shape in shapes.values()]
    header = HEADER_BYTES // dtype.itemsize  # in units of the numbers that follow it
    expected = (header + sum(lengths)) * dtype.itemsize
    if size != expected or not 0 < V <= P or n_head < 1:
        raise ConversionError(f"{path} has {size:,} bytes and, by its header, should have {expected:,}: copy it again")
    print(f"{path}: llm.c, {str(dtype).removeprefix('torch.')}")
    numbers = torch.from_file(path, shared=False, size=header + sum(lengths), dtype=dtype)
    parts = numbers[header:].split(lengths)
    weights = {name: part.view(shapes[name]) for name, part in zip(shapes, parts, strict=True)}
    settings = {"n_head": n_head, "activation_function": "gelu_new", "vocab_size": V}
    return weights, settings | dict.fromkeys(DROPOUTS, 0.0)


def write_llmc(weights: Weights, config: GPTConfig, output: Path) -> str:
    """Write the file and return the command that loads it."""
    dtype = weights[TOKENS].dtype
    version = next(version for version, known in DTYPES.items() if known == dtype)
    L, T, C, V = config.n_layer, config.n_positions, config.n_embd, config.vocab_size
    P = math.ceil(V / 128) * 128
    header = np.zeros(HEADER_LENGTH, "<i4")
    header[:8] = MAGIC, version, T, V, L, config.n_head, C, P
    with whole_file(output) as file:
        file.write(header.tobytes())
        for name in linear_shapes(L, T, C, V):
            file.write(weights[name].view(torch.uint8).numpy().data)
            if name == TOKENS:
                file.write(bytes((P - V) * C * dtype.itemsize))
    return f"./train_gpt2cu -e {output}   # built with PRECISION={'FP32' if version == 3 else 'BF16'}"
