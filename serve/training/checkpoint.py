"""Checkpoints of an unfinished training: written beside it, whole or not at all, and found again.

    <work>/checkpoint-<step>/    state.safetensors, progress.json, COMPLETE

Knows tensors and JSON, not what they mean.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from serve.logs import get_logger
from serve.store.disk import sync

log = get_logger()

_COMPLETE = "COMPLETE"  # written into a checkpoint's folder when all else is there
_STATE, _PROGRESS = "state.safetensors", "progress.json"
_MAX_SHARE = 0.05  # of the time goes into checkpoints, at most


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """`progress` is JSON; its `fingerprint` says of which training."""

    state: Mapping[str, Tensor]
    progress: Mapping[str, Any]


def find_checkpoint(root: Path) -> Path | None:
    """The furthest complete checkpoint below `root`, in a folder of any earlier attempt."""
    found = [path.parent for path in root.glob(f"*/checkpoint-*/{_COMPLETE}")]
    return max(found, key=lambda path: int(path.name.removeprefix("checkpoint-")), default=None)


def read_checkpoint(folder: Path, fingerprint: str) -> Checkpoint | None:
    """None when it is damaged, or of another training or version: then all begins anew, which is only slower."""
    try:
        progress = json.loads((folder / _PROGRESS).read_bytes())
        if progress["fingerprint"] == fingerprint:
            return Checkpoint(load_file(folder / _STATE), progress)
        reason = "it belongs to another training"
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as exc:
        reason = type(exc).__name__
    log.warning("checkpoint_ignored", name=folder.name, reason=reason)
    return None


def read_progress(folder: Path) -> dict[str, Any]:
    """What is said of it; nothing where that cannot be read."""
    try:
        return dict(json.loads((folder / _PROGRESS).read_bytes()))
    except (OSError, ValueError, TypeError):
        return {}


class CheckpointWriter:
    """Writes in a thread of its own, from a copy, so that training waits for neither disk nor fsync."""

    def __init__(self, work: Path, every_s: float, replaces: Path | None) -> None:
        """`replaces`: the checkpoint that this training went on from, removed once there is a newer one."""
        self._work, self._every_s, self._last = work, every_s, replaces
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._cost_s = 0.0
        self._finished = time.monotonic()

    @property
    def is_due(self) -> bool:
        waited = time.monotonic() - self._finished
        return not self._is_writing and waited >= max(self._every_s, self._cost_s / _MAX_SHARE)

    def write(self, step: int, checkpoint: Checkpoint) -> None:
        """Returns when the state is copied. Raises: what went wrong with the one before."""
        self.wait()
        copy = Checkpoint(
            {name: t.detach().to("cpu", copy=True) for name, t in checkpoint.state.items()}, checkpoint.progress
        )
        self._thread = threading.Thread(target=self._write, args=(step, copy), name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until what was begun is on disk. Raises: what went wrong."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            raise self._error

    @property
    def _is_writing(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _write(self, step: int, checkpoint: Checkpoint) -> None:
        started = time.monotonic()
        folder = self._work / f"checkpoint-{step}"
        aside = self._work / f".checkpoint-{step}"
        try:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            save_file(dict(checkpoint.state), aside / _STATE)
            (aside / _PROGRESS).write_text(json.dumps(checkpoint.progress), encoding="utf-8")
            (aside / _COMPLETE).touch()
            for path in (*aside.iterdir(), aside):
                sync(path)
            shutil.rmtree(folder, ignore_errors=True)
            aside.rename(folder)
            sync(self._work)
            if self._last is not None and self._last != folder:
                shutil.rmtree(self._last, ignore_errors=True)
            self._last = folder
        except Exception as exc:  # told by the next `write` or `wait`
            shutil.rmtree(aside, ignore_errors=True)
            self._error = exc
        self._finished = time.monotonic()
        self._cost_s = self._finished - started
