"""Tweets and posts as JSON: lines, arrays, pages of the API and a lone tweets.js."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from serve.errors import BadUpload
from serve.training.archives import read_archive
from serve.training.archives.json_stream import read_values
from serve.training.dataset import REASONS
from tests.training.archive_files import ADA, DID, PUBLIC, script, texts, tweet, wrapped, write, write_lines


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz", "upload-0001"])
def test_json_lines_are_read_whatever_their_name(tmp_path: Path, name: str) -> None:
    rows = [{"id": "1", "created_at": "2021-10-23T20:00:00Z", "full_text": "line\u2028one", "retweeted": False}]
    rows.append({"id": "2", "created_at": "2021-10-23T20:00:00Z", "full_text": "no mark", "retweeted": True})
    archive = read_archive(write_lines(tmp_path / name, rows))
    assert [(post.text, post.is_retweet) for post in archive.posts] == [("line\u2028one", False), ("no mark", True)]
    assert archive.format == "jsonl"


def test_in_api_v1_a_retweet_has_the_retweeted_status_and_the_flag_says_nothing(tmp_path: Path) -> None:
    user = {"screen_name": "Ada_L", "name": "Ada"}
    rows = [
        {"id_str": "1", "id": 1, "full_text": "mine, and I shared it again", "retweeted": True, "user": user},
        {"id_str": "2", "id": 2, "text": "theirs", "retweeted": False, "retweeted_status": {"id": 7}, "user": user},
        {"id_str": "3", "text": "cut…", "extended_tweet": {"full_text": "cut and whole"}, "user": user},
    ]
    archive = read_archive(write_lines(tmp_path / "t.jsonl", rows))
    assert [(post.text, post.is_retweet) for post in archive.posts] == [
        ("mine, and I shared it again", False),
        ("theirs", True),
        ("cut and whole", False),
    ]
    assert (archive.handle, archive.display_name) == ("Ada_L", "Ada")


def test_api_v2_pages_are_read_without_other_peoples_tweets(tmp_path: Path) -> None:
    page = {
        "data": [
            {"id": "1", "author_id": "5", "text": "a &amp; b", "created_at": "2021-10-23T14:10:29.000Z"},
            {"id": "2", "author_id": "5", "text": "RT", "referenced_tweets": [{"type": "retweeted", "id": "8"}]},
            {"id": "3", "author_id": "5", "text": "cut", "note_tweet": {"text": "cut no more"}},
            {"id": "4", "text": "quoting", "referenced_tweets": [{"type": "quoted"}, {"type": "replied_to"}]},
        ],
        "includes": {
            "users": [{"id": "5", "username": "Ada_L", "name": "Ada"}],
            "tweets": [{"id": "8", "text": "CANARY"}],
        },
        "meta": {"result_count": 4},
    }
    archive = read_archive(write_lines(tmp_path / "t.jsonl", [page, {"meta": {"result_count": 0}, "data": []}]))
    assert texts(archive) == ["a &amp; b", "RT", "cut no more", "quoting"]
    assert [post.is_retweet for post in archive.posts] == [False, True, False, False]
    assert [post.escaped for post in archive.posts] == [True, True, False, True]
    assert archive.handle == "Ada_L"


def test_edits_in_api_v2_are_settled_by_their_history(tmp_path: Path) -> None:
    rows = [
        {"id": i, "text": t, "edit_history_tweet_ids": h} for i, t, h in (("2", "new", ["1", "2"]), ("1", "old", ["1"]))
    ]
    rows[1]["edit_history_tweet_ids"] = ["1", "2"]
    assert texts(read_archive(write_lines(tmp_path / "t.jsonl", rows))) == ["new"]


@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_array_is_read(tmp_path: Path, indent: int | None) -> None:
    path = write(tmp_path / "t.json", json.dumps([{"id": 1, "text": "a"}, {"id": 2, "text": "b"}], indent=indent))
    archive = read_archive(path)
    assert (texts(archive), archive.format) == (["a", "b"], "json")


def test_a_lone_tweets_js_is_read_and_a_lone_like_js_is_not(tmp_path: Path) -> None:
    path = write(tmp_path / "tweets.js", script("tweets.part0", wrapped(tweet(1, "mine"))))
    assert texts(read_archive(path)) == ["mine"]
    path = write(tmp_path / "like.js", script("like.part0", [{"like": {"fullText": "CANARY"}}]))
    with pytest.raises(BadUpload, match="not its tweets"):
        read_archive(path)


FLAGS: list[tuple[str, object, bool]] = [
    ("retweet", True, True),
    ("is_retweet", True, True),
    ("isRetweet", "t", True),
    ("isRetweet", 1, True),
    ("retweeted", "true", True),
    ("retweeted_status_id", 12345, True),
    ("retweetedTweet", {"id": 1}, True),
    ("reblog", {"id": 1}, True),
    ("retweet", False, False),
    ("retweet", 3, False),
    ("retweeted", "false", False),
    ("isRetweet", None, False),
    ("retweeted_status", {}, False),
]


@pytest.mark.parametrize(("name", "value", "is_retweet"), FLAGS)
def test_a_retweet_in_json_is_known_by_the_same_marks_as_in_a_table(
    tmp_path: Path, name: str, value: object, is_retweet: bool
) -> None:
    [post] = read_archive(write_lines(tmp_path / "t.jsonl", [{"text": "hello", name: value}])).posts
    assert post.is_retweet == is_retweet


PRIVATE: list[tuple[dict[str, Any], str]] = [
    ({"type": "Note", "to": [f"{ADA}/followers"], "cc": []}, "not_public"),
    ({"type": "Note", "to": []}, "not_public"),
    ({"to": "https://other.example/users/bob"}, "not_public"),
    ({"visibility": "direct"}, "not_public"),
    ({"visibility": "private"}, "not_public"),
    ({"recipient_id": "7"}, "not_public"),
    ({"recipient": {"screen_name": "bob"}}, "not_public"),
    ({"dm_conversation_id": "1-2"}, "not_public"),
    ({"sender": {"did": DID}}, "not_public"),
    ({"deleted_at": "2024"}, "deleted"),
    ({"community_id": "1"}, "community"),
]


@pytest.mark.parametrize(("marks", "reason"), PRIVATE)
def test_what_is_private_deleted_or_of_a_community_is_left_out_of_json(
    tmp_path: Path, marks: dict[str, Any], reason: str
) -> None:
    archive = read_archive(write_lines(tmp_path / "t.jsonl", [{"id": "1", "text": "CANARY", **marks}, {"text": "b"}]))
    assert (texts(archive), archive.left_out) == (["b"], {reason: 1})
    assert reason in REASONS


@pytest.mark.parametrize(
    "marks", [{"type": "Note", "cc": PUBLIC}, {"visibility": "unlisted"}, {"deleted_at": None}, {"to": "bob"}]
)
def test_what_is_public_is_kept(tmp_path: Path, marks: dict[str, Any]) -> None:
    assert texts(read_archive(write_lines(tmp_path / "t.jsonl", [{"text": "a", **marks}]))) == ["a"]


def test_deleted_tweets_of_a_lone_tweets_js_are_left_out(tmp_path: Path) -> None:
    tweets = wrapped(tweet(1, "mine"), tweet(2, "CANARY", deleted_at="x"), tweet(3, "CANARY", community_id="1"))
    archive = read_archive(write(tmp_path / "tweets.js", script("tweets.part0", tweets)))
    assert (texts(archive), archive.left_out) == (["mine"], {"deleted": 1, "community": 1})


def test_what_comes_after_a_json_array_is_read_or_refused(tmp_path: Path) -> None:
    first, second = json.dumps([{"text": "a"}, {"text": "b"}]), json.dumps([{"text": "c"}])
    assert texts(read_archive(write(tmp_path / "t.json", f"{first}\n{second}\n"))) == ["a", "b", "c"]
    assert texts(read_archive(write(tmp_path / "t.json", first + '{"text": "d"}'))) == ["a", "b", "d"]
    with pytest.raises(BadUpload, match="not JSON"):
        read_archive(write(tmp_path / "t.json", first + " and more"))


def test_values_larger_than_a_chunk_are_read_whole(tmp_path: Path) -> None:
    with open(
        write(tmp_path / "v.json", json.dumps([{"a": "x" * 1_000_000}, 12, "é" * 500_000], ensure_ascii=False)),
        encoding="utf-8",
    ) as text:
        values = list(read_values(text, "v.json"))
    assert [len(values[0]["a"]), values[1], len(values[2])] == [1_000_000, 12, 500_000]


def test_a_page_too_large_to_hold_is_read_in_parts(tmp_path: Path) -> None:
    users = [{"id": str(number), "username": f"user{number}", "bio": "x" * 1_000} for number in range(3_000)]
    tweets = [{"id": str(number), "author_id": "7", "text": "y" * 1_000} for number in range(3_000)]
    page = {"data": tweets, "includes": {"users": users, "tweets": [{"text": "CANARY-theirs"}]}, "meta": {"n": 1}}
    archive = read_archive(write(tmp_path / "page.json", json.dumps(page)))
    assert (len(archive.posts), archive.handle, archive.left_out) == (3_000, "user7", {})


def test_pages_of_several_authors_are_refused(tmp_path: Path) -> None:
    users = [{"id": "1", "username": "ada"}]
    pages = [{"data": [{"id": f"{i}", "author_id": f"{i}", "text": "a"}], "includes": {"users": users}} for i in (1, 2)]
    with pytest.raises(BadUpload, match="several accounts"):
        read_archive(write_lines(tmp_path / "pages.jsonl", pages))


@pytest.mark.parametrize("spoilt", ["1.45E+18", "1.45e18", "1,45E+18", "1450000000000000000.0"])
def test_ids_spoilt_in_json_are_no_ids_either(tmp_path: Path, spoilt: str) -> None:
    rows = [{"id": spoilt, "text": "a"}, {"id": spoilt, "text": "b"}]
    assert texts(read_archive(write_lines(tmp_path / "t.jsonl", rows))) == ["a", "b"]


def test_an_id_of_a_million_digits_makes_no_post_another_one(tmp_path: Path) -> None:
    digits = "9" * 10**6
    rows = [{"id": digits, "text": "a"}, {"id_str": digits, "text": "b"}]
    assert texts(read_archive(write_lines(tmp_path / "t.jsonl", rows))) == ["a", "b"]


def test_a_search_of_api_v1_and_a_file_of_tweets_under_a_name_are_read(tmp_path: Path) -> None:
    found = {"statuses": [tweet(1, "mine")], "search_metadata": {"count": 1}}
    assert texts(read_archive(write(tmp_path / "t.json", json.dumps(found)))) == ["mine"]
    named = {"tweets": wrapped(tweet(1, "mine")), "like": [{"like": {"fullText": "CANARY"}}]}
    assert texts(read_archive(write(tmp_path / "t.json", json.dumps(named)))) == ["mine"]
