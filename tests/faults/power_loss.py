"""The power goes at any moment of publishing, fetching, deleting, uploading and creating jobs, and comes back.

    python -m tests.faults.power_loss --cuts 1000

A real process does these things on a real folder while strace writes down each of its calls; `tests.faults.disk_log`
then makes the folder as a disk may have kept it after a cut, and the service's own store and database are opened there.
What the process had been told is done must be there, whole, and nothing that is there may be less than whole.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import sqlite3
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file
from sqlalchemy import text

from serve.database.connection import Database
from serve.errors import ModelNotFound, NotFound, RookeryError
from serve.store.integrity import is_intact
from serve.store.revisions import Store
from serve.store.validate import WEIGHTS, check_finite, check_folder
from serve.training.jobs.store import JobStore
from tests.fakes.hub import fake_hub
from tests.fakes.models import write_tiny_gpt2
from tests.faults.disk_log import LOSSES, Log, Loss, record
from tests.faults.publish_and_commit import NUM_MODELS

NUM_ROUNDS = 8


def run(cuts: int, seed: int, folder: Path) -> dict[str, Any]:
    """Each cut with each kind of loss. The figures; `broken` tells of each promise that was."""
    log = _record(folder)
    lot = random.Random(seed)
    ends = sorted(lot.choices(range(1, len(log.calls) + 1), k=cuts - 1)) + [len(log.calls)]
    count, broken = Counter[str](), list[str]()
    memory = Path("/dev/shm")  # what is laid out there a thousand times need not wait for a disk
    _STATES[:] = [_State(log, memory if memory.is_dir() else folder, end, loss) for end in ends for loss in LOSSES]
    # By fork, so that the log is there already; none of them uses torch, whose threads are not.
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        for counted, found in pool.imap_unordered(_look, range(len(_STATES)), chunksize=len(LOSSES)):
            count += counted
            broken += found
    return {
        "cuts": len(ends),
        "states": len(_STATES),
        "calls": len(log.calls),
        "promises": count["promises"],
        "revisions_read": count["revisions"],
        "broken": len(broken),
        "examples": broken[:20],
    }


@dataclass(frozen=True, slots=True)
class _State:
    log: Log
    folder: Path
    end: int
    loss: Loss


_STATES: list[_State] = []  # of this run


def _look(number: int) -> tuple[Counter[str], list[str]]:
    """What was counted in one state, and what is broken."""
    state, count = _STATES[number], Counter[str]()
    with tempfile.TemporaryDirectory(prefix="rookery-power-", dir=state.folder) as folder:
        root = Path(folder) / "data"
        state.log.crash(state.end, state.loss, random.Random(number)).lay_out(state.log.root, root)
        broken = _check(root, state.log.told(state.end), count)
    return count, [f"after call {state.end}, {state.loss} lost: {what}" for what in broken]


def _record(folder: Path) -> Log:
    data = folder / "data"
    data.mkdir()
    with fake_hub() as hub:
        for number in range(NUM_MODELS):
            hub.add(f"hub/m{number}", write_tiny_gpt2(folder / f"m{number}", seed=number))
        command = [sys.executable, "-m", "tests.faults.publish_and_commit"]
        arguments = [str(data), str(folder), hub.endpoint, str(NUM_ROUNDS)]
        return record([*command, *arguments], data, folder / "trace")


def _check(root: Path, told: list[str], count: Counter[str]) -> list[str]:
    """What is not as it should be, a sentence each."""
    try:
        store = Store(root, embedded={})
        database = Database(f"sqlite:///{root / 'rookery.db'}")
    except (RookeryError, sqlite3.Error) as exc:
        return [f"it does not open: {exc}"]
    try:
        jobs = JobStore(database, root / "uploads")
        broken = [what for model_id in store.model_ids() for what in _check_visible(store, model_id, count)]
        with database.read() as session:
            if (said := session.scalar(text("PRAGMA integrity_check"))) != "ok":
                broken.append(f"the database is damaged: {said}")
        for kind, name, value in _promises(told):
            count["promises"] += 1
            broken += _check_promise(store, jobs, kind, name, value)
        return broken
    except RookeryError as exc:
        return [f"it cannot be used: {exc}"]
    finally:
        database.close()


def _promises(told: list[str]) -> list[tuple[str, str, str]]:
    """What was done, and has not begun to change since."""
    held: dict[str, tuple[str, str, str]] = {}
    for line in told:
        verb, *rest = line.split(" ")
        if verb == "begin":
            held.pop(rest[0], None)
        else:
            kind, name, value = (*rest, "")[:3]
            held[name] = kind, name, value
    return list(held.values())


def _check_visible(store: Store, model_id: str, count: Counter[str]) -> list[str]:
    """Every revision that can be found."""
    broken = []
    for found in store.published(model_id):
        count["revisions"] += 1
        try:
            check_folder(found.path)
            check_finite(found.path)
            if is_intact(found.path) is not True:
                broken.append(f"{model_id}@{found.revision} has other bytes")
        except RookeryError as exc:
            broken.append(f"{model_id}@{found.revision} is visible and not whole: {exc}")
    try:
        store.resolve(model_id)
    except ModelNotFound:
        if len(store.published(model_id)) > 1:  # `main` can be missing only where it had never been
            broken.append(f"{model_id} has revisions and no main")
    return broken


def _check_promise(store: Store, jobs: JobStore, kind: str, name: str, value: str) -> list[str]:
    try:
        if kind == "model":
            found = store.resolve(name)
            if found.revision != value:
                return [f"{name} is {found.revision}, not {value}"]
            load_file(found.path / WEIGHTS)
        elif kind == "deletion":
            if any(model_id == name for model_id in store.model_ids()) and store.published(name):
                return [f"{name} is back though it was deleted"]
        elif kind == "file":
            if hashlib.sha256(jobs.get_file(name).path.read_bytes()).hexdigest() != value:
                return [f"{name} has other bytes"]
        else:
            jobs.get_job(name)
    except (ModelNotFound, NotFound, FileNotFoundError):
        return [f"the {kind} {name} is gone"]
    except RookeryError as exc:
        return [f"the {kind} {name} cannot be used: {exc}"]
    return []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cuts", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rookery-power-") as folder:
        figures = run(arguments.cuts, arguments.seed, Path(folder))
    print(json.dumps(figures))
    sys.exit(bool(figures["broken"]))


if __name__ == "__main__":
    main()
