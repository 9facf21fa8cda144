"""How numbers are written, whatever a stranger's model says of itself."""

from __future__ import annotations

import math

import pytest

from serve.web.show import number


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1234, "1,234"), (2**53 - 1, "9,007,199,254,740,991"), (1234.6, "1,235"), (-5, "-5"), (None, "–")],
)
def test_numbers_have_commas(value: float | None, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize("value", [10**400, -(10**4000), math.inf, -math.inf, math.nan, 1e308])
def test_what_counts_nothing_is_a_dash(value: float) -> None:
    assert number(value) == "–"
