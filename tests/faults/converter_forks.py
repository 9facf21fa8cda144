"""The converter's process as a fork of one that has imported torch: the same code, without the 2 s of imports.

    python -m tests.faults.converter_forks [--trusting]

Reads one JSON line for each conversion, [arguments, report, timeout_s], and answers with its exit status, null when it
took too long. `--trusting` takes the first wall away: pickles are run as they are, so that the second is tested alone.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import torch

from serve.store import convert

# What payloads use, imported before they cannot be: it is their harm that must fail, not their first step.
_USED_BY_PAYLOADS = ("pty", "runpy", "socket", "subprocess", "urllib.request", "importlib", "numpy", "codecs")


def fork_converter(arguments: list[str], report: IO[bytes], timeout_s: float) -> int:
    """In place of `convert.run_apart`. Only in a process with one thread."""

    def work() -> int:
        for number, file in ((0, os.open(os.devnull, os.O_RDWR)), (1, report.fileno()), (2, 0)):
            os.dup2(file, number)
        return convert.main(arguments)

    status = run_forked(work, timeout_s)
    if status is None:
        raise subprocess.TimeoutExpired("convert", timeout_s)
    return status


def run_forked(work: Callable[[], int], timeout_s: float) -> int | None:
    """The exit status of a child that does `work`: negative for a signal, 1 for an exception, None when it was late."""
    pid = os.fork()
    if not pid:
        status = 1
        try:
            status = work()
        except BaseException:
            with contextlib.suppress(BaseException):
                traceback.print_exc()
        finally:
            os._exit(status)
    handle = os.pidfd_open(pid)
    late = not select.select([handle], [], [], timeout_s)[0]
    os.close(handle)
    if late:
        os.kill(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return None if late else status


class Forks:
    """Such a process, for tests that have threads themselves. `run` goes in place of `convert.run_apart`."""

    def __init__(self, *, trusting: bool = False) -> None:
        command = [sys.executable, "-m", "tests.faults.converter_forks", *["--trusting"] * trusting]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)

    def run(self, arguments: list[str], report: IO[bytes], timeout_s: float) -> int:
        assert self._process.stdin and self._process.stdout
        path = f"/proc/{os.getpid()}/fd/{report.fileno()}"
        self._process.stdin.write(json.dumps([arguments, path, timeout_s]).encode() + b"\n")
        self._process.stdin.flush()
        status = json.loads(self._process.stdout.readline())
        if status is None:
            raise subprocess.TimeoutExpired("convert", timeout_s)
        return int(status)

    def close(self) -> None:
        self._process.communicate()


@contextlib.contextmanager
def forks(*, trusting: bool = False) -> Iterator[Forks]:
    process = Forks(trusting=trusting)
    try:
        yield process
    finally:
        process.close()


def _load_trusting(file: Any) -> Any:
    return torch.load(file, map_location="cpu", weights_only=False)


def main() -> None:
    torch.set_num_threads(1)
    if "--trusting" in sys.argv:
        convert.load_pickle = _load_trusting
        for name in _USED_BY_PAYLOADS:
            importlib.import_module(name)
    for line in sys.stdin:
        arguments, path, timeout_s = json.loads(line)
        status: int | None
        with Path(path).open("r+b") as report:
            try:
                status = fork_converter(arguments, report, timeout_s)
            except subprocess.TimeoutExpired:
                status = None
        print(json.dumps(status), flush=True)


if __name__ == "__main__":
    main()
