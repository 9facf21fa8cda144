"""The importers and the cleaner against real tweets with known answers, where these lie beside the checkout."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from serve.training.archives import read_archive
from serve.training.clean import clean, clean_text, is_short
from serve.training.dataset import preview
from tests.conftest import SHARED_DATA

_EXPECTED = SHARED_DATA / "expected.json"
EXPECTED: dict[str, Any] = json.loads(_EXPECTED.read_text()) if _EXPECTED.is_file() else {}
HANDLES: list[dict[str, Any]] = EXPECTED.get("handles", [])
ARCHIVES: dict[str, dict[str, Any]] = EXPECTED.get("archives", {})
COUNTS = ("downloaded", "retweets", "short", "kept")
HANDLES_IN_FILE = {"x-2024", "x-2021-tweet-js", "x-2019-bare", "x-2017-grailbird", "csv-excel", "jsonl-api-v1.1"}


@pytest.mark.parametrize(
    "expected",
    [
        pytest.param(expected, id=expected["handle"], marks=[pytest.mark.slow] if number % 4 else [])
        for number, expected in enumerate(HANDLES)
    ],
)
def test_a_timeline_is_counted_and_cleaned_as_huggingtweets_did(shared_data: Path, expected: dict[str, Any]) -> None:
    cleaned = clean(read_archive(shared_data / expected["file"]))
    assert cleaned.counts == {key: expected[key] for key in COUNTS}
    assert cleaned.status == expected["status"]
    assert cleaned.num_chars == expected["kept_joined_chars"]
    assert cleaned.kept_sorted_sha256 == expected["kept_sorted_sha256"]
    assert hashlib.sha256("\n".join(cleaned.kept).encode()).hexdigest() == expected["kept_sha256"]


@pytest.mark.parametrize("name", ARCHIVES)
def test_an_archive_is_counted_and_cleaned_to_the_byte(shared_data: Path, name: str) -> None:
    expected = ARCHIVES[name]
    archive = read_archive(shared_data / expected["file"])
    cleaned = clean(archive)
    assert cleaned.counts == {key: expected[key] for key in COUNTS}
    assert cleaned.kept_sorted_sha256 == expected["kept_sorted_sha256"]
    assert cleaned.num_chars == sum(map(len, cleaned.kept)) + 13 * (len(cleaned.kept) - 1)
    assert cleaned.status == ("ok" if cleaned.num_chars >= 40_000 else "warn_few")
    if name in HANDLES_IN_FILE:
        assert archive.handle == expected["handle"]
    texts = {hashlib.sha256(post.text.encode()).hexdigest() for post in archive.posts}
    assert texts.issuperset(expected.get("note_text_sha256", []))


@pytest.mark.parametrize("name", ARCHIVES)
def test_what_is_private_or_another_persons_is_nowhere(shared_data: Path, name: str) -> None:
    path = shared_data / ARCHIVES[name]["file"]
    archive = read_archive(path)
    seen = [*map(repr, archive.posts), *clean(archive).kept, repr(archive), json.dumps(preview([path]))]
    secrets = [*ARCHIVES[name].get("must_never_appear", []), "CANARY-"]
    assert not any(secret in text for secret in secrets for text in seen)


def test_the_mastodon_archive_names_its_owner_and_leaves_out_what_is_not_public(shared_data: Path) -> None:
    archive = read_archive(shared_data / ARCHIVES["mastodon"]["file"])
    assert (archive.handle, archive.display_name) == ("NatlParkService.social.example", "National Park Service")
    assert archive.left_out == {"not_public": ARCHIVES["mastodon"]["detail"]["skipped_private"]}
    assert archive.avatar is not None and archive.avatar.startswith(b"\x89PNG")


def test_the_bluesky_repository_and_its_records_are_the_same_posts(shared_data: Path) -> None:
    car, records = (read_archive(shared_data / ARCHIVES[f"bluesky-{form}"]["file"]) for form in ("car", "jsonl"))
    assert {post.id: post for post in car.posts} == {post.id: post for post in records.posts}


def test_what_an_x_archive_has_beside_the_tweets_is_counted_but_not_read(shared_data: Path) -> None:
    report = preview([shared_data / ARCHIVES["x-2024"]["file"]], None)
    assert report["left_out"] == {"deleted": 6, "community": 2, "superseded_edit": 1}
    assert "CANARY" not in json.dumps(report)


@pytest.mark.parametrize(
    "example", EXPECTED.get("cleaning_examples", []), ids=lambda example: example["full_text"][:20]
)
def test_a_cleaning_example_comes_out_to_the_byte(example: dict[str, Any]) -> None:
    cleaned = clean_text(example["full_text"])
    assert cleaned == example["cleaned"]
    assert is_short(cleaned) == example["short"]
