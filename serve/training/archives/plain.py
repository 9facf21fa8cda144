"""Plain text, one post a line: the format that anybody can write.

The last importer asked, so it refuses what is not text at all.
"""

from __future__ import annotations

import re

from serve.errors import BadUpload
from serve.training.archives.archive import MAX_POST_CHARS, Archive, Collector, Post
from serve.training.archives.tweets import RETWEET_START
from serve.training.archives.upload import Upload, read_lines

# On average. A post seldom has 300; whoever writes longer ones has an archive in another format.
_MAX_LINE_CHARS = 1_000
_MAX_CONTROL_SHARE = 0.01  # pictures, PDFs and programs have far more
# Pages, RTF and PDF; comments may come first. `*+` and `(?>`, since going back would take exponential time.
_OTHER_START = re.compile(
    r"(?>\s+|/\*.*?\*/|//[^\n]*\n)*+(?:<!doctype|<!--|<html|<head|<body|<\?xml|%pdf-|\{\\rtf)",
    re.DOTALL | re.IGNORECASE,
)
# A part of an X archive, of which some are private.
_SCRIPT = re.compile(r"(?:YTD|Grailbird\.data)\.\w{1,60}(?:\.part\d+)?\s*=", re.ASCII)


class Plain:
    """Lines; blank ones are no posts."""

    expects = "plain text with one post a line"

    def recognises(self, upload: Upload) -> bool:
        if upload.members is not None or upload.extension in (".json", ".jsonl", ".js"):
            return False
        head = upload.head_text
        num_controls = sum(char < " " and not char.isspace() for char in head)
        is_other = _OTHER_START.match(head) or _SCRIPT.search(head)
        return not is_other and num_controls <= len(head) * _MAX_CONTROL_SHARE

    def read(self, upload: Upload) -> Archive:
        """Raises: BadUpload."""
        collector = Collector(upload.name)
        num_lines = num_chars = 0
        with upload.open_text() as text:
            for line in read_lines(text, upload.name):
                if line := line.strip():
                    collector.add(Post(None, line, line.startswith(RETWEET_START), created_at=None))
                    if len(line) <= MAX_POST_CHARS:
                        num_lines, num_chars = num_lines + 1, num_chars + len(line)
        if num_chars >= num_lines * _MAX_LINE_CHARS:  # or there is no line that could be a post
            raise BadUpload(
                f"{upload.name} has lines of more than {_MAX_LINE_CHARS:,} characters on average: that is prose and "
                "not posts. Put each post on a line of its own, or upload an archive.",
                param="file",
            )
        posts, left_out = collector.finish()
        return Archive(None, None, "text", posts, left_out)
