"""SIGTERM and Ctrl-C where they would be missed, or leave half of something behind. Knows nothing of what that is."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(BaseException):
    """SIGTERM or SIGINT came. Not an Exception, so that nobody in between takes it for a failure."""


class Signals:
    """The first SIGTERM or SIGINT raises Stopped, and all that follow are ignored.

    Python drops what is raised inside a finalizer or a callback from C; therefore `check` is called after each step.
    """

    def __init__(self) -> None:
        self.has_come = False

    def catch(self) -> None:
        for number in _SIGNALS:
            signal.signal(number, self._stop)

    def ignore(self) -> None:
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def check(self) -> None:
        """Raises: Stopped."""
        if self.has_come:
            raise Stopped

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.has_come = True
        self.ignore()
        raise Stopped


@contextlib.contextmanager
def caught_signals() -> Iterator[Signals]:
    """Caught in the block; afterwards as before, or ignored while the process ends on account of one."""
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    signals = Signals()
    signals.catch()
    try:
        yield signals
    finally:
        if not signals.has_come:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def interrupts_held() -> Iterator[None]:
    """A Ctrl-C in the block counts at its end: rich, for one, writes again what a print that was cut has written."""
    if threading.current_thread() is not threading.main_thread():  # no other one is interrupted
        yield
        return
    held: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: held.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if held and callable(before):
        before(signal.SIGINT, None)
