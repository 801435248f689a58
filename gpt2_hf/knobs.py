"""What may stand in a knob: declared in its annotation, shown by --help, checked whenever it is set.

    steps: Annotated[int, Range(1)] = 19_073
    run_dir: Annotated[str, PathName()] = "runs/gpt2_124m"

A dataclass that inherits from `Knobs`, or a function under `checked`, then takes nothing else, from Python or a shell.
"""

from __future__ import annotations

import functools
import glob
import inspect
import math
import os
import re
import types
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from .program import UserError

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])

# Beyond this a whole number means no size, count or seed of anything.
LARGEST = 2**63 - 1

NUMBER = re.compile(r"[+-]?(\d[\d_]*\.?\d*|\.\d+)([eE][+-]?\d{1,4})?")
SWITCH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


class ConfigError(UserError):
    """A setting that cannot work; the message is one line that says what to do."""


@dataclass(frozen=True)
class Range:
    """Limits of a number; ``above`` and ``below`` are not in it."""

    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    below: float | None = None

    def __str__(self) -> str:
        limits = ((">=", self.at_least), (">", self.above), ("<=", self.at_most), ("<", self.below))
        return " and ".join(f"{sign} {limit}" for sign, limit in limits if limit is not None)

    def take(self, name: str, value: Any) -> Any:
        fits = (
            (self.at_least is None or value >= self.at_least)
            and (self.at_most is None or value <= self.at_most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )
        if not fits:
            raise ConfigError(f"{name} is {shown(value)}, and must be {self}")
        return value


@dataclass(frozen=True)
class PathName:
    """A file or folder: ``~`` and ``$NAME`` are expanded. ``remote``: may also be a URL, where others are refused."""

    remote: bool = False

    def __str__(self) -> str:
        return "path or URL" if self.remote else "path"

    def take(self, name: str, value: Any) -> Any:
        value = os.fspath(value)
        if not value.strip():
            raise ConfigError(f"{name} is empty: name a file or folder (is a shell variable unset?)")
        if value in ("null", "None"):
            raise ConfigError(f"{name} is {value}: name a file or folder; if one is called so, write ./{value}")
        if "\0" in value:
            raise ConfigError(f"{name} holds a NUL character: {shown(value)}")
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/", value):
            if self.remote:
                return value
            raise ConfigError(f"{name} is {shown(value)}, a URL: only a folder of this machine works here")
        if os.path.lexists(value):
            return value
        expanded = os.path.expandvars(os.path.expanduser(value))
        if unset := re.search(r"\$(\w+|\{[^}]*\})", expanded):
            raise ConfigError(f"{name} is {shown(value)}, and the environment variable {unset[0]} is not set")
        if re.match(r"~\w*(/|$)", expanded):
            raise ConfigError(f"{name} is {shown(value)}, and there is no such home folder")
        return expanded


@dataclass(frozen=True)
class Filled:
    """Text that is not empty."""

    def __str__(self) -> str:
        return "not empty"

    def take(self, name: str, value: Any) -> Any:
        if not value.strip():
            raise ConfigError(f"{name} is empty: leave it out, or give it a text")
        return value


@dataclass(frozen=True)
class OneOf:
    """A name of a table, which may grow."""

    names: tuple[str, ...]

    def __str__(self) -> str:
        return " or ".join(self.names)

    def take(self, name: str, value: Any) -> Any:
        if value not in self.names:
            raise ConfigError(f"{name} is {shown(value)}: choose {', '.join(self.names)}")
        return value


@dataclass(frozen=True)
class OrWord:
    """A word that may stand for a number until it is known. To type checkers the knob is the number."""

    word: str

    def __str__(self) -> str:
        return f"or {self.word}"

    def take(self, name: str, value: Any) -> Any:
        return value


@dataclass(frozen=True)
class Knobs:
    """Base of a dataclass whose fields are checked when it is built.

    Raises:
        ConfigError: for a value that its annotation rules out.
    """

    _prefix: ClassVar[str] = ""  # of the fields' names in messages

    def __post_init__(self) -> None:
        for name, annotation in get_type_hints(type(self), include_extras=True).items():
            if get_origin(annotation) is not ClassVar:
                taken = take(f"{self._prefix}{knob_name(name)}", getattr(self, name), annotation)
                object.__setattr__(self, name, taken)  # frozen


def knob_name(field: str) -> str:
    """A field's name as recipes and the command line have it: ``from_`` is from, which Python keeps for itself."""
    return field.removesuffix("_")


def checked(function: FunctionT) -> FunctionT:
    """Check a function's arguments by their annotations at each call. Raises ConfigError."""
    signature = inspect.signature(function)
    hints = get_type_hints(function, include_extras=True)
    limited = {name: hint for name, hint in hints.items() if name != "return" and limit_of(hint)}

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        for name, hint in limited.items():
            if name in bound.arguments:
                bound.arguments[name] = take(name, bound.arguments[name], hint)
        return function(*bound.args, **bound.kwargs)

    return call  # type: ignore[return-value]  # the same signature, which a decorator cannot say of keyword arguments


def take(name: str, value: Any, annotation: Any) -> Any:
    """``value`` as the knob has it (paths expanded). Raises ConfigError when the annotation rules it out."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        if value in _words(annotation):
            return value
        is_name = isinstance(value, str) and any(isinstance(limit, PathName) for limit in arguments[1:])
        value = value if is_name else take(name, value, arguments[0])  # a file's name may hold bytes that are no text
        return functools.reduce(lambda v, limit: limit.take(name, v) if v is not None else v, arguments[1:], value)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        kinds = [kind for kind in arguments if kind is not type(None)]
        return take(name, value, kinds[0]) if len(kinds) == 1 else value
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(f"{name} is {shown(value)}: choose {', '.join(map(str, arguments))}")
    elif origin in (list, tuple):
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{name} is {shown(value)}: give a list, such as [a, b]")
        kinds = [arguments[0]] * len(value) if origin is list or arguments[1:] == (...,) else list(arguments)
        if len(kinds) != len(value):
            raise ConfigError(f"{name} is {shown(value)}: give {len(kinds)} values, such as [a, b]")
        return origin(take(name, item, kind) for item, kind in zip(value, kinds, strict=True))
    elif annotation in (int, float):
        is_number = isinstance(value, int if annotation is int else int | float) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or (annotation is int and abs(value) > LARGEST):
            raise ConfigError(f"{name} is {shown(value)}: give a {'whole' if annotation is int else 'finite'} number")
        return annotation(value)
    elif annotation is str and isinstance(value, str):
        if not _is_unicode(value):
            raise ConfigError(f"{name} is {shown(value)}: not UTF-8")
    elif annotation in (bool, str) and not isinstance(value, annotation):
        raise ConfigError(f"{name} is {shown(value)}: give {'true or false' if annotation is bool else 'text'}")
    return value


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes of an argument or file name that are not UTF-8 stand in it as surrogates
        return False
    return True


def from_text(name: str, written: Any, annotation: Any) -> Any:
    """What a recipe or a command line writes, as a value of that annotation; its limits `take` checks.

    Whole numbers may be written 1e6, and lists a,b, which is one item if a file has that name. Raises ConfigError.
    """
    kind, is_optional = bare(annotation), type(None) in get_args(annotation)
    if written is None and not is_optional:
        raise ConfigError(f"{name} is empty: give it a value, or leave it out")
    if get_origin(kind) in (list, tuple):
        return _listed(name, written, kind)
    if kind not in (bool, int, float) or not isinstance(written, str):
        return written
    if is_optional and written == "null":
        return None
    if written in (words := _words(annotation)):
        return written
    return _switch(name, written) if kind is bool else _number(name, written, kind, words)


def _words(annotation: Any) -> list[str]:
    """Those that may stand for a number."""
    return [limit.word for limit in getattr(annotation, "__metadata__", ()) if isinstance(limit, OrWord)]


def bare(annotation: Any) -> Any:
    """An annotation without its limits and None: int for ``Annotated[int, Range(1)] | None``."""
    if get_origin(annotation) in (Union, types.UnionType):
        return bare(next(kind for kind in get_args(annotation) if kind is not type(None)))
    return bare(get_args(annotation)[0]) if get_origin(annotation) is Annotated else annotation


def _listed(name: str, written: Any, kind: Any) -> Any:
    """A recipe's list, or a,b or [a, b] as text, as the list or tuple of that kind."""
    item_kind = get_args(kind)[0]
    if isinstance(written, str):
        written = _items(name, written)
    if not isinstance(written, list):
        return written  # for `take` to refuse
    if bare(item_kind) in (int, float):
        written = [item.strip() if isinstance(item, str) else item for item in written]
    return get_origin(kind)(from_text(name, item, item_kind) for item in written)


def _items(name: str, text: str) -> list[Any]:
    if not text:
        raise ConfigError(f"{name} is empty: give a list such as a,b, or leave it out")
    if text[0] + text[-1] in ("[]", "()"):
        try:
            return yaml.load(f"[{text[1:-1]}]", yaml.BaseLoader)
        except (yaml.YAMLError, RecursionError):
            pass  # a glob, perhaps
    if "," in text and (os.path.exists(text) or glob.glob(text, recursive=True)):
        return [text]
    return text.split(",")


def _switch(name: str, text: str) -> bool:
    if text.lower() not in SWITCH:
        raise ConfigError(f"{name} is {shown(text)}: give true or false")
    return SWITCH[text.lower()]


def _number(name: str, text: str, kind: type, words: list[str]) -> float:
    what = " or ".join(["whole number" if kind is int else "number", *words])
    is_octal = re.match(r"[+-]?0[\d_]", text)
    if len(text) > 100 or not NUMBER.fullmatch(text) or is_octal:
        raise ConfigError(f"{name} is {shown(text)}: give a {what}" + (" without 0 before it" if is_octal else ""))
    digits = text.replace("_", "")
    if kind is float:
        if math.isinf(float(digits)):
            raise ConfigError(f"{name} is {shown(text)}: too large for a number")
        return float(digits)
    exact = Decimal(digits)
    if abs(exact) > LARGEST:
        raise ConfigError(f"{name} is {shown(text)}: give a whole number, not so large")
    if exact != exact.to_integral_value():
        raise ConfigError(f"{name} is {shown(text)}: give a {what}")
    return int(exact)


def limit_of(annotation: Any) -> str:
    """What its annotation says of a knob, for --help, such as ">= 0 and < 1"; "" when nothing."""
    limits = (Range, PathName, Filled, OneOf, OrWord)
    found = [str(limit) for limit in getattr(annotation, "__metadata__", ()) if isinstance(limit, limits)]
    return ", ".join(dict.fromkeys(found + [limit_of(part) for part in get_args(annotation)])).strip(", ")


def shown(value: Any) -> str:
    """A value as messages show it: in one line, and not too long a one."""
    try:
        text = value if isinstance(value, str) and value.isprintable() and value.strip() == value != "" else repr(value)
    except ValueError:  # a whole number of thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"
