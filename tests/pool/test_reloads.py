"""Loads that bring back what was evicted a short while before."""

from __future__ import annotations

from serve.pool import reloads
from serve.pool.reloads import Reloads


def test_a_model_that_comes_back_soon_is_a_reload_once() -> None:
    now = 0.0
    reloads_ = Reloads(lambda: now)
    reloads_.note("ada")
    now = reloads.SOON_S
    assert [reloads_.take(key) for key in ("bob", "ada", "ada")] == [False, True, False]
    reloads_.note("ada")
    now += reloads.SOON_S + 1
    assert not reloads_.take("ada")


def test_only_so_many_evictions_are_remembered() -> None:
    known = Reloads(lambda: 0.0)
    for number in range(reloads.MAX_REMEMBERED + 1):
        known.note(str(number))
    assert not known.take("0") and known.take("1")
