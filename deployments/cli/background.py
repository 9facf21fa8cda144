"""A service that runs on when the terminal is closed: `rookery up` in a session of its own, writing to a log."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from deployments import running
from deployments.checklist import Checklist
from deployments.show import plain
from serve.errors import RookeryError

_POLL_S = 0.1
_MAX_LOG_BYTES = 10_000_000  # a longer output makes room at the next start
_SHOWN_CHARS = 2000


class DidNotStart(RookeryError):
    """It has ended before it was ready."""

    code = "did_not_start"


def start(arguments: Sequence[str], data: Path, checklist: Checklist) -> str:
    """Starts `rookery up` with `arguments`; its URL when it is ready. Its checklist is shown as it comes.

    Raises: DidNotStart with the end of its log, BadFolder.
    """
    log = data.absolute() / running.OUTPUT
    command = [sys.executable, "-m", "deployments.cli", "up", *arguments, "--no-browser"]
    environ = {name: value for name, value in os.environ.items() if name != "FORCE_COLOR"}
    with running.in_folder(log.parent):
        if log.exists() and log.stat().st_size > _MAX_LOG_BYTES:
            log.replace(log.with_suffix(".log.1"))
        with open(log, "ab", opener=running.for_owner) as out:
            begin = out.tell()
            process = subprocess.Popen(
                command,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
    for line in _lines(process, log, begin):
        if line.startswith("ready "):
            return line.removeprefix("ready ").strip()
        checklist.relay(line)
    said = plain(log.read_bytes()[begin:].decode(errors="replace"))[-_SHOWN_CHARS:].strip()
    raise DidNotStart(f"The service did not start. The end of {log}:\n{said}")


def _lines(process: subprocess.Popen[bytes], log: Path, begin: int) -> Iterator[str]:
    """The log's lines from `begin` on, until the process has ended."""
    with log.open("rb") as file:
        file.seek(begin)
        rest = b""
        while True:
            has_ended = process.poll() is not None
            rest += file.read()
            *lines, rest = rest.split(b"\n")
            yield from (line.decode(errors="replace") for line in lines)
            if has_ended:
                return
            time.sleep(_POLL_S)
