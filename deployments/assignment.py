"""How far Ray's router has brought a call, and what the caller made of it: to whom a call is better not brought.

In the router's queue a call may wait, by a replica it is owed an answer. The router tells, in the context that the
call was made in: Ray's response for it tells the caller nothing of the kind. A replica that hangs says nothing, and Ray
takes it for well until the third of its checks has failed; calls that were given up tell sooner.
NOTE: Ray would do as much when told by `on_replica_actor_unavailable`: it asks the replica how it is before it sends it
more. But it cancels each question after 0.1 s, and of a process that is stopped Ray 2.60 then fails to rid itself.
NOTE: Ray pickles the router's module by value, and a context variable cannot be pickled: hence this one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(slots=True)
class Assignment:
    """Of one call."""

    replica: str = ""  # that it was sent to
    sent_at: float = math.inf
    is_taken: bool = False  # by a replica, which has said so

    def when_sent(self) -> float:
        """To a replica, by `time.monotonic`; infinite while it waits in the queue."""
        return self.sent_at

    def give_up(self) -> None:
        """Its replica said nothing for too long."""
        _silent[self.replica] = time.monotonic()


_AVOIDED_S = 20.0  # longer than a call takes to be given up
_followed: ContextVar[Assignment | None] = ContextVar("assignment", default=None)
_silent: dict[str, float] = {}  # replica -> when a call that it had was given up, or the last one was sent to it since


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


def note_sent(replica: str) -> None:
    """To one that need not be there any more."""
    now = time.monotonic()
    if replica in _silent:
        _silent[replica] = now  # this call finds out, and others need not
    if assignment := _followed.get():
        assignment.replica, assignment.sent_at = replica, now


def note_taken(replica: str) -> None:
    """By one that is there, then."""
    _silent.pop(replica, None)
    if assignment := _followed.get():
        assignment.is_taken = True


def note_replicas(replicas: Collection[str]) -> None:
    """These are there, and no others."""
    for gone in _silent.keys() - set(replicas):
        del _silent[gone]


def is_silent(replica: str) -> bool:
    """Whether calls that it had were given up lately, and none that it has taken since."""
    return time.monotonic() - _silent.get(replica, -math.inf) < _AVOIDED_S
