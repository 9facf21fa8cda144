"""Worlds for the pool's tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.pool.harness import MakeWorld, World


@pytest.fixture
def make_world() -> Iterator[MakeWorld]:
    """Builds worlds; closes each at the end, which checks that nothing is left behind."""
    worlds: list[World] = []

    def make(*args: Any, **options: Any) -> World:
        worlds.append(World(*args, **options))
        return worlds[-1]

    yield make
    for world in worlds:
        world.close()
