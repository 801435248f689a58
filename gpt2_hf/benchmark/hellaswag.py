"""HellaSwag by our scorer and by lm-evaluation-harness: how long each takes on the same model and items, in turns.

Both start from the items' texts and end with a pick for each item, tokenisation included. What is done once per
process (imports, loading the model, reading the items) is not timed. A first round warms up and does not count.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from importlib import resources
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from transformers import GPT2LMHeadModel, PreTrainedTokenizerBase

from .. import hardware
from ..data.tokenizer import load_tokenizer
from ..evaluation.evaluate import load_folder
from ..evaluation.hellaswag import HellaSwag, load_hellaswag
from ..model import GPTConfig, GPTForCausalLM
from ..training.build import DTYPES

Picks = dict[str, np.ndarray]  # by metric, acc and acc_norm: the number of the ending picked for each item


def write_random_model(folder: Path, **shape: Any) -> Path:
    """A checkpoint folder with random weights, and the GPT-2 tokenizer; by default of GPT-2 124M's shape.

    Args:
        shape: fields of GPTConfig, as n_layer=4.
    """
    torch.manual_seed(0)
    GPTForCausalLM(GPTConfig(**shape)).save_pretrained(folder)
    load_tokenizer().save_pretrained(folder)
    return folder


def race_hellaswag(
    folder: Path,
    n_items: int,
    rounds: int,
    device: str = "cpu",
    batch_sizes: Sequence[int] = (1, 8, 32),
) -> dict[str, Any]:
    """Score the fixed subset of `n_items` the lm-eval way, by us once and by the harness at each batch size, in turns.

    The harness has the stock model of the folder, as its command line would load it. Both compute as the loop's
    measurements do: on a GPU with fp32 weights and products in what it trains in, on a CPU in fp32.

    Returns:
        "parameters" of the model; "precision"; "seconds", by scorer, and "speedup", the harness's time over ours, at
        whichever batch size was its fastest in the round: each a median, min and max over the rounds; "same_picks", by
        metric, whether every item got the same pick from all; "different_picks", the numbers of those items.
    """
    where = torch.device(device)
    model, tokenizer = load_folder(folder, where)
    model.float()
    precision = hardware.default_precision(where) if where.type == "cuda" else "fp32"
    stock: Any = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32)
    stock.to(where).eval()
    scorers: dict[str, Callable[[], Picks]] = {
        "gpt2_hf": partial(_ours, model, tokenizer, load_hellaswag(n_items), where, precision),
        **_harness(stock, tokenizer, n_items, batch_sizes, precision),
    }
    seconds, picks = _take_turns(scorers, rounds)

    ours, *others = seconds.values()
    fastest = [min(times) for times in zip(*others, strict=True)]
    different = {
        metric: np.flatnonzero(np.any([found[metric] != picked for found in picks.values()], axis=0)).tolist()
        for metric, picked in picks["gpt2_hf"].items()
    }
    return {
        "parameters": model.num_parameters(),
        "precision": precision,
        "seconds": {name: _spread(times) for name, times in seconds.items()},
        "speedup": _spread([theirs / mine for theirs, mine in zip(fastest, ours, strict=True)]),
        "same_picks": {metric: not items for metric, items in different.items()},
        "different_picks": different,
    }


def _take_turns(
    scorers: dict[str, Callable[[], Picks]], rounds: int
) -> tuple[dict[str, list[float]], dict[str, Picks]]:
    """Seconds of each scorer in each round, and its picks; a first round warms up and does not count."""
    picks = {name: score() for name, score in scorers.items()}
    seconds: dict[str, list[float]] = {name: [] for name in scorers}
    for _ in range(rounds):
        for name, score in scorers.items():
            began = time.perf_counter()
            score()
            seconds[name].append(time.perf_counter() - began)
    return seconds, picks


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": median(values), "min": min(values), "max": max(values)}


def _ours(
    model: GPTForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    items: list[dict[str, Any]],
    device: torch.device,
    precision: str,
) -> Picks:
    task = HellaSwag(items, tokenizer, n_positions=model.config.n_positions, ways=["lm_eval"])
    size = 2_048 if device.type == "cpu" else 16_384  # tokens; on a CPU more leave the cache
    is_mixed = precision in ("bf16", "fp16")
    autocast = partial(torch.autocast, device.type, DTYPES[precision]) if is_mixed else nullcontext
    return task.score(model, device=device, tokens_per_batch=size, autocast=autocast).picks


def _harness(
    stock: GPT2LMHeadModel,
    tokenizer: PreTrainedTokenizerBase,
    n_items: int,
    batch_sizes: Sequence[int],
    precision: str,
) -> dict[str, Callable[[], Picks]]:
    """A scorer for each batch size. Its task and items are ready; building requests from them is part of its work."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    tasks = str(resources.files("gpt2_hf") / "assets" / "lm_eval")
    loaded = TaskManager(include_path=tasks, include_defaults=False).load(["hellaswag_offline"])
    task = loaded["tasks"]["hellaswag_offline"]
    n_all = len(task.dataset["validation"])
    subset = [i * n_all // n_items for i in range(n_items)]  # as in load_hellaswag
    task.dataset = {"validation": task.dataset["validation"].select(subset)}

    def score(lm: HFLM) -> Picks:
        results: Any = evaluate(lm, loaded, bootstrap_iters=0)
        samples = sorted(results["samples"]["hellaswag_offline"], key=lambda sample: sample["doc_id"])
        scores = np.array([[float(answer[0]) for (answer,) in sample["resps"]] for sample in samples])  # (N, 4)
        n_chars = np.array([[len(choice) for choice in sample["doc"]["choices"]] for sample in samples])
        return {"acc": scores.argmax(-1), "acc_norm": (scores / n_chars).argmax(-1)}

    mixed: Any = {"mixed_precision_dtype": DTYPES[precision]} if precision in ("bf16", "fp16") else {}
    models = {size: HFLM(pretrained=stock, tokenizer=tokenizer, batch_size=size, **mixed) for size in batch_sizes}
    return {f"lm_eval, batch {size}": partial(score, lm) for size, lm in models.items()}
