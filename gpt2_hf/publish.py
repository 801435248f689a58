"""Push a checkpoint to the Hub as the stock GPT-2 that it is, after ``verify`` has looked at exactly what goes up."""

from __future__ import annotations

import json
import math
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .checkpoint import newest_whole
from .metrics import read_rows
from .model.hub import AUTO_MAP, code_files
from .verify import INDEX, WEIGHTS, Folder, check_folders, weight_files

STOCK_FILES = (
    "README.md",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)


class PublishError(ValueError):
    """Why a folder cannot be checked or published, in one line."""


def find_model(folder: Path) -> Path:
    """The checkpoint folder meant by ``folder``: itself, or of a run its ``final``, else its newest whole checkpoint.

    Raises:
        PublishError: when there is none.
    """
    if not folder.is_dir():
        raise PublishError(f"no folder {folder}")
    for path in (folder, folder / "final"):
        if (path / "config.json").is_file():
            return path
    found = newest_whole(folder / "checkpoints")
    if found is None:
        raise PublishError(f"{folder} has no config.json and is no run with a final/ or a whole checkpoint")
    return found


def model_card(path: Path, repo: str, license: str | None, with_code: bool) -> str:
    """A README.md that says what is known of a checkpoint, and no more; figures come from its run's metrics.jsonl."""
    folder = Folder(path)
    c = folder.stock_config
    n_parameters = sum(math.prod(folder.shapes[name]) for name in folder.names.values())
    step = int(m[1]) if (m := re.fullmatch(r"step-(\d+)", path.name)) else math.inf
    of_checkpoint = path.parent.name == "checkpoints"
    run = path.parent.parent if of_checkpoint else path.parent
    known = of_checkpoint or path.name == "final"  # another folder's figures may be another model's
    rows = [row for row in read_rows(run / "metrics.jsonl") if row["step"] <= step] if known else []
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


def stage(path: Path, target: Path, card: str | None, with_code: bool) -> list[str]:
    """Lay out in ``target`` what would be published of a checkpoint; returns the names of the files to upload.

    All of ``path``'s files are linked, so that the check sees what the folder's owner has; ``config.json`` gets or
    loses its ``auto_map``.
    """
    code = code_files() if with_code else []
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    old_map = config.pop("auto_map", None)
    if with_code:
        config["auto_map"] = AUTO_MAP
    if config.get("auto_map") != old_map:
        (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for file in code:
        shutil.copyfile(file, target / file.name)
    if card is not None:
        (target / "README.md").write_text(card, encoding="utf-8")
    for file in path.iterdir():
        if file.is_file() and not (target / file.name).exists():
            try:
                (target / file.name).symlink_to(file.resolve())
            except OSError:  # Windows asks for a privilege
                shutil.copyfile(file, target / file.name)
    wanted = {*STOCK_FILES, INDEX, *(file.name for file in code)}
    names = {file.name for file in target.iterdir()} & wanted
    weights = {file.name for file in weight_files(target)}
    return sorted((names if WEIGHTS not in weights else names - {INDEX}) | weights)


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


def log_in_name() -> str:
    """The account that the Hub knows us by."""
    from huggingface_hub import HfApi, is_offline_mode
    from huggingface_hub.errors import OfflineModeIsEnabled

    if is_offline_mode():
        raise OfflineModeIsEnabled
    return HfApi().whoami()["name"]


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
        private: make a new repository private.
        license: the Hub's name of a licence, for the model card that is written when there is no README.md.
        dry_run: check, and list what would be uploaded; the Hub is not asked.

    Returns:
        Whether no check failed.

    Raises:
        PublishError: when there is nothing to check, or the Hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import validate_repo_id

    path = find_model(Path(folder))
    if path != Path(folder):
        print(f"{folder} is a run: taking {path}")
    check = check or repo is None
    if license and (path / "README.md").is_file():
        raise PublishError(f"{path / 'README.md'} is there: write `license: {license}` into its header instead")
    if repo is not None and not check:
        with hub_errors(repo):
            validate_repo_id(repo)
            if not dry_run:
                name = log_in_name()
                repo = repo if "/" in repo else f"{name}/{repo}"

    with tempfile.TemporaryDirectory() as temporary:
        staged, uploads, problem = path, [], None
        if not check:
            assert repo is not None
            staged = Path(temporary)
            try:
                card = None if (path / "README.md").is_file() else model_card(path, repo, license, with_code)
                uploads = stage(path, staged, card, with_code)
            except Exception as error:  # such a folder fails a check, which says better why
                staged, problem = path, error
        results = check_folders([staged], lambda _, result: print(result, flush=True))[staged]
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
        print(f"{'would upload' if dry_run else 'uploading'} to {repo}:")
        for file in uploads:
            print(f"  {(staged / file).stat().st_size:>15,} bytes  {file}")
        if not dry_run:
            assert repo is not None
            with hub_errors(repo):
                old_code = [] if with_code else [file.name for file in code_files()]
                url = HfApi().create_repo(repo, private=private or None, exist_ok=True)
                HfApi().upload_folder(
                    repo_id=url.repo_id,
                    folder_path=staged,
                    allow_patterns=uploads,
                    # Weights of an earlier upload could be read instead of these; code would stay behind unasked.
                    delete_patterns=["model*.safetensors", INDEX, *old_code],
                    commit_message="Upload GPT-2",
                )
            print(url)
            flag = ", trust_remote_code=True" if with_code else ""
            print(f'AutoModelForCausalLM.from_pretrained("{url.repo_id}"{flag})')
    return True
