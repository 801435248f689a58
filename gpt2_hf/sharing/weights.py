"""A GPT-2's weights on their way between formats: by the hub's names, in nn.Linear's layout.

All of nanoGPT, build-nanogpt and llm.c keep a matrix as ``nn.Linear`` does, [out, in], where the hub's Conv1D keeps
[in, out]. ``lm_head.weight`` is there only where it is not tied. Beside them go ``settings``: those fields of GPTConfig
that the source tells.
Letters: L layers, T positions, C channels, V vocabulary.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from ..program import UserError

Target = Literal["gpt2", "nanogpt", "build-nanogpt", "llmc"]
Weights = dict[str, Tensor]
Settings = dict[str, Any]

PADDED_VOCAB = 50304  # 50257 rounded up to a multiple of 128: what all three train with
HEAD, TOKENS, POSITIONS = "lm_head.weight", "transformer.wte.weight", "transformer.wpe.weight"
DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
# Parts of a block in llm.c's order, with the shape of the weight in units of C; a bias has the weight's first axis.
BLOCK: dict[str, tuple[int, ...]] = {
    "ln_1": (1,),
    "attn.c_attn": (3, 1),
    "attn.c_proj": (1, 1),
    "ln_2": (1,),
    "mlp.c_fc": (4, 1),
    "mlp.c_proj": (1, 4),
}


class ConversionError(UserError):
    """One line: which file, what was found, what to do."""


def linear_shapes(L: int, T: int, C: int, V: int) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight of a GPT-2 with a tied head, in nn.Linear's layout and llm.c's order."""
    shapes: dict[str, tuple[int, ...]] = {TOKENS: (V, C), POSITIONS: (T, C)}
    for part, units in BLOCK.items():
        shape = tuple(C * unit for unit in units)
        shapes |= {f"transformer.h.{i}.{part}.weight": shape for i in range(L)}
        shapes |= {f"transformer.h.{i}.{part}.bias": shape[:1] for i in range(L)}
    return shapes | {"transformer.ln_f.weight": (C,), "transformer.ln_f.bias": (C,)}


def count_layers(weights: Weights) -> int:
    return sum(name.endswith(".ln_1.weight") for name in weights)


def transposed(weights: Weights) -> Weights:
    """Matrices of the blocks from (out, in) to (in, out) or back; the embeddings are the same in both layouts."""
    is_matrix = {name: ".h." in name and weight.ndim == 2 for name, weight in weights.items()}
    return {name: weight.t().contiguous() if is_matrix[name] else weight for name, weight in weights.items()}


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
