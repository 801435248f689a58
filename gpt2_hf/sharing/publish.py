"""Push a checkpoint to the Hub as the stock GPT-2 that it is, after ``verify`` has looked at exactly what goes up.

Only the card, where there was none, is written afterwards: of a model that is known to be sound.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..files import sha256
from ..model.hub import AUTO_MAP, code_files
from ..runs import find_model, is_stock
from .card import model_card
from .fresh_process import check_folders
from .privacy import PublishError
from .staging import ADAPTER, CARD, refuse_links, shown, stage
from .verify import Result

# What runs or loads instead of the weights when it lies in a repository beside them.
LEADING_FILES = (ADAPTER, "custom_generate/generate.py")


@dataclass(frozen=True)
class Repository:
    """A repository as it is before the upload."""

    name: str
    files: frozenset[str] = frozenset()
    is_public: bool = False  # and there: a new one is neither yet


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
    path = find_model(Path(folder))
    refuse_links(Path(folder), path)
    _refuse_wrong_names(repo, license)
    if check or repo is None:
        return _only_check(path)
    remote = _destination(repo, private, dry_run)
    with tempfile.TemporaryDirectory(prefix="gpt2-") as temporary:
        staged = Path(temporary)
        stage(path, staged, with_code)
        card_at = _card_that_is_there(path, staged, remote)
        if license and card_at:
            raise PublishError(f"{card_at} is there: write `license: {license}` into its header instead")
        if not _passes(path, staged, "; nothing is published"):
            return False
        if card_at is None:
            _write_card(path, staged, remote.name, license, with_code)
        _list_upload(path, staged, remote, "would upload" if dry_run else "uploading")
        if not dry_run:
            _upload(staged, remote, private, with_code)
    return True


# Before anything is copied


def _refuse_wrong_names(repo: str | None, license: str | None) -> None:
    if repo and not repo.isascii():  # validate_repo_id takes letters of any script, as the Hub does not
        raise PublishError(f"--repo {repo!a} is not the name of a repository: a-z, 0-9, '-', '_', '.' only")
    if license and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license):
        raise PublishError(f"--license {license!r} is not the Hub's name of a licence, such as mit or apache-2.0")


def _destination(repo: str, private: bool, dry_run: bool) -> Repository:
    """The repository as the Hub has it, when nothing there stands in the way; a dry run asks nobody."""
    from huggingface_hub.utils import validate_repo_id

    with hub_errors(repo):
        validate_repo_id(repo)
        remote = Repository(repo) if dry_run else look_up(repo)
    if leading := [name for name in LEADING_FILES if name in remote.files]:
        raise PublishError(
            f"{remote.name} holds {leading[0]}, which readers would get with these weights: delete it there first"
        )
    if private and remote.is_public:
        raise PublishError(f"{remote.name} is there and public: make it private in its settings on the Hub first")
    return remote


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


# With the copy


def _only_check(path: Path) -> bool:
    with tempfile.TemporaryDirectory(prefix="gpt2-") as temporary:
        staged = Path(temporary)
        stage(path, staged, None)
        if left_out := _left_out(path, staged):
            print(f"not looked at, and left out when published: {left_out}")
        return _passes(path, staged, "")


def _card_that_is_there(path: Path, staged: Path, remote: Repository) -> str | None:
    """Where a card lies that someone wrote."""
    if (staged / CARD).exists():
        return str(path / CARD)
    return f"the {CARD} of {remote.name}" if CARD in remote.files else None


def _passes(path: Path, staged: Path, consequence: str) -> bool:
    """Print a line for each check of the copy, and one for all."""
    results = check_folders([staged], _print_result, _our_code(), AUTO_MAP)[staged]
    n_failed = sum(result.status == "FAILED" for result in results)
    if n_failed:
        print(f"{path}: {n_failed} of {len(results)} checks FAILED{consequence}")
    else:
        print(f"{path}: a stock GPT-2, {len(results)} checks passed")
    return n_failed == 0


def _print_result(path: Path, result: Result) -> None:
    print(result, flush=True)


def _our_code() -> dict[str, str]:
    return {file.name: sha256(file) for file in code_files()}


def _write_card(path: Path, staged: Path, repo: str, license: str | None, with_code: bool) -> None:
    try:
        card = model_card(path, staged, repo, license, with_code)
    except Exception as error:  # the model was loaded: what is left is a metrics.jsonl that somebody edited
        raise PublishError(f"{path} cannot be prepared for upload: {error}") from error
    (staged / CARD).write_text(card, encoding="utf-8")


def _left_out(path: Path, staged: Path) -> str:
    """Names of what stays here, of a folder with a slash."""
    names = (shown(f.name) + "/" * f.is_dir() for f in path.iterdir() if not (staged / f.name).exists())
    return ", ".join(sorted(names))


def _list_upload(path: Path, staged: Path, remote: Repository, what: str) -> None:
    print(f"{what} to {remote.name}:")
    for file in sorted(staged.iterdir()):
        print(f"  {file.stat().st_size:>15,} bytes  {file.name}")
    if left_out := _left_out(path, staged):
        print(f"left out: {left_out}")
    if CARD in remote.files and not (staged / CARD).exists():
        print(f"the {CARD} of {remote.name} stays as it is")


def _upload(staged: Path, remote: Repository, private: bool, with_code: bool) -> None:
    from huggingface_hub import HfApi

    # What an earlier upload left would be read beside these files, or instead of them.
    stale = {name for name in remote.files if is_stock(name) or name in _our_code()}
    stale -= {file.name for file in staged.iterdir()}
    with hub_errors(remote.name):
        url = HfApi().create_repo(remote.name, private=private or None, exist_ok=True)
        HfApi().upload_folder(
            repo_id=url.repo_id, folder_path=staged, delete_patterns=sorted(stale), commit_message="Upload GPT-2"
        )
    print(url)
    flag = ", trust_remote_code=True" if with_code else ""
    print(f'AutoModelForCausalLM.from_pretrained("{url.repo_id}"{flag})')
