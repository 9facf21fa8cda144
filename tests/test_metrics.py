"""The metrics: their names, what they cost where nobody wants them, and that there is one of each in a process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import Gauge

from serve import exposition
from serve.exposition import open_metrics, render
from serve.metrics import Metrics


def test_all_names_are_ours_and_say_what_they_are() -> None:
    families = list(Metrics().registry.collect())
    assert len({family.name for family in families}) == len(families) > 30
    for family in families:
        assert family.name.startswith("rookery_") and family.documentation.endswith(".")
        assert family.type != "histogram" or family.name.endswith(("_seconds", "_rows", "_models"))


def test_every_gauge_ends_with_its_process() -> None:
    gauges = [metric for metric in vars(Metrics()).values() if isinstance(metric, Gauge)]
    modes = {gauge._multiprocess_mode for gauge in gauges}
    assert len(gauges) > 5 and {f"gauge_{mode}" for mode in modes} <= set(exposition._SIZES)
    assert all(mode.startswith("live") for mode in modes)


def test_what_is_switched_off_takes_every_call_and_shows_nothing() -> None:
    metrics = Metrics(enabled=False)
    metrics.requests.labels("/x", "200").inc()
    metrics.queue_depth.set(3)
    metrics.requests_in_progress.dec()
    metrics.step_duration.observe(0.1)
    assert render(metrics)[0] == b"" and not metrics.is_enabled


def test_what_is_switched_off_declares_nothing_and_touches_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(exposition.FOLDER_VARIABLE, "/nowhere/at/all")
    monkeypatch.setattr("prometheus_client.values.ValueClass", None)  # of which every declared metric makes one
    metrics = open_metrics(Path("/nowhere/at/all"), enabled=False)
    metrics.job_duration.labels("failed").observe(1)
    assert not metrics.is_enabled and not metrics.is_shared


def test_the_program_that_imports_it_keeps_its_own_series_of_creation_times() -> None:
    code = "import prometheus_client.metrics as m, serve.metrics, serve.exposition; assert m._use_created"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_process_that_shares_has_one_object_or_values_would_be_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(exposition.FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setattr(Metrics, "_is_made", False)
    Metrics()
    Metrics(enabled=False)
    with pytest.raises(AssertionError):
        Metrics()
