"""The Hub: what a repository holds, a push that is one commit or nothing, and what goes wrong in one line."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .privacy import PublishError

STALL_S = 100.0  # without a byte, and the Hub is said not to answer; its own client would wait for ever
LOG_IN = "run `hf auth login` with a token that may write, or set HF_TOKEN"


@dataclass(frozen=True)
class Repository:
    """A repository as it is before the upload; one that is not there yet has no commit."""

    name: str
    files: frozenset[str] = frozenset()
    is_public: bool = False  # and there: a new one is neither yet
    commit: str | None = None

    @property
    def is_private(self) -> bool:
        """And there."""
        return self.commit is not None and not self.is_public


def look_up(repo: str) -> Repository:
    """Ask the Hub, as who we are logged in to it, for a repository; one without an owner is ours."""
    from huggingface_hub import HfApi, is_offline_mode
    from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError

    if is_offline_mode():
        raise OfflineModeIsEnabled
    _do_not_wait_for_ever()
    user = HfApi().whoami()["name"]
    repo = repo if "/" in repo else f"{user}/{repo}"
    try:
        found = HfApi().model_info(repo, timeout=STALL_S)
    except RepositoryNotFoundError:
        return Repository(repo)
    return Repository(
        repo, frozenset(file.rfilename for file in found.siblings or ()), not found.private, found.sha or ""
    )


def push(staged: Path, remote: Repository, stale: Collection[str], public: bool, message: str) -> str:
    """Upload a folder's files as one commit that also deletes ``stale``; returns the repository's address.

    Nobody sees a part of it: files are sent first, and appear together with the commit. (``upload_folder`` makes
    several commits where hf_xet is installed.) A repository that somebody changed since ``look_up`` is refused.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    added = {file.relative_to(staged).as_posix(): file for file in sorted(staged.rglob("*")) if file.is_file()}
    api, name = HfApi(), remote.name
    if remote.commit is None:
        name = api.create_repo(name, private=not public, exist_ok=True).repo_id
    api.create_commit(
        name,
        [
            *(CommitOperationDelete(path_in_repo=old) for old in sorted(set(stale) - added.keys())),
            *(CommitOperationAdd(path_in_repo=new, path_or_fileobj=file) for new, file in added.items()),
        ],
        commit_message=message,
        parent_commit=remote.commit or None,
    )
    return f"{api.endpoint}/{name}"


def read_text(remote: Repository, name: str) -> str:
    """A text file of a repository."""
    from huggingface_hub import HfApi

    path = HfApi().hf_hub_download(remote.name, name, revision=remote.commit, etag_timeout=STALL_S)
    return Path(path).read_text(encoding="utf-8")


def fetch(repo: str, folder: Path, patterns: list[str]) -> None:
    """Download what matches of a repository; with a token if there is one, as private ones need."""
    from huggingface_hub import HfApi

    _do_not_wait_for_ever()
    HfApi().snapshot_download(repo, local_dir=folder, allow_patterns=patterns)


@contextmanager
def hub_errors(repo: str) -> Iterator[None]:
    """Turn what can go wrong between here and the Hub into one line that says what to do."""
    try:
        yield
    except Exception as error:
        if (line := _explain(error, repo)) is None:
            raise
        raise PublishError(line) from None


def _explain(error: BaseException, repo: str) -> str | None:
    """What the user is told; None for what is no trouble with the Hub."""
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
    )

    if isinstance(error, HFValidationError):
        return f"--repo {repo!r} is not the name of a repository: {error}"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so the Hub is not asked; unset it to publish"
    if isinstance(error, LocalTokenNotFoundError):
        return f"not logged in to the Hub: {LOG_IN}"
    if isinstance(error, HfHubHTTPError):
        status, why = error.response.status_code, str(error).strip().splitlines()[0]
        return {
            401: f"the token is not valid, or {repo} is private: {LOG_IN}",
            403: f"this token may not write to {repo}: {LOG_IN}",
            404: f"the Hub has no {repo}, or this token may not see it",
            412: f"{repo} was changed by somebody else meanwhile; nothing was published, try again",
            429: "too many requests (429), says the Hub; nothing was published, try again in some minutes",
        }.get(status, f"the Hub answers {status}: {why}; nothing was published, try again")
    # A file's upload, or a download that a cached copy was looked for, wraps what went wrong.
    if isinstance(error, RuntimeError | LocalEntryNotFoundError) and error.__cause__ is not None:
        return _explain(error.__cause__, repo)
    if isinstance(error, HTTPError | ConnectionError | TimeoutError):
        what = " ".join(str(error).split()) or type(error).__name__
        return f"the Hub cannot be reached, or broke off ({what}); nothing was published, try again"
    if isinstance(error, ValueError) and "metadata in README.md" in str(error):
        return f"the Hub refuses the header of README.md: {' '.join(str(error).split())}"
    return None


def _do_not_wait_for_ever() -> None:
    """Give up on a Hub from which nothing comes."""
    from huggingface_hub import get_session

    get_session().timeout = STALL_S
