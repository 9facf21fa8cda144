"""A generator that does not compute, as Ray finds it: whose third check ends its process."""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace
from typing import Any

import pytest

from deployments.generator import Generator
from serve.errors import RookeryError


class _Engine:
    """As `LocalGenerator`; by its script."""

    def __init__(self, *is_well: bool) -> None:
        self._answers = iter(is_well)

    async def check_health(self) -> None:
        if not next(self._answers):
            raise RookeryError("The engine has come to nothing for 12 s.")


@pytest.mark.parametrize(
    ("is_well", "num_ended"),
    [((False, False), 0), ((False, False, False), 1), ((False, False, True, False, False), 0)],
)
async def test_only_the_third_failure_in_a_row_ends_it(
    is_well: tuple[bool, ...], num_ended: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[Any] = []
    monkeypatch.setattr(os, "kill", lambda *told: ended.append(told))
    generator: Any = SimpleNamespace(_generator=_Engine(*is_well), _num_unwell=0)  # Ray alone can make a whole one
    for one in is_well:
        if one:
            await Generator.check_health(generator)
        else:
            with pytest.raises(RookeryError):
                await Generator.check_health(generator)
    assert ended == [(os.getpid(), signal.SIGKILL)] * num_ended
