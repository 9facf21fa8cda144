"""What is kept for who looks again: how much, for how long, and that it goes by itself."""

from __future__ import annotations

import threading
import time
import weakref

from serve.web.recent import Recent


class Value:
    """Something that can be seen to go."""


def test_the_oldest_goes_first_and_what_is_put_again_is_new() -> None:
    recent = Recent[str, int](2)
    for key, value in (("a", 1), ("b", 2), ("a", 3), ("c", 4)):
        recent.put(key, value)
    assert [recent.get(key) for key in "abc"] == [3, None, 4]


def test_what_is_meant_is_forgotten() -> None:
    recent = Recent[str, int](3)
    for key in ("a1", "a2", "b1"):
        recent.put(key, 1)
    recent.forget(lambda key: key.startswith("a"))
    assert [recent.get(key) for key in ("a1", "a2", "b1")] == [None, None, 1]


def test_everything_goes_after_its_time_though_nobody_asks() -> None:
    recent = Recent[str, Value](9, keep_s=0.02)
    for _ in range(2):  # a second time after all has gone
        started, gone = time.monotonic(), [threading.Event(), threading.Event()]
        for key, event in zip("ab", gone, strict=True):
            value = Value()
            weakref.finalize(value, event.set)
            recent.put(key, value)
            del value
        assert all(event.wait(10) for event in gone)
        assert time.monotonic() - started >= 0.02
        assert len(recent) == 0
