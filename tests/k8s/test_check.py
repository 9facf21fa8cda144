"""What `make k8s-check` says, without its cluster."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest

from tests.k8s import check, cluster
from tests.k8s.cluster import Outcome
from tests.k8s.rendered import OVERLAYS, NoKubectl, find_kubectl, render


def test_it_ends_with_one_line_of_figures(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, definitions: Path, kubectl: str
) -> None:
    monkeypatch.setattr("sys.argv", ["check", "--offline", "--definitions", str(definitions)])
    assert check.main() == 0
    figures = json.loads(capsys.readouterr().out)
    assert [*figures][:6] == [
        "overlays",
        "manifests",
        "schema_errors",
        "policy_errors",
        "upgrade_failed_requests",
        "node_kill_failed_requests",
    ]
    assert figures["overlays"] == len(OVERLAYS)
    assert figures["manifests"] == sum(len(render(overlay).documents) for overlay in OVERLAYS)
    assert figures["schema_errors"] == figures["policy_errors"] == 0
    assert figures["upgrade_failed_requests"] is figures["node_kill_failed_requests"] is None


def test_it_says_what_it_lacks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("sys.argv", ["check", "--offline", "--definitions", str(tmp_path / "none")])
    assert check.main() == 2
    said = capsys.readouterr()
    assert not said.out and "CustomResourceDefinitions are not at" in said.err


@pytest.mark.parametrize(("requests", "failed", "is_well"), [(100, 0, True), (100, 1, False), (0, 0, False)])
def test_a_run_is_well_when_all_was_answered_and_something_was_asked(requests: int, failed: int, is_well: bool) -> None:
    manifests = {"manifests": 9, "schema_errors": 0, "policy_errors": 0}
    run = {"drain_requests": requests, "drain_failed_requests": failed}
    assert check._is_well({**manifests, **run}, ["drain"]) == is_well
    assert not check._is_well({**manifests, **run, "policy_errors": 1}, ["drain"])


def test_a_run_is_known_by_its_name(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cluster, "open_stage", nullcontext)
    monkeypatch.setattr(cluster, "RUNS", {"node_kill": lambda stage: Outcome(120, 2, {"p99_s": 1.5})})
    assert check.check_cluster(["node_kill"]) == {"node_kill_requests": 120, "node_kill_failed_requests": 2}
    assert "node kill: 2 of 120 requests failed" in capsys.readouterr().err


def test_without_kubectl_it_says_where_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(NoKubectl, match="kubectl is not on the PATH"):
        find_kubectl()
