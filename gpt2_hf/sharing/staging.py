"""What may leave this machine: a private copy of a gpt2 folder's own files, refused where they lead anywhere else.

The copy is what is checked and what is uploaded, so nothing that happens to the folder in between goes up.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import unicodedata
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..model.hub import AUTO_MAP, code_files
from ..program import UserError
from ..runs import STOCK_FILES
from .verify import INDEX, WEIGHTS, CheckFailed, weight_files

CARD = "README.md"
VOCABULARY = ("tokenizer.json", "vocab.json", "merges.txt")  # pieces of any text, which mean nothing
ADAPTER = "adapter_config.json"
# Keys by which a JSON file has a loader run code, or read other weights than those that lie beside it as they are.
LEADING = (
    "compression_config",
    "custom_generate",
    "custom_pipelines",
    "kernel_config",
    "quantization_config",
    "transformers_weights",
    "trust_remote_code",
    "use_kernels",
)
_KERNEL_CHOICE = re.compile(r"_?(attn|experts)_implementation(_internal)?")  # "owner/name" there is code of the Hub
_HOST_PATH = re.compile(r"^(~[\w-]*/|/[^/\s]+/|\.{1,2}/|file:|[A-Za-z]:[\\/]|\\\\)|/(home|Users|root)/\w|:\\Users\\")
_SECRET = re.compile(
    r"\bhf_[A-Za-z0-9]{30,}|\bgh[pousr]_[A-Za-z0-9]{36}|\bgithub_pat_\w{22,}|\bsk-[A-Za-z0-9_-]{32,}"
    r"|\bAKIA[0-9A-Z]{16}\b|-----BEGIN [A-Z ]*PRIVATE KEY|://[\w.%+-]+:[^/\s@\"']+@"
)
_SECRET_NAME = re.compile("TOKEN|SECRET|PASSW|API_?KEY|ACCESS_KEY|CREDENTIAL")
_OTHER_KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class PublishError(UserError):
    """Why a folder cannot be checked or published, in one line."""


def shown(name: str) -> str:
    """A file's name as one line of a terminal can hold it."""
    return name if name.isprintable() else repr(name)


def stage(path: Path, target: Path, with_code: bool | None) -> None:
    """Copy into the empty folder ``target`` what would be published of the gpt2 folder ``path``, and nothing else.

    Args:
        with_code: True adds our model code, False takes it away, None leaves it as it is in the folder.

    Raises:
        PublishError: for a file that is no plain file, or holds what must stay here, or leads a loader elsewhere.
    """
    names = {entry.name for entry in os.scandir(path)}
    if ADAPTER in names:
        raise PublishError(
            f"{path} holds {ADAPTER}, so loaders put an adapter on these weights: move it away, or merge it first"
        )
    wanted = {CARD, *STOCK_FILES, WEIGHTS, INDEX}
    looks = {_looks(name): name for name in wanted}
    for name in sorted(names - wanted):
        if original := looks.get(_looks(name)):
            raise PublishError(f"{path} holds {name!a}, which some systems take for {original}: rename or delete it")
    if WEIGHTS in names:
        wanted -= {INDEX}
    needed, room = sum((path / name).lstat().st_size for name in names), shutil.disk_usage(target).free
    if needed > room:
        raise PublishError(
            f"{target.parent} has {room / 1e9:,.1f} GB of room, a copy of {path} takes up to {needed / 1e9:,.1f} GB: "
            "set TMPDIR to a folder on a larger disk"
        )
    for name in sorted(wanted & names):
        copy_plain(path / name, target / name)
    shards: list[Path] = []
    with suppress(CheckFailed, ValueError, LookupError, TypeError, AttributeError):  # the check says what is wrong
        shards = weight_files(target)
    for file in shards:
        if file.name in names - wanted:
            copy_plain(path / file.name, file)

    refuse_private(path, target)

    config = read_json(target / "config.json")
    if not isinstance(config, dict):
        raise PublishError(f"{path / 'config.json'} holds no JSON object: save the model again")
    had_code = "auto_map" in config
    if with_code is False:
        config.pop("auto_map", None)
    if with_code:
        config["auto_map"] = AUTO_MAP
    if had_code != ("auto_map" in config):
        (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for file in code_files():
        if with_code:
            shutil.copyfile(file, target / file.name)
        elif "auto_map" in config and file.name in names:
            copy_plain(path / file.name, target / file.name)


def copy_plain(source: Path, target: Path) -> None:
    """Copy a plain file: not what a link leads to, and nothing that may not end.

    Raises:
        PublishError: when ``source`` is anything else, or becomes it while it is opened.
    """
    advice = "only plain files are published: look at what it leads to, and put a copy (cp -L) in its place"
    kind = stat.S_IFMT(source.lstat().st_mode)
    if kind != stat.S_IFREG:
        raise PublishError(f"{source} is {_OTHER_KINDS.get(kind, 'no file')}; {advice}")
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    with open(os.open(source, flags), "rb") as file, target.open("xb") as copy:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise PublishError(f"{source} changed while it was opened; {advice}")
        shutil.copyfileobj(file, copy, 1 << 20)


def refuse_links(named: Path, found: Path) -> None:
    """Refuse a model that was found below the folder that the user named, when a link led there."""
    for folder in (found, *found.parents):
        if folder == named:
            return
        if folder.is_symlink():
            raise PublishError(f"{folder} is a symbolic link: name the folder that it leads to, {folder.resolve()}")


def read_json(file: Path) -> Any:
    """What a JSON file holds; a key twice is refused, since of such two readers each may see another."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands there twice")
        return found

    try:
        return json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise PublishError(f"{file.name} cannot be read as JSON ({error}): save the model again") from None


def refuse_private(path: Path, staged: Path) -> None:
    """Refuse what must not go up in the files of ``staged``, which were copied from ``path``.

    That is: keys that lead a loader elsewhere, paths of this machine, and what is, or looks like, a password or token.
    """
    from huggingface_hub import get_token

    own = {value for name, value in os.environ.items() if _SECRET_NAME.search(name) and len(value) >= 12}
    own |= {token for token in (get_token(),) if token}
    places = "|".join(re.escape(str(place)) for place in (Path.home(), path.resolve()) if place != place.parent)
    for file in sorted(staged.iterdir()):
        text, entries = "", _metadata(file) if file.suffix == ".safetensors" else []
        try:
            if file.suffix != ".safetensors":
                text = file.read_text(encoding="utf-8")
            if file.suffix == ".json" and file.name not in VOCABULARY:
                entries = list(_entries(read_json(file)))
            text = "\n".join((text, *(str(value) for _, value in entries)))  # without JSON's escapes
        except UnicodeDecodeError:
            raise PublishError(f"{file.name} is not UTF-8 text: write it so") from None
        except RecursionError:
            raise PublishError(f"{file.name} is nested too deeply to be looked at: save the model again") from None
        if _SECRET.search(text) or any(secret in text for secret in own):
            raise PublishError(f"{file.name} holds what looks like a password, token or private key: take it out")
        for key, value in entries:
            _refuse_entry(file.name, key, value)
        if file.name not in VOCABULARY and (place := re.search(rf"(?<![\w./-])({places})(?![\w.-])", text)):
            raise PublishError(f"{file.name} names {place[0]}, a folder of this machine: take it out")


def _refuse_entry(file: str, key: str, value: Any) -> None:
    name = key.rpartition(".")[2]
    here = f"{file} has {key} {json.dumps(value)[:80]}"
    if name == "auto_map" and (file, key, value) != ("config.json", "auto_map", AUTO_MAP):
        raise PublishError(f"{here}, which leads to code that is not ours: delete it there")
    if name in LEADING and value:
        raise PublishError(f"{here}, by which loaders run other code or read other weights: delete it there")
    choices = value.values() if isinstance(value, dict) else (value,)
    if _KERNEL_CHOICE.fullmatch(name) and any("/" in str(choice) for choice in choices):
        raise PublishError(f"{here}, which is code of the Hub: delete it there, readers choose their own")
    if isinstance(value, str) and _HOST_PATH.search(value):
        raise PublishError(f"{here}, a path of this machine: delete it there")


def _entries(content: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """All keys of a JSON file at any depth, as "outer.inner", with their values."""
    inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for name, value in inner:
        place = f"{key}.{name}" if key else str(name)
        yield place, value
        yield from _entries(value, place)


def _metadata(file: Path) -> list[tuple[str, Any]]:
    """The free texts in the header of a safetensors file; none where it cannot be read, which the check says."""
    try:
        with safe_open(file, "pt") as tensors:
            return list((tensors.metadata() or {}).items())
    except SafetensorError:
        return []


def _looks(name: str) -> str:
    """A name as file systems and readers may take it that know no case, no widths and nothing invisible."""
    visible = "".join(c for c in unicodedata.normalize("NFKC", name) if unicodedata.category(c) not in ("Cf", "Cc"))
    return visible.casefold().rstrip(" .")
