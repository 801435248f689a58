"""Checkpoints of nanoGPT, build-nanogpt (.pt) and llm.c (.bin) to a stock gpt2 folder, and back.

All three keep a matrix as ``nn.Linear`` does, [out, in], where the hub's Conv1D keeps [in, out]. Beyond that:

    nanoGPT         exact GELU since June 2023, the tanh form before; biases are optional; often 50304 rows of tokens
    build-nanogpt   tanh GELU; 50304 rows; its configuration is a pickled object of its training script
    llm.c           tanh GELU; a header, then one block of numbers; rows are padded to a multiple of 128

In between, weights go by the hub's names in nn.Linear's layout, ``lm_head.weight`` only where it is not tied, beside
``settings``: the fields of GPTConfig that the source tells.
Letters: L layers, T positions, C channels, V vocabulary, P vocabulary with padding.
"""

from __future__ import annotations

import json
import math
import os
import pickle
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from ..data.tokenizer import EOT, VOCAB_SIZE, load_tokenizer, save_tokenizer
from ..files import whole_file
from ..knobs import Range, checked
from ..model import GPTConfig, GPTForCausalLM
from ..program import UserError
from ..runs import MANIFEST, find_model, is_stock, write_folder

Target = Literal["gpt2", "nanogpt", "build-nanogpt", "llmc"]
Weights = dict[str, Tensor]
Settings = dict[str, Any]

PADDED_VOCAB = 50304  # 50257 rounded up to a multiple of 128: what all three train with
HEAD, TOKENS, POSITIONS = "lm_head.weight", "transformer.wte.weight", "transformer.wpe.weight"
# Parts of a block in llm.c's order, with the shape of the weight in units of C; a bias has the weight's first axis.
BLOCK: dict[str, tuple[int, ...]] = {"ln_1": (1,), "attn.c_attn": (3, 1), "attn.c_proj": (1, 1)}
BLOCK |= {"ln_2": (1,), "mlp.c_fc": (4, 1), "mlp.c_proj": (1, 4)}
TANH_GELU = ("gelu_new", "gelu_pytorch_tanh")
DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
# llm.c's train_gpt2.py::write_model and train_gpt2.cu::gpt2_write_to_checkpoint; the header is in int32.
LLMC_MAGIC, LLMC_HEADER = 20240326, 256
LLMC_VERSIONS = {3: torch.float32, 5: torch.bfloat16}


class ConversionError(UserError):
    """One line: which file, what was found, what to do."""


@checked
def convert(
    source: str | Path,
    output: str | Path,
    *,
    to: Target | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    activation: Literal["gelu", "gelu_new"] | None = None,
    n_head: Annotated[int, Range(1)] | None = None,
    vocab_size: Annotated[int, Range(1)] | None = None,
    overwrite: bool = False,
) -> None:
    """Read a checkpoint, whatever its format, write it in another, and print what was read, changed and written.

    Args:
        source: .pt of nanoGPT or build-nanogpt, .bin of llm.c (told by content, not by name), a run, gpt2 folder or
            hub id.
        output: a folder for gpt2, a file for the others.
        to: format to write; a file becomes a gpt2 folder when nothing is said.
        dtype: of the weights written.
        activation: the GELU to take the weights with, if not the one assumed; gelu is exact, gelu_new the tanh form.
        n_head: number of heads, where the file does not say.
        vocab_size: rows of tokens to keep; by default 50304 in a file are cut to 50257, and others kept.
        overwrite: replace an output of the same kind.

    Raises:
        ConversionError: when the source cannot be read, the target cannot hold it or the output cannot be written; an
            output that was there is untouched.
    """
    source, output = str(source), Path(output).resolve()
    is_file = Path(source).is_file()
    to = to or ("gpt2" if is_file else None)
    if to is None or (to == "gpt2" and not is_file):
        targets = "--to nanogpt, build-nanogpt or llmc"
        if Path(source).is_dir():
            raise ConversionError(f"{source} is a folder: say what to make of it, {targets}")
        raise ConversionError(f"no such file: {source} (a model of the Hub is converted {targets})")
    if Path(source).is_dir():
        try:
            source = str(find_model(Path(source)))
        except FileNotFoundError as error:
            raise ConversionError(f"{source} is no file, no run and no gpt2 folder: {error}") from None
    _check_output(source, output, to == "gpt2", overwrite)
    weights, settings = _read_file(source) if is_file else _read_folder(source)
    if HEAD in weights and torch.equal(weights[HEAD], weights[TOKENS]):
        del weights[HEAD]
    elif HEAD in weights:
        print("  head: not tied to the embedding, kept as a matrix of its own")
    if n_head is not None and settings["n_head"] not in (None, n_head):
        raise ConversionError(
            f"{source} has {settings['n_head']} heads by its own account: leave out --n_head {n_head}"
        )
    given = {"activation_function": activation, "n_head": n_head, "vocab_size": vocab_size}
    c = _settle(source, weights, settings | {name: value for name, value in given.items() if value is not None})
    if why := why_not(c, to):
        raise ConversionError(f"{source} cannot be written as {to}: {why}")
    shape = f"{c.n_layer} layers, {c.n_embd} wide, {c.n_head} heads, {c.n_positions} positions, {c.vocab_size:,} tokens"
    print(f"  {shape}\n  {sum(map(torch.numel, weights.values())):,} parameters, activation {c.activation_function}")
    weights = {name: _as_dtype(source, name, weight, getattr(torch, dtype)) for name, weight in weights.items()}
    try:
        usage = {"gpt2": _write_gpt2, "llmc": _write_llmc}.get(to, _write_pt)(weights, c, output, to)
    except (OSError, RuntimeError, SafetensorError) as error:  # safetensors and torch.save have their own
        raise ConversionError(f"{output} cannot be written, is there room on the disk? ({_line(error)})") from error
    print(f"{output}: written as {to} in {dtype}; load it with\n  {usage}")


def why_not(config: GPTConfig, to: Target) -> str | None:
    """Why a format cannot hold a model of this configuration; None when it can."""
    act = config.activation_function
    own, other, others = ("gelu", "build-nanogpt", TANH_GELU) if to == "nanogpt" else ("gelu_new", "nanogpt", ("gelu",))
    keeps = f"--to {other} keeps it, " if act in others else ""
    advice = f": {keeps}--activation {own} accepts slightly different outputs" if "gelu" in act else ""
    scaled = config.scale_attn_weights and not config.scale_attn_by_inverse_layer_idx
    limits = {
        "its head is not tied to the embedding": not config.tie_word_embeddings,
        f"its n_inner is {config.n_inner}, not 4 * {config.n_embd}": config.n_inner not in (None, 4 * config.n_embd),
        "it has other scale_attn_ flags than GPT-2": not scaled,
        f"its layer_norm_epsilon is {config.layer_norm_epsilon}, not 1e-5": config.layer_norm_epsilon != 1e-5,
        f"its activation is {act}, not {own}{advice}": act not in (TANH_GELU if own == "gelu_new" else (own,)),
    }
    return None if to == "gpt2" else next((reason for reason, is_so in limits.items() if is_so), None)


def linear_shapes(L: int, T: int, C: int, V: int) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight of a GPT-2 with a tied head, in nn.Linear's layout and llm.c's order."""
    shapes: dict[str, tuple[int, ...]] = {TOKENS: (V, C), POSITIONS: (T, C)}
    for part, units in BLOCK.items():
        shape = tuple(C * unit for unit in units)
        shapes |= {f"transformer.h.{i}.{part}.weight": shape for i in range(L)}
        shapes |= {f"transformer.h.{i}.{part}.bias": shape[:1] for i in range(L)}
    return shapes | {"transformer.ln_f.weight": (C,), "transformer.ln_f.bias": (C,)}


def transposed(weights: Weights) -> Weights:
    """Matrices of the blocks from (out, in) to (in, out) or back; the embeddings are the same in both layouts."""
    is_matrix = {name: ".h." in name and weight.ndim == 2 for name, weight in weights.items()}
    return {name: weight.t().contiguous() if is_matrix[name] else weight for name, weight in weights.items()}


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _as_dtype(path: str, name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
    if not weight.is_floating_point():
        raise ConversionError(f"{path} has {name} in {weight.dtype}, which is no weight's: give a file of plain floats")
    weight = weight.to(dtype).contiguous()
    if not weight.isfinite().all():
        raise ConversionError(f"{path} has NaN or infinite values in {name} ({dtype}): give an earlier checkpoint")
    return weight


def _start(path: str | Path) -> tuple[Literal["pt", "llmc"] | None, bytes]:
    """What a file begins like, and its first kilobyte."""
    with open(path, "rb") as file:
        start = file.read(4 * LLMC_HEADER)
    if start[:2] == b"PK" and b"data.pkl" in start:  # PyTorch's zip archives have their pickle first
        return "pt", start
    return "llmc" if int.from_bytes(start[:4], "little") == LLMC_MAGIC else None, start


def _read_file(path: str) -> tuple[Weights, Settings]:
    kind, start = _start(path)
    if kind == "pt":
        return _read_pt(path, _load_pickle(path))
    if kind == "llmc":
        return _read_llmc(path, start)
    formats = "a .pt of nanoGPT or build-nanogpt, nor a model_*.bin of llm.c"
    raise ConversionError(f"{path} is neither {formats}: it starts with {start[:4]!r}; give one of those")


class _ForeignConfig:
    """What a pickled ``GPTConfig`` of somebody's script becomes: its fields, and none of its code."""


def _load_pickle(path: str) -> Any:
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
        raise ConversionError(f"{path} is cut off or damaged, copy it again ({_line(error)})") from None


def _read_pt(path: str, saved: Any) -> tuple[Weights, Settings]:
    saved = {str(name): value for name, value in saved.items()} if isinstance(saved, dict) else {}
    config = saved.get("model_args", saved.get("config"))
    args = vars(config) if isinstance(config, _ForeignConfig) else config if isinstance(config, dict) else {}
    origin, activation = "of unknown origin", None
    if "model_args" in saved:  # which mention biases since January 2023, when GELU was still the tanh form
        origin, activation = "nanoGPT", "gelu" if "bias" in args else "gelu_new"
    elif "block_size" in args:
        origin, activation = "build-nanogpt", "gelu_new"
    print(f"{path}: {origin}, step {saved.get('iter_num', saved.get('step', 'unknown'))}")

    state, weights = saved.get("model", saved), Weights()
    for name, weight in state.items() if isinstance(state, dict) else ():
        name = str(name)
        while name.startswith(("_orig_mod.", "module.")):  # left by torch.compile and by DDP
            name = name.split(".", 1)[1]
        if not name.endswith((".attn.bias", ".attn.masked_bias")):  # causal masks, which some versions keep as buffers
            weights[name] = weight
    if any(getattr(weights.get(name), "ndim", 0) != 2 for name in (TOKENS, POSITIONS)):
        raise ConversionError(f"{path} holds no GPT-2's weights (but {', '.join(saved)[:200]}): give a checkpoint")
    sizes = {"n_layer": sum(name.endswith(".ln_1.weight") for name in weights), "block_size": len(weights[POSITIONS])}
    sizes |= {"n_embd": weights[TOKENS].shape[1], "vocab_size": len(weights[TOKENS])}
    for name in (*sizes, "n_head"):
        if args.get(name) is not None and (type(args[name]) is not int or args[name] < 1):
            raise ConversionError(f"{path} says that its {name} is {args[name]!r}: see the code that wrote it")
    expected = linear_shapes(*(args.get(name) or size for name, size in sizes.items()))
    if HEAD in weights:
        expected[HEAD] = expected[TOKENS]
    if not any(name.endswith(".bias") for name in weights):
        weights |= {name: torch.zeros(shape) for name, shape in expected.items() if name.endswith(".bias")}
        print("  biases: the model has none, written as zeros")
    found = {name: tuple(getattr(weight, "shape", ())) for name, weight in weights.items()}
    if wrong := sorted(name for name in found | expected if found.get(name) != expected.get(name)):
        first = f"{wrong[0]} is {found.get(wrong[0], 'missing')} and should be {expected.get(wrong[0], 'absent')}"
        raise ConversionError(
            f"{path} is no whole GPT-2: {first}, {len(wrong)} such weights; see the code that wrote it"
        )
    if activation == "gelu":
        print("  GELU: exact, as in nanoGPT since June 2023; for a model of older code give --activation gelu_new")
    if "optimizer" in saved:
        print("  optimizer state: left out")
    rows = VOCAB_SIZE if len(weights[TOKENS]) == PADDED_VOCAB else len(weights[TOKENS])
    settings = {"n_head": args.get("n_head"), "activation_function": activation, "vocab_size": rows}
    return weights, settings | dict.fromkeys(DROPOUTS, args.get("dropout") or 0.0)


def _read_llmc(path: str, start: bytes) -> tuple[Weights, Settings]:
    if len(start) < 4 * LLMC_HEADER:
        raise ConversionError(f"{path} is cut off after {len(start)} bytes, in its header: copy it again")
    version, T, V, L, n_head, C, P = np.frombuffer(start, "<i4")[1:8].tolist()
    if version not in LLMC_VERSIONS:
        known = "3 (float32) and 5 (bfloat16) can be read"
        raise ConversionError(f"{path} has llm.c's version {version}, and {known}: write it again with present llm.c")
    dtype, shapes = LLMC_VERSIONS[version], linear_shapes(L, T, C, P)
    skip = 4 * LLMC_HEADER // dtype.itemsize
    lengths = [math.prod(shape) for shape in shapes.values()]
    size, expected = os.path.getsize(path), (skip + sum(lengths)) * dtype.itemsize
    if size != expected or not 0 < V <= P or n_head < 1:
        raise ConversionError(f"{path} has {size:,} bytes and, by its header, should have {expected:,}: copy it again")
    print(f"{path}: llm.c, {str(dtype).removeprefix('torch.')}")
    numbers = torch.from_file(path, shared=False, size=skip + sum(lengths), dtype=dtype)[skip:].split(lengths)
    weights = {name: part.view(shapes[name]) for name, part in zip(shapes, numbers, strict=True)}
    settings = {"n_head": n_head, "activation_function": "gelu_new", "vocab_size": V}
    return weights, settings | dict.fromkeys(DROPOUTS, 0.0)


def _read_folder(path: str) -> tuple[Weights, Settings]:
    try:
        model = GPTForCausalLM.from_pretrained(path, dtype="auto")
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path} is no file and no gpt2 folder: {_line(error)}") from None
    if model._hf_peft_config_loaded:
        raise ConversionError(
            f"{path} is an adapter: merge it (peft's merge_and_unload), save the result, convert that"
        )
    print(f"{path}: gpt2, {str(model.dtype).removeprefix('torch.')}")
    return transposed(model.state_dict()), model.config.to_dict()


def _settle(path: str, weights: Weights, settings: Settings) -> GPTConfig:
    """The configuration of what was read, with sizes and defaults filled in; cuts the vocabulary in ``weights``."""
    (V, C), rows = weights[TOKENS].shape, settings["vocab_size"]
    if not settings["activation_function"]:
        choice = "gelu (nanoGPT since June 2023) or gelu_new (build-nanogpt, older nanoGPT, OpenAI)"
        raise ConversionError(f"{path} does not say which GELU it was trained with: add --activation {choice}")
    if not settings["n_head"]:
        settings["n_head"] = max(1, C // 64)
        print(
            f"  heads: {settings['n_head']}, of 64 channels like GPT-2's; the file does not say, so see that it is true"
        )
    if settings["n_head"] < 1 or C % settings["n_head"]:
        raise ConversionError(f"{path} has {C} channels, which {settings['n_head']} heads do not divide: give --n_head")
    if not 0 < rows <= V:
        raise ConversionError(f"{path} has {V} rows of tokens, so --vocab_size cannot be {rows}")
    if rows < min(V, VOCAB_SIZE) and V in (VOCAB_SIZE, PADDED_VOCAB):
        raise ConversionError(
            f"{path} has the rows of GPT-2's {VOCAB_SIZE} tokens: --vocab_size {rows} would cut off rows that texts "
            "use; leave it out"
        )
    if rows < V:
        weights |= {name: weights[name][:rows] for name in (TOKENS, HEAD) if name in weights}
        print(f"  vocabulary: cut from {V:,} to {rows:,} rows; --vocab_size keeps more")
    settings |= {"n_positions": len(weights[POSITIONS]), "n_embd": C, "tie_word_embeddings": HEAD not in weights}
    settings |= {"n_layer": sum(name.endswith(".ln_1.weight") for name in weights)}
    settings |= {"bos_token_id": None, "eos_token_id": None} if rows <= EOT else {}
    try:
        return GPTConfig.from_dict(settings)
    except ValueError as error:
        raise ConversionError(f"{path} has settings that no GPT-2 has: {error}") from None


def _check_output(source: str, output: Path, is_folder: bool, overwrite: bool) -> None:
    """Refuse an output that would take the source, or anything but a model of the same kind, away."""
    here = Path(source).resolve()
    if here.exists() and (here.is_relative_to(output) or output.is_relative_to(here)):
        raise ConversionError(f"{output} and the source {here} lie in each other: name another output")
    if is_folder and Path.cwd().is_relative_to(output):
        raise ConversionError(f"{output} is the folder you are in, which would be replaced: name a new one")
    if not output.exists() or (is_folder and output.is_dir() and not any(output.iterdir())):
        return
    if is_folder:
        foreign = _foreign(output)
    else:
        foreign = None if output.is_file() and _start(output)[0] else "neither a .pt nor an llm.c file"
    if foreign:
        raise ConversionError(f"{output} is there and is {foreign}, so it is not replaced: name another output")
    if not overwrite:
        raise ConversionError(f"{output} is there already: name another output, or add --overwrite to replace it")


def _foreign(folder: Path) -> str | None:
    """What makes a folder, all of which would be deleted, other than a gpt2 folder and nothing else."""
    try:
        is_gpt2 = json.loads((folder / "config.json").read_text())["model_type"] == "gpt2"
    except (OSError, ValueError, LookupError, TypeError):
        is_gpt2 = False
    if not is_gpt2:
        return "no gpt2 folder"
    others = sorted(p.name for p in folder.iterdir() if not (p.is_file() and (is_stock(p.name) or p.name == MANIFEST)))
    return f"a gpt2 folder with {others[0]} in it" if others else None


def _write_gpt2(weights: Weights, config: GPTConfig, output: Path, to: Target) -> str:
    with torch.device("meta"):
        model = GPTForCausalLM(config)
    model.load_state_dict({HEAD: weights[TOKENS]} | transposed(weights), assign=True)
    model.tie_weights()

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        if config.vocab_size == VOCAB_SIZE:
            save_tokenizer(load_tokenizer(), folder, config.n_positions)

    write_folder(output, write)
    if config.vocab_size != VOCAB_SIZE:
        print(f"  tokenizer: none, as the vocabulary is not GPT-2's of {VOCAB_SIZE:,}: add its own before publishing")
    return f'transformers.AutoModelForCausalLM.from_pretrained("{output}")'


def _write_pt(weights: Weights, c: GPTConfig, output: Path, to: Target) -> str:
    args = {"n_layer": c.n_layer, "n_head": c.n_head, "n_embd": c.n_embd, "block_size": c.n_positions}
    args |= {"vocab_size": c.vocab_size}
    # build-nanogpt's own configuration is an object that loads only in its script: plain values load everywhere.
    state = {
        name: weight.clone() for name, weight in weights.items()
    }  # of a view, torch.save writes all that is behind
    saved: dict[str, Any] = {"model": state | {HEAD: state[TOKENS]}, "config": args, "step": 0}
    if to == "nanogpt":
        saved |= {"model_args": {**args, "bias": True, "dropout": c.resid_pdrop}, "config": {}}
        # It resumes only with an optimizer that has its two groups: a fresh one, whose state is empty.
        groups = [[torch.zeros(1) for w in weights.values() if (w.ndim > 1) == decays] for decays in (True, False)]
        optimizer = torch.optim.AdamW(groups[0], lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1)
        optimizer.add_param_group({"params": groups[1], "weight_decay": 0.0})
        saved |= {"optimizer": optimizer.state_dict(), "iter_num": 0, "best_val_loss": torch.tensor(1e9)}
    with whole_file(output) as file:
        torch.save(saved, file)
    key = "model_args" if to == "nanogpt" else "config"
    return f'c = torch.load("{output}"); m = GPT(GPTConfig(**c["{key}"])); m.load_state_dict(c["model"])'


def _write_llmc(weights: Weights, c: GPTConfig, output: Path, to: Target) -> str:
    dtype = weights[TOKENS].dtype
    version = {dtype: version for version, dtype in LLMC_VERSIONS.items()}[dtype]
    padded = math.ceil(c.vocab_size / 128) * 128
    header = np.zeros(LLMC_HEADER, "<i4")
    header[:8] = LLMC_MAGIC, version, c.n_positions, c.vocab_size, c.n_layer, c.n_head, c.n_embd, padded
    with whole_file(output) as file:
        file.write(header.tobytes())
        for name in linear_shapes(c.n_layer, c.n_positions, c.n_embd, c.vocab_size):
            file.write(weights[name].view(torch.uint8).numpy().data)
            if name == TOKENS:
                file.write(bytes((padded - c.vocab_size) * c.n_embd * dtype.itemsize))
    return f"./train_gpt2cu -e {output}   # built with PRECISION={'FP32' if version == 3 else 'BF16'}"
