"""Amounts as Kubernetes writes them."""

from __future__ import annotations

from decimal import Decimal

import pytest

from tests.k8s.quantities import BadQuantity, parse


@pytest.mark.parametrize(
    ("text", "amount"),
    [("500m", "0.5"), ("2", "2"), (1, "1"), ("1.5Gi", "1610612736"), ("1k", "1000"), ("1e3", "1000"), ("1E", "1e18")],
)
def test_an_amount_is_read(text: str | int, amount: str) -> None:
    assert parse(text) == Decimal(amount)


@pytest.mark.parametrize("text", ["", "2 GB", "2GB", "Gi", "1.2.3", "1Kim", "ten", "1e", "0x10"])
def test_what_is_no_amount_is_refused(text: str) -> None:
    with pytest.raises(BadQuantity):
        parse(text)
