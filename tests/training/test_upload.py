"""Files made to do harm: each is refused as a bad upload, soon, and without filling memory or disk."""

from __future__ import annotations

import gzip
import io
import json
import random
import struct
import time
import zipfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve.errors import BadUpload
from serve.training.archives import archive as archive_module
from serve.training.archives import read_archive, upload
from serve.training.archives.archive import MAX_POST_CHARS
from tests.training.archive_files import note, script, tweet, wrapped, write_zip, x_zip

TWEETS = script("tweets.part0", wrapped(tweet(1, "mine")))


def refusal(path: Path, filename: str | None = None) -> str:
    with pytest.raises(BadUpload) as refused:
        read_archive(path, filename=filename)
    return str(refused.value)


# --- Zips ---------------------------------------------------------------------------------------------------


def test_a_member_that_unpacks_to_too_much_is_refused_while_it_is_read(tmp_path: Path) -> None:
    bomb = "window.YTD.tweets.part0 = [" + " " * 50_000_000
    started = time.monotonic()
    assert "200 times" in refusal(write_zip(tmp_path / "x.zip", {"data/tweets.js": bomb}))
    assert time.monotonic() - started < 5


def test_a_bomb_in_a_member_that_is_not_needed_is_not_opened(tmp_path: Path) -> None:
    path = x_zip(tmp_path / "x.zip", [tweet(1, "mine")], {"data/tweets_media/1.jpg": bytes(50_000_000)})
    assert len(read_archive(path).posts) == 1


def test_a_member_and_an_archive_have_limits_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tweets = [tweet(i, random.Random(i).randbytes(40).hex()) for i in range(200)]
    path = x_zip(tmp_path / "x.zip", tweets, {"data/tweets-part1.js": script("tweets.part1", wrapped(*tweets))})
    with monkeypatch.context() as patch:
        patch.setattr(upload, "MAX_MEMBER_BYTES", 50_000)
        assert "'tweets.js'" in refusal(path)
    with monkeypatch.context() as patch:
        patch.setattr(upload, "MAX_TOTAL_BYTES", 100_000)
        assert "The archive has more than" in refusal(path)
    assert len(read_archive(path).posts) == 200


def test_too_many_members_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as file:
        for number in range(20_001):
            file.writestr(f"data/{number}", b"")
    assert "20,001 members" in refusal(path)


def test_a_directory_that_would_fill_memory_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = x_zip(tmp_path / "x.zip", [tweet(1, "mine")], {f"data/{i}{'n' * 5_000}": b"" for i in range(30)})
    monkeypatch.setattr(upload, "MAX_DIRECTORY_BYTES", 100_000)
    assert "damaged or incomplete zip" in refusal(path)


def test_members_that_overlap_are_refused(tmp_path: Path) -> None:
    content = x_zip(tmp_path / "x.zip", [tweet(1, "mine")], {"data/tweets-part1.js": TWEETS}).read_bytes()
    start = content.rindex(b"PK\x01\x02")  # the last entry of the directory: let it point at the first member
    forged = bytearray(content)
    forged[start + 42 : start + 46] = struct.pack("<I", 0)
    (tmp_path / "forged.zip").write_bytes(forged)
    assert "overlap" in refusal(tmp_path / "forged.zip")


def test_an_encrypted_member_is_refused(tmp_path: Path) -> None:
    forged = bytearray(write_zip(tmp_path / "x.zip", {"data/tweets.js": TWEETS}).read_bytes())
    forged[forged.index(b"PK\x01\x02") + 8] |= 1
    forged[6] |= 1
    (tmp_path / "x.zip").write_bytes(forged)
    assert "encrypted" in refusal(tmp_path / "x.zip")


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_packing_method_that_may_need_gigabytes_is_refused(tmp_path: Path, method: int) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w", method) as file:
        file.writestr("data/tweets.js", TWEETS)
    assert "method" in refusal(tmp_path / "x.zip")


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("data/tweets.js")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
        file.writestr(link, "/etc/passwd")
    assert "a link" in refusal(tmp_path / "x.zip")


@pytest.mark.parametrize(
    "name", ["../data/tweets.js", "/data/tweets.js", "a\\..\\b", "\\\\host\\x", "C:\\x", "a/../../b"]
)
def test_a_path_that_leads_out_of_the_zip_is_refused(tmp_path: Path, name: str) -> None:
    assert "leads out" in refusal(x_zip(tmp_path / "x.zip", [tweet(1, "mine")], {name: "x"}))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_members_of_one_name_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
        file.writestr("data/tweets.js", TWEETS)
        file.writestr("data/tweets.js", TWEETS)
    assert "2 times" in refusal(tmp_path / "x.zip")


def test_two_archives_in_one_zip_are_refused(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "x.zip", {"a/data/tweets.js": TWEETS, "b/data/tweets.js": TWEETS})
    assert "2 folders" in refusal(path)


def test_a_wrong_checksum_is_noticed(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
        file.writestr("data/tweets.js", TWEETS)
    content = (tmp_path / "x.zip").read_bytes().replace(b"mine", b"fine", 1)
    (tmp_path / "x.zip").write_bytes(content)
    assert "damaged" in refusal(tmp_path / "x.zip")


def test_a_zip_cut_off_in_the_middle_is_refused(tmp_path: Path) -> None:
    content = x_zip(tmp_path / "x.zip", [tweet(1, "mine")]).read_bytes()
    for length in range(4, len(content), 37):
        (tmp_path / "cut.zip").write_bytes(content[:length])
        refusal(tmp_path / "cut.zip")


def test_a_zip_inside_a_zip_is_not_opened(tmp_path: Path) -> None:
    inner = x_zip(tmp_path / "inner.zip", [tweet(1, "mine")]).read_bytes()
    assert "without any tweets" in refusal(write_zip(tmp_path / "x.zip", {"inner.zip": inner}))
    assert "not begin with an assignment" in refusal(write_zip(tmp_path / "y.zip", {"data/tweets.js": inner}))


def test_a_zip_without_tweets_says_what_was_expected(tmp_path: Path) -> None:
    message = refusal(write_zip(tmp_path / "x.zip", {"photo.jpg": b"x"}), "holiday.zip")
    assert message.startswith("'holiday.zip' is a zip of 1 members without any tweets")
    assert "data/tweets.js" in message


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


# --- Fuzz ---------------------------------------------------------------------------------------------------

FUZZ = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def read_or_refuse(path: Path, content: bytes) -> None:
    """Anything but a BadUpload is a failure."""
    path.write_bytes(content)
    try:
        archive = read_archive(path)
    except BadUpload as refused:
        assert len(str(refused)) < 1_000
    else:
        "".join(post.text for post in archive.posts).encode()  # no half surrogates


def seeds() -> list[bytes]:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("data/account.js", script("account.part0", [{"account": {"username": "ada"}}]))
        file.writestr("data/tweets.js", script("tweets.part0", wrapped(tweet(1, "mine"), tweet(2, "yours"))))
        file.writestr("data/note-tweet.js", script("note_tweet.part0", [note("mine too", "2024-11-09T12:00:01Z")]))
    lines = b"\n".join(json.dumps(tweet(i, f"text é {i}", note_tweet={"text": "x"})).encode() for i in range(3))
    table = b"id;text;retweeted\n1;\"a\nb\";t\n2;b'\\xc3\\xa9';f\n"
    bluesky = b'{"uri": "at://d/app.bsky.feed.post/3", "value": {"text": "a", "facets": [{"index": {"byteStart": 0}}]}}'
    page = b'{"data": [{"id": "1", "text": "a"}], "includes": {"users": [{"id": "1"}]}}'
    return [buffer.getvalue(), lines, gzip.compress(lines), table, table.decode().encode("utf-16"), bluesky, page]


SEEDS = seeds()


@FUZZ
@given(st.binary(max_size=600), st.sampled_from(["", "PK\x03\x04", "\x1f\x8b\x08", "[{", "{", "id,text\n", "\ufeff"]))
def test_random_bytes_are_read_or_refused(tmp_path: Path, content: bytes, start: str) -> None:
    read_or_refuse(tmp_path / "upload", start.encode("latin-1", "ignore") + content)


@FUZZ
@given(st.sampled_from(range(len(SEEDS))), st.lists(st.tuples(st.integers(0, 5_000), st.integers(0, 255)), max_size=12))
def test_an_archive_with_changed_bytes_is_read_or_refused(
    tmp_path: Path, seed: int, changes: list[tuple[int, int]]
) -> None:
    content = bytearray(SEEDS[seed])
    for position, value in changes:
        content[position % len(content)] = value
    read_or_refuse(tmp_path / "upload", bytes(content))


@FUZZ
@given(st.sampled_from(range(len(SEEDS))), st.integers(0, 5_000), st.integers(0, 200), st.binary(max_size=20))
def test_an_archive_with_a_piece_replaced_is_read_or_refused(
    tmp_path: Path, seed: int, start: int, length: int, piece: bytes
) -> None:
    content = SEEDS[seed]
    start %= len(content)
    read_or_refuse(tmp_path / "upload.csv", content[:start] + piece + content[start + length :])


KEYS = st.sampled_from(
    [
        "tweet",
        "full_text",
        "text",
        "id",
        "id_str",
        "data",
        "includes",
        "users",
        "user",
        "author",
        "edit_info",
        "edit",
        "initial",
        "editTweetIds",
        "note_tweet",
        "referenced_tweets",
        "created_at",
        "value",
        "uri",
        "facets",
        "index",
        "features",
        "byteStart",
        "records",
        "noteTweet",
        "core",
        "createdAt",
        "retweeted_status",
        "editControlInitial",
        "extended_tweet",
        "screen_name",
        "username",
    ]
)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("RT @x"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)


@FUZZ
@given(st.lists(st.dictionaries(KEYS, JSON_VALUES, max_size=5), max_size=4), st.booleans())
def test_records_of_any_shape_are_read_or_refused(tmp_path: Path, records: list[object], in_zip: bool) -> None:
    if not in_zip:
        return read_or_refuse(tmp_path / "t.json", json.dumps(records).encode())
    path = x_zip(tmp_path / "x.zip", [], {"data/tweets-part1.js": script("tweets.part1", records)})
    read_or_refuse(path, path.read_bytes())
