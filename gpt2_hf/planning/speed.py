"""How long training takes: on a CPU from three rates of it and a model of a step, on a card from its usual MFU.

Letters: N parameters, C channels, L blocks, V vocabulary, T positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from .. import hardware
from ..config import RunConfig
from ..model.loss import CHUNK_BYTES
from ..training.build import DTYPES
from ..training.memory import WIDTH, Parameters, Way, computed_share
from .cards import NETWORK, Card

# What a step on a CPU costs beside its products, each in the unit of the rate that it goes with. Fitted to profiles of
# steps of 4 shapes, 128 to 768 wide (scripts/plan.py --check compares others): products take somewhat longer than
# large square ones, those of attention twice as long; the rest are exponentials' worth of elementwise work.
PRODUCTS, ATTENTION = 1.10, 2.0
SOFTMAX = {True: 3.3, False: 12.0}  # for each logit; compiled or not
BETWEEN = {True: 75.0, False: 115.0}  # for each number of the residual stream and block
SCORES = 4.9  # for each pair of positions and head that attention looks at
MICRO_STEP, STEP = 0.010, 0.010  # seconds in which nothing is computed
MUON, MUON_BEGIN = 2.5, 0.015  # its small products take longer; seconds in which they are put together
FORWARD = 1 / 3  # of the time of training on as many tokens

# Measured: what an item of HellaSwag costs, in tokens of training, and how long a run takes to begin.
HELLASWAG_ITEM = {"cpu": 100, "cuda": 700}
BEGIN = {"cpu": 30.0, "cuda": 60.0}
# Of its nominal rate a link gives so much to the sum of gradients; and of that, what hides behind the backward pass.
LINK_SHARE, HIDDEN = 0.7, 0.8


@dataclass(frozen=True)
class Rates:
    """What a CPU does, measured in about a second.

    Args:
        products: FLOP/s of matrix products, in the precision of training.
        copy: bytes/s read and written.
        exponentials: of fp32 numbers in the cache, a second.
    """

    products: float
    copy: float
    exponentials: float


def measure_rates(precision: str, seconds: float = 0.4) -> Rates:
    """The best of each that fits in the time, in processor time: other programs matter little."""
    cpu = torch.device("cpu")
    source, small = torch.randn(2**25), torch.randn(2**18)  # beyond every cache, and within it
    target, result = torch.empty_like(source), torch.empty_like(small)
    copy = hardware.fastest(partial(target.copy_, source), cpu, seconds)
    exponential = hardware.fastest(partial(torch.exp, small, out=result), cpu, seconds)
    products = hardware.measure_gemm(cpu, DTYPES[precision], seconds)
    return Rates(products, 2 * 4 * source.numel() / copy, small.numel() / exponential)


def cpu_step_seconds(
    config: RunConfig, way: Way, n: Parameters, rates: Rates, micro_batch_size: int, n_micro_steps: int
) -> float:
    """Seconds of an update on a CPU that this process has for itself."""
    model = config.model.gpt_config()
    c, vocab_size, seq_len = model.n_embd, model.vocab_size, config.data.seq_len
    tokens = micro_batch_size * seq_len
    n_pairs = tokens * seq_len * computed_share(config, way.attention) * model.n_layer * model.n_head
    slower = 1.0 if way.attention == "blockwise" else 2.2  # PyTorch's fused attention, forward and back
    products = 6 * tokens * (n.matrices * _recomputed(config, n) + vocab_size * c) * PRODUCTS
    attention = 12 * n_pairs * (c // model.n_head)
    elementwise = tokens * vocab_size * SOFTMAX[way.is_compiled] + tokens * model.n_layer * c * BETWEEN[way.is_compiled]
    # The head's gradient is read and written for each chunk of tokens, and its padded copy made.
    n_chunks = max(1, tokens * vocab_size * WIDTH[way.precision] / CHUNK_BYTES["cpu"])
    moved = vocab_size * c * (8 * n_chunks + 18)
    micro_step = (
        products / rates.products
        + slower * (attention * ATTENTION / rates.products + n_pairs * SCORES / rates.exponentials)
        + elementwise / rates.exponentials
        + moved / rates.copy
        + MICRO_STEP
    )
    return micro_step * n_micro_steps + _update_seconds(config, n, rates) + STEP


def _update_seconds(config: RunConfig, n: Parameters, rates: Rates) -> float:
    """Of AdamW: parameter, gradient and two averages read, three of them written. Of Muon: five turns of products."""
    seconds = 28 * n.total / rates.copy
    if config.optim.name == "muon":
        model = config.model.gpt_config()
        # c_attn is three square matrices, c_proj one, and of those of the MLP the narrow side counts.
        rows, long = model.n_embd, 4 * model.n_embd
        squares = 4 * (3 * 2 * rows**3)
        oblong = 2 * (2 * (2 * rows * rows * long) + 2 * rows**3)
        seconds += 5 * model.n_layer * (squares + oblong) * MUON / rates.products + MUON_BEGIN
    return seconds


def gpu_step_seconds(
    config: RunConfig, card: Card, n: Parameters, flops_per_token: float, n_cards: int, n_micro_steps: int
) -> float:
    """Seconds of an update on so many cards of a kind: products at the card's usual MFU, then what is exchanged."""
    tokens = config.train.global_batch_tokens / n_cards
    rate = card.peak * card.mfu_of(n.total) * slower_kernels(config)[0]
    computing = tokens * flops_per_token * _recomputed_in_all(config, n, flops_per_token) / rate
    if n_cards == 1:
        return computing
    link = NETWORK if n_cards > 8 else card.link
    exchange = 2 * 4 * n.total * (n_cards - 1) / n_cards / (link * LINK_SHARE)
    backward = computing / n_micro_steps * 2 / 3  # of the last micro-step, behind which most of it goes
    return computing + max(exchange * (1 - HIDDEN), exchange - backward)


def slower_kernels(config: RunConfig) -> tuple[float, str]:
    """Which share of a card's usual rate is left where a recipe does without its fast kernels, and in words why.

    Assumed, from the lecture's steps on one A100: fp32 1000 ms, TF32 333, bf16 300, and 130 when that is compiled.
    """
    if config.train.precision in ("fp32", "fp64"):
        return (0.45, "TF32 for bf16") if config.train.tf32 and config.train.precision == "fp32" else (0.13, "no TF32")
    return (0.45, "not compiled") if config.train.compile == "off" else (1.0, "")


def _recomputed(config: RunConfig, n: Parameters) -> float:
    """How much more the blocks compute when activations are recomputed: their forward pass a second time."""
    return 4 / 3 if config.train.gradient_checkpointing else 1.0


def _recomputed_in_all(config: RunConfig, n: Parameters, flops_per_token: float) -> float:
    if not config.train.gradient_checkpointing:
        return 1.0
    model = config.model.gpt_config()
    forward = 2 * n.matrices + 4 * model.n_layer * model.n_embd * config.data.seq_len
    return 1 + forward / flops_per_token


def measuring_tokens(config: RunConfig, device: str) -> float:
    """What is measured on the way, as tokens of training that take as long; samples are left out."""
    steps, evaluation = config.train.steps, config.eval

    def times(every: int) -> int:
        return 0 if not every else -(-steps // every) + 1  # before the first step too, and after the last

    hellaswag = times(evaluation.hellaswag_every) * evaluation.hellaswag_items * HELLASWAG_ITEM[device]
    return times(evaluation.val_every) * evaluation.val_tokens * FORWARD + hellaswag
