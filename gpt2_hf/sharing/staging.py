"""What may leave this machine: a private copy of a gpt2 folder's own files, refused where they lead anywhere else.

The copy is what is checked and what is uploaded, so nothing that happens to the folder in between goes up.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import unicodedata
from contextlib import suppress
from pathlib import Path

from ..model.hub import AUTO_MAP, code_files
from ..runs import STOCK_FILES
from .privacy import PublishError, read_json, refuse_private
from .verify import INDEX, WEIGHTS, CheckFailed, weight_files

CARD = "README.md"
ADAPTER = "adapter_config.json"
_PNG, _LARGEST_PICTURE = b"\x89PNG\r\n\x1a\n", 5_000_000
_OTHER_KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def stage(path: Path, target: Path, with_code: bool | None) -> None:
    """Copy into the empty folder ``target`` what would be published of the gpt2 folder ``path``, and nothing else.

    Args:
        with_code: True adds our model code, False takes it away, None leaves it as it is in the folder.

    Raises:
        PublishError: for a file that is no plain file, or holds what must stay here, or leads a loader elsewhere.
    """
    names = {entry.name for entry in os.scandir(path)}
    wanted = {CARD, *STOCK_FILES, WEIGHTS, INDEX}
    _refuse_adapter(path, names)
    _refuse_lookalikes(path, names, wanted)
    _refuse_without_room(path, names, target)
    if WEIGHTS in names:
        wanted.remove(INDEX)
    for name in sorted(wanted & names):
        copy_plain(path / name, target / name)
    for file in _shards(target):
        if file.name in names - wanted:
            copy_plain(path / file.name, file)
    refuse_private(path, target)
    _settle_code(path, target, with_code)


def refuse_links(named: Path, found: Path) -> None:
    """Refuse a model that was found below the folder that the user named, when a link led there."""
    for folder in (found, *found.parents):
        if folder == named:
            return
        if folder.is_symlink():
            raise PublishError(f"{folder} is a symbolic link: name the folder that it leads to, {folder.resolve()}")


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


def copy_picture(source: Path, target: Path) -> bool:
    """Copy a PNG's picture, without the texts that it may carry; returns whether there is one."""
    if not stat.S_ISREG(source.lstat().st_mode if os.path.lexists(source) else 0):
        return False
    content = source.read_bytes()
    kept, place = content[:8], 8
    if kept != _PNG or len(content) > _LARGEST_PICTURE:
        return False
    while place + 12 <= len(content):  # a chunk: length, name, content, checksum
        length, name = int.from_bytes(content[place : place + 4], "big"), content[place + 4 : place + 8]
        if name in (b"IHDR", b"PLTE", b"tRNS", b"pHYs", b"IDAT", b"IEND"):
            kept += content[place : place + 12 + length]
        place += 12 + length
    target.write_bytes(kept)
    return True


def shown(name: str) -> str:
    """A file's name as one line of a terminal can hold it."""
    return name if name.isprintable() else repr(name)


def _refuse_adapter(path: Path, names: set[str]) -> None:
    if ADAPTER in names:
        raise PublishError(
            f"{path} holds {ADAPTER}, so loaders put an adapter on these weights: move it away, or merge it first"
        )


def _refuse_lookalikes(path: Path, names: set[str], wanted: set[str]) -> None:
    looks = {_looks(name): name for name in wanted}
    for name in sorted(names - wanted):
        if original := looks.get(_looks(name)):
            raise PublishError(f"{path} holds {name!a}, which some systems take for {original}: rename or delete it")


def _looks(name: str) -> str:
    """A name as file systems and readers may take it that know no case, no widths and nothing invisible."""
    visible = "".join(c for c in unicodedata.normalize("NFKC", name) if unicodedata.category(c) not in ("Cf", "Cc"))
    return visible.casefold().rstrip(" .")


def _refuse_without_room(path: Path, names: set[str], target: Path) -> None:
    needed, room = sum((path / name).lstat().st_size for name in names), shutil.disk_usage(target).free
    if needed > room:
        raise PublishError(
            f"{target.parent} has {room / 1e9:,.1f} GB of room, a copy of {path} takes up to {needed / 1e9:,.1f} GB: "
            "set TMPDIR to a folder on a larger disk"
        )


def _shards(target: Path) -> list[Path]:
    """The weight files that the copied index names; none where it is broken, which the check says better."""
    with suppress(CheckFailed, ValueError, LookupError, TypeError, AttributeError):
        return weight_files(target)
    return []


def _settle_code(path: Path, target: Path, with_code: bool | None) -> None:
    """Bring the copy's config.json and code into agreement with ``with_code``; code is ours, from this package."""
    config = read_json(target / "config.json")
    if not isinstance(config, dict):
        raise PublishError(f"{path / 'config.json'} holds no JSON object: save the model again")
    had_code = "auto_map" in config
    if with_code is None:
        for file in code_files() if had_code else ():
            if os.path.lexists(path / file.name):
                copy_plain(path / file.name, target / file.name)
        return
    if with_code:
        config["auto_map"] = AUTO_MAP
        for file in code_files():
            shutil.copyfile(file, target / file.name)
    else:
        config.pop("auto_map", None)
    if had_code != with_code:
        (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
