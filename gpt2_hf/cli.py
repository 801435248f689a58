"""How a recipe and the command line set the knobs of a dataclass, and the arguments of a script.

Precedence: defaults < recipe (``--config FILE``) < command line (``--section.name value``), wherever ``--config``
stands. Unknown keys are refused; whole numbers may be written 1e6, lists a,b, and dashes for underscores. Text stays
as it is written: only in a recipe, null is no text, and a list a,b is one item if a file has that name. Of YAML's own
readings (1:30 is 90, 010 is 8, the last of two equal keys wins) a recipe has none.
"""

from __future__ import annotations

import argparse
import codecs
import dataclasses
import difflib
import functools
import inspect
import re
import sys
from collections.abc import Callable, Container, Hashable, Iterable
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

import yaml

from .knobs import ConfigError, bare, from_text, knob_name, limit_of, shown, take
from .program import fail

ConfigT = TypeVar("ConfigT")

BYTE_ORDER_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


# Knobs of a dataclass


def parse_cli(cls: type[ConfigT], argv: list[str] | None = None, positional: str | None = None) -> ConfigT:
    """Build the frozen dataclass ``cls`` from recipe files and command-line arguments.

    Args:
        cls: a dataclass of knobs, nested or flat; its docstrings become ``--help``.
        argv: arguments, by default the process's own.
        positional: name of a knob that may also be given without its flag.

    Raises:
        SystemExit: 2 after one line on stderr for anything wrong; 0 after ``--help``.
    """
    kinds, hints = field_types(cls), getattr(cls, "HINTS", {})
    parser = Arguments((cls.__doc__ or "").strip().splitlines()[0])
    text = "recipe (YAML) to start from; the other arguments override it"
    parser.add_argument("--config", metavar="FILE", action="append", default=[], help=text)
    if positional:
        parser.add_argument("words", metavar=positional, nargs="*", help=f"the same as --{positional}")
    aliases = getattr(cls, "ALIASES", {})
    _add_fields(parser, cls, {full: f"--{short}" for short, full in aliases.items()})
    try:
        written = _join_values(sys.argv[1:] if argv is None else argv, kinds, hints, aliases)
        given = vars(parser.parse_args(written))
        values: dict[str, Any] = {}
        for path in given.pop("config"):
            values |= _recipe_values(Path(path), kinds, hints)
        if positional and (words := given.pop("words")):
            if positional in given:
                raise ConfigError(f"{positional} is given with --{positional} and without: keep one of the two")
            given[positional] = words
        values |= {name: from_text(name, written, kinds[name]) for name, written in given.items()}
        return _build(cls, values)
    except ConfigError as error:
        fail(error)


def field_types(cls: type) -> dict[str, Any]:
    """Dotted name -> annotation, with its limits, of every knob of a (nested) dataclass."""
    found: dict[str, Any] = {}
    for name, annotation, _ in _fields(cls):
        if _is_section(annotation):
            found |= {f"{name}.{inner}": kind for inner, kind in field_types(annotation).items()}
        else:
            found[knob_name(name)] = annotation
    return found


def _fields(cls: type) -> list[tuple[str, Any, Any]]:
    """Name, annotation and default of each field."""
    hints = get_type_hints(cls, include_extras=True)
    return [(field.name, hints[field.name], field.default) for field in dataclasses.fields(cls)]


def _is_section(annotation: Any) -> bool:
    return dataclasses.is_dataclass(annotation) and isinstance(annotation, type)


def _add_fields(parser: Any, cls: type, short: dict[str, str], prefix: str = "") -> None:
    """A flag for each field, those of a section in a group that has its docstring for a title."""
    described = _described(cls)
    for name, annotation, default in _fields(cls):
        if _is_section(annotation):
            title = (annotation.__doc__ or "").strip().splitlines()[0].rstrip(".")
            _add_fields(parser.add_argument_group(title), annotation, short, f"{prefix}{name}.")
        else:
            text = _help(described[knob_name(name)], annotation, default)
            metavar = _metavar(knob_name(name), annotation)
            full = f"{prefix}{knob_name(name)}"
            flags = [f"--{full}", *([short[full]] if full in short else [])]
            parser.add_argument(*flags, dest=full, default=argparse.SUPPRESS, metavar=metavar, help=text)


def _build(cls: type[ConfigT], values: dict[str, Any], prefix: str = "") -> ConfigT:
    """The dataclass from values by dotted name; what is not among them has its default."""
    arguments = {}
    for name, annotation, _ in _fields(cls):
        if _is_section(annotation):
            arguments[name] = _build(annotation, values, f"{prefix}{name}.")
        elif (knob := prefix + knob_name(name)) in values:
            arguments[name] = values[knob]
    return cls(**arguments)


# A script's own arguments


class Arguments(argparse.ArgumentParser):
    """A script's arguments, read and checked as the knobs of a recipe are; a mistake is one line and status 2."""

    def __init__(self, description: str | None) -> None:
        super().__init__(description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        fail(message)

    def add_knob(self, *flags: str, kind: Any, help: str, **options: Any) -> None:
        """An argument whose annotation is ``kind``; its limits and its default are added to ``help``."""
        name = flags[-1].lstrip("-")
        if flags[-1].startswith("-"):
            options.setdefault("metavar", _metavar(name, kind))

        def read(text: str) -> Any:
            try:
                return take(name, from_text(name, text, kind), kind)
            except ConfigError as error:
                raise argparse.ArgumentTypeError(str(error)) from None

        self.add_argument(*flags, type=read, help=_help(help, kind, options.get("default")), **options)

    def add_knobs_of(self, function: Callable[..., Any], skip: Container[str]) -> None:
        """An argument for each of a function's; its docstring has their help."""
        described = _described(function)
        hints = get_type_hints(function, include_extras=True)
        for name, parameter in inspect.signature(function).parameters.items():
            if name not in skip:
                self.add_knob(f"--{name}", kind=hints[name], help=described[name], default=parameter.default)


# Help


@functools.cache
def _described(documented: Any) -> dict[str, str]:
    """What a docstring says of each argument."""
    from docstring_parser import parse

    found = parse(documented.__doc__ or "").params
    return {item.arg_name: " ".join((item.description or "").split()) for item in found}


def _help(text: str, kind: Any, default: Any) -> str:
    limit = limit_of(kind)
    text += f" [{limit}]" if limit else ""
    text += f" (default: {default})" if default not in (None, "", [], (), dataclasses.MISSING) else ""
    return text.replace("%", "%%")  # argparse formats it


def _metavar(name: str, annotation: Any) -> str:
    kind = bare(annotation)
    if get_origin(kind) is Literal or kind is bool:
        words = ("true", "false") if kind is bool else get_args(kind)
        return "{" + ",".join(map(str, words)) + "}"
    return "ITEM,..." if get_origin(kind) in (list, tuple) else name.upper()


# The command line and recipes, before their values are looked at


def _join_values(
    argv: Iterable[str], kinds: dict[str, Any], hints: dict[str, str], aliases: dict[str, str]
) -> list[str]:
    """``--name value`` as ``--name=value``, whatever the value starts with, refusing names that do not exist."""
    joined: list[str] = []
    items = iter(argv)
    for item in items:
        if not item.startswith("--") or item == "--help":
            joined.append(item)
            continue
        name, equals, value = item[2:].partition("=")
        name = name.replace("-", "_")  # --on-error is --on_error
        name = aliases.get(name, name)
        if name != "config":
            _check_known(name, kinds, hints)
        given = value if equals else next(items, None)
        if given is None:
            example = " the path of a recipe, for example recipes/gpt2_124m.yaml" if name == "config" else " a value"
            raise ConfigError(f"--{name} needs{example}")
        joined.append(f"--{name}={given}")
    return joined


def _check_known(name: str, kinds: dict[str, Any], hints: dict[str, str]) -> None:
    if name in kinds:
        return
    leaf = name.rpartition(".")[2]
    if leaf in hints:
        raise ConfigError(f"unknown key {shown(name)}: {hints[leaf]}")
    by_leaf = {known.rpartition(".")[2]: known for known in kinds}
    close = difflib.get_close_matches(name, kinds, 1, 0.75) or [
        by_leaf[leaf] for leaf in difflib.get_close_matches(leaf, by_leaf, 1, 0.7)
    ]
    raise ConfigError(f"unknown key {name!r}{f'; did you mean {close[0]!r}?' if close else '; see --help'}")


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


def _recipe_values(path: Path, kinds: dict[str, Any], hints: dict[str, str]) -> dict[str, Any]:
    """Dotted name -> value of what a recipe sets."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"no recipe {shown(str(path))}; see the folder recipes/") from None
    except (OSError, ValueError) as error:  # a NUL character in the name is a ValueError
        raise ConfigError(f"the recipe {shown(str(path))} cannot be read ({error})") from None
    try:
        return {name: from_text(name, written, kinds[name]) for name, written in _settings(raw, kinds, hints)}
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _settings(raw: bytes, kinds: dict[str, Any], hints: dict[str, str]) -> list[tuple[str, Any]]:
    """Dotted names, all of them known, and what a recipe writes there."""
    found = []

    def walk(node: dict[str, Any], prefix: str) -> None:
        for key, written in node.items():
            name = f"{prefix}{key}"
            if not any(known.startswith(f"{name}.") for known in kinds):
                _check_known(name, kinds, hints)
                found.append((name, written))
            elif isinstance(written, dict | None):
                walk(written or {}, f"{name}.")
            else:
                raise ConfigError(f"{name} is a section, and is {shown(written)}: give it keys of its own")

    walk(_parse_recipe(raw), "")
    return found


def _parse_recipe(raw: bytes) -> dict[str, Any]:
    try:
        recipe = yaml.load(raw.decode("utf-8-sig"), _Recipe)
    except UnicodeDecodeError as error:
        kind = "UTF-16" if raw.startswith(BYTE_ORDER_MARKS) else "Latin-1, perhaps"
        raise ConfigError(f"it is not UTF-8 (byte {error.start} cannot be; {kind}): save it as UTF-8") from None
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"it is not YAML: {error}") from None
    if recipe is not None and not isinstance(recipe, dict):
        raise ConfigError(f"a recipe is a mapping of sections, not {type(recipe).__name__}")
    return recipe or {}
