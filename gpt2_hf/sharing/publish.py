"""Push a checkpoint to the Hub as the stock GPT-2 that it is, after ``verify`` has looked at exactly what goes up.

Only the card, its figures and the curves' picture are written afterwards: of a model that is known to be sound.
"""

from __future__ import annotations

import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import sha256
from ..model.hub import AUTO_MAP, code_files
from ..program import UserError
from ..runs import find_model, is_stock, problem, run_of, saved_steps
from .card import BENCHMARKS, eval_results, generated_part, model_card, renewed
from .figures import FIGURES, gather
from .fresh_process import check_folders
from .hub import Repository, hub_errors, look_up, push, read_text
from .privacy import PublishError, refuse_private_text
from .staging import ADAPTER, CARD, copy_picture, refuse_links, shown, stage
from .verify import Result

CURVES = "curves.png"
# What runs or loads instead of the weights when it lies in a repository beside them.
LEADING_FILES = (ADAPTER, "custom_generate/generate.py")


@dataclass(frozen=True)
class CardFacts:
    """What a new card is told beside the run's records: see ``publish``."""

    license: str | None = None
    language: str | None = None
    price: float | None = None
    data: Path | None = None


def publish(
    folder: str | Path,
    repo: str | None = None,
    *,
    check: bool = False,
    with_code: bool = False,
    public: bool = False,
    license: str | None = None,
    language: str | None = None,
    dry_run: bool = False,
    checkpoint: int | None = None,
    price: float | None = None,
    data: str | Path | None = None,
) -> bool:
    """Check a folder or run and, if nothing failed and a repository is named, push it; prints a line a check.

    Args:
        folder: a run, or any folder with a GPT-2 in it.
        repo: name on the Hub, "me/my-gpt2"; none to check only.
        check: check only, whatever else is asked for.
        with_code: publish our model code too, so that trust_remote_code=True loads it.
        public: let everybody see a new repository, and push to one that everybody sees. One that is there keeps its
            visibility.
        license: the Hub's name of a licence, for the model card that is written when there is no README.md, neither in
            the folder nor in the repository.
        language: of the text that the model writes, as the Hub's code for it (en), for the same card.
        dry_run: check, and list what would be uploaded; the Hub is not asked.
        checkpoint: the run's checkpoint after this step, instead of the model that it has come to.
        price: dollars for an hour of one device; the card then says what the run cost.
        data: the prepared data, where it is not at the recipe's data.path.

    Returns:
        Whether no check failed.

    Raises:
        PublishError: when there is nothing to check, or the Hub refuses.
    """
    path = find_model(Path(folder)) if checkpoint is None else find_checkpoint(Path(folder), checkpoint)
    refuse_links(Path(folder), path)
    _refuse_wrong_names(repo, license, language)
    if check or repo is None:
        return _only_check(path)
    remote = _destination(repo, public, dry_run)
    facts = CardFacts(license, language, price, Path(data) if data else None)
    with tempfile.TemporaryDirectory(prefix="gpt2-") as temporary:
        staged = Path(temporary)
        stage(path, staged, with_code)
        card, card_at = _card_that_is_there(path, staged, remote)
        if license and card_at:
            raise PublishError(f"{card_at} is there: write `license: {license}` into its header instead")
        if not _passes(path, staged, "; nothing is published"):
            return False
        _write_card(path, staged, remote.name, card, facts, with_code)
        _list_upload(path, staged, remote, "would upload" if dry_run else "uploading")
        if not dry_run:
            _upload(staged, remote, public, with_code)
    return True


def find_checkpoint(run: Path, step: int) -> Path:
    """The whole checkpoint of a step. Raises UserError, naming those that are there."""
    saved = saved_steps(run / "checkpoints") if (run / "checkpoints").is_dir() else {}
    if step not in saved:
        there = f"it has {', '.join(map(str, saved))}" if saved else "it has none"
        raise UserError(f"{run} has no checkpoint of step {step}: {there}")
    if what := problem(saved[step]):
        raise UserError(f"{saved[step]} is not published, as it is damaged: {what}")
    return saved[step]


# Before anything is copied


def _refuse_wrong_names(repo: str | None, license: str | None, language: str | None) -> None:
    if repo and not repo.isascii():  # validate_repo_id takes letters of any script, as the Hub does not
        raise PublishError(f"--repo {repo!a} is not the name of a repository: a-z, 0-9, '-', '_', '.' only")
    if license and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license):
        raise PublishError(f"--license {license!r} is not the Hub's name of a licence, such as mit or apache-2.0")
    if language and not re.fullmatch(r"[a-z]{2,3}", language):
        raise PublishError(f"--language {language!r} is not the code of a language, such as en or de")


def _destination(repo: str, public: bool, dry_run: bool) -> Repository:
    """The repository as the Hub has it, when nothing there stands in the way; a dry run asks nobody."""
    from huggingface_hub.utils import validate_repo_id

    with hub_errors(repo):
        validate_repo_id(repo)
        remote = Repository(repo) if dry_run else look_up(repo)
    if leading := [name for name in LEADING_FILES if name in remote.files]:
        raise PublishError(
            f"{remote.name} holds {leading[0]}, which readers would get with these weights: delete it there first"
        )
    if remote.is_public and not public:
        raise PublishError(
            f"{remote.name} is there and public: say --public to publish where everybody sees it, or make it private "
            "in its settings on the Hub"
        )
    return remote


# With the copy


def _only_check(path: Path) -> bool:
    with tempfile.TemporaryDirectory(prefix="gpt2-") as temporary:
        staged = Path(temporary)
        stage(path, staged, None)
        if left_out := _left_out(path, staged):
            print(f"not looked at, and left out when published: {left_out}")
        return _passes(path, staged, "")


def _card_that_is_there(path: Path, staged: Path, remote: Repository) -> tuple[str | None, str | None]:
    """The card that someone has, and where it lies."""
    if (staged / CARD).exists():
        return (staged / CARD).read_text(encoding="utf-8"), str(path / CARD)
    if CARD not in remote.files:
        return None, None
    with hub_errors(remote.name):
        return read_text(remote, CARD), f"the {CARD} of {remote.name}"


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


def _write_card(path: Path, staged: Path, repo: str, card: str | None, facts: CardFacts, with_code: bool) -> None:
    """Add the card, and the figures and the picture that it shows; a card without our marks is left as it is."""
    if card is not None and generated_part(card) is None:
        return
    try:
        record: dict[str, Any] = gather(path, staged, facts.price, facts.data)
        run = run_of(path.resolve())
        curves = run is not None and record["run"] is not None and copy_picture(run / CURVES, staged / CURVES)
        record |= {"repo": repo, "with_code": with_code, "curves": curves}
        text = renewed(card, record) if card is not None else model_card(record, facts.license, facts.language)
        made = {CARD: text or "", FIGURES: json.dumps(record, indent=1) + "\n", **eval_results(record)}
        for name, content in made.items():
            refuse_private_text(name, content, path)
            (staged / name).parent.mkdir(exist_ok=True)
            (staged / name).write_text(content, encoding="utf-8")
    except UserError:
        raise
    except Exception as error:  # the model was loaded: what is left is a record that somebody edited
        raise PublishError(f"{path} cannot be prepared for upload: {error}") from error


def _files(folder: Path) -> dict[str, Path]:
    """Name with "/" -> file, in order."""
    return {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}


def _left_out(path: Path, staged: Path) -> str:
    """Names of what stays here, of a folder with a slash."""
    names = (shown(f.name) + "/" * f.is_dir() for f in path.iterdir() if not (staged / f.name).exists())
    return ", ".join(sorted(names))


def _list_upload(path: Path, staged: Path, remote: Repository, what: str) -> None:
    print(f"{what} to {remote.name}:")
    for name, file in _files(staged).items():
        print(f"  {file.stat().st_size:>15,} bytes  {name}")
    if left_out := _left_out(path, staged):
        print(f"left out: {left_out}")
    if CARD in remote.files and not (staged / CARD).exists():
        print(f"the {CARD} of {remote.name} stays as it is")


def _upload(staged: Path, remote: Repository, public: bool, with_code: bool) -> None:
    # What an earlier upload left would be read beside these files, or instead of them.
    stale = {name for name in remote.files if is_stock(name) or name in _our_code()}
    if FIGURES in remote.files:  # they are of other weights
        stale |= remote.files & {FIGURES, CURVES, *(f".eval_results/{task}.yaml" for task in BENCHMARKS)}
    with hub_errors(remote.name):
        url = push(staged, remote, stale, public, "Upload GPT-2")
    print(url)
    if public and remote.is_private:
        print(f"{remote.name} is private and stays so; change that in its settings on the Hub")
    name = url.split("/", 3)[3]
    flag = ", trust_remote_code=True" if with_code else ""
    print(f'AutoModelForCausalLM.from_pretrained("{name}"{flag})')
