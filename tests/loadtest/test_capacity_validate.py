"""What is said of the simulator beside a real run; a whole validation takes minutes and a quiet machine."""

from __future__ import annotations

from typing import Any

from loadtest.capacity.validate import RARE, compare, worst
from loadtest.results.summary import Summary


def test_errors_are_relative_shares_too_and_p99_takes_a_thousand_requests() -> None:
    real = Summary(requests=999, p50_ms=100.0, cold_share=0.05, p99_ms=1.0)
    found = compare(real, Summary(p50_ms=110.0, cold_share=0.10, p99_ms=5.0))
    assert found["p50_ms"]["off"] is not None and abs(found["p50_ms"]["off"] - 0.1) < 1e-9
    assert found["cold_share"]["off"] == 1.0 and found["tokens_s"]["off"] is None
    assert not set(RARE) & set(found)
    assert set(RARE) <= set(compare(Summary(requests=1000), Summary()))


def test_the_worst_error_of_each_figure_keeps_its_sign() -> None:
    runs: list[dict[str, Any]] = [
        {"figures": {"p50_ms": {"off": 0.1}, "hit_rate": {"off": None}}},
        {"figures": {"p50_ms": {"off": -0.3}}},
    ]
    assert worst(runs) == {"p50_ms": -0.3}
