"""Figures of finished models: runs, folders or hub ids in, measurements out, of several on the same text and items.

A run is evaluated as it was measured in training: on its own validation data, over its own windows, with its document
mask. What is beside it sees the same.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import yaml
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .. import hardware
from ..data.documents import DocumentMask
from ..data.remote import open_folder
from ..data.shards import ShardError, ShardSet, open_split
from ..data.stream import TokenStream
from ..data.tokenizer import load_tokenizer, open_tokenizer
from ..knobs import PathName, Range, checked
from ..model import GPTForCausalLM
from ..runs import find_model, run_of
from .compare import standard_error
from .hellaswag import HELLASWAG_ITEMS, HellaSwag, load_hellaswag
from .validation import validation_loss

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def locate(folder_or_hub_id: str | Path, say: Callable[[str], None] = print) -> str:
    """The gpt2 folder that is meant, of a run the model that it has come to; a hub id as it is. Raises ValueError."""
    path = Path(folder_or_hub_id)
    if (path / "checkpoints").is_dir() or (path / "final").is_dir():
        try:
            return str(find_model(path, say))
        except FileNotFoundError as error:
            raise ValueError(str(error)) from None
    return str(folder_or_hub_id)


def load_folder(
    folder_or_hub_id: str | Path, device: torch.device | str = "cpu"
) -> tuple[GPTForCausalLM, PreTrainedTokenizerBase]:
    """A GPT-2 checkpoint, stock or ours, or a run's, in float32 and eval mode, and its tokenizer (or the packaged one).

    Raises:
        ValueError: one line, when there is no such folder or model, when it is not a GPT-2, lacks weights or is an
            adapter.
    """
    name = locate(folder_or_hub_id)
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


@dataclass(frozen=True)
class Text:
    """The validation text on which models are compared.

    Attributes:
        seq_len: tokens of a window.
        n_windows: that are scored, from the first.
        document_mask: whether tokens see only their own document.
    """

    path: str
    shards: ShardSet
    seq_len: int
    n_windows: int
    document_mask: bool

    @property
    def stream(self) -> TokenStream:
        return TokenStream(self.shards, self.seq_len, seed=0, shuffle=False)


@dataclass(frozen=True)
class Evaluation:
    """What was found of one model.

    Attributes:
        figures: val_loss (nats a token), val_ppl, val_bpb, hellaswag_acc, hellaswag_acc_norm, hellaswag_lecture_acc,
            those with a standard error of their name and _stderr, and hellaswag_items.
        outcomes: what the figures of these names are means of: each window's loss; whether each item's answer is right.
    """

    figures: dict[str, float]
    outcomes: dict[str, np.ndarray]


@dataclass(frozen=True)
class Ranks:
    """The processes that share the work; each gets all figures."""

    rank: int = 0
    world_size: int = 1

    @staticmethod
    def join() -> Ranks:
        """Those that torchrun or `accelerate launch` has started, if it has."""
        from accelerate import PartialState

        asked = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
        state = PartialState(cpu=asked or not torch.accelerator.is_available())
        return Ranks(state.process_index, state.num_processes)

    @property
    def shared(self) -> dict[str, Any]:
        reduce = _sum if self.world_size > 1 else None
        return {"rank": self.rank, "world_size": self.world_size, "reduce": reduce}


ALONE = Ranks()


def _sum(tensor: Tensor) -> Tensor:
    dist.all_reduce(tensor)
    return tensor


def choose_text(
    models: Sequence[str | Path],
    data: str | Path | None = None,
    n_windows: int | None = None,
    seq_len: int | None = None,
    document_mask: bool | None = None,
) -> Text | None:
    """What to measure the validation loss of these models on; None where neither ``data`` nor a run says.

    The first run among the models settles what is not given. Without one it is the whole split, in windows as long as
    every model can read.

    Raises:
        ValueError: when the data cannot be used, or a model cannot read windows of that length.
    """
    settings = next((found for model in models if (found := _settings_of(model))), {})
    own = settings.get("data", {})
    path = own.get("path") if data is None else data
    if path is None:
        return None
    try:
        of_run = open_tokenizer(name) if (name := own.get("tokenizer")) else None
        shards = open_split(open_folder(path), "val", of_run if str(path) == str(own.get("path")) else None)
    except ShardError as error:
        if data is not None:
            raise
        print(f"no validation loss: {error} (--data names the data where it is now)")
        return None
    positions = {str(model): _n_positions(locate(model)) for model in models}
    shortest = min(positions, key=positions.__getitem__)
    seq_len = min(own.get("seq_len", positions[shortest]), positions[shortest]) if seq_len is None else seq_len
    if seq_len > positions[shortest]:
        raise ValueError(f"seq_len is {seq_len}, and {shortest} has {positions[shortest]} positions: choose fewer")
    mask = own.get("document_mask", False) if document_mask is None else document_mask
    text = Text(str(path), shards, seq_len, 0, mask)
    available = text.stream.n_windows
    if n_windows is None:
        in_training = settings.get("eval", {}).get("val_tokens") if data is None else None
        n_windows = max(1, min(available, in_training // seq_len)) if in_training else available
    return Text(str(path), shards, seq_len, n_windows, mask)


def _settings_of(model: str | Path) -> dict[str, Any]:
    """The recipe that a run, or the run that a checkpoint lies in, was made with; empty where there is none."""
    run = run_of(Path(model))
    recipe = run / "config.yaml" if run else None
    if recipe is None or not recipe.is_file():
        return {}
    found = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    return found if isinstance(found, dict) else {}


def _n_positions(source: str) -> int:
    from ..model import GPTConfig

    try:
        return GPTConfig.from_pretrained(source).n_positions
    except (OSError, ValueError):
        return load_folder(source)[0].config.n_positions  # which says what is wrong


def evaluate(
    model: GPTForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    text: Text | None = None,
    *,
    hellaswag_items: int | None = None,
    tokens_per_batch: int = 16_384,
    dtype: str = "float32",
    ranks: Ranks = ALONE,
) -> Evaluation:
    """Evaluate a model where it is.

    Args:
        text: what val_loss, val_ppl and val_bpb are of; None leaves them out.
        hellaswag_items: size of the fixed HellaSwag subset (default: all 10,042); 0 leaves HellaSwag out.
        tokens_per_batch: tokens of a forward call. On a CPU 2048 are a little faster.
        dtype: what to compute in, a name of torch's.

    Raises:
        ValueError: for a text with another vocabulary, or a number out of range.
    """
    device, config = model.device, model.config
    compute = {
        "autocast": partial(torch.autocast, device.type, dtype=getattr(torch, dtype), enabled=dtype != "float32")
    }
    shared: dict[str, Any] = {"device": device, **compute, **ranks.shared}
    figures: dict[str, float] = {}
    outcomes: dict[str, np.ndarray] = {}
    if text is not None:
        if text.shards.vocab_size > config.vocab_size:
            raise ValueError(
                f"{text.path} has a vocabulary of {text.shards.vocab_size}, the model one of {config.vocab_size}: "
                "evaluate on data made with the model's tokenizer"
            )
        of_text = text.shards.tokenizer
        if not of_text.knows(tokenizer.get_vocab()):
            raise ValueError(
                f"{text.path} was made with the tokenizer {of_text.name}, the model has another: evaluate on data made "
                "with the model's tokenizer"
            )
        documents = None
        if text.document_mask:
            backend, shards = config._attn_implementation, text.shards
            documents = DocumentMask(shards.eot, shards.eot_first, backend, getattr(torch, dtype))
        losses = np.zeros(text.n_windows)
        figures |= validation_loss(
            model,
            text.stream,
            n_windows=text.n_windows,
            batch_size=max(1, tokens_per_batch // text.seq_len),
            documents=documents,
            window_losses=losses,
            **shared,
        )
        figures |= {"val_loss_stderr": standard_error(losses), "val_ppl": math.exp(min(figures["val_loss"], 700))}
        outcomes["val_loss"] = losses
    task = None
    if hellaswag_items != 0:
        task = HellaSwag(load_hellaswag(hellaswag_items), tokenizer, n_positions=config.n_positions)
        if task.obstacle and ranks.rank == 0:
            print(task.obstacle)
    if task is not None and not task.obstacle:
        scores = task.score(model, tokens_per_batch=tokens_per_batch, show_progress=ranks.rank == 0, **shared)
        right = {f"hellaswag_{name}": picks == task.labels for name, picks in scores.picks.items()}
        figures |= {name: float(values.mean()) for name, values in right.items()}
        figures |= {f"{name}_stderr": standard_error(values) for name, values in right.items()}
        figures["hellaswag_items"] = len(task.labels)
        outcomes |= right
    return Evaluation(figures, outcomes)


def compute_on(device: str, dtype: Dtype) -> tuple[torch.device, str]:
    """The device that is meant, and the name of what to compute in there. Raises ValueError."""
    where = hardware.pick_device(device)
    if where.type == "cpu":
        hardware.reuse_freed_memory()
    if dtype == "auto":
        has_bf16 = where.type == "cuda" and torch.cuda.is_bf16_supported(False)
        return where, "bfloat16" if has_bf16 else "float32"
    return where, dtype


@checked
def evaluate_folder(
    folder_or_hub_id: str | Path,
    data: Annotated[str | Path, PathName(remote=True)] | None = None,
    *,
    n_windows: Annotated[int, Range(1)] | None = None,
    hellaswag_items: Annotated[int, Range(0, HELLASWAG_ITEMS)] | None = None,
    document_mask: bool | None = None,
    tokens_per_batch: Annotated[int, Range(1, 10**9)] = 16_384,
    device: str = "auto",
    dtype: Dtype = "auto",
) -> dict[str, float]:
    """The figures of one run, checkpoint folder or model of the Hub, as ``choose_text`` and ``evaluate`` have them."""
    where, precision = compute_on(device, dtype)
    text = choose_text([folder_or_hub_id], data, n_windows=n_windows, document_mask=document_mask)
    model, tokenizer = load_folder(folder_or_hub_id, where)
    settings: dict[str, Any] = {"hellaswag_items": hellaswag_items, "tokens_per_batch": tokens_per_batch}
    return evaluate(model, tokenizer, text, dtype=precision, **settings).figures
