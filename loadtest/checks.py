"""Values that a stranger wrote, in TOML or JSON: each check gives the value back, or says what it should have been."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

Check: TypeAlias = Callable[[Any], Any]  # raises Unfit


class Unfit(ValueError):
    """A value of the wrong kind; the message says what is allowed: "a whole number"."""


def number(value: Any) -> float:
    """Also inf and nan, which the limits of a value have to refuse."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Unfit("a number")
    try:
        return float(value)
    except OverflowError:
        raise Unfit("a smaller number") from None


def whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise Unfit("a whole number")
    return value


def truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise Unfit("true or false")
    return value


def text(value: Any) -> str:
    if not isinstance(value, str):
        raise Unfit("a text")
    return value


def one_of(words: Iterable[str]) -> Callable[[Any], str]:
    """The check for one of `words`; it gives the word of that list, not another text like it."""
    known = tuple(words)

    def check(value: Any) -> str:
        if value not in known:
            raise Unfit("one of " + ", ".join(f'"{word}"' for word in known))
        return known[known.index(value)]

    return check
