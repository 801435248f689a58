"""How a recipe and the command line set the knobs of a dataclass.

Precedence: defaults < recipe (``--config FILE``) < command line (``--section.name value``), wherever ``--config``
stands. Unknown keys are refused; whole numbers may be written 1e6, lists a,b, and dashes for underscores. Text stays
as it is written: only in a recipe, null is no text, and a list a,b is one item if a file has that name. Of YAML's own
readings (1:30 is 90, 010 is 8, the last of two equal keys wins) a recipe has none.
"""

from __future__ import annotations

import codecs
import dataclasses
import difflib
import glob
import json
import math
import os
import re
import sys
import types
from collections.abc import Hashable
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from .knobs import LARGEST, ConfigError, limit_of, shown
from .program import fail

ConfigT = TypeVar("ConfigT")

# Stands before text for a knob that may also be None: there jsonargparse reads YAML, where "---" or "~" is None.
TEXT = "\0"
NUMBER = re.compile(r"[+-]?(\d[\d_]*\.?\d*|\.\d+)([eE][+-]?\d+)?")
SWITCH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
BYTE_ORDER_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def field_types(cls: type, prefix: str = "", include_extras: bool = False) -> dict[str, Any]:
    """Dotted name -> annotation of every knob of a (nested) dataclass; ``include_extras``: with their limits."""
    found: dict[str, Any] = {}
    hints = get_type_hints(cls, include_extras=include_extras)
    for name, annotation in ((field.name, hints[field.name]) for field in dataclasses.fields(cls)):
        if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
            found |= field_types(annotation, f"{prefix}{name}.", include_extras)
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
        typed, hints = field_types(cls), getattr(cls, "HINTS", {})
        recipes, overrides = _split_recipes(argv)
        if positional:
            overrides = _name_positionals(overrides, positional)
        flags = [flag for path in recipes for flag in _recipe_flags(Path(path), typed, hints)]
        flags += [_plain_value(flag, typed) for flag in _join_values(overrides, typed, hints)]
        parser.add_class_arguments(cls, None, as_group=False)
        _show_limits(parser, cls)
        parsed = parser.parse_args(flags)
        values = parsed.clone().as_dict()
        values.pop("config", None)
        return _build(cls, values)
    except (jsonargparse.ArgumentError, ConfigError, OSError) as error:
        fail(error)


def _show_limits(parser: Any, cls: type) -> None:
    """Add to each knob's help what its annotation says of it."""
    limits = {name: limit_of(hint) for name, hint in field_types(cls, include_extras=True).items()}
    for action in parser._actions:
        if limit := limits.get(action.dest):
            action.help = f"{action.help} [{limit}]"


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


class _Recipe(yaml.SafeLoader):
    """YAML whose plain scalars are text or, written null, ~ or nothing, None; keys stand once."""

    yaml_implicit_resolvers = {"<": [("tag:yaml.org,2002:merge", re.compile("<<"))]}

    def construct_scalar(self, node: Any) -> Any:
        text = super().construct_scalar(node)
        return None if node.style is None and text in ("", "~", "null", "Null", "NULL") else text

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            name = str(key.value)  # of a key that is no text, the nodes in it: it is refused later
            if name in seen:
                raise ConfigError(f"line {key.start_mark.line + 1}: {shown(name)} stands there a second time")
            seen.add(name)
        return super().construct_mapping(node, deep)


def _read_recipe(path: Path) -> dict[str, Any]:
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"no recipe {shown(str(path))}; see the folder recipes/") from None
    except (OSError, ValueError) as error:  # a NUL character in the name is a ValueError
        raise ConfigError(f"the recipe {shown(str(path))} cannot be read ({error})") from None
    try:
        recipe = yaml.load(raw.decode("utf-8-sig"), _Recipe)
    except UnicodeDecodeError as error:
        kind = "UTF-16" if raw.startswith(BYTE_ORDER_MARKS) else "Latin-1, perhaps"
        raise ConfigError(f"{path} is not UTF-8 (byte {error.start} cannot be; {kind}): save it as UTF-8") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None
    if recipe is not None and not isinstance(recipe, dict):
        raise ConfigError(f"{path}: a recipe is a mapping of sections, not {type(recipe).__name__}")
    return recipe or {}


def _recipe_flags(path: Path, typed: dict[str, Any], hints: dict[str, str]) -> list[str]:
    """A recipe as command-line flags, so that one code path reads both."""
    flags = []

    def walk(node: dict[str, Any], prefix: str) -> None:
        for key, value in node.items():
            name = f"{prefix}{key}"
            is_section = any(known.startswith(f"{name}.") for known in typed)
            if is_section and isinstance(value, dict | None):
                walk(value or {}, f"{name}.")
                continue
            if is_section:
                raise ConfigError(f"{path}: {name} is a section, and is {shown(value)}: give it keys of its own")
            _check_known(name, typed, f"{path}: ", hints)
            if value is None:
                if type(None) not in get_args(typed[name]):
                    raise ConfigError(f"{path}: {name} is empty: give it a value, or leave it out")
                flags.append(f"--{name}=null")
                continue
            text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
            flags.append(_plain_value(f"--{name}={text}", typed))

    walk(_read_recipe(path), "")
    return flags


def _join_values(argv: list[str], typed: dict[str, Any], hints: dict[str, str]) -> list[str]:
    """``--name value`` as ``--name=value``, refusing names that do not exist."""
    joined: list[str] = []
    items = iter(argv)
    for item in items:
        if not item.startswith("--") or item == "--help" or item.startswith("--print_config"):
            joined.append(item)
            continue
        name, equals, value = item[2:].partition("=")
        name = name.replace("-", "_")  # --on-error is --on_error
        _check_known(name, typed, "", hints)
        if not equals:
            given = next(items, None)
            if given is None:
                raise ConfigError(f"--{name} needs a value")
            value = given
        joined.append(f"--{name}={value}")
    return joined


def _check_known(name: str, typed: dict[str, Any], where: str, hints: dict[str, str]) -> None:
    if name in typed:
        return
    leaf = name.rpartition(".")[2]
    if leaf in hints:
        raise ConfigError(f"{where}unknown key {shown(name)}: {hints[leaf]}")
    by_leaf = {known.rpartition(".")[2]: known for known in typed}
    close = difflib.get_close_matches(name, typed, 1, 0.75) or [
        by_leaf[leaf] for leaf in difflib.get_close_matches(leaf, by_leaf, 1, 0.7)
    ]
    raise ConfigError(f"{where}unknown key {name!r}{f'; did you mean {close[0]!r}?' if close else '; see --help'}")


def _is_text(annotation: Any) -> bool:
    """Whether a knob is text, a word to choose, or a list of text."""
    return annotation is str or get_origin(annotation) is Literal or str in get_args(annotation)


def _plain_value(flag: str, typed: dict[str, Any]) -> str:
    """Write a value so that jsonargparse can read it in one way only. Raises ConfigError when it cannot be one."""
    name, _, text = flag[2:].partition("=")
    if name not in typed:  # --help, or a stray word for jsonargparse to refuse
        return flag
    annotation = typed[name]
    if get_origin(annotation) in (tuple, list):
        if _is_text(annotation):
            return f"--{name}={json.dumps(_list_of_text(text), ensure_ascii=False)}" if text else flag
        items = text.strip().removeprefix("[").removeprefix("(").removesuffix("]").removesuffix(")").split(",")
        numbers = [_number(name, item.strip(" \"'"), float) for item in items]
        return f"--{name}=[{', '.join(numbers)}]"
    kinds = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    if type(None) in kinds and text == "null" and not _is_text(annotation):
        return flag
    if _is_text(annotation):
        return f"--{name}={TEXT}{text}" if type(None) in kinds else flag
    if bool in kinds:
        if text.lower() not in SWITCH:
            raise ConfigError(f"{name} is {shown(text)}: give true or false")
        return f"--{name}={json.dumps(SWITCH[text.lower()])}"
    return f"--{name}={_number(name, text, float if float in kinds else int)}"


def _number(name: str, text: str, kind: type) -> str:
    what = "whole number" if kind is int else "number"
    is_octal = re.match(r"[+-]?0[\d_]", text)
    if len(text) > 100 or not NUMBER.fullmatch(text) or is_octal:
        raise ConfigError(f"{name} is {shown(text)}: give a {what}" + (" without 0 before it" if is_octal else ""))
    if kind is float:
        value = float(text.replace("_", ""))
        if math.isinf(value):
            raise ConfigError(f"{name} is {shown(text)}: too large for a number")
        return repr(value)
    exact = Decimal(text.replace("_", ""))
    if abs(exact) > LARGEST or exact != exact.to_integral_value():
        raise ConfigError(f"{name} is {shown(text)}: give a whole number" + (", not so large" * (abs(exact) > LARGEST)))
    return str(int(exact))


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
