"""How far Ray's router has brought a call: in its queue it may wait, by a replica it is owed an answer.

The router tells, in the context that the call was made in. Ray's response for it tells the caller nothing of the kind.
NOTE: Ray pickles the router's module by value, and a context variable cannot be pickled: hence this one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(slots=True)
class Assignment:
    """Of one call."""

    sent_at: float = math.inf
    is_taken: bool = False  # by a replica, which has said so

    def when_sent(self) -> float:
        """To a replica, by `time.monotonic`; infinite while it waits in the queue."""
        return self.sent_at


_followed: ContextVar[Assignment | None] = ContextVar("assignment", default=None)


@contextmanager
def follow() -> Iterator[Assignment]:
    """What becomes of the call that is made within."""
    assignment = Assignment()
    token = _followed.set(assignment)
    try:
        yield assignment
    finally:
        _followed.reset(token)


def note_queued() -> None:
    """For the first time, or again: the replica had no place after all, or could not be reached."""
    if assignment := _followed.get():
        assignment.sent_at = math.inf


def note_sent() -> None:
    """To a replica that need not be there any more."""
    if assignment := _followed.get():
        assignment.sent_at = time.monotonic()


def note_taken() -> None:
    if assignment := _followed.get():
        assignment.is_taken = True
