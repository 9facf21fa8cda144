"""Supervisors as processes, over one `Training`: started with any environment, and ended with all that they started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from tests.training.making import Training


@contextmanager
def supervisors(
    training: Training, *environments: Mapping[str, str], times: float = 1.0
) -> Iterator[list[psutil.Process]]:
    """One for each environment, which is added to this process's own; see `tests.faults.supervise`."""
    processes = []
    with (training.options.data_dir / "supervisors.log").open("ab") as log:
        for environment in environments:
            command = [sys.executable, "-m", "tests.faults.supervise", str(times)]
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, env={**os.environ, **environment}
            )
            assert process.stdin is not None
            process.stdin.write(training.options.to_json().encode())
            process.stdin.close()
            processes.append(process)
    try:
        yield [psutil.Process(process.pid) for process in processes]
    finally:
        for process in processes:
            process.send_signal(signal.SIGTERM)
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            process.kill()
            process.wait()


def running_jobs(supervisor: psutil.Process) -> dict[int, str]:
    """Process of a training -> the id of its job."""
    found = {}
    with contextlib.suppress(psutil.Error):
        for child in supervisor.children():
            with contextlib.suppress(psutil.Error, ValueError):
                arguments = child.cmdline()
                found[child.pid] = arguments[arguments.index("--job") + 1]
    return found


def wait_for_end(training: Training, job_id: str, meanwhile: Callable[[], object], timeout_s: float = 240) -> str:
    """The status in which it has ended; whatever it is when time is up. `meanwhile` is called again and again."""
    deadline = time.monotonic() + timeout_s
    while not (job := training.jobs.get_job(job_id)).status.is_final and time.monotonic() < deadline:
        meanwhile()
        time.sleep(0.05)
    return job.status


def library_of_faketime() -> Path:
    """Raises: StopIteration where it is not installed."""
    return next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))
