"""`rookery keys` over a real database, and a server over the same one."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from serve.keys.opening import open_keys
from serve.settings import Settings
from serve.types import KeyLimits, Scope
from tests.deployments.cli_world import Rookery


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("ROOKERY_DATA", str(tmp_path / "data"))
    return Settings.from_env()


def test_a_key_is_made_before_any_service_was_started(rookery: Rookery, settings: Settings) -> None:
    made = rookery("keys", "create", "--name", "shop", "--expires", "2h", "--storage", "2GB", "--requests-per-s", 2.5)
    assert made.code == 0 and re.fullmatch(r"rk-[0-9a-f]{12}-[A-Za-z0-9_-]{43}\n", made.out)
    assert "shown this once" in made.err
    found = open_keys(settings).find(made.out.strip())
    assert found is not None and found.id in made.err
    assert found.name == "shop" and found.scopes == {Scope.GENERATE, Scope.READ, Scope.TRAIN}
    assert found.limits == KeyLimits(requests_per_s=2.5, storage_bytes=2_000_000_000)
    assert found.expires_at == found.created_at + 7200


def test_keys_are_listed_without_what_opens_anything(rookery: Rookery, settings: Settings) -> None:
    made = [
        json.loads(rookery("keys", "create", "--scopes", scopes, "--tenant", "ada", "--json").out)
        for scopes in ("admin", "read, generate")
    ]
    assert [one["scopes"] for one in made] == [["admin"], ["generate", "read"]]
    listed = rookery("keys", "ls", "--json")
    ids = [one["id"] for one in made]
    assert [one["id"] for one in json.loads(listed.out)["data"]] == ids
    assert rookery("keys", "ls", "-q").out.split() == ids
    table = rookery("keys", "ls").out
    assert table.count(" ada ") == 2 and " good " in table
    for one in made:
        assert one["key"] not in listed.out + table and one["key"][16:] not in listed.out + table


def test_a_key_is_rotated_and_revoked_by_its_id(rookery: Rookery, settings: Settings) -> None:
    first = json.loads(rookery("keys", "create", "--json").out)
    second = rookery("keys", "rotate", first["id"]).out.strip()
    keys = open_keys(settings)
    assert keys.find(first["key"]) and keys.find(second) and second != first["key"]
    third = rookery("keys", "rotate", first["id"], "--grace", "0").out.strip()
    keys.refresh()
    assert [bool(keys.find(key)) for key in (first["key"], second, third)] == [False, False, True]
    assert rookery("keys", "revoke", first["id"]).out == f"{first['id']} is revoked.\n"
    keys.refresh()
    assert not keys.find(third)
    assert json.loads(rookery("keys", "revoke", first["id"], "--json").out)["revoked_at"]
    assert " revoked " in rookery("keys", "ls").out
    assert rookery("keys", "rotate", first["id"]).code == 1


@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        (("create", "--scopes", "root"), 2),
        (("create", "--scopes", ""), 2),
        (("create", "--expires", "soon"), 2),
        (("create", "--storage", "much"), 2),
        (("create", "--jobs", "-1"), 2),
        (("create", "--name", "a\nb"), 1),
        (("revoke", "key-000000000000"), 3),
        (("rotate", "key-000000000000"), 3),
    ],
)
def test_what_cannot_be_done_makes_no_key(
    rookery: Rookery, settings: Settings, wrong: tuple[str, ...], code: int
) -> None:
    assert rookery("keys", *wrong).code == code
    assert json.loads(rookery("keys", "ls", "--json").out)["data"] == []
