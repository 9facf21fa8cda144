"""Archives made to do harm, and real ones damaged at random, in every format that users have (B7, B8)."""

from __future__ import annotations

import gzip
import io
import json
import random
import struct
import zipfile
from collections.abc import Callable, Mapping

from tests.faults.fuzz.case import MARK, Case, request
from tests.faults.fuzz.requests import BOUNDARY, MULTIPART
from tests.training.archive_files import script, tweet, wrapped
from tests.training.test_upload_fuzz import SEEDS, mutated

_TARGET = b"/v1/archives/preview"
_TWEETS = script("tweets.part0", wrapped(tweet(1, "mine"), tweet(2, "yours")))
_MEBIBYTE = 1 << 20
MAX_READING_S = 120.0  # a record takes some 0.1 ms, and an archive may have a hundred thousand


def archive_case(family: str, content: bytes, filename: str = "x.zip") -> Case:
    """Uploads `content` to see what a bot would learn from it."""
    head = b'--%s\r\ncontent-disposition: form-data; name="archive"; filename="%s"\r\n\r\n'
    body = head % (BOUNDARY, filename.encode()) + content + b"\r\n--" + BOUNDARY + b"--\r\n"
    return Case(family, (request(b"POST", _TARGET, [MULTIPART], body),), max_s=MAX_READING_S)


def b7_damaged(rng: random.Random) -> Case:
    """A real archive with bytes changed, cut out, doubled or moved."""
    name = rng.choice(("x.zip", "tweets.js", "outbox.json", "repo.car", "x.tar.gz", MARK.decode()))
    return archive_case("B7", mutated(rng.choice(SEEDS), rng), name)


def b8_text(rng: random.Random) -> Case:
    """Posts in another encoding, with other ends of lines, numbers and dates than any archive has."""
    texts = ("a\0b", "\u202egnp.exe", "é".encode().decode("latin-1") * 9, "\x1b[31m", "e\u0301" * 3_000, MARK.decode())
    records = [tweet(number, rng.choice(texts) + " and some words") for number in range(rng.choice((1, 30)))]
    records[0]["id_str"] = rng.choice(("1", "9" * 1_000_000, "-1", "1e5", ""))
    records[0]["created_at"] = rng.choice(
        ("Sat Nov 09 12:00:00 +0000 0000", "9999-12-31T23:59:60Z", "", "now", 5, None)
    )
    text = rng.choice(
        (
            json.dumps(records),
            json.dumps(records, ensure_ascii=False),
            script("tweets.part0", wrapped(*records)),
            "window.YTD.tweets.part0 = (function(){while(1);})()",
            "\r".join(["id,text", *(f"{number},{MARK.decode()}" for number in range(9))]),
            "[" * 200_000,
        )
    )
    encoded = text.encode(rng.choice(("utf-8", "utf-8-sig", "utf-16", "utf-16-be", "latin-1", "utf-7")), "replace")
    return archive_case("B8", encoded, rng.choice(("tweets.js", "tweets.json", "tweets.csv", "posts.txt")))


def made_to_harm() -> Mapping[str, Callable[[], bytes]]:
    """Name -> what makes the archive; some have megabytes."""
    return {
        "bomb": lambda: _zip({"data/tweets.js": b"window.YTD.tweets.part0 = [" + b" " * (300 * _MEBIBYTE)}),
        "bomb in a bomb": lambda: _zip({"data/tweets.zip": _zip({"tweets.js": b" " * (50 * _MEBIBYTE)})}),
        "gzip bomb": lambda: gzip.compress(b" " * (300 * _MEBIBYTE)),
        "gzip of gzips": lambda: gzip.compress(gzip.compress(gzip.compress(b"[" * _MEBIBYTE))),
        "overlapping members": _overlapping,
        "too many members": lambda: _zip({f"data/{number}": b"" for number in range(20_001)}),
        "a directory that lies": lambda: _with_entry(24, struct.pack("<I", 2**32 - 2)),
        "encrypted": lambda: _with_entry(8, b"\x01\x00"),
        "another method": lambda: _with_entry(10, struct.pack("<H", 97)),
        "a link": _link,
        "paths out": lambda: _zip({"../../data/tweets.js": _TWEETS, "/etc/cron.d/x": b"* * * * * root id"}),
        "paths of Windows": lambda: _zip({"C:\\data\\tweets.js": _TWEETS, "\\\\host\\data\\tweets.js": _TWEETS}),
        "one name twice": lambda: _zip(
            {"data/tweets.js": _TWEETS, "data/./tweets.js": _TWEETS, "DATA/TWEETS.JS": _TWEETS}
        ),
        "wrong checksum": lambda: _with_entry(16, b"\0\0\0\0"),
        "picture and zip": lambda: b"\x89PNG\r\n\x1a\n" + bytes(64) + _zip({"data/tweets.js": _TWEETS}),
        "script and zip": lambda: b"<script>" + MARK + b"</script>" + _zip({"data/tweets.js": _TWEETS}),
        "depth": lambda: b'[{"tweet":' * 200_000,
        "a number of a million digits": lambda: b'[{"tweet": {"id": ' + b"9" * _MEBIBYTE + b', "full_text": "a"}}]',
        "one key in all of it": lambda: b"[{" + b'"full_text":"a",' * 70_000 + b'"id":"1"}]',
        "nothing": lambda: b"",
    }


def _zip(members: Mapping[str, bytes | str]) -> bytes:
    with zipfile.ZipFile(buffer := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def _with_entry(offset: int, value: bytes) -> bytes:
    """With these bytes in the directory's entry of its one member."""
    content = bytearray(_zip({"data/tweets.js": _TWEETS}))
    start = content.index(b"PK\x01\x02") + offset
    content[start : start + len(value)] = value
    return bytes(content)


def _overlapping() -> bytes:
    """A hundred members that are the same bytes, which unpack to 10 GB."""
    content = _zip({"data/tweets-part00.js": b"window.YTD.tweets.part0 = [" + b" " * (100 * _MEBIBYTE)})
    start, end = content.index(b"PK\x01\x02"), content.index(b"PK\x05\x06")
    entry, tail = content[start:end], bytearray(content[end:])
    directory = b"".join(entry.replace(b"part00", b"part%02d" % number) for number in range(100))
    tail[8:12] = struct.pack("<HH", 100, 100)
    tail[12:16] = struct.pack("<I", len(directory))
    return content[:start] + directory + bytes(tail)


def _link() -> bytes:
    with zipfile.ZipFile(buffer := io.BytesIO(), "w") as file:
        member = zipfile.ZipInfo("data/tweets.js")
        member.create_system, member.external_attr = 3, 0o120777 << 16
        file.writestr(member, "/etc/passwd")
    return buffer.getvalue()
