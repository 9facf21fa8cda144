"""The version that the service tells of itself."""

from __future__ import annotations

import tomllib
from pathlib import Path

from serve.version import VERSION


def test_the_version_is_the_one_of_the_distribution() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    assert project["project"]["version"] == VERSION
