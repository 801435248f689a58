"""What may not stand in files that leave this machine: secrets, its paths, and keys that lead loaders elsewhere."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..model.hub import AUTO_MAP
from ..program import UserError

VOCABULARY = ("tokenizer.json", "vocab.json", "merges.txt")  # pieces of any text, which mean nothing
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


class PublishError(UserError):
    """Why a folder cannot be checked or published, in one line."""


def refuse_private(path: Path, staged: Path) -> None:
    """Refuse what must not go up in the files of ``staged``, which were copied from ``path``.

    That is: keys that lead a loader elsewhere, paths of this machine, and what is, or looks like, a password or token.
    """
    own = _own_secrets()
    for file in sorted(staged.iterdir()):
        text, entries = _content(file)
        _refuse_secrets(file.name, text, own)
        for key, value in entries:
            _refuse_entry(file.name, key, value)
        if file.name not in VOCABULARY:
            _refuse_places(file.name, text, path)


def refuse_private_text(name: str, text: str, path: Path) -> None:
    """The same of a text that was made from the records of the model at ``path``."""
    _refuse_secrets(name, text, _own_secrets())
    _refuse_places(name, text, path)
    if home := re.search(r"(?<![\w.])/(home|Users|root)/\w+", text):
        raise PublishError(f"{name} would name {home[0]}, a folder of this machine: take it out of the run's records")


def _refuse_secrets(name: str, text: str, own: set[str]) -> None:
    if _SECRET.search(text) or any(secret in text for secret in own):
        raise PublishError(f"{name} holds what looks like a password, token or private key: take it out")


def _refuse_places(name: str, text: str, path: Path) -> None:
    places = "|".join(re.escape(str(place)) for place in (Path.home(), path.resolve()) if place != place.parent)
    if place := re.search(rf"(?<![\w./-])({places})(?![\w.-])", text):
        raise PublishError(f"{name} names {place[0]}, a folder of this machine: take it out")


def _own_secrets() -> set[str]:
    """What this process was given to keep to itself."""
    from huggingface_hub import get_token

    own = {value for name, value in os.environ.items() if _SECRET_NAME.search(name) and len(value) >= 12}
    return own | {token for token in (get_token(),) if token}


def _content(file: Path) -> tuple[str, list[tuple[str, Any]]]:
    """A file's text, and its keys with their values, which stand in the text once more, without JSON's escapes."""
    text, entries = "", list[tuple[str, Any]]()
    try:
        if file.suffix == ".safetensors":
            entries = _metadata(file)
        else:
            text = file.read_text(encoding="utf-8")
        if file.suffix == ".json" and file.name not in VOCABULARY:
            entries = list(_entries(read_json(file)))
        return "\n".join((text, *(str(value) for _, value in entries))), entries
    except UnicodeDecodeError:
        raise PublishError(f"{file.name} is not UTF-8 text: write it so") from None
    except RecursionError:
        raise PublishError(f"{file.name} is nested too deeply to be looked at: save the model again") from None


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
