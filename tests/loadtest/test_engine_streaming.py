"""The benchmark of streaming runs, and says what it promises."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_it_ends_with_a_line_of_figures() -> None:
    command = [sys.executable, "-m", "loadtest.engine.streaming", "--tiny", "--rounds", "1", "--tokens", "8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    values = json.loads(done.stdout.splitlines()[-1])
    assert {"http_efficiency", "ttft_added_ms", "client_cores", "service_cores"} <= values.keys()
    assert values["http_efficiency"] > 0
