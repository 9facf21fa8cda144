"""What is looked for in a scrape."""

from __future__ import annotations

import pytest

from tests.monitoring.exposition import leaks, series_of

SCRAPE = """\
# HELP rookery_requests HTTP requests answered.
# TYPE rookery_requests counter
rookery_requests_total{route="/v1/completions",status="200"} 3.0
rookery_requests_total{route="/tweets/Ada",status="200"} 1.0
# EOF
"""


def test_series_are_counted_by_family() -> None:
    assert series_of(SCRAPE) == {"rookery_requests": 2}


def test_a_model_in_a_label_is_found_in_any_case() -> None:
    assert leaks(SCRAPE, ["tweets/ada"]) == ["/tweets/Ada"]
    assert leaks(SCRAPE, ["tweets/bob", "a-key"]) == []


def test_what_is_no_openmetrics_is_refused() -> None:
    with pytest.raises(ValueError):
        series_of(SCRAPE.replace("# EOF\n", ""))
