"""Do our HellaSwag scorer and lm-evaluation-harness pick the same ending for every item?

    python tests/evaluation/harness_equality.py runs/demo           # all 10,042 items, in fp32
    python tests/evaluation/harness_equality.py runs/demo --items 200 --dtype bfloat16 --batch_size 64
    python tests/evaluation/harness_equality.py 124M --items 500    # random weights of that shape
    python tests/evaluation/harness_equality.py --table             # of all that was compared

Each scorer gets the model in its own way: ours a folder, the harness transformers' own GPT-2 with the weights of that
folder, which it computes in autocast as we do. What each says of an item is kept in runs/equality, so that a
comparison that was ended goes on where it was. Exit status 0 means: where the picks differ, it is a tie.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GPT2LMHeadModel

from gpt2_hf import hardware
from gpt2_hf.data.tokenizer import load_tokenizer
from gpt2_hf.evaluation.evaluate import load_folder
from gpt2_hf.evaluation.hellaswag import HellaSwag, hellaswag_texts, load_hellaswag
from gpt2_hf.model import GPTConfig, GPTForCausalLM
from gpt2_hf.runs import find_model, read_rows

OUT = Path("runs/equality")
TASKS = Path(__file__).parents[2] / "gpt2_hf" / "assets" / "lm_eval"
N_ITEMS = 10_042
TOKENS_OF_ROW = 256  # no item has more: a batch size of ours, in rows, as tokens
# Summation order moves a log-likelihood of some -100 nats by less, in fp32; so two this near to each other are a tie.
TIE = {"float32": 1e-3, "bfloat16": 0.0}


def write_model(folder: Path) -> Path:
    """Random weights of GPT-2 124M's shape, four times as large as a fresh model's, which has no opinions."""
    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        GPTForCausalLM(GPTConfig(initializer_range=0.08)).save_pretrained(folder)
        load_tokenizer().save_pretrained(folder)
    return folder


def compare(
    folder: Path, numbers: Sequence[int], dtype: str, batch_size: int, at_once: int
) -> Iterator[dict[str, Any]]:
    """What both scorers say of the items with these numbers: log-likelihoods of four endings, in nats, and lengths."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    hardware.reuse_freed_memory()
    model, tokenizer = load_folder(folder)
    autocast = partial(torch.autocast, "cpu", dtype=getattr(torch, dtype), enabled=dtype != "float32")
    stock: Any = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()
    lm = HFLM(
        pretrained=stock,
        tokenizer=tokenizer,
        batch_size=batch_size,
        mixed_precision_dtype=None if dtype == "float32" else dtype,
    )
    loaded = TaskManager(include_path=str(TASKS), include_defaults=False).load(["hellaswag_offline"])
    task = loaded["tasks"]["hellaswag_offline"]
    documents = task.dataset["validation"]
    items = load_hellaswag()
    for start in range(0, len(numbers), at_once):
        some = list(numbers[start : start + at_once])
        task.dataset = {"validation": documents.select(some)}
        found: Any = evaluate(lm, loaded, bootstrap_iters=0)
        samples = found["samples"]["hellaswag_offline"]
        theirs = {some[row["doc_id"]]: [float(answer[0]) for (answer,) in row["resps"]] for row in samples}
        scorer = HellaSwag([items[i] for i in some], tokenizer, n_positions=model.config.n_positions, ways=["lm_eval"])
        scores = scorer.score(model, device="cpu", tokens_per_batch=batch_size * TOKENS_OF_ROW, autocast=autocast)
        for i, ours in zip(some, scores.loglikelihoods["lm_eval"].tolist(), strict=True):
            endings = hellaswag_texts(items[i], "lm_eval")[1]
            yield {"item": i, "ours": ours, "theirs": theirs[i], "characters": [len(text) for text in endings]}


def differences(rows: Sequence[dict[str, Any]], tie: float) -> dict[str, Any]:
    """How far the log-likelihoods are apart, and by metric the items with a tie, and with different picks.

    Args:
        tie: two endings are tied for an item when the best is no more than this ahead in log-likelihood, by either.
    """
    ours, theirs, characters = (np.array([row[key] for row in rows]) for key in ("ours", "theirs", "characters"))
    found: dict[str, Any] = {"items": len(rows), "apart": float(np.abs(ours - theirs).max())}
    for metric, lengths in (("acc", np.ones_like(characters)), ("acc_norm", characters)):
        picks, ahead = [], []
        for scores in (ours / lengths, theirs / lengths):
            picks.append(scores.argmax(-1))
            best = np.sort(scores, axis=-1)
            ahead.append(best[:, -1] - best[:, -2])
        different = picks[0] != picks[1]
        tied = np.minimum(*ahead) <= tie / lengths.mean(-1)
        found[metric] = {
            "tied": [rows[i]["item"] for i in np.flatnonzero(tied)],
            "different": [
                {"item": rows[i]["item"], "picks": [int(p[i]) for p in picks], "ahead": [float(a[i]) for a in ahead]}
                for i in np.flatnonzero(different)
            ],
            "unexplained": int((different & ~tied).sum()),
            "smallest_lead": float(np.minimum(*ahead).min()),
        }
    return found


def table(out: Path) -> str:
    """All that was compared, as Markdown."""
    columns = ["model", "computed in", "batch", "items", "furthest apart, nats", "other picks (acc)", "(acc_norm)"]
    columns += ["least lead (acc)", "(acc_norm)"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    listed = []
    for path in sorted(out.glob("*.jsonl")):
        model, dtype, batch = path.stem.rsplit("-", 2)
        if not (rows := read_rows(path)):
            continue
        found = differences(rows, TIE[dtype])
        acc, norm = found["acc"], found["acc_norm"]
        lines.append(
            f"| {model} | {dtype} | {batch} | {found['items']:,} | {found['apart']:.1e} | {len(acc['different'])} | "
            f"{len(norm['different'])} | {acc['smallest_lead']:.1e} | {norm['smallest_lead']:.1e} |"
        )
        for metric in ("acc", "acc_norm"):
            for case in found[metric]["different"]:
                picks, ahead = case["picks"], case["ahead"]
                listed.append(
                    f"| {model} | {dtype} | {batch} | {metric} | {case['item']} | {picks[0]} (by {ahead[0]:.1e}) | "
                    f"{picks[1]} (by {ahead[1]:.1e}) |"
                )
    head = [
        "",
        "| model | computed in | batch | metric | item | our pick | the harness's |",
        "|---|---|---|---|---|---|---|",
    ]
    return "\n".join(lines + (head + listed if listed else []))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a run, a folder, or 124M: random weights of that shape")
    parser.add_argument("--items", type=int, default=N_ITEMS, help="spread evenly over the file")
    parser.add_argument("--dtype", choices=list(TIE), default="float32")
    parser.add_argument("--batch_size", type=int, default=8, help="of both: endings of the harness, rows of ours")
    parser.add_argument("--at_once", type=int, default=100, help="items after which what was found is kept")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--table", action="store_true", help="only print what was found so far")
    args = parser.parse_args()
    if args.table:
        print(table(args.out))
        return 0
    if args.model is None:
        parser.error("name a model, or ask for the --table")
    args.out.mkdir(parents=True, exist_ok=True)
    folder = write_model(args.out / "124M") if args.model == "124M" else find_model(Path(args.model))
    path = args.out / f"{Path(args.model).name}-{args.dtype}-{args.batch_size}.jsonl"
    done = {row["item"] for row in read_rows(path)}
    chosen = [i * N_ITEMS // args.items for i in range(args.items)]
    # In an order that spreads each part over the file, so that what is known early speaks for all.
    n_parts = -(-len(chosen) // args.at_once)
    left = [i for part in range(n_parts) for i in chosen[part::n_parts] if i not in done]
    began = time.monotonic()
    with path.open("a") as file:
        for count, row in enumerate(compare(folder, left, args.dtype, args.batch_size, args.at_once), start=1):
            file.write(json.dumps(row) + "\n")
            if count % args.at_once == 0:
                file.flush()
                print(f"{count:,} of {len(left):,} items in {time.monotonic() - began:.0f} s", flush=True)
    rows = [row for row in read_rows(path) if row["item"] in set(chosen)]
    found = differences(rows, TIE[args.dtype])
    print(json.dumps(found, indent=1))
    return 1 if found["acc"]["unexplained"] or found["acc_norm"]["unexplained"] else 0


if __name__ == "__main__":
    sys.exit(main())
