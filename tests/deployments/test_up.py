"""Starting and stopping the whole service. That SIGTERM leaves no process is checked where `live_service` ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from unittest.mock import AsyncMock

import psutil  # type: ignore[import-untyped]
import pytest
import uvicorn

from deployments import haproxy
from deployments.stopping import Stopped, caught_signals
from deployments.up import _set_environment
from serve.settings import Settings
from tests.deployments.conftest import BASE, import_tiny_model, start_service, stop_service


def up(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "deployments.up", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_a_port_in_use_is_said_in_one_sentence() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ended = up("--port", str(port))
    assert ended.returncode == 1
    by = f"process {os.getpid()}, {psutil.Process().name()}"
    said = f"Port {port} on 127.0.0.1 cannot be used (Address already in use by {by}); choose another one.\n"
    assert ended.stderr == said


def test_a_wrong_setting_is_said_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROOKERY_MEMORY", "2GB")
    ended = up()
    assert ended.returncode == 1
    assert ended.stderr.startswith("ROOKERY_MEMORY is not a setting.")
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("variables", "hosts"),
    [({}, "localhost"), ({"ROOKERY_HOSTS": "birds.example"}, "birds.example"), ({"ROOKERY_HOSTS": ""}, "")],
)
def test_a_service_on_one_machine_answers_to_no_other_name_unless_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], hosts: str
) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "ROOKERY_HOSTS"} | variables
    monkeypatch.setattr(os, "environ", environment)
    _set_environment(Settings.from_env({**variables, "ROOKERY_DATA": str(tmp_path)}), {})
    assert environment["ROOKERY_HOSTS"] == hosts


@pytest.mark.parametrize(
    ("variables", "header"),
    [
        ({}, haproxy.CALLER_HEADER),
        ({"ROOKERY_ADDRESS_HEADER": "x-forwarded-for"}, "x-forwarded-for"),
        ({"RAY_SERVE_ENABLE_HA_PROXY": "0"}, ""),
        ({"RAY_SERVE_HAPROXY_BINARY_PATH": "/usr/sbin/haproxy"}, ""),
    ],
)
def test_only_our_own_haproxy_is_believed_who_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], header: str
) -> None:
    environment = {"ROOKERY_DATA": str(tmp_path), **variables}
    monkeypatch.setattr(os, "environ", environment)
    _set_environment(Settings.from_env(environment), haproxy.switches(tmp_path, tmp_path / "x", fallback_port=8500))
    assert environment["ROOKERY_ADDRESS_HEADER"] == header


async def test_without_haproxy_no_caller_says_where_it_calls_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    os.environ.pop("FORWARDED_ALLOW_IPS", None)
    _set_environment(Settings(data=tmp_path), {})
    app = AsyncMock()
    config = uvicorn.Config(lambda: app, factory=True, interface="asgi3", log_config=None)  # as Ray makes it
    config.load()
    scope = {"type": "http", "client": ("127.0.0.1", 1), "headers": [(b"x-forwarded-for", b"10.0.0.1")]}
    await config.loaded_app(scope, AsyncMock(), AsyncMock())
    assert app.await_args.args[0]["client"] == ("127.0.0.1", 1)  # type: ignore[union-attr]


def test_a_signal_that_python_loses_in_a_finalizer_is_noticed_after_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = []
    monkeypatch.setattr(sys, "unraisablehook", lambda about: lost.append(about.exc_type))

    class Finalizer:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        with caught_signals() as signals:
            signals.check()
            Finalizer()
            assert lost == [Stopped]
            with pytest.raises(Stopped):
                signals.check()
            signal.raise_signal(signal.SIGINT)  # a second one is ignored while the service ends
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
            signal.signal(number, handler)


def test_signals_are_afterwards_as_they_were_before() -> None:
    before = signal.getsignal(signal.SIGINT)
    with caught_signals():
        assert signal.getsignal(signal.SIGINT) != before
    assert signal.getsignal(signal.SIGINT) == before


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_no_replica_outlives_a_kill_for_long(tmp_path: Path) -> None:
    import_tiny_model(tmp_path, BASE)
    left = stop_service(start_service(tmp_path), signal.SIGKILL)
    assert set(left) <= {"ray::DashboardAgent", "ray::RuntimeEnvAgent"}  # idle; they end when a time-out of 60 s does
