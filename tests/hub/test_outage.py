"""Some seconds of every kind of Hub outage under a live service; `make hub-check` has ten minutes of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hub.outage import outage

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


@pytest.mark.slow
def test_models_that_are_here_do_not_notice_an_outage_of_the_hub(tmp_path: Path) -> None:
    figures = outage(0.3, tmp_path)
    assert figures["outage_errors"] == figures["outage_hub_requests_cached"] == 0, figures
    assert figures["outage_requests"] > 100 and figures["outage_from_disk"] > 0, figures
    assert set(figures["outage_absent_statuses"]) == {"503"}, figures
    assert figures["outage_absent_without_retry_after"] == 0, figures
    assert figures["outage_recovery_s"] is not None, figures
