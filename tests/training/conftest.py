from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.making import Training


@pytest.fixture
def training(tmp_path: Path) -> Training:
    return Training(tmp_path)
