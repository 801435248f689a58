"""How a recipe and the command line set the knobs of a dataclass.

Precedence: defaults < recipe (``--config FILE``) < command line (``--section.name value``), wherever ``--config``
stands. Unknown keys are refused; whole numbers may be written 1e6, lists a,b, and dashes for underscores. Text stays
as it is written: only in a recipe, null is no text, and a list a,b is one item if a file has that name.
"""

from __future__ import annotations

import dataclasses
import difflib
import glob
import json
import os
import sys
import types
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from .program import UserError, fail

ConfigT = TypeVar("ConfigT")

# Stands before text for a knob that may also be None: there jsonargparse reads YAML, where "---" or "~" is None.
TEXT = "\0"


class ConfigError(UserError):
    """A setting that cannot work; the message is one line that says what to do."""


def field_types(cls: type, prefix: str = "") -> dict[str, Any]:
    """Dotted name -> annotation of every knob of a (nested) dataclass."""
    found: dict[str, Any] = {}
    for name, annotation in get_type_hints(cls).items():
        if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
            found |= field_types(annotation, f"{prefix}{name}.")
        else:
            found[prefix + name] = annotation
    return found


def parse_cli(cls: type[ConfigT], argv: list[str] | None = None, positional: str | None = None) -> ConfigT:
    """Build the frozen dataclass ``cls`` from recipe files and command-line arguments.

    Args:
        cls: a dataclass of knobs, nested or flat; its docstrings become ``--help``.
        argv: arguments, by default the process's own.
        positional: name of a knob that may also be given without its flag.

    Raises:
        SystemExit: 2 after one line on stderr for anything wrong; 0 after ``--help``.
    """
    import jsonargparse  # only programs with a command line need it

    argv = list(sys.argv[1:] if argv is None else argv)
    parser = jsonargparse.ArgumentParser(
        description=(cls.__doc__ or "").strip().splitlines()[0], exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument("--config", metavar="FILE", help="Recipe (YAML) to start from; later arguments override it.")
    try:
        typed = field_types(cls)
        recipes, overrides = _split_recipes(argv)
        if positional:
            overrides = _name_positionals(overrides, positional)
        flags = [flag for path in recipes for flag in _recipe_flags(Path(path), typed)]
        flags += [_plain_value(flag, typed) for flag in _join_values(overrides, typed)]
        parser.add_class_arguments(cls, None, as_group=False)
        parsed = parser.parse_args(flags)
        values = parsed.clone().as_dict()
        values.pop("config", None)
        return _build(cls, values)
    except (jsonargparse.ArgumentError, ConfigError, OSError) as error:
        fail(error)


def _split_recipes(argv: list[str]) -> tuple[list[str], list[str]]:
    """Take every ``--config FILE`` out of the arguments, so that recipes come first wherever they stand."""
    recipes, rest = [], []
    items = iter(argv)
    for item in items:
        if item == "--config":
            path = next(items, None)
            if path is None:
                raise ConfigError("--config needs the path of a recipe, for example recipes/gpt2_124m.yaml")
            recipes.append(path)
        elif item.startswith("--config="):
            recipes.append(item.removeprefix("--config="))
        else:
            rest.append(item)
    return recipes, rest


def _name_positionals(argv: list[str], name: str) -> list[str]:
    """Turn bare arguments into one ``--name=[...]`` flag."""
    bare: list[str] = []
    while argv and not argv[0].startswith("-"):
        bare.append(argv.pop(0))
    return [f"--{name}={json.dumps(bare, ensure_ascii=False)}", *argv] if bare else argv


def _recipe_flags(path: Path, typed: dict[str, Any]) -> list[str]:
    """A recipe as command-line flags, so that one code path reads both."""
    try:
        content = path.read_text()
        recipe = yaml.safe_load(content) or {}
        written = yaml.load(content, yaml.BaseLoader) or {}  # the same with all values as text
    except FileNotFoundError:
        raise ConfigError(f"no recipe {path}; see the folder recipes/") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None
    if not isinstance(recipe, dict):
        raise ConfigError(f"{path}: a recipe is a mapping of sections, not {type(recipe).__name__}")
    flags = []

    def walk(node: dict[str, Any], written: dict[str, Any], prefix: str) -> None:
        for key, value in node.items():
            name, as_written = f"{prefix}{key}", written.get(key, value)  # `value` where << merges mappings
            if isinstance(value, dict):
                walk(value, as_written, f"{name}.")
                continue
            _check_known(name, typed, f"{path}: ")
            if value is None:
                flags.append(f"--{name}=null")
                continue
            if _is_text(typed[name]):  # YAML would make 42798 of the commit 0123456, and True of on
                value = as_written
            text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
            flags.append(_plain_value(f"--{name}={text}", typed))

    walk(recipe, written, "")
    return flags


def _join_values(argv: list[str], typed: dict[str, Any]) -> list[str]:
    """``--name value`` as ``--name=value``, refusing names that do not exist."""
    joined: list[str] = []
    items = iter(argv)
    for item in items:
        if not item.startswith("--") or item == "--help" or item.startswith("--print_config"):
            joined.append(item)
            continue
        name, equals, value = item[2:].partition("=")
        name = name.replace("-", "_")  # --on-error is --on_error
        _check_known(name, typed, "")
        if not equals:
            given = next(items, None)
            if given is None:
                raise ConfigError(f"--{name} needs a value")
            value = given
        joined.append(f"--{name}={value}")
    return joined


def _check_known(name: str, typed: dict[str, Any], where: str) -> None:
    if name in typed:
        return
    by_leaf = {known.rpartition(".")[2]: known for known in typed}
    close = difflib.get_close_matches(name, typed, 1, 0.75) or [
        by_leaf[leaf] for leaf in difflib.get_close_matches(name.rpartition(".")[2], by_leaf, 1)
    ]
    raise ConfigError(f"{where}unknown key {name!r}{f'; did you mean {close[0]!r}?' if close else '; see --help'}")


def _is_text(annotation: Any) -> bool:
    """Whether a knob is text, a word to choose, or a list of text."""
    return annotation is str or get_origin(annotation) is Literal or str in get_args(annotation)


def _plain_value(flag: str, typed: dict[str, Any]) -> str:
    """Write 1e6 or 1_000_000 as 1000000 where a whole number is wanted, and a,b as ["a", "b"] where a list is."""
    name, _, text = flag[2:].partition("=")
    annotation = typed.get(name)
    if get_origin(annotation) in (tuple, list) and text:
        if _is_text(annotation):
            return f"--{name}={json.dumps(_list_of_text(text), ensure_ascii=False)}"
        return flag if text[0] in "[(" else f"--{name}=[{text}]"
    if _is_text(annotation) and type(None) in get_args(annotation):
        return f"--{name}={TEXT}{text}"
    wanted = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    if int not in wanted or float in wanted:
        return flag
    try:
        number = float(text)
    except ValueError:
        return flag
    return f"--{name}={int(number)}" if number.is_integer() else flag


def _list_of_text(text: str) -> Any:
    if text[0] + text[-1] in ("[]", "()"):
        try:
            return yaml.load(f"[{text[1:-1]}]", yaml.BaseLoader)
        except yaml.YAMLError:
            pass  # a glob, perhaps
    if "," in text and (os.path.exists(text) or glob.glob(text, recursive=True)):
        return [text]
    return text.split(",")


def _build(cls: type[ConfigT], values: dict[str, Any]) -> ConfigT:
    # By hand, because jsonargparse builds the root without running its __post_init__.
    hints = get_type_hints(cls)
    arguments = {}
    for name, value in values.items():
        annotation = hints[name]
        if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
            value = _build(annotation, value)
        elif isinstance(value, str):
            value = value.removeprefix(TEXT)
        arguments[name] = value
    return cls(**arguments)
