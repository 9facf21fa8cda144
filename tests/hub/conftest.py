"""The fake Hub that a test asks, and no session of its that is left to the next."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import close_session

from serve.hub.fetch import Hub
from serve.store.revisions import Store
from tests.fakes.hub import FakeHub, fake_hub


@pytest.fixture(autouse=True)
def no_session_left() -> Iterator[None]:
    yield
    close_session()


@pytest.fixture
def server() -> Iterator[FakeHub]:
    with fake_hub() as server:
        yield server


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "data", embedded={})


@pytest.fixture
def hub(server: FakeHub, store: Store) -> Hub:
    return Hub(store, endpoint=server.endpoint, token="hf_secret", deadline_s=5)


@pytest.fixture
def nothing_left(tmp_path: Path) -> Callable[[], None]:
    """Whatever failed, nobody sees any of it, and nothing is held or half done."""

    def check() -> None:
        models = tmp_path / "data/models"
        assert [path.name for path in models.iterdir() if not path.name.startswith(".")] == []
        assert os.listdir(models / ".staging") == []
        assert {path.name for path in (models / ".fetching").iterdir()} <= {"unusable.json", "unusable.lock"}

    return check
