"""Figures of a finished model: the folder, or the hub's id, of a GPT-2 in, a dictionary of measurements out."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .. import hardware
from ..data.documents import DocumentMask
from ..data.remote import open_folder
from ..data.shards import open_split
from ..data.stream import TokenStream
from ..data.tokenizer import load_tokenizer
from ..knobs import PathName, Range, checked
from ..model import GPTForCausalLM
from ..runs import find_model
from .hellaswag import HellaSwag, load_hellaswag
from .validation import validation_loss


def load_folder(
    folder_or_hub_id: str | Path, device: torch.device | str = "cpu"
) -> tuple[GPTForCausalLM, PreTrainedTokenizerBase]:
    """A GPT-2 checkpoint, stock or ours, or a run's, in float32 and eval mode, and its tokenizer (or the packaged one).

    Raises:
        ValueError: one line, when there is no such folder or model, when it is not a GPT-2, lacks weights or is an
            adapter.
    """
    name = str(folder_or_hub_id)
    if (Path(name) / "checkpoints").is_dir() or (Path(name) / "final").is_dir():
        try:
            name = str(find_model(Path(name)))
        except FileNotFoundError as error:
            raise ValueError(str(error)) from None
    # A hub id has at most one slash and never starts with a dot or a slash.
    if not Path(name).is_dir() and not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise ValueError(f"no folder {name}: give a checkpoint folder (with config.json), or a model id of the Hub")
    try:
        model: Any = GPTForCausalLM.from_pretrained(name, dtype=torch.float32)
        tokenizer: Any = AutoTokenizer.from_pretrained(name)
    except OSError as error:
        where = "" if Path(name).is_dir() else " (no such folder, so looked for on the Hub)"
        why = str(error).strip().splitlines()[0].removeprefix(f"cannot load {name}: ")
        raise ValueError(f"cannot load {name}{where}: {why}") from None
    if model._hf_peft_config_loaded:
        raise ValueError(
            f"{name} is an adapter, not a whole model: merge it (peft's merge_and_unload) and give the folder that "
            "save_pretrained makes of the result"
        )
    if len(tokenizer) <= 1:  # transformers makes an empty vocabulary of a folder without tokenizer files
        tokenizer = load_tokenizer()
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"{name} has {model.config.vocab_size} tokens in its model and {len(tokenizer)} in its tokenizer: "
            "put the model's own tokenizer files in the folder"
        )
    return model.to(device).eval(), tokenizer


@checked
def evaluate_folder(
    folder_or_hub_id: str | Path,
    data: Annotated[str | Path, PathName(remote=True)] | None = None,
    *,
    n_windows: Annotated[int, Range(1)] | None = None,
    hellaswag_items: Annotated[int, Range(0, 10_042)] | None = None,
    document_mask: bool = False,
    tokens_per_batch: Annotated[int, Range(1, 10**9)] = 16_384,
    device: str = "auto",
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
) -> dict[str, float]:
    """Evaluate a checkpoint folder or hub model.

    Args:
        data: prepared data folder whose split "val" gives val_loss and val_bpb; without it there is neither.
        n_windows: validation windows to use, from the first (default: all); each as long as the model's n_positions.
        hellaswag_items: size of the fixed HellaSwag subset (default: all 10,042); 0 leaves HellaSwag out.
        document_mask: let validation tokens see only their own document, as a run with data.document_mask does.
        tokens_per_batch: tokens of a forward call; lower it if memory runs out. On a CPU 2048 are a little faster.
        device: "auto" takes an accelerator if there is one.
        dtype: what to compute in; "auto" is bfloat16 on CUDA where supported, as in training.

    Raises:
        ValueError: one line, for a folder, data or number that cannot be used.
    """
    where = hardware.pick_device(device)
    if where.type == "cpu":
        hardware.reuse_freed_memory()
    if dtype == "auto":
        dtype = "bfloat16" if where.type == "cuda" and torch.cuda.is_bf16_supported(False) else "float32"
    autocast = partial(torch.autocast, where.type, dtype=getattr(torch, dtype), enabled=dtype != "float32")

    model, tokenizer = load_folder(folder_or_hub_id, where)
    n_positions = model.config.n_positions
    results: dict[str, float] = {}
    if data is not None:
        shards = open_split(open_folder(data), "val")
        if shards.vocab_size > model.config.vocab_size:
            raise ValueError(
                f"{data} has a vocabulary of {shards.vocab_size}, the model one of {model.config.vocab_size}: "
                "evaluate on data made with the model's tokenizer"
            )
        stream = TokenStream(shards, n_positions, seed=0, shuffle=False)
        documents = None
        if document_mask:
            attention = model.config._attn_implementation
            documents = DocumentMask(shards.eot, shards.eot_first, attention, getattr(torch, dtype))
        results |= validation_loss(
            model,
            stream,
            n_windows=stream.n_windows if n_windows is None else n_windows,
            batch_size=max(1, tokens_per_batch // n_positions),
            device=where,
            autocast=autocast,
            documents=documents,
        )
    if hellaswag_items != 0:
        task = HellaSwag(load_hellaswag(hellaswag_items), tokenizer, n_positions=n_positions)
        scores = task.score(
            model, device=where, tokens_per_batch=tokens_per_batch, autocast=autocast, show_progress=True
        )
        results |= scores.metrics
    return results
