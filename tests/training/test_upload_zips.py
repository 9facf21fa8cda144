"""Zips made to do harm: each is refused as a bad upload, soon, and without filling memory or disk."""

from __future__ import annotations

import io
import random
import struct
import time
import zipfile
from pathlib import Path

import pytest

from serve.training.archives import read_archive, upload
from tests.training.archive_files import script, tweet, wrapped, write_zip, x_zip
from tests.training.uploads import read_or_refuse, refusal

TWEETS = script("tweets.part0", wrapped(tweet(1, "mine")))


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
