"""What is raced: our own training step, and the plain loops that people write around other GPT-2s.

All variants start from the same weights, see the same tokens and use the same hyper-parameters, so that their losses
can be compared.
"""

from __future__ import annotations

import functools
import gzip
import importlib.util
import inspect
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from .. import hardware
from ..config import DataSection, ModelSection, OptimSection, RunConfig, TrainSection
from ..data.tokenizer import load_tokenizer
from ..model import GPTForCausalLM
from ..training.build import build_accelerator, build_model, set_precision
from ..training.loop import train_step
from ..training.optim import build_optimizers, set_lr

LR, BETAS, EPS, WEIGHT_DECAY, MAX_GRAD_NORM = 6e-4, (0.9, 0.95), 1e-8, 0.1, 1.0
SEED = 1337


@dataclass(frozen=True)
class Shape:
    """A model and the batch it is trained with."""

    n_layer: int
    n_embd: int
    n_head: int
    seq_len: int
    micro_batch_size: int
    grad_accum_steps: int = 1
    vocab_size: int = 50257

    @property
    def tokens(self) -> int:
        """Of one optimizer step."""
        return self.micro_batch_size * self.seq_len * self.grad_accum_steps

    def model_section(self) -> ModelSection:
        return ModelSection("gpt2", self.n_layer, self.n_head, self.n_embd, self.seq_len, self.vocab_size)


def shape_of(name: str, device: str) -> Shape:
    """A shape by name; on a GPU OpenAI's sizes have their recipes' micro-batches, which a CPU has no memory for."""
    shapes = {
        "demo": Shape(4, 128, 4, 256, 8),
        "4x256": Shape(4, 256, 4, 256, 8),
        "124M": Shape(12, 768, 12, 1024, 1 if device == "cpu" else 64),
        "355M": Shape(24, 1024, 16, 1024, 1 if device == "cpu" else 32),
        "774M": Shape(36, 1280, 20, 1024, 1 if device == "cpu" else 16),
        "1558M": Shape(48, 1600, 25, 1024, 1 if device == "cpu" else 8),
    }
    if name not in shapes:
        raise ValueError(f"--shape {name}: choose {', '.join(shapes)}")
    return shapes[name]


@dataclass(frozen=True)
class Variant:
    """One row of the table.

    Args:
        model: ours, stock (transformers.GPT2LMHeadModel), or PATH:CLASS, a nanoGPT-style module of a file.
        attention: of stock; the others have their own.
        padded: compute with a vocabulary of 50304, as nanoGPT does.
        fused: fused AdamW.
        allocator: our setting of glibc's allocator (CPU only).
    """

    label: str
    model: str
    bf16: bool = False
    compile: bool = False
    tf32: bool = False
    attention: str = "sdpa"
    padded: bool = False
    fused: bool = False
    allocator: bool = False


OURS = Variant("gpt2_hf", "ours", bf16=True, compile=True)
PLAIN = Variant("transformers fp32", "stock")


def variants(device: str, peers: Sequence[str], bf16: bool) -> list[Variant]:
    """Ours, and every peer as its user would run it; the fastest ones also with our allocator settings.

    Without `bf16` no peer computes in it: where it is emulated a step takes minutes, and nobody would train so.
    """
    rows = [OURS, PLAIN]
    if bf16:
        rows.append(Variant("transformers bf16", "stock", bf16=True, tf32=True))
        rows.append(Variant("transformers compile", "stock", compile=True, tf32=True))
    kind = "compile + bf16" if bf16 else "compile"
    fast = Variant(f"transformers {kind}", "stock", bf16=bf16, compile=True, tf32=True)
    best = [fast]
    for peer in peers:
        name = f"{Path(peer.rpartition(':')[0]).stem} {kind}"
        best.append(replace(fast, label=name, model=peer, fused=device != "cpu"))
    rows += best
    if device == "cpu":
        rows += [replace(row, label=f"{row.label} + our allocator", allocator=True) for row in best]
    return rows


def ladder(device: str, bf16: bool) -> list[Variant]:
    """The lecture's steps, each row one more of them than the row above; the last is ours.

    TF32 is a GPU's; bf16 is left out where it would be emulated.
    """
    rows = [Variant("fp32", "stock", attention="eager")]
    for label, change in (
        ("+ TF32", {"tf32": True}),
        ("+ bf16", {"bf16": True}),
        ("+ torch.compile", {"compile": True}),
        ("+ flash attention", {"attention": "sdpa"}),
        ("+ padded vocabulary", {"padded": True}),
        ("+ fused AdamW", {"fused": True}),
    ):
        if (label != "+ TF32" or device == "cuda") and (label != "+ bf16" or bf16):
            rows.append(replace(rows[-1], label=label, **change))
    return [*rows, OURS]


Step = Callable[[Tensor], Tensor]  # a batch (grad_accum_steps, B, T + 1) int64 on the host -> its mean loss


def build(variant: Variant, shape: Shape, device: torch.device, seed: int = SEED) -> Step:
    """The variant's optimizer step, with its model and optimizer inside it; `seed` is of the initial weights.

    Raises:
        ValueError, ImportError: in one line, when a peer cannot be made.
    """
    make = _build_ours if variant.model == "ours" else _build_peer
    return make(variant, shape, device, seed)


def run_config(shape: Shape, **train: Any) -> RunConfig:
    """A run of this shape, with the settings of the 124M recipe."""
    return RunConfig(
        model=shape.model_section(),
        data=DataSection(seq_len=shape.seq_len),
        optim=OptimSection("adamw", LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, max_grad_norm=MAX_GRAD_NORM),
        train=TrainSection(global_batch_tokens=shape.tokens, micro_batch_size=shape.micro_batch_size, **train),
    )


def _build_ours(variant: Variant, shape: Shape, device: torch.device, seed: int) -> Step:
    """train.py's own parts, with what its "auto" chooses."""
    compile, precision = "auto" if variant.compile else "off", "auto" if variant.bf16 else "fp32"
    config = run_config(shape, seed=seed, compile=compile, precision=precision)
    PartialState(cpu=device.type == "cpu")
    accelerator = build_accelerator(config, precision := set_precision(config, device))
    bare_model = build_model(config, None, accelerator, precision)
    optimizers = build_optimizers(bare_model, config.optim, device)
    model, *_ = accelerator.prepare(bare_model, *optimizers)
    set_lr(optimizers, 1.0)

    def step(batch: Tensor) -> Tensor:
        return train_step(accelerator, model, optimizers, batch, 0, config)[0]

    return step


def _build_peer(variant: Variant, shape: Shape, device: torch.device, seed: int) -> Step:
    """The loop of nanoGPT and of the Hugging Face examples: forward, backward, clip, step."""
    if variant.allocator:
        hardware.reuse_freed_memory()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = variant.tf32
    bare, loss_of = _peer_model(variant, shape, seed)
    bare.to(device).train()
    model: Any = torch.compile(bare) if variant.compile else bare
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in bare.parameters() if p.ndim >= 2], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in bare.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=LR,
        betas=BETAS,
        eps=EPS,
        fused=True if variant.fused else None,
    )
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=variant.bf16)

    def step(batch: Tensor) -> Tensor:
        total = torch.zeros((), device=device)
        for windows in batch.to(device, non_blocking=True):
            with autocast():
                loss = loss_of(model, windows) / len(batch)
            loss.backward()
            total = total + loss.detach()
        nn.utils.clip_grad_norm_(bare.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    return step


def _peer_model(variant: Variant, shape: Shape, seed: int) -> tuple[nn.Module, Callable[[Any, Tensor], Tensor]]:
    """The module with our initial weights, and how it turns windows (B, T + 1) into a loss."""
    vocab_size = -(-shape.vocab_size // 128) * 128 if variant.padded else shape.vocab_size
    sizes = {"n_layer": shape.n_layer, "n_embd": shape.n_embd, "n_head": shape.n_head}
    model: Any
    if variant.model == "stock":
        dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        options: Any = sizes | dropout | {"n_positions": shape.seq_len, "vocab_size": vocab_size, "use_cache": False}
        config = GPT2Config(**options)
        config._attn_implementation = variant.attention
        model, loss = GPT2LMHeadModel(config), _loss_of_stock
    else:
        model = _nanogpt(variant.model, {**sizes, "block_size": shape.seq_len, "vocab_size": vocab_size})
        loss = _loss_of_nanogpt
    copy_weights(initial_model(shape, seed), model)
    return model, loss


def _loss_of_stock(model: Any, windows: Tensor) -> Tensor:
    # The plain form gives T tokens T - 1 labels; this keyword, transformers' own, gives all variants the same labels.
    return model(windows[:, :-1], labels=windows[:, 1:], shift_labels=windows[:, 1:].contiguous()).loss


def _loss_of_nanogpt(model: Any, windows: Tensor) -> Tensor:
    return model(windows[:, :-1].contiguous(), windows[:, 1:].contiguous())[1]


def _nanogpt(peer: str, sizes: dict[str, int]) -> nn.Module:
    """CLASS(config) of a Python file that also has a dataclass GPTConfig, as nanoGPT and build-nanogpt have."""
    path, _, name = peer.rpartition(":")
    if not Path(path).is_file():
        raise ValueError(f"--peer {peer}: no file {path!r}; give PATH:CLASS, for example nanoGPT/model.py:GPT")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    try:
        config, model = module.GPTConfig, getattr(module, name)
    except AttributeError as error:
        raise ValueError(f"--peer {peer}: {error}; the file needs GPTConfig and {name}") from None
    known = inspect.signature(config).parameters
    return model(config(**{key: value for key, value in sizes.items() if key in known}))


def initial_model(shape: Shape, seed: int = SEED) -> GPTForCausalLM:
    torch.manual_seed(seed)
    return GPTForCausalLM(shape.model_section().gpt_config())


@torch.no_grad()
def copy_weights(source: GPTForCausalLM, target: nn.Module) -> None:
    """Give the target our weights where it has parameters of our names, as stock GPT-2 and nanoGPT's family have."""
    ours = dict(source.named_modules())
    linear = {name for name, module in target.named_modules() if isinstance(module, nn.Linear)}  # [out, in]
    values = source.state_dict()
    for name, parameter in target.state_dict().items():
        if (value := values.get(name)) is not None:
            module = name.rpartition(".")[0]
            if value.ndim == 2 and module in linear and isinstance(ours[module], Conv1D):
                value = value.T
            parameter.zero_()
            parameter[: len(value)].copy_(value)


@functools.cache
def read_tokens() -> np.ndarray:
    """The first of the packaged plays, by the packaged tokenizer: about 300,000 ids."""
    packed = (resources.files("gpt2_hf") / "assets" / "shakespeare.jsonl.gz").read_bytes()
    plays = [json.loads(line)["text"] for line in gzip.decompress(packed).splitlines()[:8]]
    tokenizer: Any = load_tokenizer()
    return np.concatenate([tokenizer(play, verbose=False)["input_ids"] for play in plays])


def read_batches(shape: Shape) -> Tensor:
    """Several steps' batches, (steps, grad_accum_steps, B, T + 1)."""
    tokens = read_tokens() % shape.vocab_size  # of small models, in tests
    n_steps = max(2, len(tokens) // (shape.tokens + shape.tokens // shape.seq_len))
    windows = (n_steps, shape.grad_accum_steps, shape.micro_batch_size, shape.seq_len + 1)
    return torch.from_numpy(np.resize(tokens, windows))
