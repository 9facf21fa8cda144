"""Amounts as Kubernetes writes them: `500m`, `1.5`, `8Gi`, `1e3`."""

from __future__ import annotations

import re
from decimal import Decimal

_NUMBER = re.compile(r"([+-]?(?:\d+(?:\.\d*)?|\.\d+))(?:([numkMGTPE]|[KMGTPE]i)|[eE]([+-]?\d+))?")
_DECIMAL = {"n": -9, "u": -6, "m": -3, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18}
_BINARY: dict[str, int] = {"Ki": 1, "Mi": 2, "Gi": 3, "Ti": 4, "Pi": 5, "Ei": 6}


class BadQuantity(ValueError):
    """A text that is no amount."""


def parse(text: str | int | float) -> Decimal:
    """Raises: BadQuantity."""
    match = _NUMBER.fullmatch(str(text))
    if match is None:
        raise BadQuantity(f"{text!r} is no quantity")
    number, suffix, exponent = Decimal(match[1]), match[2], match[3]
    if suffix in _BINARY:
        return number * Decimal(1024 ** _BINARY[suffix])
    return number.scaleb(_DECIMAL[suffix] if suffix else int(exponent or 0))
