"""Starting and stopping the whole service. That SIGTERM leaves no process is checked where `live_service` ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

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
    assert ended.stderr == f"Port {port} on 127.0.0.1 cannot be used (Address already in use); choose another one.\n"


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


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_no_replica_outlives_a_kill_for_long(tmp_path: Path) -> None:
    import_tiny_model(tmp_path, BASE)
    left = stop_service(start_service(tmp_path), signal.SIGKILL)
    assert set(left) <= {"ray::DashboardAgent", "ray::RuntimeEnvAgent"}  # idle; they end when a time-out of 60 s does
