"""`make bench-gpu` without a GPU: the script runs from end to end on a toy, and says plainly what it lacks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run_bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "loadtest.engine.gpu", *arguments],
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=110,
    )


@pytest.mark.slow
def test_the_whole_bench_runs_on_a_toy_and_ends_with_its_figures() -> None:
    done = run_bench("--device", "cpu", "--tiny")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert list(figures) == ["tokens_s_64x4", "hbm_floor_share", "vs_generate", "swap_ms", "captured_graphs"]
    assert all(figures[name] > 0 for name in list(figures)[:4])
    assert figures["captured_graphs"] == 0  # graphs are CUDA's


@pytest.mark.slow
def test_without_a_cuda_device_it_says_so_and_exits_with_2() -> None:
    done = run_bench()
    assert done.returncode == 2
    assert done.stderr.startswith("No CUDA device is available") and done.stdout == ""
