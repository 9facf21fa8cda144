"""A port for scrapes: real sockets, in this process and in others."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from serve import metrics_port
from serve.metrics import Metrics
from serve.metrics_port import listen
from tests.test_exposition import Process, start  # noqa: F401  # a fixture


def test_two_listeners_at_one_port_say_the_same_and_one_is_enough(
    tmp_path: Path,
    start: Callable[[], Process],  # noqa: F811
    free_port: int,
) -> None:
    one, other = start(), start()
    for process in (one, other):
        process.do("metrics.requests.labels('/v1/models', '200').inc()")
        process.do(f"assert listen(metrics, {free_port})")
    with httpx.Client(base_url=f"http://127.0.0.1:{free_port}", timeout=10) as client:
        assert {client.get("/metrics").text.count('status="200"} 2.0') for _ in range(20)} == {1}
        one.kill()
        assert {client.get("/metrics").text.count('status="200"} 2.0') for _ in range(5)} == {1}


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_a_port_that_is_taken_is_told_and_hurts_nobody() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert listen(Metrics(), taken.getsockname()[1]) is None


def test_a_listener_ends_when_it_is_told_to(free_port: int) -> None:
    close = listen(Metrics(), free_port)
    assert close is not None
    assert "rookery_build_info" in httpx.get(f"http://127.0.0.1:{free_port}/metrics").text
    close()
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{free_port}/metrics")


def test_only_so_many_are_answered_at_once_and_the_next_waits(free_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_port, "_MAX_AT_ONCE", 2)
    close = listen(Metrics(), free_port)
    assert close is not None
    silent = [socket.create_connection(("127.0.0.1", free_port)) for _ in range(2)]
    url = f"http://127.0.0.1:{free_port}/metrics"
    with pytest.raises(httpx.ReadTimeout):
        httpx.get(url, timeout=0.3)
    silent[0].close()
    assert "rookery_build_info" in httpx.get(url, timeout=10).text
    silent[1].close()
    close()
