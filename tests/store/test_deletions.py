from __future__ import annotations

import os
import time
from pathlib import Path

from serve.store.deletions import Deletions


def test_each_deletion_of_a_model_is_told_from_the_one_before(tmp_path: Path) -> None:
    deletions = Deletions(tmp_path / "deleted")
    assert deletions.last("x/ada") is None
    seen = set()
    for name in ("x/ada", "X/Ada", "x/ADA"):
        deletions.note(name)
        seen.add(deletions.last("x/ada"))
    assert len(seen) == 3 and None not in seen
    assert deletions.last("x/bob") is None


def test_what_was_deleted_long_ago_is_forgotten(tmp_path: Path) -> None:
    deletions = Deletions(tmp_path / "deleted")
    deletions.sweep()
    deletions.note("x/old")
    (old,) = (tmp_path / "deleted").iterdir()
    os.utime(old, (time.time() - 100_000,) * 2)
    deletions.note("x/new")
    deletions.sweep()
    assert deletions.last("x/old") is None and deletions.last("x/new")
