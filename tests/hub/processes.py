"""Processes that fetch, light enough to be started by the dozen: nothing here imports torch."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from serve.errors import RookeryError
from serve.hub.fetch import Hub
from serve.store.revisions import Store

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.hub.processes"])


@contextmanager
def fetching(
    count: int, data: Path, endpoint: str, model_id: str, *, is_locking: bool = True
) -> Iterator[tuple[list[BaseProcess], Any]]:
    """Processes that begin to locate one model at the same moment, and the queue of what they found."""
    ready, found = CONTEXT.Barrier(count), CONTEXT.Queue()
    arguments = (ready, found, data, endpoint, model_id, is_locking)
    processes: list[BaseProcess] = [CONTEXT.Process(target=_locate, args=arguments) for _ in range(count)]
    for process in processes:
        process.start()
    try:
        yield processes, found
    finally:
        for process in processes:
            process.kill()
            process.join()


def _locate(ready: Any, found: Any, data: Path, endpoint: str, model_id: str, is_locking: bool) -> None:
    hub = Hub(Store(data, embedded={}), endpoint=endpoint, deadline_s=60, is_locking=is_locking)
    ready.wait(60)
    try:
        found.put(hub.locate(model_id).revision)
    except RookeryError as exc:
        found.put(repr(exc))
