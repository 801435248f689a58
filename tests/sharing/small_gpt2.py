"""Small GPT-2 folders with GPT-2's tokenizer, or a small piece of it."""

import functools
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from gpt2_hf.data.tokenizer import ASSETS, VOCAB_SIZE
from gpt2_hf.model import GPTConfig, GPTForCausalLM

BYTES = 257  # GPT-2's first 256 tokens are the bytes
SMALL = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 32}
CODE = {"attention.py", "configuration_gpt.py", "hub.py", "loss.py", "modeling_gpt.py", "versions.py"}


def small_model(**fields) -> GPTForCausalLM:
    torch.manual_seed(0)
    model = GPTForCausalLM(GPTConfig(**{**SMALL, **fields}))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)  # large, so that attention is not uniform
    return model.eval()


def save(folder: Path, with_code: bool = False, tokenizer: str = "bytes", shards: str = "1GB", **fields) -> Path:
    """A small model with GPT-2's tokenizer ("gpt2"), its first 256 tokens ("bytes", and fast), or none ("")."""
    size = {"gpt2": VOCAB_SIZE}.get(tokenizer, BYTES)
    fields = {"vocab_size": size, "bos_token_id": size - 1, "eos_token_id": size - 1, **fields}
    small_model(**fields).save_pretrained(folder, with_code=with_code, max_shard_size=shards)
    if tokenizer:
        settings = json.loads((ASSETS / "tokenizer" / "tokenizer_config.json").read_text())
        settings["model_max_length"] = {**SMALL, **fields}["n_positions"]
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        (folder / "tokenizer.json").write_text(_tokenizer(tokenizer))
    return folder


@functools.cache
def _tokenizer(kind: str) -> str:
    text = (ASSETS / "tokenizer" / "tokenizer.json").read_text()
    if kind == "gpt2":
        return text
    content = json.loads(text)
    vocab = {token: number for token, number in content["model"]["vocab"].items() if number < 256}
    content["model"] |= {"vocab": vocab | {"<|endoftext|>": 256}, "merges": []}
    content["added_tokens"][0]["id"] = 256
    return json.dumps(content)


def edit_weights(folder: Path, edit) -> Path:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def edit_config(folder: Path, file: str = "config.json", **fields) -> Path:
    config = json.loads((folder / file).read_text()) | fields
    (folder / file).write_text(json.dumps(config))
    return folder
