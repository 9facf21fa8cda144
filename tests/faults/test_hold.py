"""A held thread stands still until it is let go; killed, it leaves no zombie, for which its parent would wait."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from tests.faults.hold import busiest_thread, held

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="ptrace needs root in most places")

_CODE = """
import threading, time
counts = [0, 0]
def work(which):
    while True:
        counts[which] += 1
        if which: time.sleep(0.005)
        else: sum(range(2000))
for which in (0, 1):
    threading.Thread(target=work, args=[which], daemon=True).start()
print("ready", flush=True)
time.sleep(600)
"""


def test_it_is_the_busiest_that_stands_still_until_it_is_let_go_or_killed() -> None:
    process = subprocess.Popen([sys.executable, "-c", _CODE], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        thread = busiest_thread(process.pid, 0.5)
        with held(thread):
            time.sleep(0.05)
            before = _ticks(process.pid, thread)
            time.sleep(0.3)
            assert _ticks(process.pid, thread) == before
        time.sleep(0.5)
        assert _ticks(process.pid, thread) > before
        with held(thread):
            process.kill()
    finally:
        process.kill()
        process.wait(30)
        if process.stdout is not None:
            process.stdout.close()


def _ticks(pid: int, thread: int) -> int:
    with open(f"/proc/{pid}/task/{thread}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])
