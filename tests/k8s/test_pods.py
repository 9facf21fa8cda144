"""Pods without Kubernetes: they reach each other and nothing else, and they end with whoever made them."""

from __future__ import annotations

import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from tests.k8s.pods import ROOT, Network, why_impossible
from tests.k8s.service import PORT, Service

WHY_NOT = why_impossible()
pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)

_MAKER = """
import subprocess
import sys
from pathlib import Path
from tests.k8s.pods import Network
with Network(Path(sys.argv[1])) as network:
    inside = network.pod("one").popen("sh", "-c", "echo $$; exec sleep 600", out=subprocess.PIPE)
    inside.stdout.readline()
    print(inside.pid, flush=True)
    inside.wait()
"""


@pytest.fixture
def network(tmp_path: Path) -> Iterator[Network]:
    with Network(tmp_path) as network:
        yield network


def test_pods_reach_each_other_by_name(network: Network) -> None:
    one, two = network.pod("one"), network.pod("two")
    server = two.call(lambda: socket.create_server((two.address, PORT)))
    with server, one.call(lambda: socket.create_connection((two.address, PORT), 5)) as client:
        server.accept()[0].close()
        assert client.getsockname()[0] == one.address
    assert one.run("getent", "hosts", "two").split()[0] == two.address


def test_a_pod_sees_its_own_processes_and_files_alone(network: Network) -> None:
    pod = network.pod("one")
    assert pod.run("sh", "-c", "hostname; ls -A /tmp; echo $$").split()[0] == "one"
    assert int(pod.run("sh", "-c", "echo $$")) < 100
    assert pod.run("ls", network.folder / "one" / "tmp") is not None


def test_nothing_outside_can_be_reached(network: Network) -> None:
    pod = network.pod("one")
    with pytest.raises(OSError):
        pod.call(lambda: socket.create_connection(("192.0.2.1", 80), 0.2))


def test_a_killed_pod_takes_all_its_processes_with_it(network: Network) -> None:
    pod = network.pod("one")
    with pod.popen("sh", "-c", "echo begun; exec sleep 600", out=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        pod.kill()
        assert process.wait(5) == -signal.SIGKILL


def test_pods_end_with_the_process_that_made_them(tmp_path: Path) -> None:
    maker = subprocess.Popen([sys.executable, "-c", _MAKER, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    with maker:
        assert maker.stdout is not None
        inside = psutil.Process(int(maker.stdout.readline()))
        maker.kill()
    inside.wait(10)


def test_a_service_shares_out_connections_among_those_that_are_ready(network: Network) -> None:
    pods = [network.pod(f"gateway-{number}") for number in range(2)]
    servers = [pod.call(lambda pod=pod: socket.create_server((pod.address, PORT))) for pod in pods]  # type: ignore[misc]
    client = network.pod("client")
    with Service(client) as service:
        for pod, server in zip(pods, servers, strict=True):
            service.add(pod)
            _answer(server, b"HTTP/1.1 200 OK\r\n\r\n")
            _answer(server, b"HTTP/1.1 200 OK\r\n\r\n")
        service.wait_for(2, 5)
        served = []
        for _ in range(4):
            with client.call(lambda: socket.create_connection((client.address, PORT), 5)):
                found, *_ = select.select(servers, [], [], 5)[0]
                served.append(servers.index(found))
                found.accept()[0].close()
        assert sorted(served) == [0, 0, 1, 1]
        service.remove(pods[0])
        assert service.ready == ["gateway-1"]
    for server in servers:
        server.close()


def _answer(server: socket.socket, answer: bytes) -> None:
    server.settimeout(5)
    connection, _ = server.accept()
    with connection:
        connection.recv(1000)
        connection.sendall(answer)
