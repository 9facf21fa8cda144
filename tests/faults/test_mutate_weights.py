"""F10, B9: model folders with random changes are refused, or serve exactly what is in them."""

from __future__ import annotations

from typing import Any

import pytest

from tests.faults.mutate_weights import run


def check(figures: dict[str, Any], cases: int) -> None:
    bad = [
        figures[key] for key in ("crashes", "wrong_loads", "wrong_loads_known_sha256", "pickle_ran", "reader_crashes")
    ]
    assert bad == [0, 0, 0, 0, 0], figures["failures"][:5]
    assert figures["refused"] + figures["loaded"] == figures["mutations"] == cases
    assert figures["loaded"] > cases / 20 and figures["in_engine"] > 0  # or it would be easy


@pytest.mark.timeout(300)
def test_f10_60_mutated_models_crash_nothing_and_none_is_loaded_wrong() -> None:
    check(run(60, seed=5), 60)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_f10_10000_mutated_models_crash_nothing_and_none_is_loaded_wrong() -> None:
    check(run(10_000, seed=0), 10_000)
