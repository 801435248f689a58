"""The newest releases that this code was tested with. Under a newer one its results are checked at their first use.

A release may change what its calls mean without an error: transformers 5.24 renamed the cache, and cached generation by
the old name gave other text.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.nn.functional as F
from packaging.version import Version
from torch import Tensor, nn
from transformers import GPT2LMHeadModel

NEWEST_TESTED = {"torch": "2.13.0", "transformers": "5.24.0", "accelerate": "1.15.0"}
PREFIX = 64  # tokens of the first sample that are computed again
CHUNK = 1024  # tokens whose logits are held at once


def untested() -> str:
    """The installed releases that are newer than the newest tested, such as "torch 2.14.0 (2.13.0)"; "" for none."""
    found = []
    for name, tested in NEWEST_TESTED.items():
        try:
            installed = version(name)
        except PackageNotFoundError:  # accelerate, where only the model is used
            continue
        if Version(installed).release > Version(tested).release:
            found.append(f"{name} {installed} ({tested})")
    return ", ".join(found)


def _differ(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    tolerance = 1e-2 if dtype in (torch.float32, torch.float64) else 0.2
    return bool((a.double() - b.double()).abs().max() > tolerance * b.double().std())


def _refuse(what: str) -> None:
    newer = untested()
    raise ImportError(
        f"{what}. Newer than the newest that gpt2_hf was tested with (in brackets): {newer}. Install the tested version"
    )


@torch.no_grad()
def compare_cached(model: Any, generate: Any) -> None:
    """Raise ImportError when greedy tokens drawn with the cache have other logits than without it.

    Args:
        generate: transformers' own ``generate`` of this model.
    """
    n_new = min(4, model.config.n_positions - 4)
    if n_new < 2:
        return
    prompt = torch.arange(4, device=model.device)[None] % model.config.vocab_size
    settings = {"max_new_tokens": n_new, "min_new_tokens": n_new, "do_sample": False, "pad_token_id": 0}
    settings |= {"return_dict_in_generate": True, "output_logits": True, "attention_mask": torch.ones_like(prompt)}
    was_training = model.training
    model.eval()
    try:
        with torch.compiler.set_stance("force_eager"):
            cached, plain = (generate(prompt, use_cache=use_cache, **settings) for use_cache in (True, False))
    finally:
        model.train(was_training)
    for step, (a, b) in enumerate(zip(cached.logits, plain.logits, strict=True)):
        if _differ(a, b, model.dtype):
            _refuse("generate() with a cache gives other logits than without one")
        if not torch.equal(cached.sequences[:, : 5 + step], plain.sequences[:, : 5 + step]):
            return  # two tokens were as likely as each other: from here on the texts may differ


def check_first_step(model: Any, has_checked_loss: bool = False) -> None:
    """Under an untested release, compare the first training step's forward pass with stock GPT-2's, and its loss with
    plain cross-entropy; a difference raises ImportError. The numbers of the run stay what they are.

    Args:
        model: a GPTForCausalLM as it will be trained, not wrapped.
        has_checked_loss: leave out the comparison with cross-entropy, which has been made.
    """
    if not untested():
        return
    seen: dict[str, Tensor] = {}

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        seen["hidden"] = output.last_hidden_state.detach()  # (B, T, C)

    def compare(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        for handle in handles:
            handle.remove()
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            _compare_step(model, seen["hidden"], args[0], kwargs, None if has_checked_loss else output.loss)

    handles = [
        model.transformer.register_forward_hook(keep),
        model.register_forward_hook(compare, with_kwargs=True),
    ]


def _compare_step(model: Any, hidden: Tensor, input_ids: Tensor, kwargs: dict[str, Any], loss: Tensor | None) -> None:
    device = input_ids.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.dtype
    labels, weight = kwargs["shift_labels"].flatten(), model.lm_head.weight
    with torch.autocast(device, enabled=False):
        config = model.config
        plain = not (config.resid_pdrop or config.embd_pdrop or config.attn_pdrop) and kwargs.keys() <= {
            "shift_labels",
            "num_items_in_batch",
        }
        if plain:  # no dropout, no documents kept apart: a prefix is computed as it is alone
            prefix = input_ids[:1, :PREFIX]
            expected = _stock(model)(prefix, use_cache=False).last_hidden_state
            if _differ(hidden[:1, :PREFIX], expected, dtype):
                _refuse("the first training step's forward pass differs from stock GPT-2's")
        if loss is None:
            return
        total = sum(
            F.cross_entropy((rows.to(dtype) @ weight.to(dtype).T).float(), wanted, reduction="sum")
            for rows, wanted in zip(hidden.flatten(0, 1).split(CHUNK), labels.split(CHUNK), strict=True)
        )
        expected_loss = float(total) / int(kwargs["num_items_in_batch"])
        if abs(float(loss) - expected_loss) > 1e-2 * expected_loss:
            _refuse(f"the first training step's loss is {float(loss):.4f}, by plain cross-entropy {expected_loss:.4f}")


def _stock(model: Any) -> nn.Module:
    """transformers' own GPT-2 over the same parameters, with the plain form of attention."""
    config = type(model.config).from_dict(model.config.to_dict())
    config._attn_implementation = "eager"
    with torch.device("meta"):
        stock = GPT2LMHeadModel(config)
    stock.load_state_dict(model.state_dict(keep_vars=True), assign=True)
    return stock.transformer.eval()
