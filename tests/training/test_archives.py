"""Each trap of the formats that users really have, on small archives made here."""

from __future__ import annotations

import json
import random
import tarfile
import zipfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from serve.errors import BadUpload
from serve.training.archives import IMPORTERS, Archive, Importer, read_archive
from serve.training.archives.json_stream import read_values
from serve.training.archives.tweets import parse_time
from serve.training.clean import clean
from serve.training.dataset import REASONS
from tests.training.archive_files import (
    ADA,
    DID,
    PNG,
    PUBLIC,
    Car,
    account,
    boost,
    create,
    mastodon_members,
    note,
    outbox,
    repository,
    script,
    tweet,
    wrapped,
    write_lines,
    write_tar,
    write_zip,
    x_zip,
)


def texts(archive: Archive) -> list[str]:
    return [post.text for post in archive.posts]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# --- X, 2020 to today ---------------------------------------------------------------------------------------


def test_an_x_archive_gives_its_tweets_and_its_owners_names(tmp_path: Path) -> None:
    archive = read_archive(x_zip(tmp_path / "x.zip", [tweet(1, "one &amp; two"), tweet(2, "RT @bob: hello…")]))
    assert (archive.handle, archive.display_name, archive.format) == ("Ada_L", "Ada & Co", "x-archive")
    assert texts(archive) == ["one &amp; two", "RT @bob: hello…"]
    assert [post.is_retweet for post in archive.posts] == [False, True]
    assert archive.posts[0].created_at == datetime(2024, 11, 9, 12, 0, 1, tzinfo=UTC)


def test_every_importer_keeps_the_protocol() -> None:
    importers: tuple[Importer, ...] = IMPORTERS
    assert all(importer.expects for importer in importers)


def test_parts_are_read_together_and_a_tweet_in_two_parts_counts_once(tmp_path: Path) -> None:
    parts = {"data/tweets-part1.js": script("tweets.part1", wrapped(tweet(1, "first"), tweet(2, "second")))}
    archive = read_archive(x_zip(tmp_path / "x.zip", [tweet(1, "first")], parts))
    assert texts(archive) == ["first", "second"]
    assert archive.left_out == {"duplicate": 1}


def test_files_whose_names_only_resemble_tweets_are_not_tweets(tmp_path: Path) -> None:
    other = wrapped(tweet(9, "CANARY of another kind"))
    beside = {
        f"data/{name}.js": script("x.part0", other)
        for name in ("like", "direct-messages", "tweet-headers", "tweets-old", "mytweets", "tweets-part", "ad-tweets")
    }
    archive = read_archive(x_zip(tmp_path / "x.zip", [tweet(1, "mine")], beside))
    assert texts(archive) == ["mine"]
    assert archive.left_out == {}


def test_private_members_are_never_opened(tmp_path: Path) -> None:
    # Were one of them opened, it would be refused: they are no JavaScript at all.
    names = ("like", "direct-messages", "direct-messages-group", "phone-number", "ip-audit", "manifest")
    beside: dict[str, str | bytes] = {f"data/{name}.js": b"\xff\x00 not a script" for name in names}
    assert texts(read_archive(x_zip(tmp_path / "x.zip", [tweet(1, "mine")], beside))) == ["mine"]


def test_a_broken_profile_does_not_spoil_an_archive(tmp_path: Path) -> None:
    archive = read_archive(x_zip(tmp_path / "x.zip", [tweet(1, "mine")], {"data/profile.js": b"\xff\x00 not a script"}))
    assert texts(archive) == ["mine"] and archive.avatar is None


def test_deleted_and_community_tweets_are_counted_and_left_out(tmp_path: Path) -> None:
    beside = {
        "data/deleted-tweets.js": script("deleted_tweets.part0", wrapped(tweet(5, "gone", deleted_at="x"))),
        "data/deleted-tweet-headers.js": script("deleted_tweet_headers.part0", wrapped({"tweet_id": "5"})),
        "data/community-tweet.js": script("community_tweet.part0", wrapped(tweet(6, "inside"))),
    }
    tweets = [
        tweet(1, "mine"),
        tweet(5, "gone"),
        tweet(7, "also gone", deleted_at="x"),
        tweet(8, "in", community_id="1"),
    ]
    archive = read_archive(x_zip(tmp_path / "x.zip", tweets, beside))
    assert texts(archive) == ["mine"]
    assert archive.left_out == {"deleted": 2, "community": 2}


def edited(number: int, text: str, versions: list[int], *, later: bool) -> dict[str, Any]:
    control = {"editTweetIds": [str(10**18 + version) for version in versions]}
    info = {"edit": {"initialTweetId": str(10**18 + versions[0]), "editControlInitial": control}}
    return tweet(number, text, edit_info=info if later else {"initial": control})


def test_only_the_newest_version_of_an_edited_tweet_counts(tmp_path: Path) -> None:
    tweets = [edited(3, "third", [1, 2, 3], later=True), edited(1, "first", [1, 2, 3], later=False), tweet(4, "other")]
    tweets.append(edited(2, "second", [1, 2, 3], later=True))
    archive = read_archive(x_zip(tmp_path / "x.zip", tweets))
    assert texts(archive) == ["third", "other"]
    assert archive.left_out == {"superseded_edit": 2}


def test_if_the_newest_version_is_absent_the_newest_present_counts(tmp_path: Path) -> None:
    tweets = [edited(2, "second", [1, 2, 3], later=True), edited(1, "first", [1, 2, 3], later=False)]
    assert texts(read_archive(x_zip(tmp_path / "x.zip", tweets))) == ["second"]


def test_an_edited_tweet_that_is_alone_counts(tmp_path: Path) -> None:
    assert texts(read_archive(x_zip(tmp_path / "x.zip", [edited(1, "first", [1, 2], later=False)]))) == ["first"]


LONG = "Ada & Bob <3 " + "and so it goes on " * 20


def test_a_note_takes_the_place_of_its_tweet_and_is_not_unescaped(tmp_path: Path) -> None:
    whole = LONG + "with a literal &amp; at the end"
    cut = LONG[:270].replace("&", "&amp;").replace("<", "&lt;") + "… https://t.co/self https://t.co/media"
    notes = script("note_tweet.part0", [note(whole, "2024-11-09T12:00:02.000Z")])
    archive = read_archive(
        x_zip(tmp_path / "x.zip", [tweet(1, cut), tweet(30, "other")], {"data/note-tweet.js": notes})
    )
    assert texts(archive) == [whole, "other"]
    assert [post.escaped for post in archive.posts] == [False, True]
    assert clean(archive).kept[0].endswith("a literal &amp; at the end")


def test_notes_of_a_thread_posted_at_once_go_each_to_its_own_tweet(tmp_path: Path) -> None:
    wholes = [f"{number}/ {'thread ' * 60}end {number}" for number in (1, 2)]
    tweets = [tweet(1, whole[:270] + "… https://t.co/x") for whole in wholes]
    tweets[1]["id_str"] = "99"
    notes = [note(whole, "2024-11-09T12:00:01.000Z") for whole in reversed(wholes)]
    beside = {"data/note-tweet.js": script("note_tweet.part0", notes)}
    assert texts(read_archive(x_zip(tmp_path / "x.zip", tweets, beside))) == wholes


def test_a_note_that_begins_with_a_link_finds_its_tweet(tmp_path: Path) -> None:
    whole = "https://example.org/long " + "a story " * 50
    cut = "https://t.co/short " + ("a story " * 50)[:250] + "… https://t.co/self"
    beside = {"data/note-tweet.js": script("note_tweet.part0", [note(whole, "2024-11-09T12:00:01.000Z")])}
    assert texts(read_archive(x_zip(tmp_path / "x.zip", [tweet(1, cut)], beside))) == [whole]


@pytest.mark.parametrize("time", ["2024-11-09T12:05:00.000Z", "nonsense", None])
def test_a_note_of_another_time_replaces_nothing(tmp_path: Path, time: str) -> None:
    beside = {"data/note-tweet.js": script("note_tweet.part0", [note("the beginning and more", time)])}
    assert texts(read_archive(x_zip(tmp_path / "x.zip", [tweet(1, "the beginning")], beside))) == ["the beginning"]


def test_a_note_of_a_tweet_that_is_left_out_goes_to_no_other(tmp_path: Path) -> None:
    gone = {"created_at": "Sat Nov 09 12:00:01 +0000 2024"}
    whole = "Good morning, here is the CANARY " + "and so on " * 40
    notes = {"data/note-tweet.js": script("note_tweet.part0", [note(whole, "2024-11-09T12:00:01.000Z")])}
    cut = whole[:270] + "… https://t.co/self"
    deleted = {"data/deleted-tweets.js": script("x", wrapped(tweet(2, cut, **gone, deleted_at="x")))}
    inside = {"data/community-tweet.js": script("x", wrapped(tweet(2, cut, **gone)))}
    for text in ("Good morning", "Good morning…"):
        for beside in (deleted, inside):
            archive = read_archive(x_zip(tmp_path / "x.zip", [tweet(1, text)], {**notes, **beside}))
            assert texts(archive) == [text]
    assert texts(read_archive(x_zip(tmp_path / "x.zip", [tweet(1, "Good morning")], notes))) == ["Good morning"]


def test_a_deleted_tweet_goes_with_its_earlier_versions_and_by_its_header(tmp_path: Path) -> None:
    deleted = edited(2, "CANARY second", [1, 2], later=True) | {"deleted_at": "x"}
    beside = {
        "data/deleted-tweets.js": script("x", wrapped(deleted)),
        "data/deleted-tweet-headers.js": script("x", wrapped({"tweet_id": str(10**18 + 5)})),
    }
    tweets = [edited(1, "CANARY first", [1, 2], later=False), tweet(5, "CANARY"), tweet(6, "mine")]
    assert texts(read_archive(x_zip(tmp_path / "x.zip", tweets, beside))) == ["mine"]


def test_an_archive_is_read_without_its_owner_where_that_is_broken(tmp_path: Path) -> None:
    archive = read_archive(x_zip(tmp_path / "x.zip", [tweet(1, "mine")], {"data/account.js": b"\xff\x00 broken"}))
    assert (texts(archive), archive.handle) == (["mine"], None)
    old = {"id_str": "300", "text": "mine", "created_at": "2015-01-24 02:02:37 +0000"}
    members = {**grailbird("2015_01", old), "data/js/user_details.js": "broken"}
    archive = read_archive(write_zip(tmp_path / "g.zip", members))
    assert (texts(archive), archive.handle) == (["mine"], None)


def test_a_zip_with_backslashes_in_its_names_is_read(tmp_path: Path) -> None:
    members = {"data\\account.js": account(), "data\\tweets.js": script("tweets.part0", wrapped(tweet(1, "mine")))}
    archive = read_archive(write_zip(tmp_path / "x.zip", members))
    assert (texts(archive), archive.handle) == (["mine"], "Ada_L")


def test_a_short_note_with_bold_text_replaces_its_tweet(tmp_path: Path) -> None:
    beside = {"data/note-tweet.js": script("note_tweet.part0", [note("bold & short", "2024-11-09T12:00:01.000Z")])}
    archive = read_archive(x_zip(tmp_path / "x.zip", [tweet(1, "bold &amp; short https://t.co/pic")], beside))
    assert texts(archive) == ["bold & short"]


def test_emoji_and_rare_separators_are_kept_as_they_are(tmp_path: Path) -> None:
    text = "family 👨‍👩‍👧 ❤️ line\u2028next\u00a0end"
    assert texts(read_archive(x_zip(tmp_path / "x.zip", [tweet(1, text)]))) == [text]


def test_half_a_surrogate_pair_does_not_break_what_comes_after(tmp_path: Path) -> None:
    content = 'window.YTD.tweets.part0 = [{"tweet": {"id_str": "1", "full_text": "broken \\ud83d in the middle"}}]'
    archive = read_archive(write_zip(tmp_path / "x.zip", {"data/tweets.js": content}))
    assert clean(archive).kept == ("broken \ufffd in the middle",)
    assert len(clean(archive).kept_sorted_sha256) == 64


def test_the_manifest_gives_the_handle_where_the_account_is_missing(tmp_path: Path) -> None:
    manifest = 'window.__THAR_CONFIG = {"userInfo": {"userName": "Ada_L", "displayName": "Ada"}}'
    members = {"data/manifest.js": manifest, "data/tweets.js": script("tweets.part0", [])}
    archive = read_archive(write_zip(tmp_path / "x.zip", members))
    assert (archive.handle, archive.display_name, archive.posts) == ("Ada_L", "Ada", ())


def test_an_archive_zipped_again_in_its_folder_on_a_mac_is_read(tmp_path: Path) -> None:
    members: dict[str, str | bytes] = {
        "twitter-2024/data/tweets.js": script("tweets.part0", wrapped(tweet(1, "mine"))),
        "twitter-2024/data/account.js": account("Bob"),
        "__MACOSX/data/tweets.js": b"\x00\x05\x16\x07",
    }
    archive = read_archive(write_zip(tmp_path / "x.zip", members))
    assert (archive.handle, texts(archive)) == ("Bob", ["mine"])


# --- Twitter before 2022 ------------------------------------------------------------------------------------


def test_an_archive_of_2021_has_one_file_tweet_js(tmp_path: Path) -> None:
    members = {"data/account.js": account(), "data/tweet.js": script("tweet.part0", wrapped(tweet(1, "mine")))}
    assert texts(read_archive(write_zip(tmp_path / "x.zip", members))) == ["mine"]


def test_an_archive_of_2019_has_bare_tweets_in_the_zips_top(tmp_path: Path) -> None:
    members = {"account.js": account(), "tweet.js": script("tweet.part0", [tweet(1, "mine")]), "like.js": "CANARY"}
    archive = read_archive(write_zip(tmp_path / "x.zip", members))
    assert (archive.handle, texts(archive)) == ("Ada_L", ["mine"])


def grailbird(month: str, *tweets: dict[str, Any]) -> dict[str, str | bytes]:
    return {f"data/js/tweets/{month}.js": f"Grailbird.data.tweets_{month} = \n {json.dumps(tweets)}"}


def test_a_grailbird_archive_counts_each_tweet_once(tmp_path: Path) -> None:
    old = {"id_str": "300", "id": 300, "text": "mine", "created_at": "2015-01-24 02:02:37 +0000"}
    retweet = {"id_str": "301", "text": "via bob", "retweeted_status": {"id": 5}, "created_at": "bad"}
    members: dict[str, str | bytes] = {
        **grailbird("2015_01", old),
        **grailbird("2015_02", old, retweet),
        "data/js/user_details.js": 'var user_details =  {"screen_name": "Ada_L", "full_name": "Ada"}',
        "tweets.csv": '"tweet_id","text"\n"300","mine"\n',
    }
    archive = read_archive(write_zip(tmp_path / "g.zip", members))
    assert (archive.handle, archive.display_name, archive.format) == ("Ada_L", "Ada", "grailbird")
    assert [(post.text, post.is_retweet) for post in archive.posts] == [("mine", False), ("via bob", True)]
    assert archive.left_out == {"duplicate": 1}
    assert archive.posts[0].created_at == datetime(2015, 1, 24, 2, 2, 37, tzinfo=UTC)


def test_a_grailbird_archive_of_which_only_the_ragged_table_is_left_is_read(tmp_path: Path) -> None:
    table = '"tweet_id","timestamp","text","retweeted_status_id","expanded_urls"\n"1","","a, b","",""\n"2","","c","7"\n'
    archive = read_archive(write_zip(tmp_path / "g.zip", {"tweets.csv": table}))
    assert [(post.text, post.is_retweet) for post in archive.posts] == [("a, b", False), ("c", True)]


@pytest.mark.parametrize("name", ["data/js/tweets/2015_01.js", "tweets.csv"])
def test_two_archives_in_one_zip_are_refused(tmp_path: Path, name: str) -> None:
    old = {"id_str": "300", "text": "mine", "created_at": "2015-01-24 02:02:37 +0000"}
    content = "tweet_id,text\n1,mine\n" if name.endswith("csv") else grailbird("2015_01", old)[name]
    with pytest.raises(BadUpload, match="2 folders"):
        read_archive(write_zip(tmp_path / "g.zip", {f"{who}/{name}": content for who in ("ada", "bob")}))


# --- JSON ---------------------------------------------------------------------------------------------------


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


ADA_BOB = ("ada", "ADA", "bob")


def test_a_file_of_several_people_is_refused(tmp_path: Path) -> None:
    rows = [{"id": i, "text": "a", "user": {"screen_name": name}} for i, name in enumerate(ADA_BOB)]
    with pytest.raises(BadUpload, match="several accounts"):
        read_archive(write_lines(tmp_path / "t.jsonl", rows))
    assert read_archive(write_lines(tmp_path / "t.jsonl", rows[:2])).handle == "ADA"
    table = "id,username,text\n" + "".join(f"{i},{name},a\n" for i, name in enumerate(ADA_BOB))
    with pytest.raises(BadUpload, match="several accounts"):
        read_archive(write(tmp_path / "t.csv", table))


def test_an_account_that_was_renamed_is_one_account(tmp_path: Path) -> None:
    rows = [{"id": i, "text": "a", "user": {"id": 7, "screen_name": name}} for i, name in enumerate(ADA_BOB)]
    archive = read_archive(write_lines(tmp_path / "t.jsonl", rows))
    assert (len(archive.posts), archive.handle) == (3, None)
    table = "id,user_id,username,text\n" + "".join(f"{i},7,{name},a\n" for i, name in enumerate(ADA_BOB))
    assert len(read_archive(write(tmp_path / "t.csv", table)).posts) == 3


def test_a_retweet_may_bear_the_name_of_who_wrote_it(tmp_path: Path) -> None:
    table = "id,username,text,retweet\n1,ada,mine,False\n2,bob,theirs,True\n"
    archive = read_archive(write(tmp_path / "t.csv", table))
    assert ([post.is_retweet for post in archive.posts], archive.handle) == ([False, True], "ada")


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


@pytest.mark.parametrize("column", ["Visibility", "recipient_id", "deleted_at", "Community Id"])
def test_what_is_private_is_left_out_of_tables_by_their_columns(tmp_path: Path, column: str) -> None:
    archive = read_archive(write(tmp_path / "t.csv", f"id,text,{column}\n1,CANARY,direct\n2,mine,\n"))
    assert (texts(archive), sum(archive.left_out.values())) == (["mine"], 1)


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


def test_a_feed_of_bluesky_is_refused_with_what_was_expected(tmp_path: Path) -> None:
    post = {"uri": f"at://{DID}/app.bsky.feed.post/3k", "cid": "x", "record": {"text": "CANARY"}}
    with pytest.raises(BadUpload, match="listRecords"):
        read_archive(write(tmp_path / "feed.json", json.dumps({"feed": [{"post": post}], "cursor": "x"})))


# --- Bluesky's repository -----------------------------------------------------------------------------------


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


# --- Mastodon -----------------------------------------------------------------------------------------------

FOLLOWERS = f"{ADA}/followers"


def test_a_mastodon_archive_gives_what_is_public_or_unlisted(tmp_path: Path) -> None:
    activities = [
        create(1, "<p>public</p>", cc=[FOLLOWERS]),
        create(2, "<p>unlisted</p>", to=[FOLLOWERS], cc=[PUBLIC]),
        create(3, "<p>CANARY-followers</p>", to=[FOLLOWERS]),
        create(4, "<p>CANARY-direct</p>", to=["https://other.example/users/bob"]),
        create(5, "<p>CANARY-nobody</p>", to=[]),
        boost(6),
        {**boost(7), "to": [FOLLOWERS]},
        {"id": "8", "type": "Delete", "actor": ADA, "to": [PUBLIC], "object": "CANARY"},
        create(9, "<p>CANARY-theirs</p>", attributedTo="https://other.example/users/bob"),
    ]
    archive = read_archive(write_zip(tmp_path / "m.zip", mastodon_members(*activities)))
    assert [(post.text.strip(), post.is_retweet) for post in archive.posts] == [
        ("public", False),
        ("unlisted", False),
        ("", True),
    ]
    assert archive.left_out == {"not_public": 4, "other_record": 1, "other_account": 1}
    assert (archive.handle, archive.display_name, archive.format) == ("ada.social.example", "Ada & Co", "mastodon")
    assert archive.avatar == PNG
    assert archive.posts[0].created_at == datetime(2024, 11, 9, 12, 14, 18, tzinfo=UTC)


BOB = "https://social.example/users/bob"


def test_activities_of_another_account_than_the_owner_are_left_out(tmp_path: Path) -> None:
    activities = [create(1, "mine"), create(2, "CANARY", attributedTo=BOB) | {"actor": BOB}]
    activities.append(create(3, "mine too", attributedTo=[{"id": BOB}, ADA]))
    archive = read_archive(write_zip(tmp_path / "m.zip", mastodon_members(*activities)))
    assert (texts(archive), archive.left_out) == (["mine", "mine too"], {"other_account": 1})


@pytest.mark.parametrize("actor_json", [None, "{broken", "[]"])
def test_an_outbox_of_several_accounts_is_refused_where_nothing_names_its_owner(
    tmp_path: Path, actor_json: str | None
) -> None:
    activities = [create(1, "mine"), create(2, "CANARY", attributedTo=BOB) | {"actor": BOB}]
    members = mastodon_members(*activities) | {"actor.json": actor_json or ""}
    with pytest.raises(BadUpload, match="several accounts"):
        read_archive(write_zip(tmp_path / "m.zip", members))
    with pytest.raises(BadUpload, match="several accounts"):
        read_archive(write(tmp_path / "outbox.json", outbox(*activities)))
    alone = read_archive(write_zip(tmp_path / "m.zip", members | {"outbox.json": outbox(*activities[:1])}))
    assert (texts(alone), alone.handle) == (["mine"], "ada.social.example")


def test_a_note_that_is_private_in_a_public_activity_is_private(tmp_path: Path) -> None:
    activity = create(1, "CANARY") | {"to": [PUBLIC]}
    activity["object"]["to"] = [FOLLOWERS]
    assert texts(read_archive(write_zip(tmp_path / "m.zip", mastodon_members(activity)))) == []


def test_warnings_poll_options_and_descriptions_of_pictures_are_not_text(tmp_path: Path) -> None:
    options = [{"type": "Note", "name": "CANARY-option"}]
    more: dict[str, Any] = {
        "summary": "CANARY-warning",
        "attachment": [{"name": "CANARY-alt"}],
        "oneOf": options,
        "type": "Question",
    }
    archive = read_archive(write_zip(tmp_path / "m.zip", mastodon_members(create(1, "<p>Tea or coffee?</p>", **more))))
    assert clean(archive).kept == ("Tea or coffee?",)


@pytest.mark.parametrize(
    ("html", "text"),
    [
        ("<p>one</p><p>two<br />three</p>", "one\n\ntwo\nthree"),
        ("<p>it&#39;s &lt;b&gt; &amp;amp;</p>", "it's <b> &amp;"),
        (
            '<a href="x"><span class="invisible">https://</span><span class="ellipsis">example.org/a</span>'
            '<span class="invisible">/b?c=1</span></a>',
            "https://example.org/a/b?c=1",
        ),
        ('hi <span class="h-card"><a class="u-url mention">@<span>bob</span></a></span>', "hi @bob"),
        ('<a class="mention hashtag">#<span>Tag</span></a>', "#Tag"),
        ("<ul><li>a</li><li>b</li></ul>c", "a\nb\n\n\nc"),
        ("a<script>CANARY</script><style>CANARY</style>", "a"),
        ('<p class="quote-inline">RE: <a>https://x</a></p><p>mine</p>', "mine"),
        ("plain, no tags", "plain, no tags"),
        ("", ""),
    ],
)
def test_html_becomes_what_a_reader_sees(tmp_path: Path, html: str, text: str) -> None:
    archive = read_archive(write_zip(tmp_path / "m.zip", mastodon_members(create(1, html))))
    assert [post.text.strip() for post in archive.posts] == [text]


@pytest.mark.parametrize("mode", ["w:gz", "w"])
@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("folder", ["", "./", "archive-2019/"])
def test_a_mastodon_archive_of_an_older_server_is_a_tar(tmp_path: Path, mode: str, form: int, folder: str) -> None:
    long_name = "media_attachments/files/" + "é" * 60 + "x" * 90
    members = {**mastodon_members(create(1, "<p>mine</p>")), long_name if form else "a": bytes(3_000)}
    named = {folder + name: content for name, content in members.items()}
    archive = read_archive(write_tar(tmp_path / "m.tar.gz", dict(reversed(named.items())), mode, format=form))
    assert [post.text.strip() for post in archive.posts] == ["mine"]
    assert (archive.handle, archive.avatar) == ("ada.social.example", PNG)


def test_an_outbox_alone_is_read_and_names_its_owner_by_address(tmp_path: Path) -> None:
    archive = read_archive(write(tmp_path / "outbox.json", outbox(create(1, "<p>mine</p>"), boost(2))))
    assert [post.is_retweet for post in archive.posts] == [False, True]
    assert (archive.handle, archive.format) == ("ada.social.example", "mastodon")


def test_an_outbox_too_large_to_hold_is_read_in_parts(tmp_path: Path) -> None:
    activities = [create(number, f"<p>{random.Random(number).randbytes(1_000).hex()} é</p>") for number in range(2_000)]
    archive = read_archive(write_zip(tmp_path / "m.zip", mastodon_members(*activities)))
    assert (len(archive.posts), archive.left_out) == (2_000, {})


@pytest.mark.parametrize("actor", ["http://[", "x", "https://social.example/", ["x"], None])
def test_an_owner_with_a_made_up_address_has_no_handle(tmp_path: Path, actor: object) -> None:
    activity = {**create(1, "<p>mine</p>"), "actor": actor}
    activity["object"].pop("attributedTo")
    assert read_archive(write(tmp_path / "outbox.json", outbox(activity))).handle is None


# --- Pictures -----------------------------------------------------------------------------------------------

AVATAR_URL = "https://pbs.twimg.com/profile_images/1/{}"


@pytest.mark.parametrize(
    ("name", "url", "data", "found"),
    [
        ("7-ada.jpg", "ada.jpg", b"\xff\xd8\xff\xe0", True),
        ("7-ada.jpg", "ada_400x400.jpg", b"\xff\xd8\xff\xe0", True),
        ("7-ada_b.png", "ada_b_normal.png", PNG, True),
        ("7-ada.webp", "ada.webp", b"RIFF1234WEBPVP8 ", True),
        ("7-ada.gif", "ada.gif", b"GIF89a", True),
        ("7-header.jpg", "ada.jpg", b"\xff\xd8\xff\xe0", False),
        ("7-ada.svg", "ada.svg", b"<svg onload=alert(1)>", False),
        ("7-ada.jpg", "ada.jpg", b"\xff\xd8\xff" + bytes(1_000_000), False),
        ("7-ada.jpg", "", b"\xff\xd8\xff\xe0", False),
    ],
)
def test_the_owners_picture_is_taken_from_the_archive(
    tmp_path: Path, name: str, url: str, data: bytes, found: bool
) -> None:
    profile = [{"profile": {"avatarMediaUrl": AVATAR_URL.format(url)}}]
    beside: dict[str, str | bytes] = {
        "data/profile.js": script("profile.part0", profile),
        f"data/profile_media/{name}": data,
    }
    archive = read_archive(x_zip(tmp_path / "x.zip", [tweet(1, "mine")], beside))
    assert archive.avatar == (data if found else None)
    assert "avatar=" not in repr(archive)


# --- CSV ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "cp1252"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_csv_of_any_delimiter_encoding_and_line_end_is_read(
    tmp_path: Path, delimiter: str, encoding: str, line_end: str
) -> None:
    rows = [["Tweet Id", "Datetime", "Username", "Text"], ["1", "2022-04-29 20:56:57+00:00", "Ada", '"café; a, b|c"']]
    rows.append(["2", "2022-04-29", "Ada", f'"two{line_end}lines ""quoted"""'])
    content = "".join(delimiter.join(row) + line_end for row in rows)
    archive = read_archive(write(tmp_path / "t.csv", content.encode(encoding)))
    assert texts(archive) == ["café; a, b|c", f'two{line_end}lines "quoted"']
    assert (archive.handle, archive.posts[0].id) == ("Ada", "1")
    assert archive.posts[1].created_at == datetime(2022, 4, 29, tzinfo=UTC)


@pytest.mark.parametrize("column", ["text", "full_text", "Full Text", "tweet", "Tweet", "content", "Tweet-Text"])
def test_the_text_column_may_have_many_names(tmp_path: Path, column: str) -> None:
    assert texts(read_archive(write(tmp_path / "t.csv", f"a,{column}\n1,hello\n"))) == ["hello"]


def test_a_table_is_known_by_its_header_whatever_its_name(tmp_path: Path) -> None:
    assert read_archive(write(tmp_path / "t.txt", "id,text\n1,hello\n")).format == "csv"
    assert read_archive(write(tmp_path / "p.txt", "My first text, and more\nMy tweet, too\n")).format == "text"
    assert read_archive(write(tmp_path / "stored-7", "text\nhello\n"), filename="mine.CSV").format == "csv"


def test_the_content_decides_and_not_the_extension(tmp_path: Path) -> None:
    assert read_archive(write(tmp_path / "t.json", "id,text\n1,hello\n")).format == "csv"
    assert read_archive(write(tmp_path / "t.csv", '{"text": "hello"}')).format == "jsonl"
    assert read_archive(x_zip(tmp_path / "x.csv", [tweet(1, "mine")])).format == "x-archive"


def test_ids_spoilt_by_excel_do_not_make_two_tweets_one(tmp_path: Path) -> None:
    archive = read_archive(write(tmp_path / "t.csv", "id,text\n1.45E+18,a\n1.45E+18,b\n7,c\n7,c\n"))
    assert texts(archive) == ["a", "b", "c"]
    assert [post.id for post in archive.posts] == [None, None, "7"]


def test_texts_written_as_python_bytes_are_decoded(tmp_path: Path) -> None:
    row = r"""1,"b'it\'s caf\xc3\xa9\xe2\x80\xa6\nnext \\ C:\\new'" """.strip()
    archive = read_archive(write(tmp_path / "t.csv", f'id,text\n{row}\n2,"b\'open"\n'))
    assert texts(archive) == ["it's café…\nnext \\ C:\\new", "b'open"]


def test_links_that_a_scraper_glued_to_words_are_taken_out_alone(tmp_path: Path) -> None:
    content = "date;text;permalink\n2017-01-01;A big win:https://t.co/abc …pic.twitter.com/xyz;https://x\n"
    assert clean(read_archive(write(tmp_path / "t.csv", content))).kept == ("A big win:",)


def test_rows_may_be_ragged(tmp_path: Path) -> None:
    content = "id,date,text\n1,2020-01-01,unquoted, with commas\n2\n\n3,,whole\n"
    archive = read_archive(write(tmp_path / "t.csv", content))
    assert texts(archive) == ["unquoted, with commas", "whole"]
    assert archive.left_out == {"no_text": 1}


@pytest.mark.parametrize("header", ["isRetweet", "retweeted", "retweeted_status_id"])
@pytest.mark.parametrize(("cell", "is_retweet"), [("True", True), ("False", False), ("", False), ("nan", False)])
def test_a_retweet_in_a_table_is_known_by_its_columns(tmp_path: Path, header: str, cell: str, is_retweet: bool) -> None:
    archive = read_archive(write(tmp_path / "t.csv", f"id,text,{header}\n1,hello,{cell}\n"))
    assert archive.posts[0].is_retweet == is_retweet


@pytest.mark.parametrize("before", ["sep=;\n", "\n", "\r\n  \r\n", "\ufeffsep=;\r\n"])
@pytest.mark.parametrize("name", ["t.csv", "t.txt"])
def test_a_table_may_begin_with_excels_line_or_a_blank_one(tmp_path: Path, before: str, name: str) -> None:
    archive = read_archive(write(tmp_path / name, before + "id;text\n1;hello\n"))
    assert (texts(archive), archive.format) == (["hello"], "csv")


def test_a_table_without_texts_is_refused_without_repeating_it(tmp_path: Path) -> None:
    with pytest.raises(BadUpload, match="none of its columns") as refused:
        read_archive(write(tmp_path / "t.csv", "secret,words\n1,2\n"))
    assert "secret" not in str(refused.value)


def test_a_quote_that_is_never_closed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadUpload, match="not a sound CSV"):
        read_archive(write(tmp_path / "t.csv", 'id,text\n1,"open' + "\nmore" * 50_000))


@pytest.mark.parametrize("spoilt", ["1.45E+18", "1.45e18", "1,45E+18", "1450000000000000000.0"])
def test_ids_spoilt_in_json_are_no_ids_either(tmp_path: Path, spoilt: str) -> None:
    rows = [{"id": spoilt, "text": "a"}, {"id": spoilt, "text": "b"}]
    assert texts(read_archive(write_lines(tmp_path / "t.jsonl", rows))) == ["a", "b"]


def test_an_id_of_a_million_digits_makes_no_post_another_one(tmp_path: Path) -> None:
    digits = "9" * 10**6
    rows = [{"id": digits, "text": "a"}, {"id_str": digits, "text": "b"}]
    assert texts(read_archive(write_lines(tmp_path / "t.jsonl", rows))) == ["a", "b"]


def test_times_of_year_zero_and_9999_lose_the_time_and_not_the_post(tmp_path: Path) -> None:
    times = ["0000-01-01T00:00:00Z", "9999-12-31T23:59:59-10:00", "Sat Nov 09 12:14:18 +0000 0000", "9999-12-31"]
    rows = [{"id": str(number), "text": "a", "created_at": time} for number, time in enumerate(times)]
    archive = read_archive(write_lines(tmp_path / "t.jsonl", rows))
    assert [post.created_at and post.created_at.year for post in archive.posts] == [None, None, None, 9999]


@pytest.mark.parametrize("time", ["0001-01-01T00:00:00.000Z", "9999-12-31T23:59:59.000Z"])
def test_a_note_of_the_first_or_last_second_of_all_is_survived(tmp_path: Path, time: str) -> None:
    beside = {"data/note-tweet.js": script("note_tweet.part0", [note("mine and more", time)])}
    tweets = [tweet(1, "mine…", created_at=time)]
    assert texts(read_archive(x_zip(tmp_path / "x.zip", tweets, beside))) == ["mine and more"]


@pytest.mark.parametrize("original", ["café — naïve", "don’t “quote”", "日本語 🎉", "Ада Ловелас"])
@pytest.mark.parametrize("read_as", ["latin-1", "cp1252"])
def test_text_encoded_twice_is_repaired(tmp_path: Path, original: str, read_as: str) -> None:
    spoilt = original.encode().decode(read_as, "surrogateescape")
    spoilt = "".join(chr(ord(char) - 0xDC00) if 0xDC80 <= ord(char) <= 0xDCFF else char for char in spoilt)
    archive = read_archive(write_lines(tmp_path / "t.jsonl", [{"id": "1", "text": spoilt}, {"id": "2", "text": "a"}]))
    assert texts(archive) == [original, "a"]


def test_a_file_of_sound_text_is_not_repaired_for_one_spoilt_post(tmp_path: Path) -> None:
    rows = [{"id": "1", "text": "cafÃ©"}, {"id": "2", "text": "naïve"}, {"id": "3", "text": "don’t"}]
    assert texts(read_archive(write_lines(tmp_path / "t.jsonl", rows))) == ["cafÃ©", "naïve", "don’t"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "cp1252"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_json_lines_and_text_may_be_in_any_encoding_with_any_line_ends(
    tmp_path: Path, encoding: str, line_end: str
) -> None:
    rows = [json.dumps({"id": str(number), "text": "café"}, ensure_ascii=False) for number in range(3)]
    assert texts(read_archive(write(tmp_path / "t.jsonl", line_end.join(rows).encode(encoding)))) == ["café"] * 3
    assert texts(read_archive(write(tmp_path / "t.txt", line_end.join(["café"] * 3).encode(encoding)))) == ["café"] * 3


def test_an_early_version_that_knows_no_later_one_is_superseded(tmp_path: Path) -> None:
    tweets = [edited(1, "first", [1], later=False), edited(2, "second", [1, 2], later=True)]
    archive = read_archive(x_zip(tmp_path / "x.zip", tweets))
    assert (texts(archive), archive.left_out) == (["second"], {"superseded_edit": 1})


def test_a_search_of_api_v1_and_a_file_of_tweets_under_a_name_are_read(tmp_path: Path) -> None:
    found = {"statuses": [tweet(1, "mine")], "search_metadata": {"count": 1}}
    assert texts(read_archive(write(tmp_path / "t.json", json.dumps(found)))) == ["mine"]
    named = {"tweets": wrapped(tweet(1, "mine")), "like": [{"like": {"fullText": "CANARY"}}]}
    assert texts(read_archive(write(tmp_path / "t.json", json.dumps(named)))) == ["mine"]


# --- Text ---------------------------------------------------------------------------------------------------


def test_each_line_of_a_text_is_a_post(tmp_path: Path) -> None:
    archive = read_archive(write(tmp_path / "t.txt", "\ufeffone two three\r\n\r\n  RT @b: x\rline\u2028sep\n"))
    assert texts(archive) == ["one two three", "RT @b: x", "line\u2028sep"]
    assert [post.is_retweet for post in archive.posts] == [False, True, False]


@pytest.mark.parametrize("line_end", [" ", "\n\n"])
def test_prose_is_refused_and_says_what_to_do(tmp_path: Path, line_end: str) -> None:
    paragraph = "It was a dark and stormy night; the rain fell in torrents. " * 30
    with pytest.raises(BadUpload, match="prose and not posts. Put each post on a line of its own"):
        read_archive(write(tmp_path / "novel.txt", line_end.join([paragraph] * 20)))


def test_a_long_post_among_short_ones_is_a_post(tmp_path: Path) -> None:
    lines = ["a short one", *["x" * 3_000], *["another short one"] * 20]
    assert len(read_archive(write(tmp_path / "t.txt", "\n".join(lines))).posts) == 22


@pytest.mark.parametrize(
    "content",
    [
        b"\x89PNG\r\n\x1a\n" + bytes(200),
        b"<!DOCTYPE html><p>hi",
        b"%PDF-1.7 text",
        b"",
        b" \n\t ",
        b"\xef\xbb\xbf",
        b"Rar!\x1a\x07\x01\x00",
        rb"{\rtf1\ansi hello}",
        b"<!-- saved --> <html><p>hi",
        b" /* x */ // y\n /* z */ <head>",
        b"<body>hi",
        b"/* x */ window.YTD.like.part0 = [",
        b"YTD.like.part0 = [{}]",
        b"hello\nwindow.YTD.direct_messages.part0 = [",
    ],
)
def test_what_is_no_text_is_refused_with_what_was_expected(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(BadUpload) as refused:
        read_archive(write(tmp_path / "upload.bin", content))
    assert "'upload.bin'" in str(refused.value)
    assert refused.value.param == "file"


def test_a_message_names_the_file_as_the_user_did_and_stays_short(tmp_path: Path) -> None:
    with pytest.raises(BadUpload) as refused:
        read_archive(write(tmp_path / "7f3a", b"\x00" * 50), filename="C:\\me\\\x1b[31mred\n" + "x" * 500)
    assert "7f3a" not in str(refused.value)
    assert str(refused.value).startswith("'[31mred")
    assert len(str(refused.value)) < 600


@pytest.mark.parametrize(
    ("text", "time"),
    [
        ("Sat Nov 09 12:14:18 +0000 2024", (2024, 11, 9, 12, 14, 18)),
        ("Sat Nov 09 12:14:18 +0230 2024", (2024, 11, 9, 9, 44, 18)),
        ("2024-11-09T13:14:18.000Z", (2024, 11, 9, 13, 14, 18)),
        ("2015-01-24 02:02:37 +0000", (2015, 1, 24, 2, 2, 37)),
        ("2022-04-29 20:56:57+00:00", (2022, 4, 29, 20, 56, 57)),
        ("2022-04-29", (2022, 4, 29)),
        ("0001-01-01T00:00:00+14:00", None),
        ("9999-12-31T23:59:59-10:00", None),
        ("0000-01-01", None),
        ("Sat Foo 09 12:14:18 +0000 2024", None),
        ("Sat Nov 09 12:14:18 +9999 2024", None),
        ("yesterday", None),
        ("1" * 10**6, None),
        (None, None),
    ],
)
def test_times_are_utc_and_nonsense_is_none(text: str | None, time: tuple[int, ...] | None) -> None:
    assert parse_time(text) == (datetime(*time, tzinfo=UTC) if time else None)  # type: ignore[misc,arg-type]


def test_an_empty_zip_is_no_archive(tmp_path: Path) -> None:
    path = tmp_path / "empty.zip"
    with zipfile.ZipFile(path, "w"):
        pass
    with pytest.raises(BadUpload):
        read_archive(path)
