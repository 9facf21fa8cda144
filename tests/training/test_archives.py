"""What archives of every format have in common: how they are known, their texts, times and owners."""

from __future__ import annotations

import json
import zipfile
from datetime import UTC, datetime
from pathlib import Path

import pytest

from serve.errors import BadUpload
from serve.training.archives import IMPORTERS, Importer, read_archive
from serve.training.archives.tweets import parse_time
from tests.training.archive_files import texts, tweet, write, write_lines, x_zip


def test_every_importer_keeps_the_protocol() -> None:
    importers: tuple[Importer, ...] = IMPORTERS
    assert all(importer.expects for importer in importers)


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


def test_the_content_decides_and_not_the_extension(tmp_path: Path) -> None:
    assert read_archive(write(tmp_path / "t.json", "id,text\n1,hello\n")).format == "csv"
    assert read_archive(write(tmp_path / "t.csv", '{"text": "hello"}')).format == "jsonl"
    assert read_archive(x_zip(tmp_path / "x.csv", [tweet(1, "mine")])).format == "x-archive"


def test_times_of_year_zero_and_9999_lose_the_time_and_not_the_post(tmp_path: Path) -> None:
    times = ["0000-01-01T00:00:00Z", "9999-12-31T23:59:59-10:00", "Sat Nov 09 12:14:18 +0000 0000", "9999-12-31"]
    rows = [{"id": str(number), "text": "a", "created_at": time} for number, time in enumerate(times)]
    archive = read_archive(write_lines(tmp_path / "t.jsonl", rows))
    assert [post.created_at and post.created_at.year for post in archive.posts] == [None, None, None, 9999]


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
    assert str(refused.value).startswith("'__31mred")
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
