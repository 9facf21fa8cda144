"""Posts of Bluesky: its records as JSON and its repositories."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from serve.errors import BadUpload
from serve.training.archives import read_archive
from serve.training.clean import clean
from tests.training.archive_files import DID, Car, repository, texts, write, write_lines

# --- Records as JSON ----------------------------------------------------------------------------------------


def test_bluesky_records_have_their_links_expanded_by_bytes(tmp_path: Path) -> None:
    text = "Žluťoučký kůň: example.org/very… galloped"
    start = len("Žluťoučký kůň: ".encode())
    facet = {
        "index": {"byteStart": start, "byteEnd": start + len("example.org/very…".encode())},
        "features": [{"uri": "https://example.org/very/long"}],
    }
    uri = "at://did:plc:abc/app.bsky.feed.{}/3k"
    rows = [
        {
            "uri": uri.format("post"),
            "value": {"text": text, "facets": [facet, 7, {"index": {"byteStart": -1, "byteEnd": 9**9}}]},
        },
        {"uri": uri.format("repost"), "value": {"subject": {"uri": "at://other"}}},
        {"uri": uri.format("like"), "value": {"subject": {"uri": "at://other"}}},
    ]
    archive = read_archive(write_lines(tmp_path / "records.jsonl", rows))
    assert texts(archive) == ["Žluťoučký kůň: https://example.org/very/long galloped", ""]
    assert clean(archive).counts == {"downloaded": 2, "retweets": 1, "short": 0, "kept": 1}
    assert archive.left_out == {"other_record": 1}


def test_bluesky_records_may_come_in_pages_with_their_keys_in_any_order(tmp_path: Path) -> None:
    record = {"cid": "x", "value": {"text": "first"}, "uri": f"at://{DID}/app.bsky.feed.post/3k"}
    pages = [{"cursor": "3k", "records": [record]}, {"cursor": None, "records": []}]
    archive = read_archive(write_lines(tmp_path / "records.json", pages))
    assert (texts(archive), archive.format, archive.left_out) == (["first"], "bluesky-jsonl", {})


def test_bluesky_records_of_two_accounts_are_refused(tmp_path: Path) -> None:
    rows = [{"uri": f"at://did:plc:{who}/app.bsky.feed.post/3k", "value": {"text": "a"}} for who in ("ada", "bob")]
    with pytest.raises(BadUpload, match="several accounts"):
        read_archive(write_lines(tmp_path / "records.jsonl", rows))


def test_a_feed_of_bluesky_is_refused_with_what_was_expected(tmp_path: Path) -> None:
    post = {"uri": f"at://{DID}/app.bsky.feed.post/3k", "cid": "x", "record": {"text": "CANARY"}}
    with pytest.raises(BadUpload, match="listRecords"):
        read_archive(write(tmp_path / "feed.json", json.dumps({"feed": [{"post": post}], "cursor": "x"})))


# --- A repository -------------------------------------------------------------------------------------------


def test_a_repository_gives_what_its_tree_reaches(tmp_path: Path) -> None:
    path = write(tmp_path / "repo.car", repository({"3lbk4zvhrgc2k": "one", "3lbk4zvhrgc2m": "two"}))
    archive = read_archive(path)
    assert (texts(archive), archive.format, archive.handle) == (["one", "two", ""], "bluesky-car", None)
    assert [post.is_retweet for post in archive.posts] == [False, False, True]
    assert archive.left_out == {"other_record": 1}
    assert archive.posts[0].id == f"at://{DID}/app.bsky.feed.post/3lbk4zvhrgc2k"


def test_a_repository_is_read_from_a_tree_of_several_nodes(tmp_path: Path) -> None:
    car = Car()
    keys = [f"app.bsky.feed.post/{letter}" for letter in "abcdef"]
    cids = {key: car.put({"text": key}) for key in keys}
    low, high = car.node({key: cids[key] for key in keys[:2]}), car.node({key: cids[key] for key in keys[4:]})
    tree = car.node({key: cids[key] for key in keys[2:4]}, left=low, after=high)
    assert texts(read_archive(write(tmp_path / "r.car", car.finish(tree)))) == keys


def test_the_record_key_is_the_clock_and_not_what_the_client_wrote(tmp_path: Path) -> None:
    car = Car()
    wrong = {"text": "a", "createdAt": "1970-01-01T00:00:00Z"}
    records = {"app.bsky.feed.post/3jzfcijpj2z2a": car.put(wrong), "app.bsky.feed.post/self": car.put(wrong | {"x": 1})}
    archive = read_archive(write(tmp_path / "r.car", car.finish(car.node(records))))
    assert [post.created_at and post.created_at.year for post in archive.posts] == [2023, 1970]


def test_a_record_that_is_absent_is_left_out_and_a_node_that_is_absent_refuses(tmp_path: Path) -> None:
    car = Car()
    records = {f"app.bsky.feed.post/{key}": car.put({"text": key}) for key in "ab"}
    tree = car.node(records)
    del car.blocks[records["app.bsky.feed.post/a"]]
    archive = read_archive(write(tmp_path / "r.car", car.finish(tree)))
    assert (texts(archive), archive.left_out) == (["b"], {"missing": 1})
    del car.blocks[tree]
    with pytest.raises(BadUpload, match="absent"):
        read_archive(write(tmp_path / "r.car", car.finish(tree)))
