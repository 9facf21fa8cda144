from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.chaos_jobs import run


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_f3_f4_f6_few_random_kills_lose_and_double_nothing(tmp_path: Path, database_url: str) -> None:
    figures = run(8, "either", 1, tmp_path, database_url)
    assert (figures["kills"], figures["broken"]) == (8, [])
    assert figures["max_lost_work_s"] <= 60.0
