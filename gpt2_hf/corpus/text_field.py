"""The field of a row that has the text, by its name; data.text is one inside another."""

from collections.abc import Iterator
from typing import Any


def prefixes(text_field: str) -> list[str]:
    """a.b.c, a.b, a: a key may have a dot in it."""
    parts = text_field.split(".")
    return [".".join(parts[:count]) for count in range(len(parts), 0, -1)]


def value_of(row: dict[str, Any], text_field: str) -> Any:
    """The value of a field, or of one inside others by a name with dots; None where there is none."""
    for name in prefixes(text_field):
        if name == text_field and name in row:
            return row[name]
        if isinstance(inner := row.get(name), dict):
            found = value_of(inner, text_field[len(name) + 1 :])
            if found is not None:
                return found
    return None


def _field_names(row: dict[str, Any], before: str = "", depth: int = 2) -> Iterator[str]:
    """The fields of a row, those inside others by a name with dots."""
    for name, value in row.items():
        if isinstance(value, dict) and depth:
            yield from _field_names(value, f"{before}{name}.", depth - 1)
        else:
            yield f"{before}{name}"


def what_is_there(row: dict[str, Any], text_field: str, value: Any) -> str:
    """What a row has instead of a text, in few words."""
    if value is None:
        if text_field in row:
            return f"{text_field!r} is null"
        names = list(_field_names(row))
        more = ", ..." if len(names) > 20 else ""
        return f"no {text_field!r} among {', '.join(names[:20])}{more}; set --text_field" if names else "no fields"
    kind = type(value).__name__
    if isinstance(value, list) and value:
        kind = f"list of {type(value[0]).__name__}"
    elif isinstance(value, dict):
        inside = ", ".join(f"{text_field}.{name}" for name in list(_field_names(value))[:20])
        return f"{text_field!r} is not a text, but holds {inside}; set --text_field"
    return f"{text_field!r} is a {kind}, not a text; set --text_field, or make one text of it first"
