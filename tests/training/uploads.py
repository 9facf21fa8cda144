"""Reading a file made to do harm: what it is refused with, or that it is read or refused and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from serve.errors import BadUpload
from serve.training.archives import read_archive
from tests.training.archive_files import create, outbox

OUTBOX = {"outbox.json": outbox(create(1, "<p>mine</p>"))}


def refusal(path: Path, filename: str | None = None) -> str:
    with pytest.raises(BadUpload) as refused:
        read_archive(path, filename=filename)
    return str(refused.value)


def read_or_refuse(path: Path, content: bytes) -> None:
    """Anything but a BadUpload is a failure."""
    path.write_bytes(content)
    try:
        archive = read_archive(path)
    except BadUpload as refused:
        assert len(str(refused)) < 1_200
    else:
        "".join(post.text for post in archive.posts).encode()  # no half surrogates
