"""The service as its users start it, for benchmarks to talk to."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def free_port() -> int:
    """Of this machine; nobody has it yet."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running_server(data: Path, dtype: str) -> Iterator[str]:
    """`rookery up` on a free port; yields its URL once it is ready."""
    port = free_port()
    environ = os.environ | {"ROOKERY_DTYPE": dtype, "ROOKERY_HUB_ENABLED": "0"}
    command = [sys.executable, "-m", "deployments.cli", "up", "--port", str(port), "--data", str(data), "--no-browser"]
    with (data / "server.log").open("w") as log:
        server = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            assert server.stdout is not None
            for line in server.stdout:
                if line.startswith("ready "):
                    yield line.split()[1]
                    break
            else:
                raise SystemExit("the server did not start: " + (data / "server.log").read_text()[-2000:])
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(timeout=60)
