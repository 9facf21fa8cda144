"""Every process of a live service counts, each scrape of any of them says the same, and nothing is counted twice."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil  # type: ignore[import-untyped]
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from tests.deployments.conftest import BASE, LiveService, import_tiny_model, stop_service, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(300)]

NUM_REQUESTS, NUM_TOKENS = 8, 6
OPENMETRICS = {"accept": "application/openmetrics-text; version=1.0.0"}
_parse: Any = text_string_to_metric_families  # without types


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def metrics_port() -> int:
    return _free_port()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, metrics_port: int) -> Iterator[LiveService]:
    """Two gateways, two generators and a trainer."""
    data = tmp_path_factory.mktemp("metrics")
    import_tiny_model(data, BASE)
    port = _free_port()
    settings = {
        "ROOKERY_DATA": str(data),
        "ROOKERY_BASE": BASE,
        "ROOKERY_HUB_ENABLED": "false",
        "ROOKERY_MEMORY_BYTES": str(50_000_000),
        "ROOKERY_THREADS": "1",
        "ROOKERY_METRICS_PORT": str(metrics_port),
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "deployments.up", "--port", str(port), "--generators", "2", "--gateways", "2"],
        env={**os.environ, **settings},
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    service = LiveService(f"http://127.0.0.1:{port}", process, data)
    assert process.stdout.readline() == f"ready {service.url}\n"
    yield service
    assert stop_service(service) == []


def scrape(url: str) -> dict[str, float]:
    """Name and labels -> value."""
    text = httpx.get(f"{url}/metrics", headers=OPENMETRICS, timeout=30).text
    samples = [sample for family in _parse(text) for sample in family.samples]
    return {" ".join([sample.name, *sample.labels.values()]): sample.value for sample in samples}


def ask(service: LiveService) -> None:
    body = {"model": BASE, "prompt": "I", "max_tokens": NUM_TOKENS, "ignore_eos": True}
    assert httpx.post(f"{service.url}/v1/completions", json=body, timeout=60).status_code == 200


def test_every_scrape_says_the_same_and_counts_each_request_once(service: LiveService, metrics_port: int) -> None:
    urls = [service.url, f"http://127.0.0.1:{metrics_port}"]
    before = scrape(urls[1])
    expected = (
        ("rookery_requests_total /v1/completions 200", 1),
        ("rookery_tokens_generated_total", NUM_TOKENS),
        ("rookery_queue_wait_seconds_count", 1),
        ("rookery_request_duration_seconds_count /v1/completions", 1),  # the last that a request counts
    )
    for number in range(1, NUM_REQUESTS + 1):
        ask(service)
        wait_until(lambda n=number: scrape(urls[0]).get(expected[-1][0], 0) >= n, 5, 0.01)  # type: ignore[misc]
        time.sleep(1.1)  # what a process told somebody else it tells for a second
        told = [scrape(url) for url in urls for _ in range(2)]
        for name, each in expected:
            assert {one[name] - before.get(name, 0) for one in told} == {each * number}, name
    assert told[0]["rookery_pool_budget_bytes device"] == 100_000_000
    assert told[0]["rookery_step_duration_seconds_count"] >= NUM_REQUESTS * NUM_TOKENS


def test_all_processes_listen_and_share_one_private_folder(service: LiveService, metrics_port: int) -> None:
    family = psutil.Process(service.process.pid).children(recursive=True)
    listening = {
        child.pid
        for child in family
        for found in child.net_connections("tcp")
        if found.status == psutil.CONN_LISTEN and found.laddr.port == metrics_port
    }
    pids = {pid for name in ("gateway", "generator", "trainer") for pid in service.replica_pids(name)}
    assert listening == pids and len(pids) == 5
    mapped = {Path(one.path) for pid in pids for one in psutil.Process(pid).memory_maps() if one.path.endswith(".db")}
    (folder,) = {path.parent for path in mapped}
    assert folder.stat().st_mode & 0o777 == 0o700
    others = [child for child in family if child.pid not in pids]
    assert not any(str(folder) in one.path for child in others for one in child.memory_maps())


def test_counters_outlive_a_killed_replica_and_its_gauges_do_not(service: LiveService, metrics_port: int) -> None:
    url = f"http://127.0.0.1:{metrics_port}"
    before = scrape(url)
    for pid in [service.replica_pids(name)[0] for name in ("generator", "gateway")]:
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: scrape(url)["rookery_pool_budget_bytes device"] == 50_000_000, 10)
    wait_until(lambda: scrape(url)["rookery_pool_budget_bytes device"] == 100_000_000, 60)
    after = scrape(url)
    counters = [name for name in before if name.partition(" ")[0].endswith(("_total", "_count", "_bucket"))]
    assert all(after[name] >= before[name] for name in counters)
    name = "rookery_requests_total /v1/completions 200"
    assert after[name] == before[name] > 0
