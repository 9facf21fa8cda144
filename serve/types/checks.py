"""What several parts check in the same words."""

from __future__ import annotations

import re
from collections.abc import Sequence

from serve.errors import InvalidRequest

_IDEMPOTENCY_KEY = re.compile(r"[!-~](?:[ -~]{0,253}[!-~])?")


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Raises: InvalidRequest naming the field, the value and the limits (NaN is outside every range)."""
    if not low <= value <= high:
        raise InvalidRequest(f"'{name}' must be between {low:g} and {high:g}, not {value:g}.", param=name)


def check_idempotency_key(key: str) -> str:
    """A key that arrives in an HTTP header as it was sent. Raises: InvalidRequest."""
    if not _IDEMPOTENCY_KEY.fullmatch(key):
        raise InvalidRequest(
            "An Idempotency-Key must be 1 to 255 printable ASCII characters, with no space at either end, such as a "
            "random UUID.",
            param="idempotency-key",
        )
    return key


def as_tuple(value: str | Sequence[str] | None) -> tuple[str, ...]:
    """None -> (), "a" -> ("a",), ["a", "b"] -> ("a", "b")."""
    return () if value is None else (value,) if isinstance(value, str) else tuple(value)
