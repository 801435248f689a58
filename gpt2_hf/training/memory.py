"""What a training step holds in memory, by part, counted from the recipe.

Letters: N parameters, C channels, L blocks, V vocabulary, T positions, B windows of a micro-batch, w bytes of a number
in the precision of the matrix products.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from ..config import RunConfig
from ..hardware import has_narrow_residual
from ..model import GPTForCausalLM
from ..model.loss import CHUNK_BYTES, PAD_MULTIPLE

WIDTH = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}

# What no tensor shows. On a GPU its driver's context, libraries' workspaces, and room that the allocator cannot use; in
# a process on the CPU what the first step brings with it (oneDNN, threads, the compiler). Fitted to measured peaks.
GPU_CONTEXT, GPU_LOST = 0.9e9, 0.03
CPU_LIBRARIES, CPU_COMPILER, CPU_LOST = 60e6, 180e6, 0.05


@dataclass(frozen=True)
class Parameters:
    """How many numbers a model has: in all, and in parts that are treated differently."""

    total: int
    embeddings: int  # of tokens and positions; the head is the first of them
    matrices: int  # of the blocks, with two dimensions

    @classmethod
    def of(cls, config: RunConfig) -> Parameters:
        with torch.device("meta"):
            model = GPTForCausalLM(config.model.gpt_config())
        named = dict(model.named_parameters())
        return cls(
            total=sum(p.numel() for p in named.values()),
            embeddings=sum(p.numel() for name, p in named.items() if ".wte." in name or ".wpe." in name),
            matrices=sum(p.numel() for name, p in named.items() if ".h." in name and p.ndim == 2),
        )


@dataclass(frozen=True)
class Way:
    """How a recipe is computed.

    Args:
        device: cpu or cuda.
        shards: ranks that share one copy of the model; 1 where each has it whole.
    """

    device: str
    precision: str
    is_compiled: bool
    attention: str
    shards: int = 1


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank, at the moment when most are held: while the loss is computed, or when gradients are whole."""

    weights: float
    averages: float
    gradients: float
    copies: float  # of weights, in the precision of the products: cast, or gathered from other ranks
    activations: float
    loss: float
    rest: float

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))


def n_averages(config: RunConfig, n: Parameters) -> int:
    """Numbers that are kept beside the weights: averages of gradients and their squares, and of weights."""
    of_muon = n.matrices if config.optim.name == "muon" else 0
    return 2 * n.total - of_muon + (n.total if config.optim.ema else 0)


def memory_of(config: RunConfig, way: Way, n: Parameters, micro_batch_size: int, accumulates: bool) -> Memory:
    """What a rank holds at most.

    Args:
        accumulates: an update has several micro-steps, so that gradients of the earlier ones are held in the next.
    """
    model = config.model.gpt_config()
    whole = WIDTH["fp64"] if way.precision == "fp64" else 4
    width, tokens = WIDTH[way.precision], micro_batch_size * config.data.seq_len
    weights = whole * n.total / way.shards
    averages = whole * n_averages(config, n) / way.shards
    if way.shards > 1:
        # Gathered once a step: blocks in the products' precision, embeddings and the head as they are. Between
        # micro-steps whole gradients are added up.
        copies: float = width * (n.total - n.embeddings) + whole * n.embeddings
        gradients: float = whole * n.total / way.shards + whole * n.total * accumulates
    else:
        copies = width * n.matrices if width != whole else 0.0
        gradients = whole * n.total * accumulates
    activations = tokens * activation_bytes(config, way)
    loss = _loss_bytes(way, tokens, model.n_embd, model.vocab_size, whole)
    # At the end of the backward pass all gradients are there, and nothing of the rest.
    grown = whole * n.total * (1 / way.shards + (way.shards > 1)) - gradients
    if grown > copies + activations + loss:
        gradients, copies, activations, loss = gradients + grown, 0.0, 0.0, 0.0
    held = weights + averages + gradients + copies + activations + loss
    if way.device == "cpu":
        rest = CPU_LIBRARIES + CPU_COMPILER * way.is_compiled + CPU_LOST * held
    else:
        rest = GPU_CONTEXT + GPU_LOST * held
    return Memory(weights, averages, gradients, copies, activations, loss, rest)


def memory_on(config: RunConfig, way: Way, n: Parameters, micro_batch_size: int, n_devices: int) -> Memory:
    """What each of so many devices holds at most."""
    accumulates = config.train.global_batch_tokens > micro_batch_size * config.data.seq_len * n_devices
    return memory_of(config, way, n, micro_batch_size, accumulates)


def largest_that_fits(config: RunConfig, way: Way, n: Parameters, room: float, n_devices: int) -> int:
    """The largest micro-batch that divides and takes no more than ``room`` bytes of each device; 0: none does."""
    sizes = config.micro_batch_sizes(n_devices)
    return max((size for size in sizes if memory_on(config, way, n, size, n_devices).total <= room), default=0)


def activation_bytes(config: RunConfig, way: Way) -> float:
    """What is kept of one token for the backward pass, before the loss."""
    model = config.model.gpt_config()
    c, n_head, width = model.n_embd, model.n_head, WIDTH[way.precision]
    is_narrow = has_narrow_residual(config.train.residual, way.device, way.precision)
    residual = width if is_narrow else max(4, width)  # the sum that runs through all blocks
    statistics = 16 + 4 * n_head  # of two norms and of attention's softmax
    # Attention's and the MLP's inputs, queries, keys and values, what attention gives, and the two of 4 C around GELU.
    own = residual + 15 * width if way.is_compiled else 2 * residual + 14 * width
    block: float = own * c + statistics
    if config.model.dropout:
        block += 2 * c  # masks, a byte each
    seq_len = config.data.seq_len
    if way.attention == "blockwise":
        # Of each pair that is computed scores in fp32 and weights in bf16, of the first block's twice bf16; keys and
        # values once more for each block of queries.
        ends = _block_ends(seq_len)
        block += 2 * width * c * (sum(ends) / seq_len - 1)
        block += n_head * (6 * _n_pairs(ends) - 2 * ends[0] ** 2) / seq_len
    elif way.attention == "eager":
        block += (4 + 2 * width) * n_head * seq_len
    last = residual * c + width * c  # what the last norm reads and gives
    if config.train.gradient_checkpointing:  # each block's input, and one block at a time
        return model.n_layer * residual * c + block + last
    return model.n_layer * block + last


def _block_ends(seq_len: int) -> list[int]:
    """Where the blocks of queries of blockwise attention end (model/attention.py)."""
    size = max(128, -(-seq_len // 4))
    return [min(start + size, seq_len) for start in range(0, seq_len, size)]


def _n_pairs(ends: list[int]) -> int:
    """Pairs of positions that blockwise attention computes: each block's queries with all keys up to its end."""
    return sum((end - start) * end for start, end in zip([0, *ends], ends, strict=False))


def computed_share(config: RunConfig, attention: str) -> float:
    """Of all pairs of positions, those whose scores a kind of attention computes."""
    seq_len = config.data.seq_len
    if attention == "blockwise":
        return _n_pairs(_block_ends(seq_len)) / seq_len**2
    return 1.0 if attention == "eager" else 0.5


def _loss_bytes(way: Way, tokens: int, c: int, vocab_size: int, whole: int) -> float:
    """The head's padded copy, a chunk's logits, the gradients made on the way (model/loss.py)."""
    width = WIDTH[way.precision]
    padded = -(-vocab_size // PAD_MULTIPLE) * PAD_MULTIPLE
    limit = max(128, CHUNK_BYTES.get(way.device, 2**28) // (padded * width))
    n_chunks = -(-tokens // limit)
    chunk = -(-tokens // n_chunks) * padded
    logits = chunk * width + (chunk * 4 if width == 2 and not way.is_compiled else 0)
    return padded * c * width + logits + 2 * tokens * c * width + whole * vocab_size * c
