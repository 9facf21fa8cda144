"""`deployments.drain` in a cluster of several nodes, under streams that are longer than it takes to ask for them."""

from __future__ import annotations

import http.client
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.k8s.cluster import Cluster, Node, wait_until
from tests.k8s.pods import Network, why_impossible

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

NUM_PIECES = 200  # ten a second
BOTH = {"gateway": 1.0, "generator": 1.0}
CONFIG = {
    "proxy_location": "EveryNode",
    "http_options": {"host": "0.0.0.0", "port": 8000},
    "applications": [{"name": "rookery", "route_prefix": "/", "import_path": "tests.k8s.streams:app"}],
}
DRAIN = (sys.executable, "-m", "deployments.drain", "--timeout", "150")


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head, and two nodes with a gateway and a generator each."""
    if reason := why_impossible():
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="rookery-drain-") as folder, Network(Path(folder)) as network:
        data = Path(folder) / "data"
        data.mkdir()
        cluster = Cluster(network, data)
        cluster.start({"gateway": 2}, resources={"gateway": BOTH})
        cluster.deploy(CONFIG)
        for node in cluster.of("gateway"):
            wait_until(lambda node=node: is_ready(node), 180, "the node answers", node)  # type: ignore[misc]
        yield cluster


def read(node: Node, num_pieces: int) -> tuple[int, int]:
    """Status and number of the pieces that have come."""

    def ask() -> tuple[int, int]:
        connection = http.client.HTTPConnection(node.pod.address, 8000, timeout=120)
        connection.request("GET", f"/?pieces={num_pieces}")
        response = connection.getresponse()
        return response.status, response.read().count(b"\n")

    return node.pod.call(ask)


def is_ready(node: Node) -> bool:
    try:
        return read(node, 1) == (200, 1)
    except OSError:
        return False


def begin_streams(pool: ThreadPoolExecutor, nodes: list[Node]) -> list[Future[tuple[int, int]]]:
    streams = [pool.submit(read, node, NUM_PIECES) for node in nodes for _ in range(5)]
    assert all(read(node, 1) == (200, 1) for node in nodes)  # those are under way
    return streams


def test_a_node_leaves_without_breaking_a_stream(cluster: Cluster) -> None:
    leaving, staying = cluster.of("gateway")
    with ThreadPoolExecutor(20) as pool:
        streams = begin_streams(pool, [leaving, staying])
        cluster.start_worker("gateway", BOTH)
        hook = pool.submit(cluster.run, leaving, *DRAIN, timeout_s=200)
        short = []
        while not hook.done():
            short.append(read(staying, 3))
        assert "Nothing of ours runs here any more." in hook.result()
        assert [stream.result() for stream in streams] == [(200, NUM_PIECES)] * 10
        assert set(short) == {(200, 3)}
    assert leaving.pod.address not in {replica["node_ip"] for replica in cluster.replicas("Entrance")}


def test_all_of_a_cluster_leaves_at_once_after_its_last_answer(cluster: Cluster) -> None:
    nodes = cluster.of("gateway")
    with ThreadPoolExecutor(20) as pool:
        streams = begin_streams(pool, nodes)
        last = pool.submit(cluster.run, cluster.head, *DRAIN, timeout_s=200)
        hooks = [pool.submit(cluster.run, node, *DRAIN, timeout_s=200) for node in nodes]
        assert [stream.result() for stream in streams] == [(200, NUM_PIECES)] * 10
        for node, hook in zip(nodes, hooks, strict=True):
            assert "Nothing has been asked of this node" in hook.result()
            assert not last.done()
            cluster.kill(node)
        assert "Other nodes, which stay: 0." in last.result()


def test_nodes_without_their_head_leave_after_their_last_answer(cluster: Cluster) -> None:
    nodes = cluster.of("gateway")
    with ThreadPoolExecutor(20) as pool:
        streams = begin_streams(pool, nodes)
        cluster.kill(cluster.head)
        hooks = [pool.submit(cluster.run, node, *DRAIN, timeout_s=200) for node in nodes]
        assert [stream.result() for stream in streams] == [(200, NUM_PIECES)] * 10
        for hook in hooks:
            assert "does not answer" in hook.result()
            assert "Nothing has been asked of this node" in hook.result()
