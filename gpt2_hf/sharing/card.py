"""A model card that says what is known of a checkpoint, and no more."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ..runs import read_rows, same_weights, saved_steps
from .verify import Folder

MEASURES = {
    "val_loss": "validation loss (nats per token, held-out part of the training data)",
    "val_bpb": "validation bits per byte",
    "hellaswag_acc": "HellaSwag acc (as lm-evaluation-harness)",
    "hellaswag_acc_norm": "HellaSwag acc_norm (as lm-evaluation-harness)",
    "hellaswag_lecture_acc": "HellaSwag, lowest mean loss per token",
}
EXAMPLE = """\
```python
from transformers import pipeline

generate = pipeline("text-generation", "{repo}")
print(generate("Hello, I'm a language model,", max_new_tokens=40)[0]["generated_text"])
```"""


def model_card(path: Path, staged: Path, repo: str, license: str | None, with_code: bool) -> str:
    """The text of a README.md.

    Args:
        path: where the checkpoint lies; figures come from its run's metrics.jsonl.
        staged: its copy, which is described.
    """
    from huggingface_hub import ModelCardData

    figures = latest_figures(path.resolve())
    header = ModelCardData(library_name="transformers", pipeline_tag="text-generation", tags=["gpt2"], license=license)
    paragraphs = [
        f"---\n{header.to_yaml()}\n---",
        f"# {repo.split('/')[-1]}",
        f"{_description(staged, figures)}\n"
        "It continues text, and may repeat what is false or offensive in the text that it was trained on.",
        EXAMPLE.format(repo=repo),
    ]
    if with_code:
        paragraphs.append("The weights are plain GPT-2. `trust_remote_code=True` loads the training code beside them.")
    if measured := [f"| {name} | {figures[key]:.4f} |" for key, name in MEASURES.items() if key in figures]:
        paragraphs.append("\n".join(["| measure | value |", "|---|---|", *measured]))
    if "hellaswag_items" in figures:
        items, error = figures["hellaswag_items"], figures["hellaswag_stderr"]
        paragraphs.append(f"HellaSwag on {items:,} of 10,042 items, standard error {error:.4f}.")
    return "\n\n".join(paragraphs) + "\n"


def latest_figures(path: Path) -> dict[str, Any]:
    """What was measured last of a checkpoint's weights, by its run's metrics.jsonl; nothing where nobody knows."""
    run = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    metrics, step = run / "metrics.jsonl", last_step(path)
    if step is None or metrics.is_symlink() or not metrics.is_file():
        return {}
    return {key: value for row in read_rows(metrics) if row["step"] <= step for key, value in row.items()}


def last_step(path: Path) -> float | None:
    """The last step whose figures in metrics.jsonl are those of a run's folder; None where nobody knows."""
    if path.parent.name == "checkpoints":
        return next((step for step, folder in saved_steps(path.parent).items() if folder == path), None)
    if path.name != "final":  # perhaps another model's
        return None
    kept = saved_steps(path.parent / "checkpoints")
    same = [step for step, folder in kept.items() if same_weights(folder, path)]
    return max(same, default=None if kept else math.inf)


def _description(staged: Path, figures: dict[str, Any]) -> str:
    folder = Folder(staged)
    c = folder.stock_config
    n_parameters = sum(math.prod(folder.shapes[name]) for name in folder.names.values())
    text = (
        f"A GPT-2 of {n_parameters:,} parameters: {c.n_layer} layers, {c.n_embd} wide, {c.n_head} heads, "
        f"{c.n_positions} positions, {c.vocab_size:,} tokens."
    )
    return f"{text} Pretrained with gpt2_hf on {figures['tokens_seen']:,} tokens." if figures else text
