"""Fixtures shared by all tests."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.postgres import PostgresServer, is_installed

# A shell ignores Ctrl-C for what it starts in the background, and so would all that the tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of two workers, one has a file to itself, and one has all that need the live application, which is one."""
    for item in items:
        is_live = item.get_closest_marker("ray") is not None
        item.add_marker(pytest.mark.xdist_group("ray" if is_live else str(item.path)))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real tweets and archives that may lie beside the checkout; tests that want them skip without."""
    if not SHARED_DATA.is_dir():
        pytest.skip("the shared test data is not beside this checkout")
    return SHARED_DATA


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A server for the whole run; tests that want one skip where PostgreSQL is not installed."""
    if not is_installed():
        pytest.skip("PostgreSQL's initdb and postgres are not on the PATH")
    server = PostgresServer()
    yield server
    server.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of either kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'rookery.db'}"
    server: PostgresServer = request.getfixturevalue("postgres")
    return server.create_database()
