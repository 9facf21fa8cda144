"""The fake Hub that a test asks, and no session of its that is left to the next."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from huggingface_hub import close_session

from tests.fakes.hub import FakeHub, fake_hub


@pytest.fixture(autouse=True)
def no_session_left() -> Iterator[None]:
    yield
    close_session()


@pytest.fixture
def server() -> Iterator[FakeHub]:
    with fake_hub() as server:
        yield server
