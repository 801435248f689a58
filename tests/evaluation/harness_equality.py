"""Our HellaSwag scorer and lm-evaluation-harness, item by item: python tests/evaluation/harness_equality.py --help

Prints a row of a table: how many of the items got the same ending from both, and of the others how near a tie they are.
A margin is the difference between the two best endings' scores, in nats (acc) or nats a character (acc_norm).
"""

import argparse
import logging
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import GPT2LMHeadModel

from gpt2_hf.benchmark.hellaswag import write_random_model
from gpt2_hf.evaluation.evaluate import load_folder, locate
from gpt2_hf.evaluation.harness import TASKS
from gpt2_hf.evaluation.hellaswag import HellaSwag, hellaswag_texts, load_hellaswag


def harness_loglikelihoods(folder: str, n_items: int, batch_size: int, dtype: str, softmax: str | None) -> np.ndarray:
    """Of the endings of the fixed subset, (N, 4), as stock transformers and the harness have them."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    loaded = TaskManager(include_path=str(TASKS), include_defaults=False).load(["hellaswag_offline"])
    task = loaded["tasks"]["hellaswag_offline"]
    everything = task.dataset["validation"]
    subset = [i * len(everything) // n_items for i in range(n_items)]  # as in load_hellaswag
    task.dataset = {"validation": everything.select(subset)}
    stock = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()
    options = {} if dtype == "float32" else {"mixed_precision_dtype": dtype, "softmax_dtype": softmax}
    lm = HFLM(pretrained=stock, tokenizer=load_folder(folder)[1], batch_size=batch_size, **options)
    samples = sorted(evaluate(lm, loaded, bootstrap_iters=0)["samples"]["hellaswag_offline"], key=lambda s: s["doc_id"])
    return np.array([[float(answer[0]) for (answer,) in sample["resps"]] for sample in samples])


def margins(scores: np.ndarray) -> np.ndarray:
    """The best ending's score less the second's, (N,)."""
    best = np.sort(scores, axis=-1)
    return best[:, -1] - best[:, -2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "model", help="a run or folder; 124M for random weights of that shape, ten times OpenAI's spread"
    )
    parser.add_argument("--items", type=int, default=10_042)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--batch_size", type=int, default=8, help="of the harness; ours is as many tokens")
    parser.add_argument("--softmax_dtype", help="of the harness; by default that of the logits")
    parser.add_argument("--tie", type=float, default=1e-4, help="a margin below this is a tie")
    args = parser.parse_args()
    folder = locate(args.model)
    if args.model == "124M":
        folder = "runs/random_124M"
        if not Path(folder).is_dir():
            write_random_model(Path(folder), initializer_range=0.2)

    items = load_hellaswag(args.items)
    model, tokenizer = load_folder(folder)
    autocast = partial(torch.autocast, "cpu", dtype=torch.bfloat16, enabled=args.dtype == "bfloat16")
    task = HellaSwag(items, tokenizer, n_positions=model.config.n_positions, ways=["lm_eval"])
    ours = task.score(
        model, device="cpu", tokens_per_batch=256 * args.batch_size, autocast=autocast, show_progress=True
    )
    mine, theirs = (
        ours.loglikelihoods["lm_eval"],
        harness_loglikelihoods(folder, args.items, args.batch_size, args.dtype, args.softmax_dtype),
    )
    n_chars = np.array([[len(ending) for ending in hellaswag_texts(item, "lm_eval")[1]] for item in items])

    cells = [args.model, f"{args.items:,}", args.dtype, str(args.batch_size), f"{np.abs(mine - theirs).max():.1g}"]
    for lengths in (np.ones_like(n_chars), n_chars):
        differ = np.flatnonzero((mine / lengths).argmax(-1) != (theirs / lengths).argmax(-1))
        near = margins(theirs / lengths)
        shown = ", ".join(f"{i} ({near[i]:.1g})" for i in differ[:10]) or "none"
        cells += [f"{len(items) - len(differ):,}", shown, str(int((near < args.tie).sum()))]
    print(
        "| model | items | computed in | batch | largest difference | same acc | others (margin) | ties "
        "| same acc_norm | others (margin) | ties |"
    )
    print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
