"""Ray's switches, and the copy of them that a cluster gets."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import ray

from deployments import ray_env

ROOT = Path(__file__).parents[2]
CLUSTER_COPY = ROOT / "k8s" / "base" / "ray.env"


def test_the_clusters_copy_is_what_the_module_prints() -> None:
    assert CLUSTER_COPY.read_text() == ray_env.as_env_file(ray_env.for_cluster())
    printed = subprocess.run(
        [sys.executable, "-m", "deployments.ray_env"], capture_output=True, text=True, timeout=30, check=True, cwd=ROOT
    )
    assert printed.stdout == CLUSTER_COPY.read_text()


def test_it_imports_no_ray_which_would_read_its_switches_too_early() -> None:
    said = "import sys, deployments.ray_env; print('ray' in sys.modules)"
    ended = subprocess.run(
        [sys.executable, "-c", said], capture_output=True, text=True, timeout=30, check=True, cwd=ROOT
    )
    assert ended.stdout == "False\n"


def test_no_switch_is_one_that_this_ray_does_not_know() -> None:
    known = _names_in_ray()
    unknown = {*ray_env.for_cluster(), *ray_env.for_laptop(verbose=False), *ray_env.for_laptop(verbose=True)} - known
    assert unknown == {"MALLOC_ARENA_MAX"}  # glibc's


def _names_in_ray() -> set[str]:
    """Whatever looks like a switch in Ray's Python and in its compiled part."""
    root = Path(ray.__file__).parent
    sources = [
        *(root / "serve" / "_private").glob("*.py"),
        *(root / "_private").rglob("*.py"),
        *(root / "_common").rglob("*.py"),
        root / "_raylet.so",
    ]
    return {name.decode() for path in sources for name in re.findall(rb"RAY_[A-Za-z_0-9]{3,60}", path.read_bytes())}


def test_each_switch_is_said_in_one_place_of_each_set() -> None:
    tree = ast.parse(Path(ray_env.__file__).read_text())
    names = [
        node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and str(node.value).startswith("RAY_")
    ]
    twice = {name for name in names if names.count(name) > 1}
    assert twice == {"RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"}  # a laptop and a cluster want another one


def test_an_environment_file_has_no_line_that_a_shell_or_a_cluster_reads_otherwise() -> None:
    for line in CLUSTER_COPY.read_text().splitlines():
        assert line.startswith("#") or re.fullmatch(r"(RAY|MALLOC)_\w+=[\w./ -]+", line), line


def test_the_logs_of_twenty_processes_fit_into_a_pods_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ray_env.for_cluster().items():
        monkeypatch.setenv(name, value)
    most, backups = (int(os.environ[f"RAY_ROTATION_{name}"]) for name in ("MAX_BYTES", "BACKUP_COUNT"))
    folder = 4 << 30  # the limit of `tmp` in k8s/base
    assert 0 < 20 * most * (1 + backups) < folder / 2


def test_haproxys_sockets_are_short_enough_in_the_cluster() -> None:
    node_id, most = "0" * 56, 97
    for name, value in ray_env.for_cluster().items():
        if name.endswith("SOCKET_PATH"):
            path = Path(value)
            assert len(os.path.join(path.parent, node_id, path.name)) <= most
