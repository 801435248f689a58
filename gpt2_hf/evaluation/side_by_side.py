"""Models -> one table: their figures, how two of them differ, and a record of both in the folders of their runs."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers

from .. import hardware
from ..files import mask, whole_file
from ..knobs import PathName, Range, checked
from ..runs import EVALUATIONS, run_of, step_of, weights_hash
from .compare import paired_difference
from .evaluate import Dtype, Evaluation, Ranks, Text, choose_text, compute_on, evaluate, load_folder, locate
from .harness import Harness, HarnessResults
from .hellaswag import HELLASWAG_ITEMS

# Figure, its name in the table, and what OpenAI's GPT-2 124M gets; its validation loss is another on every text.
ROWS = (
    ("val_loss", "validation loss (nats per token)", "*"),
    ("val_ppl", "validation perplexity", "*"),
    ("val_bpb", "validation bits per byte", "*"),
    ("hellaswag_acc", "HellaSwag acc (lm-eval)", "0.2892"),
    ("hellaswag_acc_norm", "HellaSwag acc_norm (lm-eval)", "0.3114"),
    ("hellaswag_lecture_acc", "HellaSwag (mean loss per token)", "0.2955"),
)
NAME_WIDTH, WIDTH = 34, 21


@checked
def evaluate_side_by_side(
    models: Sequence[str],
    *,
    data: Annotated[str, PathName(remote=True)] | None = None,
    n_windows: Annotated[int, Range(1)] | None = None,
    seq_len: Annotated[int, Range(1)] | None = None,
    document_mask: bool | None = None,
    hellaswag_items: Annotated[int, Range(0, HELLASWAG_ITEMS)] | None = None,
    tasks: list[str] | None = None,
    limit: Annotated[int, Range(1)] | None = None,
    include_path: Annotated[str, PathName()] | None = None,
    output_path: Annotated[str, PathName()] | None = None,
    tokens_per_batch: Annotated[int, Range(1, 10**9)] = 16_384,
    device: str = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Evaluate models on the same text and items, print them side by side, and record it in the folders of runs.

    Args:
        models: runs, folders with a GPT-2 in them, or hub ids.
        data: prepared data whose split "val" is scored (default: that of the first run; without any there is no
            validation loss).
        n_windows: validation windows to use, from the first (default: as many as the run used; with data, all).
        seq_len: tokens of a window (default: the run's, or as many as every model can read).
        document_mask: let validation tokens see only their own document (default: as the run did).
        hellaswag_items: size of the fixed HellaSwag subset (default: all 10,042); 0 leaves HellaSwag out.
        tasks: of lm-evaluation-harness, which then runs on each model.
        limit: only so many of the first items of each of the tasks.
        include_path: folder with tasks of your own, as for lm_eval.
        output_path: folder for the harness's JSON files (default: lm_eval in the run's folder).
        tokens_per_batch: tokens of a forward call; lower it if memory runs out. On a CPU 2048 are a little faster.
        device: "auto" takes an accelerator if there is one.
        dtype: what to compute in; "auto" is bfloat16 on CUDA where supported, as in training.

    Raises:
        ValueError: one line, for a model, data or number that cannot be used.
        ImportError: when tasks are named and lm_eval is not there.
    """
    transformers.utils.logging.disable_progress_bar()
    ranks = Ranks.join()
    where, precision = compute_on(device, dtype)
    say = print if ranks.rank == 0 else lambda _: None
    sources = [locate(model, say) for model in models]
    text = choose_text(sources, data, n_windows, seq_len, document_mask)
    harness = Harness(tasks, limit, include_path) if tasks else None
    evaluations, harness_results = [], []
    for model, source in zip(models, sources, strict=True):
        loaded, tokenizer = load_folder(source, where)
        evaluations.append(
            evaluate(
                loaded,
                tokenizer,
                text,
                hellaswag_items=hellaswag_items,
                tokens_per_batch=tokens_per_batch,
                dtype=precision,
                ranks=ranks,
            )
        )
        if harness:
            size = max(1, tokens_per_batch // loaded.config.n_positions)
            place = _harness_folder(output_path, source)
            found = harness.evaluate(
                loaded,
                tokenizer,
                batch_size=size,
                dtype=precision,
                ranks=ranks,
                save_to=place if ranks.rank == 0 else None,
            )
            harness_results.append(found)
            if ranks.rank == 0:
                print(f"{model}: lm-evaluation-harness's results are in {place}")
    if ranks.rank:
        return
    print(table(models, evaluations, harness_results, text))
    settings = {"dtype": precision, "tokens_per_batch": tokens_per_batch, "limit": limit}
    _record(models, sources, evaluations, harness_results, text, settings, hardware.describe(where))


def table(
    models: Sequence[str], evaluations: Sequence[Evaluation], harness: Sequence[HarnessResults], text: Text | None
) -> str:
    """The figures of the models, a column each, and for two of them the paired difference."""
    first = evaluations[0].figures
    all_items = first.get("hellaswag_items") == HELLASWAG_ITEMS
    headers = [_fit(model) for model in models]
    headers += ["GPT-2 124M, published"] if len(models) == 1 else ["difference"] if len(models) == 2 else []
    lines = [f"{'':<{NAME_WIDTH}}" + "".join(f"{header:>{WIDTH + 2}}" for header in headers)]
    for key, name, mark in ROWS:
        if key in first:
            cells = [_with_error(found.figures, key) for found in evaluations]
            cells += [mark] if len(models) == 1 else _difference([found.outcomes.get(key) for found in evaluations])
            lines.append(f"{name:<{NAME_WIDTH}}" + "".join(f"{cell:>{WIDTH + 2}}" for cell in cells))
    for task, figures in (harness[0].table if harness else {}).items():
        for metric in figures:
            if metric in ("n", "version") or metric.endswith("_stderr"):
                continue
            cells = [_with_error(found.table[task], metric) for found in harness]
            if len(models) == 2:
                cells += _difference([found.outcomes.get(f"{task} {metric}") for found in harness])
            lines.append(f"{f'{task} {metric}':<{NAME_WIDTH}}" + "".join(f"{cell:>{WIDTH + 2}}" for cell in cells))
    lines += _notes(first, text, all_items, len(models))
    return "\n".join(lines)


def _fit(name: str) -> str:
    return name if len(name) <= WIDTH else f"...{name[-WIDTH + 3 :]}"


def _with_error(figures: dict[str, Any], key: str) -> str:
    error = figures.get(f"{key}_stderr")
    return f"{figures[key]:.4f}" + (f" ± {error:.4f}" if isinstance(error, float) and error == error else "")


def _difference(outcomes: Sequence[Any]) -> list[str]:
    if len(outcomes) != 2 or any(values is None for values in outcomes):
        return []
    found = paired_difference(*outcomes)
    p = "" if found.p is None else f", p {found.p:.2g}" if found.p >= 1e-4 else ", p < 0.0001"
    return [f"{found.mean:+.4f}{p}"]


def _notes(figures: dict[str, float], text: Text | None, all_items: bool, n_models: int) -> list[str]:
    notes = []
    if text:
        apart = ", documents apart" if text.document_mask else ""
        notes.append(
            f"validation: {text.n_windows:,} windows of {text.seq_len:,} tokens of {text.path}{apart}; "
            "± is the standard error over windows"
        )
    if "hellaswag_items" in figures:
        marks = "; the published marks are for all items" if n_models == 1 and not all_items else ""
        notes.append(f"HellaSwag on {figures['hellaswag_items']:,} of {HELLASWAG_ITEMS:,} items{marks}")
    if text and n_models == 1:
        notes.append("* depends on the text: name openai-community/gpt2 as a second model to measure it there")
    if n_models == 2:
        notes.append(
            "difference: the first less the second, item by item; p by McNemar's exact test, for losses Student's"
        )
    return notes


def _harness_folder(output_path: str | None, source: str) -> Path:
    if output_path:
        return Path(output_path)
    run = run_of(Path(source))
    return (run if run else Path()) / "lm_eval"


def _record(
    models: Sequence[str],
    sources: Sequence[str],
    evaluations: Sequence[Evaluation],
    harness: Sequence[HarnessResults],
    text: Text | None,
    settings: dict[str, Any],
    device: str,
) -> None:
    """A row for each model in the evaluations.jsonl of each run among them."""
    runs = {run.resolve(): run for source in sources if (run := run_of(Path(source)))}
    for run in runs.values():
        rows = []
        for number, (model, source) in enumerate(zip(models, sources, strict=True)):
            folder = Path(source)
            own = run_of(folder)
            of_run = own is not None and own.resolve() == run.resolve()
            is_folder = folder.is_dir()
            rows.append(
                {
                    "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                    "model": folder.resolve().relative_to(run.resolve()).as_posix() if of_run else _short(model),
                    "of_run": of_run,
                    "weights": weights_hash(folder) if is_folder else None,
                    "step": step_of(folder) if is_folder else None,
                    "data": _described(text),
                    "settings": settings | {"document_mask": bool(text and text.document_mask)},
                    "command": mask("python " + shlex.join(sys.argv)),
                    "device": device,
                    "versions": _versions(bool(harness)),
                    "figures": evaluations[number].figures,
                    "harness": harness[number].table if harness else None,
                }
            )
        try:
            _append(run / EVALUATIONS, rows)
            print(f"recorded in {run / EVALUATIONS}")
        except OSError as error:
            print(f"{run / EVALUATIONS} cannot be written ({error.strerror}): nothing is recorded")


def _short(model: str) -> str:
    """A hub id as it is; of a path, the part that says which model it is."""
    path = Path(model)
    if not path.is_dir():
        return model
    run = run_of(path.resolve())
    return run.name if run else path.resolve().name


def _described(text: Text | None) -> dict[str, Any] | None:
    if text is None:
        return None
    return {
        "path": mask(text.path),
        "fingerprint": text.shards.fingerprint,
        "windows": text.n_windows,
        "seq_len": text.seq_len,
    }


def _versions(with_harness: bool) -> dict[str, str]:
    found = {"gpt2_hf": version("gpt2_hf"), "torch": torch.__version__, "transformers": transformers.__version__}
    return found | ({"lm_eval": version("lm_eval")} if with_harness else {})


def _append(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    before = path.read_bytes() if path.is_file() else b""
    before += b"\n" if before and not before.endswith(b"\n") else b""  # a kill has cut the last one off
    with whole_file(path) as file:
        file.write(before + "".join(json.dumps(row) + "\n" for row in rows).encode())
