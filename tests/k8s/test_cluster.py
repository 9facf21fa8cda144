"""What becomes of requests while a cluster of several nodes is upgraded, drained and broken."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from tests.k8s import cluster, pods
from tests.k8s.cluster import Stage

WHY_NOT = pods.why_impossible()

pytestmark = [
    pytest.mark.slow,
    pytest.mark.ray,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT),
]


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with cluster.open_stage() as stage:
        yield stage


def test_the_smoke_plan_has_no_error_on_a_cluster_of_five_nodes(stage: Stage) -> None:
    outcome = cluster.run_smoke(stage)
    assert outcome.requests > 40
    assert outcome.failed == 0, outcome


def test_gateways_and_generators_are_on_the_nodes_of_their_groups(stage: Stage) -> None:
    for group in cluster.GROUPS:
        nodes = {node.pod.address for node in stage.cluster.of(group)}
        assert {replica["node_ip"] for replica in stage.cluster.replicas(group)} == nodes


def test_a_rolling_upgrade_loses_no_request(stage: Stage) -> None:
    assert cluster.run_upgrade(stage).failed == 0


def test_the_death_of_a_generators_node_loses_no_request(stage: Stage) -> None:
    assert cluster.run_node_kill(stage).failed == 0


def test_a_generators_machine_that_vanishes_loses_no_request(stage: Stage) -> None:
    outcome = cluster.run_node_loss(stage)
    assert outcome.failed == 0, outcome
    assert outcome.detail["noticed_s"] < 40


def test_the_death_of_a_gateways_node_loses_only_what_it_was_answering(stage: Stage) -> None:
    outcome = cluster.run_gateway_kill(stage)
    assert set(outcome.detail["openai"]) <= {"broken off: APIConnectionError", "broken off: APIError"}, outcome
    assert outcome.failed < 0.1 * outcome.requests, outcome


def test_draining_a_gateway_and_a_generator_loses_no_request(stage: Stage) -> None:
    assert cluster.run_drain(stage).failed == 0


@pytest.mark.skipif(not shutil.which("redis-server"), reason="needs redis-server: apt-get install redis-server")
def test_a_head_that_dies_loses_no_request_and_comes_back(stage: Stage) -> None:
    assert cluster.run_head_kill(stage).failed == 0


def test_a_second_cluster_takes_over_without_losing_a_request(stage: Stage) -> None:
    assert cluster.run_new_cluster(stage).failed == 0
