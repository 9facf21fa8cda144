"""Fixtures shared by all tests."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from tests.postgres import PostgresServer, is_installed

# A shell ignores Ctrl-C for what it starts in the background, and so would all that the tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples each time, and no limit on an example's time: on a busy machine it says nothing.
settings.register_profile("same", deadline=None, derandomize=True)
settings.load_profile("same")

_LIVE = "deployments/test_live"  # how the paths of files begin that share one live application

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Of two workers, one has a file to itself, and one has all that need the live application, which is one.

    xdist's own groups (3.8) do nothing with pytest 9.2, whose items no longer take a new `_nodeid`.
    """
    from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]

    class ByFile(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.partition("::")[0]
            return _LIVE if _LIVE in path else path

    return ByFile(config, log)


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
