"""What the Serve configurations of clusters have in common, and in what they must differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

FOLDER = Path(__file__).parents[2] / "deployments"
AUTOSCALED = ("gpu", "ha")
CLUSTERS = ("kind", *AUTOSCALED)


def read(name: str) -> dict[str, Any]:
    return dict(yaml.safe_load((FOLDER / f"{name}.yaml").read_text()))


def surges(name: str) -> dict[str, int]:
    (application,) = read(name)["applications"]
    return {override["name"]: override.get("max_surge_percent", 0) for override in application["deployments"]}


@pytest.mark.parametrize("name", CLUSTERS)
def test_ray_writes_no_line_for_each_request_beside_the_gateways_own(name: str) -> None:
    assert read(name)["logging_config"]["enable_access_log"] is False


@pytest.mark.parametrize("name", AUTOSCALED)
def test_a_change_starts_the_new_before_the_old_end_where_pods_come_for_them(name: str) -> None:
    assert surges(name) == {"generator": 25, "gateway": 25}


def test_a_change_waits_for_no_place_where_no_pod_would_come() -> None:
    assert surges("kind") == {"generator": 0, "gateway": 0}


@pytest.mark.parametrize("name", AUTOSCALED)
def test_a_cluster_for_others_answers_nobody_without_a_key(name: str) -> None:
    (application,) = read(name)["applications"]
    assert application["args"]["needs_keys"] is True
