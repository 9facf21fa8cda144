"""Files made to do harm: each is refused as a bad upload, soon, and without filling memory or disk."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import random
import struct
import tarfile
import time
import zipfile
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve.errors import BadUpload
from serve.training.archives import Post, mastodon, read_archive, upload
from serve.training.archives import archive as archive_module
from serve.training.archives.archive import MAX_POST_CHARS
from tests.training.archive_files import (
    Car,
    boost,
    create,
    mastodon_members,
    note,
    outbox,
    repository,
    script,
    tweet,
    varint,
    wrapped,
    write_tar,
    write_zip,
    x_zip,
)

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


def test_a_directory_of_a_hundred_thousand_tiny_entries_makes_no_objects(tmp_path: Path) -> None:
    entry = b"PK\x01\x02" + bytes(24) + struct.pack("<H", 1) + bytes(16) + b"a"
    directory = entry * 100_000
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, len(directory), 4, 0)
    (tmp_path / "x.zip").write_bytes(b"PK\x03\x04" + directory + end)
    started = time.process_time()
    assert "100,000 members" in refusal(tmp_path / "x.zip")
    assert time.process_time() - started < 1


def zip64_bytes() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file, file.open("data/tweets.js", "w", force_zip64=True) as member:
        member.write(TWEETS.encode())
    return buffer.getvalue()


@pytest.mark.parametrize("claimed", [0, 1, 2**32, 2**40, 2**62, 2**64 - 1])
@pytest.mark.parametrize("field", ["size", "packed size", "offset"])
def test_sizes_of_zip64_that_lie_are_refused_or_do_no_harm(tmp_path: Path, claimed: int, field: str) -> None:
    content = bytearray(zip64_bytes())
    at = content.index(b"PK\x01\x02")
    name_bytes, extra_bytes = struct.unpack("<HH", content[at + 28 : at + 32])
    for place in {"size": (24,), "packed size": (20,), "offset": (42,)}[field]:
        content[at + place : at + place + 4] = b"\xff" * 4
    extra = struct.pack("<HHQ", 1, 8, claimed)
    end = at + 46 + name_bytes
    forged = bytes(content[: at + 30]) + struct.pack("<H", len(extra)) + bytes(content[at + 32 : end]) + extra
    rest = bytearray(content[end + extra_bytes :])
    eocd = rest.index(b"PK\x05\x06")
    rest[eocd + 12 : eocd + 16] = struct.pack("<L", 46 + name_bytes + len(extra))
    read_or_refuse(tmp_path / "x.zip", forged + bytes(rest))


def test_a_picture_or_a_table_with_a_zip_behind_it_is_not_read_as_a_zip(tmp_path: Path) -> None:
    inner = x_zip(tmp_path / "inner.zip", [tweet(1, "CANARY")]).read_bytes()
    (tmp_path / "p.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(200) + inner)
    refusal(tmp_path / "p.png")
    (tmp_path / "t.json").write_bytes(b'[{"text": "mine"}]' + inner)
    refusal(tmp_path / "t.json")
    (tmp_path / "t.jsonl").write_bytes(b'{"text": "mine"}\n' + inner)
    refusal(tmp_path / "t.jsonl")


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


# --- Tars ---------------------------------------------------------------------------------------------------

OUTBOX = {"outbox.json": outbox(create(1, "<p>mine</p>"))}


def tar_of(path: Path, **fields: object) -> Path:
    """An outbox and then an empty member with these fields."""
    with tarfile.open(path, "w:gz") as tar:
        data = OUTBOX["outbox.json"].encode()
        header = tarfile.TarInfo("outbox.json")
        header.size = len(data)
        tar.addfile(header, io.BytesIO(data))
        odd = tarfile.TarInfo("odd")
        for name, value in fields.items():
            setattr(odd, name, value)
        tar.addfile(odd)
    return path


@pytest.mark.parametrize(
    "kind",
    [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE],
)
def test_a_tar_with_a_link_a_device_or_a_sparse_member_is_refused(tmp_path: Path, kind: bytes) -> None:
    assert "pack only files" in refusal(tar_of(tmp_path / "m.tar.gz", type=kind, linkname="/etc/passwd"))


@pytest.mark.parametrize(
    "name", ["../outbox.json", "/etc/passwd", "a/../../b", "C:\\x", "\\\\host\\x", "../" + "x" * 200]
)
def test_a_tar_with_a_path_that_leads_out_is_refused(tmp_path: Path, name: str) -> None:
    assert "leads out" in refusal(tar_of(tmp_path / "m.tar.gz", name=name))


def test_a_tar_with_two_outboxes_is_refused(tmp_path: Path) -> None:
    assert "twice" in refusal(tar_of(tmp_path / "m.tar.gz", name="./outbox.json"))
    assert "2 folders" in refusal(tar_of(tmp_path / "m.tar.gz", name="other/outbox.json"))


def test_a_tar_with_a_sparse_member_in_words_is_refused(tmp_path: Path) -> None:
    for words in ({"GNU.sparse.major": "1"}, {"size": "1"}):
        assert "sparse or oddly sized" in refusal(tar_of(tmp_path / "m.tar.gz", pax_headers=words))


def test_a_tar_with_a_huge_header_is_refused(tmp_path: Path) -> None:
    assert "too large" in refusal(tar_of(tmp_path / "m.tar.gz", name="x" * 100_000))


def test_a_tar_that_claims_too_much_or_is_cut_off_is_refused(tmp_path: Path) -> None:
    content = gzip.decompress(write_tar(tmp_path / "m.tar.gz", mastodon_members(create(1, "mine"))).read_bytes())
    for size in (2**33, 2**40, -1):
        header = tarfile.TarInfo("media")
        header.size = size
        forged = header.tobuf(tarfile.GNU_FORMAT) + content
        (tmp_path / "forged.tar").write_bytes(forged)
        refusal(tmp_path / "forged.tar")
    for length in range(0, content.rindex(b"PNG"), 511):
        (tmp_path / "cut.tar").write_bytes(content[:length])
        refusal(tmp_path / "cut.tar")


def test_a_tar_bomb_is_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "m.tar.gz", {**OUTBOX, "media": bytes(80_000_000)})
    assert "200 times" in refusal(path)


def test_what_is_passed_over_in_a_tar_counts_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    media = random.Random(0).randbytes(400_000)
    parts = {f"data/tweets-part{i}.js": script(f"tweets.part{i}", wrapped(tweet(i, "mine"))) for i in range(1, 9)}
    few = write_tar(tmp_path / "few.tar.gz", {"media": media, **dict(list(parts.items())[:2])})
    many = write_tar(tmp_path / "many.tar.gz", {"media": media, **parts})
    monkeypatch.setattr(upload, "MAX_TOTAL_BYTES", 500_000)
    assert len(read_archive(few).posts) == 2
    assert "to read" in refusal(many)


def test_a_mastodon_archive_as_large_as_allowed_is_read_from_a_tar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = {"media": random.Random(0).randbytes(400_000), **mastodon_members(create(1, "<p>mine</p>"))}
    path = write_tar(tmp_path / "m.tar.gz", members)
    monkeypatch.setattr(upload, "MAX_TOTAL_BYTES", 450_000)
    archive = read_archive(path)
    assert len(archive.posts) == 1 and archive.avatar is not None and archive.handle == "ada.social.example"


def test_a_tar_of_too_many_members_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "MAX_MEMBERS", 100)
    assert "members" in refusal(write_tar(tmp_path / "m.tar", {f"{number}": "" for number in range(300)}, "w"))


# --- Repositories -------------------------------------------------------------------------------------------


def car_refusal(tmp_path: Path, content: bytes) -> str:
    (tmp_path / "repo.car").write_bytes(content)
    return refusal(tmp_path / "repo.car")


def test_a_block_that_is_not_what_its_hash_says_is_refused(tmp_path: Path) -> None:
    content = repository({"3lbk4zvhrgc2k": "mine"})
    assert "not what its hash says" in car_refusal(tmp_path, content.replace(b"mine", b"fine"))


def test_a_repository_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    content = repository({"3lbk4zvhrgc2k": "mine"})
    for length in range(70, len(content), 7):
        car_refusal(tmp_path, content[:length])


def test_a_tree_that_names_a_node_twice_is_refused_and_not_gone_into_for_ever(tmp_path: Path) -> None:
    car = Car()
    tree = car.node({})
    for _ in range(40):  # each level names the one below twice: 2^40 ways
        tree = car.node({"app.bsky.feed.post/a": car.put({"text": "a"})}, left=tree, after=tree)
    assert "twice" in car_refusal(tmp_path, car.finish(tree))


def test_a_tree_of_too_many_levels_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.training.archives.car._MAX_PENDING", 5_000)
    car = Car()
    cid, tree = car.put({"text": "a"}), car.node({})
    for number in range(5_100):
        tree = car.node({f"app.bsky.feed.post/{number:06}": cid}, left=tree)
    assert "too deep" in car_refusal(tmp_path, car.finish(tree))


def test_a_repository_of_nonsense_is_refused(tmp_path: Path) -> None:
    start = repository({"3lbk4zvhrgc2k": "mine"})[:100]
    header = start[: 1 + start[0]]
    for rest in (
        b"",
        b"\xff" * 20,
        b"\x00",
        varint(2**62) + b"x",
        varint(40) + bytes(40),
        varint(2**24) + bytes(2**24),
    ):
        car_refusal(tmp_path, header + rest)


def test_blocks_nested_too_deep_or_of_the_wrong_shape_are_read_or_refused(tmp_path: Path) -> None:
    for block in (b"\x81" * 200_000 + b"\x01", b"\xa0", b"\x81\x01", b"\x9b" + b"\xff" * 8):
        car = Car()
        read_or_refuse(tmp_path / "repo.car", car.finish(car.put_bytes(block)))


@pytest.mark.parametrize(
    "entry",
    [
        {"p": 5, "k": b"x", "v": b"", "t": None},
        {"p": -1, "k": b"x", "v": b"", "t": None},
        {"p": 0, "k": b"\xff", "v": b"", "t": None},
        {"p": 0, "k": b"x" * 2_000, "v": b"", "t": None},
        {"p": "0", "k": 7, "v": None, "t": 5},
        7,
    ],
)
def test_entries_of_any_shape_are_read_or_refused(tmp_path: Path, entry: object) -> None:
    car = Car()
    read_or_refuse(tmp_path / "repo.car", car.finish(car.put({"l": None, "e": [entry, entry]})))


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
        assert len(str(refused)) < 1_200
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
    with zipfile.ZipFile(mastodon := io.BytesIO(), "w") as file:
        for name, content in mastodon_members(create(1, "<p>a<br>b</p>"), boost(2)).items():
            file.writestr(name, content)
    with tarfile.open(fileobj=(tar := io.BytesIO()), mode="w") as packed:
        for name, text in OUTBOX.items():
            header = tarfile.TarInfo(name)
            header.size = len(text)
            packed.addfile(header, io.BytesIO(text.encode()))
    car = repository({"3lbk4zvhrgc2k": "one", "3lbk4zvhrgc2m": "two"})
    return [
        *(buffer.getvalue(), lines, gzip.compress(lines), table, table.decode().encode("utf-16"), bluesky, page),
        *(mastodon.getvalue(), tar.getvalue(), gzip.compress(tar.getvalue()), car, outbox(boost(1)).encode()),
    ]


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


@pytest.mark.parametrize("seed", range(len(SEEDS)))
def test_ten_thousand_mutations_in_all_are_read_or_refused_within_seconds(tmp_path: Path, seed: int) -> None:
    # Hashes of a repository are made right again in every other mutation, so that they guard nothing behind them.
    generator, started = random.Random(seed), time.process_time()
    for number in range(10_000 // len(SEEDS) + 1):
        content = mutated(SEEDS[seed], generator)
        if number % 2 and content[1:3] == SEEDS[CAR][1:3]:
            content = rehashed(content)
        read_or_refuse(tmp_path / "upload", content)
    assert time.process_time() - started < 30


CAR = len(SEEDS) - 2


def mutated(content: bytes, generator: random.Random) -> bytes:
    """A few bytes changed, or a piece cut out, doubled, zeroed or moved."""
    data = bytearray(content)
    for _ in range(generator.choice((1, 1, 2, 5))):
        start, length = generator.randrange(len(data)), generator.choice((1, 1, 2, 8, 60))
        piece = data[start : start + length]
        replacement = generator.choice(
            (generator.randbytes(len(piece)), b"", piece * 2, bytes(len(piece)), b"\xff" * len(piece), piece[::-1])
        )
        data[start : start + length] = replacement
        if not data:
            return b"\0"
    return bytes(data)


def rehashed(content: bytes) -> bytes:
    """The repository with each block's name made from its bytes, and named so wherever it was named."""
    position = content[0] + 1
    while position + 38 < len(content):
        num_bytes, start = content[position], position + 1
        if num_bytes & 0x80:
            num_bytes, start = (num_bytes & 0x7F) | content[start] << 7, start + 1
        old, block = content[start : start + 36], content[start + 36 : start + num_bytes]
        if len(old) < 36 or num_bytes < 37:
            break
        content = content.replace(old, old[:4] + hashlib.sha256(block).digest())
        position = start + num_bytes
    return content
