"""Files of random bytes, shapes and damage: each is read or refused as a bad upload, soon."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import random
import tarfile
import time
import zipfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.training.archive_files import (
    boost,
    create,
    mastodon_members,
    note,
    outbox,
    repository,
    script,
    tweet,
    wrapped,
    x_zip,
)
from tests.training.uploads import OUTBOX, read_or_refuse

FUZZ = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


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


@pytest.mark.parametrize("in_all", [600, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("seed", range(len(SEEDS)))
def test_thousands_of_mutations_are_read_or_refused_within_seconds(tmp_path: Path, seed: int, in_all: int) -> None:
    # Hashes of a repository are made right again in every other mutation, so that they guard nothing behind them.
    generator, started = random.Random(seed), time.process_time()
    for number in range(in_all // len(SEEDS) + 1):
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
