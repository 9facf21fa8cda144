"""What is said of a whole model by a small file in its home: who meets it, whose it is, that it stays.

No revision holds them, so a new one changes nothing of what was said.
"""

from __future__ import annotations

from pathlib import Path

from serve.store.disk import replace_file, sync
from serve.types import Visibility

PRIVATE = ".private"  # only for its owner
UNLISTED = ".unlisted"  # in no list but its owner's
OWNER = ".owner"  # holds the name of the tenant whose it is
KEPT = ".kept"  # fetched by hand: never removed to make room
DAMAGED = ".damaged"  # in the folder of one revision: the disk has changed its bytes, and it is not served
MARKS = (PRIVATE, UNLISTED, OWNER, KEPT, DAMAGED)


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


def read_visibility(home: Path) -> Visibility:
    if is_marked(home, PRIVATE):
        return Visibility.PRIVATE
    return Visibility.UNLISTED if is_marked(home, UNLISTED) else Visibility.PUBLIC


def set_visibility(home: Path, visibility: Visibility) -> None:
    """The new mark comes before the old one goes: meanwhile nobody meets it who may not."""
    marks = {Visibility.PRIVATE: PRIVATE, Visibility.UNLISTED: UNLISTED}
    for one in sorted(marks, key=lambda one: one is not visibility):
        set_mark(home, marks[one], one is visibility)


def restrict(home: Path, visibility: Visibility) -> None:
    """No more than these meet it from now on; who must not meet it already still must not."""
    order = list(Visibility)
    set_visibility(home, max(visibility, read_visibility(home), key=order.index))


def unmark(home: Path) -> None:
    """Nothing is said of it any more."""
    for mark in MARKS:
        (home / mark).unlink(missing_ok=True)
    sync(home)


def read_owner(home: Path) -> str:
    """The tenant whose it is; "" where it is nobody's."""
    try:
        return (home / OWNER).read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""


def set_owner(home: Path, owner: str) -> None:
    """On the disk itself when it returns."""
    replace_file(home / OWNER, owner.encode())
