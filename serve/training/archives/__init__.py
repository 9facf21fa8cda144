"""People's archives of their own posts, in whatever format they have them.

`read_archive` is the way in. A new format is a file here and a line in `IMPORTERS`.
"""

from __future__ import annotations

from pathlib import Path

from serve.errors import BadUpload
from serve.training.archives.archive import Archive, Importer, Post
from serve.training.archives.bluesky import BlueskyRecords, BlueskyRepository
from serve.training.archives.grailbird import Grailbird
from serve.training.archives.mastodon import Mastodon
from serve.training.archives.plain import Plain
from serve.training.archives.records import Records
from serve.training.archives.table import Table
from serve.training.archives.upload import TarMembers, Upload, open_upload
from serve.training.archives.x import XArchive

__all__ = ["IMPORTERS", "Archive", "Importer", "Post", "read_archive"]

# Asked in this order; the least particular comes last.
IMPORTERS: tuple[Importer, ...] = (
    XArchive(),
    Grailbird(),
    Mastodon(),
    BlueskyRepository(),
    BlueskyRecords(),
    Records(),
    Table(),
    Plain(),
)


def read_archive(path: Path, *, filename: str | None = None) -> Archive:
    """Reads the posts of one file. `filename`: the user's own name for it, where it is stored under another.

    Raises: BadUpload.
    """
    with open_upload(path, filename or path.name) as upload:
        for importer in IMPORTERS:
            if importer.recognises(upload):
                return importer.read(upload)
        raise BadUpload(
            f"{upload.name} is {_kind_of(upload)}. Expected: {'; '.join(importer.expects for importer in IMPORTERS)}.",
            param="file",
        )


def _kind_of(upload: Upload) -> str:
    if upload.members is None:
        return "in no form that we can read"
    kind = "tar" if isinstance(upload.members, TarMembers) else "zip"
    return f"a {kind} of {len(upload.members.names):,} members without any tweets that we know"
