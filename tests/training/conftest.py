from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.training.making import Training


@pytest.fixture
def training(tmp_path: Path) -> Iterator[Training]:
    training = Training(tmp_path)
    yield training
    training.close()


@pytest.fixture
def training_on_both(tmp_path: Path, database_url: str) -> Iterator[Training]:
    """As `training`, once on each kind of database."""
    training = Training(tmp_path, database_url)
    yield training
    training.close()
