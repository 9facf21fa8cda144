"""Tars made to do harm: each is refused as a bad upload, soon, and without filling memory or disk."""

from __future__ import annotations

import gzip
import io
import random
import tarfile
from pathlib import Path

import pytest

from serve.training.archives import read_archive, upload
from tests.training.archive_files import create, mastodon_members, script, tweet, wrapped, write_tar
from tests.training.uploads import OUTBOX, refusal


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
