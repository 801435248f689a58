"""The library versions that this code was tested with, and a check against itself for newer ones.

A release may rename an argument, and then nothing fails: results are only other ones. So where something newer than the
table is installed, the first use compares two ways to the same figures, in milliseconds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor, nn
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

# The oldest and the newest releases that the tests ran with; what is usually installed stands in constraints.txt.
OLDEST = {"torch": "2.11", "transformers": "5.17", "accelerate": "1.15"}
TESTED = {"torch": "2.13.0", "transformers": "5.24.0", "accelerate": "1.15.0"}


@functools.cache
def untested() -> str:
    """What is installed and newer than what was tested, for example "transformers 5.31.0"; "" when nothing is."""
    found = {}
    for name in TESTED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # accelerate is not needed where this code has travelled to
            continue
    return ", ".join(f"{name} {v}" for name, v in found.items() if Version(v).release > Version(TESTED[name]).release)


@contextmanager
def _at_rest(model: nn.Module) -> Iterator[None]:
    """No dropout, gradients or compiling in here; the mode comes back."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        model.train(was_training)


def _compare(what: str, found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    tolerance = 1e-4 if dtype in (torch.float32, torch.float64) else 2e-2
    scale = expected.float().abs().max()
    distance = (found.float() - expected.float()).abs().max()
    if not distance <= tolerance * scale:  # NaN too
        tested = ", ".join(f"{name} {v}" for name, v in TESTED.items())
        raise ImportError(
            f"{what} by {distance:.2g} of {scale:.2g} with {untested()}, newer than what this code was tested with "
            f"({tested}): install the tested versions"
        )


def check_generation(model: Any, generate: Callable[..., Any]) -> None:
    """Compare the logits of a few tokens generated with a cache with those of one forward call without.

    Does nothing where all versions are tested ones. Global state and the model's mode stay as they were.

    Args:
        generate: the model's own, without this check.

    Raises:
        ImportError: naming the versions, when they differ.
    """
    n_new = 4
    n_prompt = min(8, model.config.n_positions - n_new)
    if not untested() or n_prompt < 1:
        return
    prompt = torch.arange(n_prompt, device=model.device)[None] * 7 % model.config.vocab_size
    settings = GenerationConfig(
        max_new_tokens=n_new,
        do_sample=False,
        use_cache=True,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    with _at_rest(model):
        out = generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=settings)
        expected = model(out.sequences[:, :-1], use_cache=False).logits[:, n_prompt - 1 :]
    found = torch.stack(out.logits, dim=1)
    _compare("logits of tokens generated with a cache differ from those without", found, expected, expected.dtype)


def check_loss(model: Any, windows: Tensor, autocast: AbstractContextManager) -> None:
    """Compare the training loss of a few tokens, one by one, with stock GPT-2's logits on the same weights.

    Does nothing where all versions are tested ones. Global state and the model's mode stay as they were.

    Args:
        model: the model itself, unwrapped.
        windows: tokens (B, T + 1) of a training batch, of which a slice is used.
        autocast: the context that training computes in.

    Raises:
        ImportError: naming the versions, when they differ.
    """
    if not untested():
        return
    window = windows[:1, :65].to(model.device)
    config = GPT2Config.from_dict({**model.config.to_dict(), "dtype": None}, attn_implementation="eager")
    with torch.device("meta"):
        stock = GPT2LMHeadModel(config).eval()
    with _at_rest(model):
        call = torch.func.functional_call
        logits = call(stock, model.state_dict(), window[:, :-1], {"use_cache": False}, tie_weights=False).logits
        expected = nn.functional.cross_entropy(logits.float().transpose(1, 2), window[:, 1:], reduction="none")
        with autocast:
            dtype = (window.new_zeros(1, 1).float() @ window.new_zeros(1, 1).float()).dtype
            found = model(window[:, :-1], shift_labels=window[:, 1:], reduction="none").loss
    _compare("the training loss differs from stock GPT-2's", found, expected, dtype)
