"""The archive that Twitter gave its users until 2018, called Grailbird after its viewer.

Opens data/js/tweets/*.js and data/js/user_details.js. tweets.csv has the same tweets again: it is read only where
the months are missing.
"""

from __future__ import annotations

import contextlib
import re

from serve.errors import BadUpload
from serve.training.archives.archive import Archive, Collector
from serve.training.archives.json_stream import as_mapping, read_assigned_values
from serve.training.archives.table import read_table
from serve.training.archives.tweets import as_display_name, as_handle, to_post, unwrap
from serve.training.archives.upload import Members, Upload, find_base

_MONTH = re.compile(r"(?P<base>(?:[^/]+/)?)data/js/tweets/\d{4}_\d\d\.js")
_TABLE = re.compile(r"(?P<base>(?:[^/]+/)?)tweets\.csv")


class Grailbird:
    """One JavaScript file a month; months are cut in the owner's time zone, so neighbours may overlap."""

    expects = "a Twitter archive of before 2018 (a zip with data/js/tweets)"

    def recognises(self, upload: Upload) -> bool:
        return upload.members is not None and any(
            _MONTH.fullmatch(name) or _TABLE.fullmatch(name) for name in upload.members.names
        )

    def read(self, upload: Upload) -> Archive:
        """Raises: BadUpload."""
        assert upload.members is not None, "recognises() has seen members"
        members, collector = upload.members, Collector(upload.name)
        months = [name for name in members.names if _MONTH.fullmatch(name)]
        base = find_base(members, _MONTH if months else _TABLE, upload.name)
        for month in months:
            _read_month(members, month, collector)
        if not months:
            with members.open_text(f"{base}tweets.csv") as text:
                read_table(text, upload.name, collector)
        posts, left_out = collector.finish()
        handle, display_name = _read_owner(members, base)
        return Archive(handle, display_name, "grailbird", posts, left_out)


def _read_month(members: Members, month: str, collector: Collector) -> None:
    with members.open_text(month) as text:
        for record in read_assigned_values(text, f"'{month[-10:]}'"):
            post = to_post(unwrap(record))
            if post is None:
                collector.leave_out("no_text")
            else:
                collector.add(post)


def _read_owner(members: Members, base: str) -> tuple[str | None, str | None]:
    """Broken or absent, it takes nothing from the tweets."""
    with contextlib.suppress(BadUpload), members.open_text(f"{base}data/js/user_details.js") as text:
        for details in map(as_mapping, read_assigned_values(text, "'user_details.js'")):
            return as_handle(details.get("screen_name")), as_display_name(details.get("full_name"))
    return None, None
