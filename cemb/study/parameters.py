"""Flat parameters of nested dataclasses: one name each, on the command line, in notebooks and in grids."""

from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints


def names(kind: Any) -> list[str]:
    """Names of a dataclass's fields, where one is a dataclass those of its own in its place."""
    hints = get_type_hints(kind)
    return [
        name
        for field in fields(kind)
        for name in (names(hints[field.name]) if is_dataclass(hints[field.name]) else [field.name])
    ]


def build(kind: Any, **values: Any) -> Any:
    """An instance of a dataclass from values by their flat names; others take their defaults.

    ValueError for a name that it does not have, and what the dataclasses raise for bad values.
    """
    check(kind, values)
    hints = get_type_hints(kind)
    own = {}
    for name, hint in ((field.name, hints[field.name]) for field in fields(kind)):
        if is_dataclass(hint):
            known = names(hint)
            own[name] = build(hint, **{k: v for k, v in values.items() if k in known})
        elif name in values:
            own[name] = values[name]
    return kind(**own)


def check(kind: Any, given: Iterable[str], what: str | None = None) -> None:
    """ValueError if one of the given names is no flat name of a dataclass; `what` the error calls it."""
    known = names(kind)
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(
            f"{what or kind.__name__} has no parameter {', '.join(unknown)}; it has {', '.join(known)}"
        )
