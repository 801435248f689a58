"""Does a card say what its weights do? Its figures, computed again from a private copy of the model.

A figure need not come back to the last digit: devices, precisions and kernels round differently. What may lie between
the two is said in each line, and is less than the figure's own standard error on any benchmark of this size.
"""

from __future__ import annotations

import difflib
import math
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .. import hardware
from ..data.documents import DocumentMask
from ..data.remote import open_folder
from ..data.shards import ShardSet, SplitMissing, open_split
from ..data.stream import TokenStream
from ..evaluation.evaluate import load_folder
from ..evaluation.hellaswag import HellaSwag, load_hellaswag
from ..evaluation.validation import validation_loss
from ..program import UserError
from ..runs import STOCK_FILES, find_model, weights_hash
from ..schedules import sum_before
from .card import eval_results, generated_part, marked
from .figures import FIGURES, FORMAT, count_parameters, gather
from .hub import fetch, hub_errors
from .privacy import PublishError, read_json
from .staging import CARD, copy_plain, refuse_links, stage
from .verify import Folder, Result

SAME, DIFFERS, NOT_TRIED = "same", "DIFFERS", "not tried"
LOSS_TOLERANCE = 1e-3  # relative, of losses: bfloat16 on another device differs by up to 2e-4
TOKENS_PER_BATCH = 16_384
PATTERNS = [CARD, FIGURES, ".eval_results/*.yaml", *STOCK_FILES, "model*.safetensors", "model.safetensors.index.json"]


def prove(folder_or_repo: str, data: str | None = None) -> bool:
    """Compute the figures of a published model, or of a run's, and print a line for each.

    Args:
        folder_or_repo: a folder with figures.json beside the model, a run, or a repository of the Hub.
        data: the prepared data on which the validation loss was measured; without it that is not computed.

    Returns:
        Whether none differs.

    Raises:
        UserError: when there is nothing to compare, or the Hub, the model or the data cannot be read.
    """
    with tempfile.TemporaryDirectory(prefix="gpt2-") as temporary:
        root = Path(temporary)
        staged = root / "model"
        staged.mkdir()
        path = _locate(folder_or_repo, root / "fetched")
        stage(path, staged, None)
        record = _read_record(path, root)
        try:
            findings = []
            for finding in _findings(path, staged, record, Path(data) if data else None):
                print(finding, flush=True)
                findings.append(finding)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise PublishError(f"{FIGURES} lacks or garbles an entry ({error}): publish the model again") from None
    n_different = sum(finding.status == DIFFERS for finding in findings)
    n_same = sum(finding.status == SAME for finding in findings)
    if n_different:
        print(f"{folder_or_repo}: {n_different} of {n_same + n_different} figures DIFFER")
    else:
        print(f"{folder_or_repo}: {n_same} figures are what the weights give")
    return n_different == 0


def _locate(name: str, fetched: Path) -> Path:
    """A local folder, or the files of a repository, brought to ``fetched``."""
    if Path(name).is_dir():
        path = find_model(Path(name))
        refuse_links(Path(name), path)
        return path
    from huggingface_hub.utils import validate_repo_id

    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(f"no folder {name}: give a folder, a run, or a repository of the Hub, as me/my-gpt2")
    with hub_errors(name):
        validate_repo_id(name)
        fetch(name, fetched, PATTERNS)
    return fetched


def _read_record(path: Path, root: Path) -> dict[str, Any]:
    """The content of figures.json, or what it would be for a run's model."""
    if not (path / FIGURES).is_symlink() and not (path / FIGURES).exists():
        record = gather(path, root / "model")
        if record["run"] is None:
            raise UserError(f"{path} has no {FIGURES}, and is no run's model: there is nothing to compare with")
        return record
    copy_plain(path / FIGURES, root / FIGURES)
    record = read_json(root / FIGURES)
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise UserError(f"{FIGURES} is not of format {FORMAT}: use the gpt2_hf that wrote it")
    return record


# One after another


def _findings(path: Path, staged: Path, record: dict[str, Any], data: Path | None) -> Iterator[Result]:
    yield _compare("weights", record["weights"][:16], weights_hash(staged)[:16])
    yield _compare("parameters", record["parameters"], count_parameters(Folder(staged)))
    run = record["run"] or {}
    if run.get("batch_tokens") and run.get("tokens") is not None:
        stages = run.get("batch_ramp", []), run.get("batch_ramp_steps", 0), run["batch_tokens"]
        yield _compare("tokens", run["tokens"], sum_before(run["step"], *stages))
    yield from _text(path, record)
    model, tokenizer = load_folder(staged, hardware.pick_device("auto"))
    known: dict[Any, dict[str, float]] = {}
    for figures, settings, fingerprint in _measurements(run):
        yield from _validation(model, figures, settings, fingerprint, data, known)
        yield from _hellaswag(model, tokenizer, figures, settings, known)
    for evaluation in run.get("evaluations", ()):
        for task in evaluation.get("harness") or ():
            yield Result(task, NOT_TRIED, f"of lm-evaluation-harness: {evaluation.get('command', 'run it again')}")


def _measurements(run: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any], str | None]]:
    """Figures, what they were measured with, and of what data."""
    if last := run.get("last"):
        settings = last["settings"]
        yield last["figures"], settings, settings.get("data_fingerprint")
    for row in run.get("evaluations", ()):
        data = row.get("data") or {}
        settings = (row.get("settings") or {}) | {key: data[key] for key in ("windows", "seq_len") if key in data}
        yield row.get("figures") or {}, settings, data.get("fingerprint")


def _text(path: Path, record: dict[str, Any]) -> Iterator[Result]:
    """The card and .eval_results against what figures.json makes of them."""
    if not (path / FIGURES).exists():
        return  # a run: nothing is written yet
    card = (path / CARD).read_text(encoding="utf-8") if (path / CARD).is_file() else ""
    found, expected = generated_part(card), marked(record)
    if found is None:
        yield Result("card", DIFFERS, f"{CARD} lacks the part that is made from {FIGURES}, or has it twice")
    elif found == expected:
        yield Result("card", SAME, f"every line is as {FIGURES} has it")
    else:
        for line in difflib.unified_diff(expected.splitlines(), found.splitlines(), lineterm="", n=0):
            if line.startswith(("+", "-")) and not line.startswith(("+++", "---")):
                whose = f"{CARD} says" if line[0] == "+" else f"{FIGURES} gives"
                yield Result("card", DIFFERS, f"{whose}: {line[1:]}")
    for name, text in eval_results(record).items():
        there = (path / name).read_text(encoding="utf-8") if (path / name).is_file() else None
        yield Result(
            name,
            SAME if there == text else DIFFERS,
            f"as {FIGURES} has it" if there == text else f"is not what {FIGURES} gives",
        )


def _validation(
    model: Any,
    figures: dict[str, Any],
    settings: dict[str, Any],
    fingerprint: str | None,
    data: Path | None,
    known: Any,
) -> Iterator[Result]:
    if "val_loss" not in figures:
        return
    if "val_ppl" in figures:
        yield _compare(
            "val_ppl", figures["val_ppl"], math.exp(figures["val_loss"]), LOSS_TOLERANCE * figures["val_ppl"]
        )
    if data is None:
        yield Result("val_loss", NOT_TRIED, f"{figures['val_loss']:.4f}: give the data, with --data")
        return
    shards = open_split(open_folder(data), "val")
    if fingerprint not in _fingerprints(data, shards):
        raise UserError(f"--data {data} is not what this was measured on: its fingerprint is {shards.fingerprint}")
    key = ("validation", *sorted((name, str(value)) for name, value in settings.items()))
    if key not in known:
        known[key] = _measure_validation(model, shards, settings)
    for name in ("val_loss", "val_bpb"):
        if name in figures:
            yield _compare(name, figures[name], known[key][name], LOSS_TOLERANCE * figures[name])


def _fingerprints(data: Path, val: ShardSet) -> set[str]:
    """Of the validation split, as evaluations note it, and of the other, as training does."""
    found = {val.fingerprint}
    try:
        return found | {open_split(open_folder(data), "train").fingerprint}
    except SplitMissing:
        return found


def _measure_validation(model: Any, shards: ShardSet, settings: dict[str, Any]) -> dict[str, float]:
    seq_len = settings.get("seq_len") or model.config.n_positions
    stream = TokenStream(shards, seq_len, seed=0, shuffle=False)
    wanted = settings.get("windows") or settings.get("val_tokens", stream.n_windows * seq_len) // seq_len
    documents = None
    if settings.get("document_mask"):
        attention, dtype = model.config._attn_implementation, getattr(torch, settings.get("dtype", "float32"))
        documents = DocumentMask(shards.eot, shards.eot_first, attention, dtype)
    return validation_loss(
        model,
        stream,
        n_windows=max(1, min(stream.n_windows, wanted)),
        batch_size=max(1, TOKENS_PER_BATCH // seq_len),
        device=model.device,
        autocast=_autocast(model, settings),
        documents=documents,
    )


def _hellaswag(
    model: Any, tokenizer: Any, figures: dict[str, Any], settings: dict[str, Any], known: Any
) -> Iterator[Result]:
    n_items = figures.get("hellaswag_items")
    if not n_items:
        return
    key = ("hellaswag", n_items, settings.get("dtype"))
    if key not in known:
        task = HellaSwag(load_hellaswag(n_items), tokenizer, n_positions=model.config.n_positions)
        known[key] = task.score(
            model,
            device=model.device,
            tokens_per_batch=TOKENS_PER_BATCH,
            autocast=_autocast(model, settings),
            show_progress=True,
        ).metrics
    allowed = max(2, math.floor(0.005 * n_items)) / n_items
    for name in ("hellaswag_acc", "hellaswag_acc_norm", "hellaswag_lecture_acc"):
        if name in figures:
            yield _compare(name, figures[name], known[key][name], allowed, f" on {n_items:,} items")
            error = figures.get(f"{name}_stderr")
            if error is None and name == "hellaswag_lecture_acc":
                error = figures.get("hellaswag_stderr")
            if error is not None:
                share = figures[name]
                yield _compare(f"{name}_stderr", error, math.sqrt(share * (1 - share) / n_items), 1e-2 * error)


def _autocast(model: Any, settings: dict[str, Any]) -> Any:
    dtype = settings.get("dtype", "float32")
    if dtype not in ("bfloat16", "float16"):
        return nullcontext
    return partial(torch.autocast, model.device.type, dtype=getattr(torch, dtype))


def _compare(what: str, said: Any, found: Any, allowed: float = 0.0, more: str = "") -> Result:
    is_same = said == found or (isinstance(said, float) and abs(said - found) <= allowed)
    texts = [f"{value:.4f}" if isinstance(value, float) else f"{value}" for value in (said, found)]
    within = f" (up to {allowed:.4f} apart counts as the same)" if allowed else ""
    return Result(what, SAME if is_same else DIFFERS, f"{texts[0]} said, {texts[1]} computed{more}{within}")
