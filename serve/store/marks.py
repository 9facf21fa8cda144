"""What is said of a whole model by an empty file in its home: that it is private, that it stays.

No revision holds them, so a new one changes nothing of what was said.
"""

from __future__ import annotations

from pathlib import Path

from serve.store.disk import sync

PRIVATE = ".private"  # only for callers with a key
KEPT = ".kept"  # fetched by hand: never removed to make room
MARKS = (PRIVATE, KEPT)


def is_marked(home: Path, mark: str) -> bool:
    """One look at the disk."""
    return (home / mark).exists()


def set_mark(home: Path, mark: str, is_set: bool) -> None:
    """On the disk itself when it returns."""
    if is_set == is_marked(home, mark):
        return
    if is_set:
        (home / mark).touch(mode=0o444)
    else:
        (home / mark).unlink(missing_ok=True)
    sync(home)
