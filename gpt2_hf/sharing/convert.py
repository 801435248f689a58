"""Checkpoints of nanoGPT, build-nanogpt (.pt) and llm.c (.bin) to a stock gpt2 folder, and back.

A source becomes weights and settings (see ``weights.py``), these a GPTConfig that has everything, and both a target.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from safetensors import SafetensorError

from ..data.tokenizer import EOT, VOCAB_SIZE, Tokenizer, gpt2_tokenizer, open_tokenizer, save_tokenizer
from ..knobs import PathName, Range, checked
from ..model import GPTConfig, GPTForCausalLM
from ..runs import MANIFEST, find_model, is_stock, write_folder
from .llmc import HEADER_BYTES, is_llmc, read_llmc, write_llmc
from .nanogpt import is_pt, read_pt, write_pt
from .weights import (
    HEAD,
    PADDED_VOCAB,
    POSITIONS,
    TOKENS,
    ConversionError,
    Settings,
    Target,
    Weights,
    count_layers,
    first_line,
    transposed,
)

PADDED_TO = 128  # a multiple of which other projects train with
TANH_GELU = ("gelu_new", "gelu_pytorch_tanh")


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
    tokenizer: Annotated[str, PathName()] | None = None,
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
        tokenizer: for a gpt2 folder whose tokenizer is not GPT-2's: a folder with its tokenizer.json, such as the
            data's, or a model of the Hub.
        overwrite: replace an output of the same kind.

    Raises:
        ConversionError: when the source cannot be read, the target cannot hold it or the output cannot be written; an
            output that was there is untouched.
    """
    source, output = str(source), Path(output).resolve()
    to = _target(source, to)
    source = _model_in(source)
    _refuse_output(source, output, to == "gpt2", overwrite)

    weights, settings = _read_file(source) if Path(source).is_file() else _read_folder(source)
    _drop_tied_head(weights)
    if n_head is not None and settings["n_head"] not in (None, n_head):
        raise ConversionError(
            f"{source} has {settings['n_head']} heads by its own account: leave out --n_head {n_head}"
        )
    own = _tokenizer(source, to, tokenizer, weights)
    if own is not None and vocab_size is None and len(weights[TOKENS]) - own.vocab_size in range(PADDED_TO):
        settings |= {"vocab_size": own.vocab_size}
    given = {"activation_function": activation, "n_head": n_head, "vocab_size": vocab_size}
    settings |= {name: value for name, value in given.items() if value is not None}
    config = _settle(source, weights, settings)
    if own is not None:
        config.bos_token_id = config.eos_token_id = own.eot
    if why := why_not(config, to):
        raise ConversionError(f"{source} cannot be written as {to}: {why}")
    _describe(weights, config)
    weights = _as_dtype(source, weights, getattr(torch, dtype))
    try:
        usage = _write(weights, config, output, to, own)
    except (OSError, RuntimeError, SafetensorError) as error:  # safetensors and torch.save have their own
        raise ConversionError(
            f"{output} cannot be written, is there room on the disk? ({first_line(error)})"
        ) from error
    print(f"{output}: written as {to} in {dtype}; load it with\n  {usage}")


def why_not(config: GPTConfig, to: Target) -> str | None:
    """Why a format cannot hold a model of this configuration; None when it can."""
    if to == "gpt2":
        return None
    if not config.tie_word_embeddings:
        return "its head is not tied to the embedding"
    if config.n_inner not in (None, 4 * config.n_embd):
        return f"its n_inner is {config.n_inner}, not 4 * {config.n_embd}"
    if not config.scale_attn_weights or config.scale_attn_by_inverse_layer_idx:
        return "it has other scale_attn_ flags than GPT-2"
    if config.layer_norm_epsilon != 1e-5:
        return f"its layer_norm_epsilon is {config.layer_norm_epsilon}, not 1e-5"
    return _why_not_activation(config.activation_function, to)


def _why_not_activation(found: str, to: Target) -> str | None:
    exact = ("gelu",)
    own, other, others = (exact, "build-nanogpt", TANH_GELU) if to == "nanogpt" else (TANH_GELU, "nanogpt", exact)
    if found in own:
        return None
    reason = f"its activation is {found}, not {own[0]}"
    if "gelu" not in found:  # nobody would take another function's outputs for slightly different ones
        return reason
    keeps = f"--to {other} keeps it, " if found in others else ""
    return f"{reason}: {keeps}--activation {own[0]} accepts slightly different outputs"


def _target(source: str, to: Target | None) -> Target:
    is_file = Path(source).is_file()
    if is_file or to not in (None, "gpt2"):
        return to or "gpt2"
    targets = "--to nanogpt, build-nanogpt or llmc"
    if Path(source).is_dir():
        raise ConversionError(f"{source} is a folder: say what to make of it, {targets}")
    raise ConversionError(f"no such file: {source} (a model of the Hub is converted {targets})")


def _model_in(source: str) -> str:
    """The source itself, but of a run the folder of its model."""
    if not Path(source).is_dir():
        return source
    try:
        return str(find_model(Path(source)))
    except FileNotFoundError as error:
        raise ConversionError(f"{source} is no file, no run and no gpt2 folder: {error}") from None


def _tokenizer(source: str, to: Target, name: str | None, weights: Weights) -> Tokenizer | None:
    """What is to lie beside the weights, of the name that was given."""
    if name is None:
        return None
    if to != "gpt2":
        raise ConversionError(f"{to} holds no tokenizer: leave out --tokenizer {name}")
    tokenizer, rows = open_tokenizer(name), len(weights[TOKENS])
    if tokenizer.vocab_size > rows:
        raise ConversionError(
            f"{source} has {rows:,} rows of tokens, too few for the {tokenizer.vocab_size:,} of --tokenizer {name}: "
            "name the model's own"
        )
    return tokenizer


# Reading


def _read_file(path: str) -> tuple[Weights, Settings]:
    start = _start(path)
    if is_pt(start):
        return read_pt(path)
    if is_llmc(start):
        return read_llmc(path)
    formats = "a .pt of nanoGPT or build-nanogpt, nor a model_*.bin of llm.c"
    raise ConversionError(f"{path} is neither {formats}: it starts with {start[:4]!r}; give one of those")


def _start(path: str | Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(HEADER_BYTES)


def _read_folder(path: str) -> tuple[Weights, Settings]:
    try:
        model = GPTForCausalLM.from_pretrained(path, dtype="auto")
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path} is no file and no gpt2 folder: {first_line(error)}") from None
    if model._hf_peft_config_loaded:
        raise ConversionError(
            f"{path} is an adapter: merge it (peft's merge_and_unload), save the result, convert that"
        )
    print(f"{path}: gpt2, {str(model.dtype).removeprefix('torch.')}")
    return transposed(model.state_dict()), model.config.to_dict()


# What was read, made whole


def _drop_tied_head(weights: Weights) -> None:
    if HEAD not in weights:
        return
    if torch.equal(weights[HEAD], weights[TOKENS]):
        del weights[HEAD]
    else:
        print("  head: not tied to the embedding, kept as a matrix of its own")


def _settle(path: str, weights: Weights, settings: Settings) -> GPTConfig:
    """The configuration of what was read, with sizes and defaults filled in; cuts the vocabulary in ``weights``."""
    if not settings["activation_function"]:
        choice = "gelu (nanoGPT since June 2023) or gelu_new (build-nanogpt, older nanoGPT, OpenAI)"
        raise ConversionError(f"{path} does not say which GELU it was trained with: add --activation {choice}")
    _cut_vocabulary(path, weights, settings["vocab_size"])
    sizes = {
        "n_layer": count_layers(weights),
        "n_positions": len(weights[POSITIONS]),
        "n_embd": weights[TOKENS].shape[1],
        "n_head": _n_head(path, weights[TOKENS].shape[1], settings["n_head"]),
        "tie_word_embeddings": HEAD not in weights,
    }
    no_end = {"bos_token_id": None, "eos_token_id": None} if settings["vocab_size"] <= EOT else {}
    try:
        return GPTConfig.from_dict(settings | sizes | no_end)
    except ValueError as error:
        raise ConversionError(f"{path} has settings that no GPT-2 has: {error}") from None


def _n_head(path: str, channels: int, n_head: int | None) -> int:
    if not n_head:
        n_head = max(1, channels // 64)
        print(f"  heads: {n_head}, of 64 channels like GPT-2's; the file does not say, so see that it is true")
    if n_head < 1 or channels % n_head:
        raise ConversionError(f"{path} has {channels} channels, which {n_head} heads do not divide: give --n_head")
    return n_head


def _cut_vocabulary(path: str, weights: Weights, rows: int) -> None:
    """Leave the first ``rows`` rows of the tokens."""
    there = len(weights[TOKENS])
    if not 0 < rows <= there:
        raise ConversionError(f"{path} has {there} rows of tokens, so --vocab_size cannot be {rows}")
    if rows < min(there, VOCAB_SIZE) and there in (VOCAB_SIZE, PADDED_VOCAB):
        raise ConversionError(
            f"{path} has the rows of GPT-2's {VOCAB_SIZE} tokens: --vocab_size {rows} would cut off rows that texts "
            "use; leave it out"
        )
    if rows < there:
        weights |= {name: weights[name][:rows] for name in (TOKENS, HEAD) if name in weights}
        print(f"  vocabulary: cut from {there:,} to {rows:,} rows; --vocab_size keeps more")


def _describe(weights: Weights, c: GPTConfig) -> None:
    print(
        f"  {c.n_layer} layers, {c.n_embd} wide, {c.n_head} heads, {c.n_positions} positions, {c.vocab_size:,} tokens"
    )
    print(f"  {sum(map(torch.numel, weights.values())):,} parameters, activation {c.activation_function}")


def _as_dtype(path: str, weights: Weights, dtype: torch.dtype) -> Weights:
    """All weights as contiguous tensors of finite numbers of ``dtype``."""
    converted = Weights()
    for name, weight in weights.items():
        if not weight.is_floating_point():
            what = f"{name} in {weight.dtype}, which is no weight's"
            raise ConversionError(f"{path} has {what}: give a file of plain floats")
        converted[name] = weight.to(dtype).contiguous()
        if not converted[name].isfinite().all():
            raise ConversionError(f"{path} has NaN or infinite values in {name} ({dtype}): give an earlier checkpoint")
    return converted


# Writing


def _refuse_output(source: str, output: Path, is_folder: bool, overwrite: bool) -> None:
    """Refuse an output that would take the source, or anything but a model of the same kind, away."""
    here = Path(source).resolve()
    if here.exists() and (here.is_relative_to(output) or output.is_relative_to(here)):
        raise ConversionError(f"{output} and the source {here} lie in each other: name another output")
    if is_folder and Path.cwd().is_relative_to(output):
        raise ConversionError(f"{output} is the folder you are in, which would be replaced: name a new one")
    if not output.exists() or (is_folder and output.is_dir() and not any(output.iterdir())):
        return
    if foreign := _foreign_folder(output) if is_folder else _foreign_file(output):
        raise ConversionError(f"{output} is there and is {foreign}, so it is not replaced: name another output")
    if not overwrite:
        raise ConversionError(f"{output} is there already: name another output, or add --overwrite to replace it")


def _foreign_file(file: Path) -> str | None:
    """What makes a file other than a checkpoint that we could have written."""
    start = _start(file) if file.is_file() else b""
    return None if is_pt(start) or is_llmc(start) else "neither a .pt nor an llm.c file"


def _foreign_folder(folder: Path) -> str | None:
    """What makes a folder, all of which would be deleted, other than a gpt2 folder and nothing else."""
    if not _is_gpt2(folder / "config.json"):
        return "no gpt2 folder"
    others = sorted(p.name for p in folder.iterdir() if not (p.is_file() and (is_stock(p.name) or p.name == MANIFEST)))
    return f"a gpt2 folder with {others[0]} in it" if others else None


def _is_gpt2(config: Path) -> bool:
    if not config.is_file():  # a pipe would be read for ever
        return False
    try:
        return json.loads(config.read_text())["model_type"] == "gpt2"
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _write(weights: Weights, config: GPTConfig, output: Path, to: Target, tokenizer: Tokenizer | None) -> str:
    """Write the output, and return the line that loads it."""
    if to == "gpt2":
        return _write_gpt2(weights, config, output, tokenizer)
    if to == "llmc":
        return write_llmc(weights, config, output)
    return write_pt(weights, config, output, to)


def _write_gpt2(weights: Weights, config: GPTConfig, output: Path, tokenizer: Tokenizer | None) -> str:
    with torch.device("meta"):
        model: Any = GPTForCausalLM(config)
    model.load_state_dict({HEAD: weights[TOKENS]} | transposed(weights), assign=True)
    model.tie_weights()
    if tokenizer is None and config.vocab_size == VOCAB_SIZE:
        tokenizer = gpt2_tokenizer()

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        if tokenizer:
            save_tokenizer(tokenizer.hugging_face(), folder, config.n_positions)

    write_folder(output, write)
    if not tokenizer:
        print(f"  tokenizer: none, as the vocabulary is not GPT-2's of {VOCAB_SIZE:,}: --tokenizer names its own")
    return f'transformers.AutoModelForCausalLM.from_pretrained("{output}")'
