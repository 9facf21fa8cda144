"""What Ray starts as HAProxy, without Ray."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from ray.serve._private.haproxy_templates import HAPROXY_CONFIG_TEMPLATE

from deployments.haproxy import close_to_others, find_haproxy, switches, write_start

FOLDER = Path("/tmp/rookery-12345678")


def test_nothing_in_rays_own_template_stays_open_on_all_interfaces() -> None:
    ports = {"config.metrics_port": "9101", "config.stats_port": "8404", "config.frontend_port": "8000"}
    config = HAPROXY_CONFIG_TEMPLATE.replace("{{ config.frontend_host }}", "127.0.0.1")
    for name, port in ports.items():
        config = config.replace("{{ " + name + " }}", port)
    before, after = (
        [line.split(maxsplit=1)[1] for line in text.splitlines() if line.split()[:1] == ["bind"]]
        for text in (config, close_to_others(config, FOLDER))
    )
    assert {":9101", "*:8404", "127.0.0.1:8000"} <= set(before)
    assert {"unix@/tmp/rookery-12345678/9101.sock", "unix@/tmp/rookery-12345678/8404.sock", "127.0.0.1:8000"} <= set(
        after
    )
    assert not any(address.startswith((":", "*", "0.0.0.0", "[")) for address in after)


def test_paths_of_sockets_are_short_enough_for_the_system() -> None:
    node_id, most = "0" * 56, 97
    socket = Path(switches(FOLDER)["RAY_SERVE_HAPROXY_SOCKET_PATH"])
    assert len(str(socket.parent / node_id / socket.name)) <= most


def test_the_real_program_runs_with_the_changed_configuration(tmp_path: Path) -> None:
    binary = find_haproxy()
    if binary is None:
        pytest.skip("there is no HAProxy here")
    write_start(tmp_path, binary)
    config = tmp_path / "some.cfg"
    config.write_text("defaults\n  mode http\n  timeout client 1s\nfrontend pages\n  bind *:8404\n")
    done = subprocess.run([tmp_path / "haproxy", "-c", "-f", config], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    assert f"bind unix@{tmp_path}/8404.sock" in config.read_text()


def test_it_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    binary = find_haproxy()
    if binary is None:
        pytest.skip("there is no HAProxy here")
    write_start(tmp_path, binary)
    config = tmp_path / "some.cfg"
    config.write_text("defaults\n  mode http\n  timeout client 1s\nfrontend pages\n  bind *:8404\n")
    reading, writing = os.pipe()
    start = f"'{tmp_path}/haproxy' -db -f '{config}' & while [ ! -S '{tmp_path}/8404.sock' ]; do sleep 0.01; done"
    subprocess.run(["sh", "-c", start], pass_fds=[writing], stderr=subprocess.DEVNULL, timeout=30, check=True)
    os.close(writing)
    assert os.read(reading, 1) == b""  # the last writer has ended
    os.close(reading)
