"""A model card that says what is known of a checkpoint, and no more: figures.json as text.

What is generated stands between two marks, which the Hub does not show. It is a function of figures.json alone, so that
it can be made again and compared; what somebody writes before or after the marks stays theirs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

BEGIN, END = "<!-- made by gpt2_hf from figures.json: begin -->", "<!-- made by gpt2_hf from figures.json: end -->"
ALL_ITEMS = 10_042  # of HellaSwag's validation split
MEASURES = {
    "val_loss": "validation loss (nats per token, held-out part of the training data)",
    "val_ppl": "validation perplexity",
    "val_bpb": "validation bits per byte",
    "hellaswag_acc": "HellaSwag acc (as lm-evaluation-harness)",
    "hellaswag_acc_norm": "HellaSwag acc_norm (as lm-evaluation-harness)",
    "hellaswag_lecture_acc": "HellaSwag, lowest mean loss per token",
}
# The Hub's dataset of a task of lm-evaluation-harness, and the metric that is usually quoted.
BENCHMARKS = {
    "hellaswag": ("Rowan/hellaswag", "acc_norm"),
    "arc_easy": ("allenai/ai2_arc", "acc"),
    "arc_challenge": ("allenai/ai2_arc", "acc_norm"),
    "piqa": ("ybisk/piqa", "acc_norm"),
    "winogrande": ("allenai/winogrande", "acc"),
    "openbookqa": ("allenai/openbookqa", "acc_norm"),
    "lambada_openai": ("EleutherAI/lambada_openai", "acc"),
    "sciq": ("allenai/sciq", "acc"),
    "boolq": ("google/boolq", "acc"),
}
EXAMPLE = """\
```python
from transformers import pipeline

generate = pipeline("text-generation", "{repo}")
print(generate("Hello, I'm a language model,", max_new_tokens=40)[0]["generated_text"])
```"""


def model_card(record: dict[str, Any], license: str | None, language: str | None) -> str:
    """The text of a new README.md."""
    from huggingface_hub import ModelCardData

    data = (record["run"] or {}).get("data") or {}
    dataset = data.get("source", {}).get("dataset")
    header = ModelCardData(
        language=language,
        license=license,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["gpt2"],
        datasets=[dataset] if dataset else None,
        base_model=_hub_id((record["run"] or {}).get("begun_from")),
    )
    return f"---\n{header.to_yaml()}\n---\n\n{marked(record)}\n"


def marked(record: dict[str, Any]) -> str:
    """The generated part of a card, with its marks."""
    return f"{BEGIN}\n\n" + "\n\n".join(_paragraphs(record)) + f"\n\n{END}"


def generated_part(card: str) -> str | None:
    """What stands between the marks, and the marks; None where they are not there once and in order."""
    before, begin, rest = card.partition(BEGIN)
    inside, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in before + after:
        return None
    return begin + inside + end


def renewed(card: str, record: dict[str, Any]) -> str | None:
    """A card with its generated part made anew; None for one that has none."""
    old = generated_part(card)
    return card.replace(old, marked(record)) if old else None


def eval_results(record: dict[str, Any]) -> dict[str, str]:
    """Path in the repository -> YAML, for the figures that the Hub's leaderboards take: of whole benchmarks only."""
    import yaml
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    found = {}
    for task, value, date, notes in _whole_benchmarks(record):
        dataset, metric = BENCHMARKS[task]
        entry = EvalResultEntry(dataset, task, round(value, 6), date=date, notes=f"{metric}, 0-shot{notes}")
        found[f".eval_results/{task}.yaml"] = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False)
    return found


def _whole_benchmarks(record: dict[str, Any]) -> Iterator[tuple[str, float, str | None, str]]:
    """Task, its usual metric, when it was measured, and how; the latest last."""
    run = record["run"] or {}
    last = (run.get("last") or {}).get("figures", {})
    for figures, date in (
        (last, None),
        *((row.get("figures") or {}, row.get("date")) for row in run.get("evaluations", ())),
    ):
        if figures.get("hellaswag_items") == ALL_ITEMS and "hellaswag_acc_norm" in figures:
            yield "hellaswag", figures["hellaswag_acc_norm"], date, ""
    for row in run.get("evaluations", ()):
        for task, scores in (row.get("harness") or {}).items():
            metric = BENCHMARKS.get(task, ("", ""))[1]
            if not row.get("settings", {}).get("limit") and isinstance(scores.get(metric), float):
                yield task, scores[metric], row.get("date"), ", lm-evaluation-harness"


# Paragraphs


def _paragraphs(record: dict[str, Any]) -> Iterator[str]:
    run = record["run"] or {}
    yield f"# {record['repo'].split('/')[-1]}"
    yield _description(record)
    yield EXAMPLE.format(repo=record["repo"])
    if record["with_code"]:
        yield "The weights are plain GPT-2. `trust_remote_code=True` loads the training code beside them."
    if record["curves"]:
        yield "![Loss, HellaSwag and learning rate of the run against tokens](curves.png)"
    yield from _evaluation(record)
    yield from _training(run)
    yield from _data(run)
    yield from _limits(record)
    yield from _proof(record)


def _hub_id(begun_from: dict[str, Any] | None) -> str | None:
    """Of the model that training began from; None for a folder, whose version is a hash of weights and no commit."""
    is_commit = begun_from is not None and re.fullmatch(r"[0-9a-f]{40}", str(begun_from.get("version")))
    return begun_from["name"] if begun_from and is_commit else None


def _description(record: dict[str, Any]) -> str:
    shape, run = record["shape"], record["run"]
    text = (
        f"A GPT-2 of {record['parameters']:,} parameters: {shape['n_layer']} layers, {shape['n_embd']} wide, "
        f"{shape['n_head']} heads, {shape['n_positions']} positions, {shape['vocab_size']:,} tokens."
    )
    if run and run.get("begun_from"):
        text += f" It began with the weights of {run['begun_from']['name']}."
    if run and run["tokens"] is not None:
        text += f" Pretrained with gpt2_hf on {run['tokens']:,} tokens."
    if run and run["steps"] and run["step"] < run["steps"]:
        text += f" Its training was not finished: this is step {run['step']:,} of {run['steps']:,}."
    return text


def _evaluation(record: dict[str, Any]) -> Iterator[str]:
    run = record["run"] or {}
    rows, sources = list[str](), list[str]()
    if last := run.get("last"):
        sources.append(f"while training, after step {run['step']:,}{_settings(last['settings'], last['figures'])}")
        rows += _rows(last["figures"], len(sources))
    for evaluation in run.get("evaluations", ()):
        figures = evaluation.get("figures") or {}
        command = f"`{evaluation['command']}`" if evaluation.get("command") else "gpt2_hf"
        when = f", {evaluation['date'][:10]}" if evaluation.get("date") else ""
        where = f", on {evaluation['device']}" if evaluation.get("device") else ""
        sources.append(f"{command}{when}{where}{_settings(evaluation.get('settings') or {}, figures)}")
        rows += _rows(figures, len(sources))
        rows += _harness_rows(evaluation.get("harness") or {}, len(sources))
    if not rows:
        return
    yield "## Evaluation"
    yield "\n".join(["| measure | value | standard error | measured |", "|---|---|---|---|", *rows])
    yield "\n".join(f"{number}. {source}" for number, source in enumerate(sources, 1))


def _rows(figures: dict[str, Any], source: int) -> list[str]:
    return [
        f"| {name} | {figures[key]:.4f} | {_error(figures, key)} | {source} |"
        for key, name in MEASURES.items()
        if key in figures
    ]


def _error(figures: dict[str, Any], key: str) -> str:
    error = figures.get(f"{key}_stderr")
    if error is None and key == "hellaswag_lecture_acc":  # as training writes it
        error = figures.get("hellaswag_stderr")
    return "" if error is None else f"{error:.4f}"


def _harness_rows(harness: dict[str, dict[str, Any]], source: int) -> list[str]:
    rows = []
    for task, scores in harness.items():
        for metric, value in scores.items():
            if isinstance(value, float) and metric != "version" and not metric.endswith("_stderr"):
                error = scores.get(f"{metric}_stderr")
                shown = f"{error:.4f}" if isinstance(error, float) else ""
                rows.append(f"| {task} {metric} (lm-evaluation-harness) | {value:.4f} | {shown} | {source} |")
    return rows


def _settings(settings: dict[str, Any], figures: dict[str, Any]) -> str:
    said = [settings["dtype"]] if settings.get("dtype") else []
    if items := figures.get("hellaswag_items"):
        said.append(f"HellaSwag on {items:,} of {ALL_ITEMS:,} items")
    return "".join(f"; {words}" for words in said)


def _training(run: dict[str, Any]) -> Iterator[str]:
    if not run:
        return
    yield "## Training"
    machine, time, cost = run["machine"], run["time"], run["cost"]
    if machine:
        versions = ", ".join(
            f"{key} {machine[key]}" for key in ("python", "torch", "transformers", "accelerate") if key in machine
        )
        processes = (
            f"{machine['processes']} process{'es' * (machine['processes'] != 1)}" if "processes" in machine else ""
        )
        yield ", ".join(filter(None, [machine.get("device"), processes, machine.get("precision"), versions])) + "."
    if time:
        said = (
            f"{time['hours']:.2f} hours, {time['device_hours']:.2f} device-hours: the time of the optimizer steps by "
            "their logged speeds, without compiling, evaluating, saving and work that was lost."
        )
        if cost:
            said += f" At {cost['price']:g} dollars per device-hour that is {cost['dollars']:,.2f} dollars."
        yield said
    if run["recipe"]:
        yield f"Recipe, for `scripts/pretrain.py --config`:\n\n```yaml\n{run['recipe'].rstrip()}\n```"


def _data(run: dict[str, Any]) -> Iterator[str]:
    if not (data := run.get("data")):
        return
    yield "## Data"
    source = data["source"]
    if source:
        yield f"{source.get('dataset', data['name'])}" + "".join(
            f", {source[k]}" for k in ("name", "revision") if k in source
        )
    rows = [
        f"| {name} | {counts['documents'] or 0:,} | {counts['tokens'] or 0:,} | {data['fingerprints'][name]} |"
        for name, counts in data["splits"].items()
    ]
    yield "\n".join(["| split | documents | tokens | fingerprint |", "|---|---|---|---|", *rows])
    said = [f"Tokenizer: {data['tokenizer']}, which is in this folder."] if "tokenizer" in data else []
    said.append(f"Deduplication: {data['dedup'] or 'not known'}.")
    if data["decontaminate"]:
        looked = f"{', '.join(data['decontaminate'])} ({data['decontaminate_ngram']}-grams)"
        kept = "dropped" if data["contaminated"] == "drop" else "counted and kept"
        n_found = data["dropped" if data["contaminated"] == "drop" else "reported"].get("contaminated", 0)
        said.append(f"Documents that hold items of {looked} were {kept}: {n_found:,}.")
    else:
        said.append("It was not searched for items of evaluations.")
    if data["dropped"]:
        said.append(
            "Dropped documents: "
            + ", ".join(f"{n:,} {why.replace('_', ' ')}" for why, n in data["dropped"].items())
            + "."
        )
    yield " ".join(said)


def _limits(record: dict[str, Any]) -> Iterator[str]:
    yield "## Limits"
    yield (
        "It continues text, and may repeat what is false or offensive in the text that it was trained on. It was not "
        f"trained to follow instructions, and reads {record['shape']['n_positions']:,} tokens at most."
    )


def _proof(record: dict[str, Any]) -> Iterator[str]:
    yield "## Proof"
    data = (record["run"] or {}).get("data") or {}
    option = f" --data data/{data['name']}" if data else ""
    yield (
        "`figures.json` holds every figure above. gpt2_hf computes them again from the weights, and says which "
        "differ:\n\n"
        f"```bash\npython scripts/publish.py --verify {record['repo']}{option}\n```"
    )
