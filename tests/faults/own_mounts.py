"""Runs a measurement where it alone sees what it mounts: `unshare -m`, and all of it is gone when its processes are.

run_with_mounts("tests.faults.full_disk", "FOLDER", "0.1")     # as root; what it prints last, as JSON
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any


def run_with_mounts(module: str, *arguments: str) -> dict[str, Any]:
    """Raises: CalledProcessError."""
    command = ["unshare", "--mount", "--propagation", "private", sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    figures: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return figures


def mount_memory(folder: Path, num_bytes: int) -> None:
    """A disk of that size, in memory, at `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    options = f"size={num_bytes},mode=0755"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "rookery-fault", str(folder)], check=True)


def leave_free(disk: Path, num_bytes: int) -> None:
    """Fills a disk up to so many bytes, or gives back what it was filled with: no more than that."""
    filler = disk / "filler"
    filler.unlink(missing_ok=True)
    for _ in range(100):
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        with filler.open("wb") as file, suppress(OSError):  # others write at the same moment
            if free > num_bytes:
                os.posix_fallocate(file.fileno(), 0, free - num_bytes)
            return
