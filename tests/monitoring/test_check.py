"""A real Prometheus scrapes the live service, and every panel and rule has data."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.monitoring.check import MOST_SERIES, SECONDS, check_live
from tests.monitoring.overhead import interval

needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="Prometheus is not here; Debian and Ubuntu have it as a package"
)


@needs_prometheus
@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_every_panel_and_rule_has_data_on_a_live_service(tmp_path: Path) -> None:
    found = check_live(tmp_path, SECONDS, dump=None, picture=None)
    assert found["panels_without_data"] == [] and found["recorded_without_data"] == []
    assert found["rules_ill"] == {} and found["scrape_errors"] == []
    assert found["runbook_commands_failed"] == []
    assert found["labels_that_tell"] == [] and found["series"] <= MOST_SERIES


def test_the_interval_of_the_overhead_holds_the_median_and_narrows_with_more_rounds() -> None:
    few, many = interval([1.0, 2.0, 3.0]), interval([1.0, 2.0, 3.0] * 20)
    assert few[0] <= 2.0 <= few[1]
    assert many[1] - many[0] <= few[1] - few[0]
