"""The .pt of nanoGPT and of build-nanogpt: a pickled dictionary with the weights under "model".

nanoGPT         exact GELU since June 2023, the tanh form before; biases are optional; often 50304 rows of tokens
build-nanogpt   tanh GELU; 50304 rows; its configuration is a pickled object of its training script
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, Literal

import torch

from ..data.tokenizer import VOCAB_SIZE
from ..files import whole_file
from ..model import GPTConfig
from .weights import (
    DROPOUTS,
    HEAD,
    PADDED_VOCAB,
    POSITIONS,
    TOKENS,
    ConversionError,
    Settings,
    Weights,
    count_layers,
    first_line,
    linear_shapes,
)


def is_pt(start: bytes) -> bool:
    """Whether a file that starts so is PyTorch's: a zip archive that has its pickle first."""
    return start[:2] == b"PK" and b"data.pkl" in start


def read_pt(path: str) -> tuple[Weights, Settings]:
    """Weights, mapped from the file, all there and of the shapes that they should have, and settings."""
    saved = _load(path)
    saved = {str(name): value for name, value in saved.items()} if isinstance(saved, dict) else {}
    args = _arguments(saved)
    origin, activation = _origin(saved, args)
    print(f"{path}: {origin}, step {saved.get('iter_num', saved.get('step', 'unknown'))}")

    weights = _clean_names(saved.get("model", saved))
    if any(getattr(weights.get(name), "ndim", 0) != 2 for name in (TOKENS, POSITIONS)):
        raise ConversionError(f"{path} holds no GPT-2's weights (but {', '.join(saved)[:200]}): give a checkpoint")
    expected = _expected_shapes(path, weights, args)
    if not any(name.endswith(".bias") for name in weights):
        weights |= {name: torch.zeros(shape) for name, shape in expected.items() if name.endswith(".bias")}
        print("  biases: the model has none, written as zeros")
    _refuse_other_shapes(path, weights, expected)
    if activation == "gelu":
        print("  GELU: exact, as in nanoGPT since June 2023; for a model of older code give --activation gelu_new")
    if "optimizer" in saved:
        print("  optimizer state: left out")
    rows = VOCAB_SIZE if len(weights[TOKENS]) == PADDED_VOCAB else len(weights[TOKENS])
    settings = {"n_head": args.get("n_head"), "activation_function": activation, "vocab_size": rows}
    return weights, settings | dict.fromkeys(DROPOUTS, args.get("dropout") or 0.0)


class _ForeignConfig:
    """What a pickled ``GPTConfig`` of somebody's script becomes: its fields, and none of its code."""


def _load(path: str) -> Any:
    classes: list[str] = []
    try:
        classes = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        # Stands for the name in the pickle, whose module is never imported.
        allowed: list[Any] = [(_ForeignConfig, name) for name in classes if name.split(".")[-1] == "GPTConfig"]
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        what = f"objects that could run foreign code ({', '.join(sorted(classes))}), so it is not loaded"
        raise ConversionError(f"{path} holds {what}: save it again with 'model' and 'model_args' only") from None
    except Exception as error:  # what a damaged pickle raises is anybody's guess
        raise ConversionError(f"{path} is cut off or damaged, copy it again ({first_line(error)})") from None


def _arguments(saved: dict[str, Any]) -> dict[str, Any]:
    """What the file says of the model's sizes; nothing where only weights were saved."""
    config = saved.get("model_args", saved.get("config"))
    if isinstance(config, _ForeignConfig):
        return vars(config)
    return config if isinstance(config, dict) else {}


def _origin(saved: dict[str, Any], args: dict[str, Any]) -> tuple[str, str | None]:
    """The project that wrote a file, and the activation that it trained with, where that is known."""
    if "model_args" in saved:  # which mention biases since January 2023, when GELU was still the tanh form
        return "nanoGPT", "gelu" if "bias" in args else "gelu_new"
    if "block_size" in args:
        return "build-nanogpt", "gelu_new"
    return "of unknown origin", None


def _clean_names(state: Any) -> Weights:
    weights = Weights()
    for name, weight in state.items() if isinstance(state, dict) else ():
        name = str(name)
        while name.startswith(("_orig_mod.", "module.")):  # left by torch.compile and by DDP
            name = name.split(".", 1)[1]
        if not name.endswith((".attn.bias", ".attn.masked_bias")):  # causal masks, which some versions keep as buffers
            weights[name] = weight
    return weights


def _expected_shapes(path: str, weights: Weights, args: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """By the sizes that the file gives, and by its weights where it gives none."""
    sizes = {"n_layer": count_layers(weights), "block_size": len(weights[POSITIONS])}
    sizes |= {"n_embd": weights[TOKENS].shape[1], "vocab_size": len(weights[TOKENS])}
    for name in (*sizes, "n_head"):
        if args.get(name) is not None and (type(args[name]) is not int or args[name] < 1):
            raise ConversionError(f"{path} says that its {name} is {args[name]!r}: see the code that wrote it")
    expected = linear_shapes(*(args.get(name) or size for name, size in sizes.items()))
    if HEAD in weights:
        expected[HEAD] = expected[TOKENS]
    return expected


def _refuse_other_shapes(path: str, weights: Weights, expected: dict[str, tuple[int, ...]]) -> None:
    found = {name: tuple(getattr(weight, "shape", ())) for name, weight in weights.items()}
    wrong = sorted(name for name in found | expected if found.get(name) != expected.get(name))
    if wrong:
        first = f"{wrong[0]} is {found.get(wrong[0], 'missing')} and should be {expected.get(wrong[0], 'absent')}"
        raise ConversionError(
            f"{path} is no whole GPT-2: {first}, {len(wrong)} such weights; see the code that wrote it"
        )


def write_pt(weights: Weights, config: GPTConfig, output: Path, to: Literal["nanogpt", "build-nanogpt"]) -> str:
    """Write the file and return the line that loads it in the other project."""
    args = {
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "block_size": config.n_positions,
        "vocab_size": config.vocab_size,
    }
    # A clone: of a view, torch.save writes all that is behind it.
    state = {name: weight.clone() for name, weight in weights.items()}
    state[HEAD] = state[TOKENS]
    if to == "nanogpt":
        saved = {
            "model": state,
            "model_args": {**args, "bias": True, "dropout": config.resid_pdrop},
            "optimizer": _fresh_optimizer(weights),
            "iter_num": 0,
            "best_val_loss": torch.tensor(1e9),
            "config": {},
        }
    else:
        # Its own configuration is an object that loads only in its script: plain values load everywhere.
        saved = {"model": state, "config": args, "step": 0}
    with whole_file(output) as file:
        torch.save(saved, file)
    key = "model_args" if to == "nanogpt" else "config"
    return f'c = torch.load("{output}"); m = GPT(GPTConfig(**c["{key}"])); m.load_state_dict(c["model"])'


def _fresh_optimizer(weights: Weights) -> dict[str, Any]:
    """nanoGPT resumes only with an optimizer that has its two groups: one that has not stepped, with an empty state."""
    decay = [torch.zeros(1) for weight in weights.values() if weight.ndim > 1]
    no_decay = [torch.zeros(1) for weight in weights.values() if weight.ndim == 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": no_decay, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95)).state_dict()
