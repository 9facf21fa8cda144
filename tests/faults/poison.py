"""A job that ends its process whenever it runs, and one behind it in the queue of one supervisor."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from serve.training.jobs.queue import MAX_ATTEMPTS
from tests.faults.supervise import LEASE_S
from tests.faults.supervisors import running_jobs, supervisors, wait_for_end
from tests.training.making import Training


def run(rounds: int, folder: Path) -> dict[str, Any]:
    """Two jobs a round. The wait is from the first start of the poison to that of the other."""
    training = Training(folder)
    count: Counter[str] = Counter()
    attempts, waits_s = [], []
    try:
        with supervisors(training, {}) as [supervisor]:
            for number in range(rounds):
                poison = training.create_job(f"poison{number}")
                other = training.create_job(f"other{number}")
                hit: set[int] = set()
                began, other_began = 0.0, 0.0

                def strike(poison_id: str = poison.id, hit: set[int] = hit) -> None:
                    for pid, job_id in running_jobs(supervisor).items():
                        if job_id == poison_id and pid not in hit:
                            _segfault(pid)
                            hit.add(pid)

                while not other_began:
                    strike()
                    jobs = running_jobs(supervisor).values()
                    now = time.monotonic()
                    began = began or (now if hit else 0.0)
                    is_over = training.jobs.get_job(other.id).status.is_final
                    other_began = now if other.id in jobs or is_over else 0.0
                    time.sleep(0.02)
                waits_s.append(other_began - began)
                wait_for_end(training, poison.id, strike)
                failed = training.jobs.get_job(poison.id)
                count["poison"] += failed.error_code == "poison_job"
                count["others"] += wait_for_end(training, other.id, lambda: None) == "succeeded"
                attempts.append(len(hit))
    finally:
        training.close()
    return {
        "rounds": rounds,
        "poison_jobs": count["poison"],
        "others_succeeded": count["others"],
        "attempts": sorted(set(attempts)),
        "max_attempts": MAX_ATTEMPTS,
        "longest_wait_s": round(max(waits_s), 2),
        "lease_s": LEASE_S,
    }


def _segfault(pid: int) -> None:
    """As a fault in the process itself ends it."""
    with contextlib.suppress(psutil.Error, ProcessLookupError):
        os.kill(pid, signal.SIGSEGV)
