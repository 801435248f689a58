"""Push a checkpoint to the Hub as the stock GPT-2 that it is, after ``verify`` has looked at exactly what goes up."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpoint import STOCK_FILES, find_model, is_stock, same_weights, saved_steps
from .metrics import read_rows
from .model.hub import AUTO_MAP, code_files
from .program import UserError
from .verify import INDEX, WEIGHTS, Folder, check_folders, link, sha256, weight_files


class PublishError(UserError):
    """Why a folder cannot be checked or published, in one line."""


def steps_trained(path: Path) -> float | None:
    """The last step whose figures in metrics.jsonl are those of a run's folder; None where nobody knows."""
    if path.parent.name == "checkpoints":
        return next((step for step, folder in saved_steps(path.parent).items() if folder == path), None)
    if path.name != "final":  # perhaps another model's
        return None
    kept = saved_steps(path.parent / "checkpoints")
    same = [step for step, folder in kept.items() if same_weights(folder, path)]
    return max(same, default=None if kept else math.inf)


def model_card(path: Path, repo: str, license: str | None, with_code: bool) -> str:
    """A README.md that says what is known of a checkpoint, and no more; figures come from its run's metrics.jsonl."""
    folder = Folder(path)
    c = folder.stock_config
    n_parameters = sum(math.prod(folder.shapes[name]) for name in folder.names.values())
    path = path.resolve()
    step, run = steps_trained(path), path.parent.parent if path.parent.name == "checkpoints" else path.parent
    rows = [row for row in read_rows(run / "metrics.jsonl") if row["step"] <= step] if step is not None else []
    latest: dict[str, Any] = {key: value for row in rows for key, value in row.items()}
    measures = {
        "val_loss": "validation loss (nats per token, held-out part of the training data)",
        "val_bpb": "validation bits per byte",
        "hellaswag_acc": "HellaSwag acc (as lm-evaluation-harness)",
        "hellaswag_acc_norm": "HellaSwag acc_norm (as lm-evaluation-harness)",
        "hellaswag_lecture_acc": "HellaSwag, lowest mean loss per token",
    }
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags:", "- gpt2"]
    lines += [f"license: {license}"] if license else []
    lines += ["---", "", f"# {repo.split('/')[-1]}", ""]
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


def stage(path: Path, target: Path, card: str | None, with_code: bool) -> None:
    """Lay out in ``target`` what would be published of a checkpoint, and nothing else.

    Files are linked; ``config.json`` gets or loses its ``auto_map``.
    """
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    old_map = config.pop("auto_map", None)
    if with_code:
        config["auto_map"] = AUTO_MAP
        for file in code_files():
            shutil.copyfile(file, target / file.name)
    if config.get("auto_map") != old_map:
        (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if card is not None:
        (target / "README.md").write_text(card, encoding="utf-8")
    weights = {file.name for file in weight_files(path)}
    wanted = {"README.md", *STOCK_FILES, *weights, *([] if WEIGHTS in weights else [INDEX])}
    for file in path.iterdir():
        if file.is_file() and file.name in wanted and not (target / file.name).exists():
            link(file, target / file.name)


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
    check = check or repo is None
    remote = Repository(repo or "")
    if not check:
        with hub_errors(remote.name):
            validate_repo_id(remote.name)
            remote = remote if dry_run else look_up(remote.name)
        if private and remote.is_public:
            raise PublishError(f"{remote.name} is there and public: make it private in its settings on the Hub first")
    card_at = f"the README.md of {remote.name}" if "README.md" in remote.files else None
    card_at = str(path / "README.md") if (path / "README.md").is_file() else card_at
    if license and card_at:
        raise PublishError(f"{card_at} is there: write `license: {license}` into its header instead")

    with tempfile.TemporaryDirectory() as temporary:
        staged, problem = path, None
        if not check:
            staged = Path(temporary)
            try:
                stage(path, staged, None if card_at else model_card(path, remote.name, license, with_code), with_code)
            except Exception as error:  # such a folder fails a check, which says better why
                staged, problem = path, error
        known_code = {file.name: sha256(file) for file in code_files()}
        results = check_folders([staged], lambda _, result: print(result, flush=True), known_code)[staged]
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
        uploads = sorted(file.name for file in staged.iterdir())
        print(f"{'would upload' if dry_run else 'uploading'} to {remote.name}:")
        for name in uploads:
            print(f"  {(staged / name).stat().st_size:>15,} bytes  {name}")
        if left_out := sorted(f.name + "/" * f.is_dir() for f in path.iterdir() if f.name not in uploads):
            print(f"left out: {', '.join(left_out)}")
        if "README.md" in remote.files and "README.md" not in uploads:
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
