"""Text, gzips and posts made to do harm: each is refused or left out, soon, and without filling memory."""

from __future__ import annotations

import gzip
import json
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

from serve.training.archives import Post, mastodon, read_archive
from serve.training.archives import archive as archive_module
from serve.training.archives.archive import MAX_POST_CHARS
from tests.training.archive_files import create, mastodon_members, note, script, tweet, write_zip, x_zip
from tests.training.uploads import refusal

# --- Gzip and text ------------------------------------------------------------------------------------------


def test_a_gzip_bomb_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl.gz").write_bytes(gzip.compress(b'{"text": "' + b" " * 50_000_000))
    assert "200 times" in refusal(tmp_path / "t.jsonl.gz")


def test_a_damaged_gzip_is_refused(tmp_path: Path) -> None:
    content = gzip.compress(json.dumps({"text": "mine"}).encode())
    for damaged in (content[:-4], content[:12], content[:-8] + bytes(8), b"\x1f\x8b" + bytes(40)):
        (tmp_path / "t.jsonl.gz").write_bytes(damaged)
        refusal(tmp_path / "t.jsonl.gz")


@pytest.mark.parametrize(
    "content",
    [
        '{"text": ' + "[" * 200_000,
        "[" * 200_000,
        '{"a":' * 100_000,
        '[{"id": ' + "9" * 1_000_000 + ', "text": "x"}]',
        '[{"text": "cut',
        '[{"text": "a"}',
        '{"text": "a"}{',
        '{"no": "post"}',
        "[1, 2, null]",
        "{}",
        "window.YTD.tweets.part0",
        'window.YTD.tweets.part0 = "evil()"; alert(1)',
    ],
    ids=lambda content: content[:20],
)
def test_json_made_to_break_a_parser_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "t.json").write_text(content)
    refusal(tmp_path / "t.json")


def test_a_script_is_never_run(tmp_path: Path) -> None:
    assert "not JSON" in refusal(write_zip(tmp_path / "x.zip", {"data/tweets.js": "a = [(() => {})(), open('x')]"}))


@pytest.mark.parametrize(
    "record",
    [
        {"full_text": "fine", "edit_info": [1], "id_str": 7, "created_at": 5},
        {"full_text": "fine", "edit_info": {"initial": {"editTweetIds": {"a": 1}}}, "referenced_tweets": "x"},
        {"full_text": "fine", "id": True, "user": "ada", "note_tweet": [], "edit_history_tweet_ids": [None, {}, 1.5]},
        {"full_text": "fine", "id": {"a": []}, "user": {"screen_name": ["x"]}, "author": 3, "retweeted": "yes"},
    ],
)
def test_fields_of_any_type_are_survived(tmp_path: Path, record: dict[str, object]) -> None:
    (tmp_path / "t.json").write_text(json.dumps([record]))
    assert [post.text for post in read_archive(tmp_path / "t.json").posts] == ["fine"]


def test_too_many_records_and_too_long_texts_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t.txt").write_text("short\n" * 9 + "x" * (MAX_POST_CHARS + 1))
    assert read_archive(tmp_path / "t.txt").left_out == {"too_long": 1}
    monkeypatch.setattr(archive_module, "MAX_POSTS", 5)
    assert "more than 5 records" in refusal(tmp_path / "t.txt")


def test_a_line_without_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("x" * (2**20 + 1))
    assert "a line of more than" in refusal(tmp_path / "t.txt")


def test_ten_thousand_notes_of_one_second_take_no_quadratic_time(tmp_path: Path) -> None:
    tweets = [tweet(0, f"{i} the same second") | {"id_str": str(i)} for i in range(10_000)]
    notes = [note(f"{i} another text", "2024-11-09T12:00:00.000Z") for i in range(10_000)]
    path = x_zip(tmp_path / "x.zip", tweets, {"data/note-tweet.js": script("note_tweet.part0", notes)})
    started = time.process_time()
    read_archive(path)
    assert time.process_time() - started < 20


def test_a_file_that_is_not_there_or_is_a_folder_is_a_bad_upload(tmp_path: Path) -> None:
    assert "cannot be read" in refusal(tmp_path / "absent.zip")
    assert "cannot be read" in refusal(tmp_path)


# --- HTML and notes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "html",
    [
        "<div>" * 180_000,
        "<div></x>" * 90_000,
        "<div><!--</div>-->" * 45_000,
        '<div title="</div>">' * 45_000,
        "<div title='>' a=\"</div>\">" * 40_000,
        "<div><marquee></div></marquee>" * 30_000,
        "<svg>" + "<link>" * 150_000,
        "".join(f"<b a='{i}'>" for i in range(200)) + "<p></p>" * 120_000,
    ],
    ids=lambda html: html[:30],
)
def test_html_nested_without_end_is_never_parsed(html: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def parse(html: str) -> None:
        raise AssertionError("it was parsed")

    monkeypatch.setattr(mastodon, "LexborHTMLParser", parse)
    assert mastodon.html_to_text(html) is None


@pytest.mark.parametrize(
    "html",
    [
        "<div>" * 100 + "mine" + "</div>" * 100,
        "<p>a line<br />and <a href='x' class=\"u-url\">@<span>bob</span></a></p>" * 5_000,
        "<br>" * 20_000 + "mine",
    ],
    ids=lambda html: html[:30],
)
def test_long_html_of_honest_depth_is_read(html: str) -> None:
    assert mastodon.html_to_text(html)


def test_a_note_nested_without_end_is_left_out_as_too_long(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "m.zip", mastodon_members(create(1, "<div>" * 100_000), create(2, "<p>mine</p>")))
    archive = read_archive(path)
    assert (len(archive.posts), archive.left_out) == (1, {"too_long": 1})


def test_long_tweets_are_not_gone_through_for_each_note(tmp_path: Path) -> None:
    collector = archive_module.Collector("x.zip")
    time_of_all = datetime(2024, 11, 9, tzinfo=UTC)
    for number, text in enumerate(["cut…", "x" * 1_001, "RT @bob: y"]):
        collector.add(Post(str(number), text, text.startswith("RT"), time_of_all))
    assert list(collector.find_own(time_of_all, time_of_all, 9)) == [(1, "cut…")]
    bounds = [0, 0, 9, 0, 0, 9]
    plan = " ".join(row[-1] for row in collector._spool.run(f"EXPLAIN QUERY PLAN {archive_module._FIND_OWN}", *bounds))
    assert "USING INDEX posts_by_time" in plan and "USING INDEX rivals_by_time" in plan and "SCAN posts" not in plan
