"""Sampling text from a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

if TYPE_CHECKING:
    from ..model import GPTForCausalLM

PROMPT = "Hello, I'm a language model,"


def sample_text(
    model: GPTForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str = PROMPT,
    *,
    max_new_tokens: int = 30,
    n_samples: int = 5,
    top_k: int = 50,
    temperature: float = 1.0,
    seed: int = 42,
    device: torch.device | str = "cpu",
) -> list[str]:
    """Sample continuations of a prompt; returns prompt and continuation, one string a sample.

    The same arguments give the same text, and the global random state stays as it was, as does the model's train or
    eval mode, so a training loop may call this at any step.

    Args:
        model: the model itself, unwrapped, on `device`.
        prompt: if empty, text starts as a document does, after <|endoftext|>.
        max_new_tokens: most new tokens; a sample also ends at <|endoftext|>, and where the model's positions do.
        top_k: draw from the k likeliest tokens only; 0 for all.
        temperature: divides the logits; 0 takes the likeliest token.

    Raises:
        ValueError: when the prompt leaves no position for a new token, or a number is out of range.
    """
    if min(max_new_tokens, n_samples) < 1 or top_k < 0 or temperature < 0:
        raise ValueError(
            f"max_new_tokens {max_new_tokens}, n_samples {n_samples}, top_k {top_k}, temperature {temperature}: "
            "the first two start at 1, the others at 0"
        )
    eot = tokenizer.eos_token_id
    tokens = tokenizer.encode(prompt) or [eot]
    room = model.config.n_positions - len(tokens)
    if room < 1:
        raise ValueError(
            f"the prompt has {len(tokens)} tokens, the model {model.config.n_positions}: shorten the prompt"
        )

    device = torch.device(device)
    input_ids = torch.tensor([tokens] * n_samples, device=device)  # (n_samples, T)
    sampling = {"do_sample": True, "top_k": top_k, "temperature": temperature} if temperature else {"do_sample": False}
    settings = GenerationConfig(
        max_new_tokens=min(max_new_tokens, room), eos_token_id=eot, pad_token_id=eot, use_cache=True, **sampling
    )
    on_cpu = device.type == "cpu"
    was_training = model.training
    model.eval()
    try:
        devices = [] if on_cpu else [input_ids.device.index]
        with torch.random.fork_rng(devices, device_type="cuda" if on_cpu else device.type), torch.no_grad():
            # torch.manual_seed would also seed devices whose state is not restored.
            torch.default_generator.manual_seed(seed)
            if not on_cpu:
                torch.get_device_module(device).manual_seed(seed)
            mask = torch.ones_like(input_ids)
            output: Any = model.generate(input_ids, attention_mask=mask, generation_config=settings)
    finally:
        model.train(was_training)
    return tokenizer.batch_decode(output, skip_special_tokens=True)
