"""A data folder and two stores on it, for the index's tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from serve.store.homes import Homes
from serve.store.listing import Listing
from serve.types import ModelInfo
from tests.fakes.models import write_tiny_gpt2
from tests.store.disk_world import Disk


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gpt2(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def by_index_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be found by looking at all homes."""

    def looked_at_all(*args: object) -> Iterator[ModelInfo]:
        raise AssertionError("all homes were looked at")

    monkeypatch.setattr(Listing, "_from_disk", looked_at_all)
    monkeypatch.setattr(Homes, "ids", looked_at_all)


@pytest.fixture
def disk(tmp_path: Path, tiny: Path) -> Disk:
    return Disk(tmp_path, tiny)
