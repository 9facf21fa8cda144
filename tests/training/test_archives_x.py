"""Archives of X and of Twitter before it: each trap of the formats that users really have."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from serve.errors import BadUpload
from serve.training.archives import read_archive
from serve.training.clean import clean
from tests.training.archive_files import PNG, account, note, script, texts, tweet, wrapped, write_zip, x_zip

# --- X, 2020 to today ---------------------------------------------------------------------------------------


def test_an_x_archive_gives_its_tweets_and_its_owners_names(tmp_path: Path) -> None:
    archive = read_archive(x_zip(tmp_path / "x.zip", [tweet(1, "one &amp; two"), tweet(2, "RT @bob: hello…")]))
    assert (archive.handle, archive.display_name, archive.format) == ("Ada_L", "Ada & Co", "x-archive")
    assert texts(archive) == ["one &amp; two", "RT @bob: hello…"]
    assert [post.is_retweet for post in archive.posts] == [False, True]
    assert archive.posts[0].created_at == datetime(2024, 11, 9, 12, 0, 1, tzinfo=UTC)


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


@pytest.mark.parametrize("time", ["0001-01-01T00:00:00.000Z", "9999-12-31T23:59:59.000Z"])
def test_a_note_of_the_first_or_last_second_of_all_is_survived(tmp_path: Path, time: str) -> None:
    beside = {"data/note-tweet.js": script("note_tweet.part0", [note("mine and more", time)])}
    tweets = [tweet(1, "mine…", created_at=time)]
    assert texts(read_archive(x_zip(tmp_path / "x.zip", tweets, beside))) == ["mine and more"]


def test_an_early_version_that_knows_no_later_one_is_superseded(tmp_path: Path) -> None:
    tweets = [edited(1, "first", [1], later=False), edited(2, "second", [1, 2], later=True)]
    archive = read_archive(x_zip(tmp_path / "x.zip", tweets))
    assert (texts(archive), archive.left_out) == (["second"], {"superseded_edit": 1})


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
