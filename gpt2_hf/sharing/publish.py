"""Push a checkpoint to the Hub as the stock GPT-2 that it is, after ``verify`` has looked at exactly what goes up."""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..model.hub import AUTO_MAP, code_files
from ..runs import find_model, is_stock, read_rows, same_weights, saved_steps
from .staging import ADAPTER, CARD, PublishError, refuse_links, shown, stage
from .verify import Folder, check_folders, sha256

# What runs or loads instead of the weights when it lies in a repository beside them.
LEADING_FILES = (ADAPTER, "custom_generate/generate.py")


def steps_trained(path: Path) -> float | None:
    """The last step whose figures in metrics.jsonl are those of a run's folder; None where nobody knows."""
    if path.parent.name == "checkpoints":
        return next((step for step, folder in saved_steps(path.parent).items() if folder == path), None)
    if path.name != "final":  # perhaps another model's
        return None
    kept = saved_steps(path.parent / "checkpoints")
    same = [step for step, folder in kept.items() if same_weights(folder, path)]
    return max(same, default=None if kept else math.inf)


def model_card(path: Path, staged: Path, repo: str, license: str | None, with_code: bool) -> str:
    """A README.md that says what is known of a checkpoint, and no more.

    Args:
        path: where it lies; figures come from its run's metrics.jsonl.
        staged: its copy, which is described.
    """
    from huggingface_hub import ModelCardData

    folder = Folder(staged)
    c = folder.stock_config
    n_parameters = sum(math.prod(folder.shapes[name]) for name in folder.names.values())
    path = path.resolve()
    step, run = steps_trained(path), path.parent.parent if path.parent.name == "checkpoints" else path.parent
    metrics = run / "metrics.jsonl"
    known = step is not None and metrics.is_file() and not metrics.is_symlink()
    rows = [row for row in read_rows(metrics) if row["step"] <= step] if known else []
    latest: dict[str, Any] = {key: value for row in rows for key, value in row.items()}
    measures = {
        "val_loss": "validation loss (nats per token, held-out part of the training data)",
        "val_bpb": "validation bits per byte",
        "hellaswag_acc": "HellaSwag acc (as lm-evaluation-harness)",
        "hellaswag_acc_norm": "HellaSwag acc_norm (as lm-evaluation-harness)",
        "hellaswag_lecture_acc": "HellaSwag, lowest mean loss per token",
    }
    header = ModelCardData(library_name="transformers", pipeline_tag="text-generation", tags=["gpt2"], license=license)
    lines = ["---", header.to_yaml(), "---", "", f"# {repo.split('/')[-1]}", ""]
    lines += [
        f"A GPT-2 of {n_parameters:,} parameters: {c.n_layer} layers, {c.n_embd} wide, {c.n_head} heads, "
        f"{c.n_positions} positions, {c.vocab_size:,} tokens."
        + (f" Pretrained with gpt2_hf on {latest['tokens_seen']:,} tokens." if latest else ""),
        "It continues text, and may repeat what is false or offensive in the text that it was trained on.",
        "",
        "```python",
        "from transformers import pipeline",
        "",
        f'generate = pipeline("text-generation", "{repo}")',
        'print(generate("Hello, I\'m a language model,", max_new_tokens=40)[0]["generated_text"])',
        "```",
    ]
    if with_code:
        lines += ["", "The weights are plain GPT-2. `trust_remote_code=True` loads the training code beside them."]
    if measured := [f"| {name} | {latest[key]:.4f} |" for key, name in measures.items() if key in latest]:
        lines += ["", "| measure | value |", "|---|---|", *measured]
    if "hellaswag_items" in latest:
        error = latest["hellaswag_stderr"]
        lines += ["", f"HellaSwag on {latest['hellaswag_items']:,} of 10,042 items, standard error {error:.4f}."]
    return "\n".join(lines) + "\n"


@contextmanager
def hub_errors(repo: str) -> Iterator[None]:
    """Turn what can go wrong between here and the Hub into one line that says what to do."""
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
    )

    log_in = "run `hf auth login` with a token that may write, or set HF_TOKEN"
    try:
        yield
    except HFValidationError as error:
        raise PublishError(f"--repo {repo!r} is not the name of a repository: {error}") from None
    except OfflineModeIsEnabled:
        raise PublishError("HF_HUB_OFFLINE is set, so the Hub is not asked; unset it to publish") from None
    except LocalTokenNotFoundError:
        raise PublishError(f"not logged in to the Hub: {log_in}") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        why = {401: f"the token is not valid: {log_in}", 403: f"this token may not write to {repo}: {log_in}"}
        raise PublishError(why.get(status, f"the Hub answers {status}: {str(error).strip().splitlines()[0]}")) from None
    except (HTTPError, ConnectionError, TimeoutError) as error:
        raise PublishError(f"the Hub cannot be reached ({error}); the folder is unchanged, try again") from None


@dataclass(frozen=True)
class Repository:
    """A repository as it is before the upload."""

    name: str
    files: frozenset[str] = frozenset()
    is_public: bool = False  # and there: a new one is neither yet


def look_up(repo: str) -> Repository:
    """Ask the Hub, as who we are logged in to it, for a repository; one without an owner is ours."""
    from huggingface_hub import HfApi, is_offline_mode
    from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError

    if is_offline_mode():
        raise OfflineModeIsEnabled
    user = HfApi().whoami()["name"]
    repo = repo if "/" in repo else f"{user}/{repo}"
    try:
        found = HfApi().model_info(repo)
    except RepositoryNotFoundError:
        return Repository(repo)
    return Repository(repo, frozenset(file.rfilename for file in found.siblings or ()), not found.private)


def publish(
    folder: str | Path,
    repo: str | None = None,
    *,
    check: bool = False,
    with_code: bool = False,
    private: bool = False,
    license: str | None = None,
    dry_run: bool = False,
) -> bool:
    """Check a folder or run and, if nothing failed and a repository is named, push it; prints a line a check.

    Args:
        folder: a run, or any folder with a GPT-2 in it.
        repo: name on the Hub, "me/my-gpt2"; none to check only.
        check: check only, whatever else is asked for.
        with_code: publish our model code too, so that trust_remote_code=True loads it.
        private: make a new repository private; one that is there and public is refused.
        license: the Hub's name of a licence, for the model card that is written when there is no README.md, neither in
            the folder nor in the repository.
        dry_run: check, and list what would be uploaded; the Hub is not asked.

    Returns:
        Whether no check failed.

    Raises:
        PublishError: when there is nothing to check, or the Hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import validate_repo_id

    path = find_model(Path(folder))
    refuse_links(Path(folder), path)
    check = check or repo is None
    remote = Repository(repo or "")
    if not remote.name.isascii():  # validate_repo_id takes letters of any script, as the Hub does not
        raise PublishError(f"--repo {remote.name!a} is not the name of a repository: a-z, 0-9, '-', '_', '.' only")
    if not check:
        with hub_errors(remote.name):
            validate_repo_id(remote.name)
            remote = remote if dry_run else look_up(remote.name)
        if leading := [name for name in LEADING_FILES if name in remote.files]:
            raise PublishError(
                f"{remote.name} holds {leading[0]}, which readers would get with these weights: delete it there first"
            )
        if private and remote.is_public:
            raise PublishError(f"{remote.name} is there and public: make it private in its settings on the Hub first")
    if license and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license):
        raise PublishError(f"--license {license!r} is not the Hub's name of a licence, such as mit or apache-2.0")

    with tempfile.TemporaryDirectory(prefix="gpt2-") as temporary:
        staged, problem = Path(temporary), None
        stage(path, staged, None if check else with_code)
        card_at = f"the {CARD} of {remote.name}" if CARD in remote.files else None
        card_at = str(path / CARD) if (staged / CARD).exists() else card_at
        if license and card_at and not check:
            raise PublishError(f"{card_at} is there: write `license: {license}` into its header instead")
        if not (check or card_at):
            try:
                card = model_card(path, staged, remote.name, license, with_code)
                (staged / CARD).write_text(card, encoding="utf-8")
            except Exception as error:  # such a folder fails a check, which says better why
                problem = error
        known_code = {file.name: sha256(file) for file in code_files()}
        results = check_folders([staged], lambda _, result: print(result, flush=True), known_code, AUTO_MAP)[staged]
        uploads = sorted(file.name for file in staged.iterdir())
        left_out = sorted(shown(f.name) + "/" * f.is_dir() for f in path.iterdir() if f.name not in uploads)
        if check and left_out:
            print(f"not looked at, and left out when published: {', '.join(left_out)}")
        failed = [result.check for result in results if result.status == "FAILED"]
        if failed:
            consequence = "" if check else "; nothing is published"
            print(f"{path}: {len(failed)} of {len(results)} checks FAILED{consequence}")
            return False
        print(f"{path}: a stock GPT-2, {len(results)} checks passed")
        if check:
            return True
        if problem is not None:
            raise PublishError(f"{path} cannot be prepared for upload: {problem}")
        print(f"{'would upload' if dry_run else 'uploading'} to {remote.name}:")
        for name in uploads:
            print(f"  {(staged / name).stat().st_size:>15,} bytes  {name}")
        if left_out:
            print(f"left out: {', '.join(left_out)}")
        if CARD in remote.files and CARD not in uploads:
            print(f"{card_at} stays as it is")
        if not dry_run:
            # What an earlier upload left would be read beside these files, or instead of them.
            stale = {name for name in remote.files if is_stock(name) or name in known_code} - set(uploads)
            with hub_errors(remote.name):
                url = HfApi().create_repo(remote.name, private=private or None, exist_ok=True)
                HfApi().upload_folder(
                    repo_id=url.repo_id,
                    folder_path=staged,
                    delete_patterns=sorted(stale),
                    commit_message="Upload GPT-2",
                )
            print(url)
            flag = ", trust_remote_code=True" if with_code else ""
            print(f'AutoModelForCausalLM.from_pretrained("{url.repo_id}"{flag})')
    return True
