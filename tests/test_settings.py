"""Settings: what is derived from them is what was meant, whatever a path is called."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy.engine import make_url

from serve.database.connection import Database
from serve.settings import BadSetting, Settings


@pytest.mark.parametrize("name", ["plain", "q?x=1", "a%20b", "a b", "a#b", "100%", "\u00fc@:+&", "a;b\\c"])
def test_the_database_lies_under_the_data_folder_whatever_that_is_called(tmp_path: Path, name: str) -> None:
    settings = Settings(data=tmp_path / name / "d")
    assert make_url(settings.sql_url).database == str(tmp_path / name / "d/rookery.db")

    Database(settings.sql_url).close()

    assert (tmp_path / name / "d/rookery.db").is_file()
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("variable", "said"),
    [("THREADS", "no whole number"), ("LEASE_TIMEOUT_S", "no number"), ("HUB_ENABLED", "neither true")],
)
def test_a_malformed_value_is_told_in_words(variable: str, said: str) -> None:
    with pytest.raises(BadSetting, match=f"ROOKERY_{variable}='x' is {said}"):
        Settings.from_env({f"ROOKERY_{variable}": "x"})
