"""Plain text, one post a line: the format that anybody can write.

The last importer asked, so it refuses what is not text at all.
"""

from __future__ import annotations

from serve.training.archives.archive import Archive, Collector, Post
from serve.training.archives.tweets import RETWEET_START
from serve.training.archives.upload import Upload, read_lines

_MAX_CONTROL_SHARE = 0.01  # pictures, PDFs and programs have far more


class Plain:
    """Lines; blank ones are no posts."""

    expects = "plain text with one post a line"

    def recognises(self, upload: Upload) -> bool:
        if upload.members is not None or upload.extension in (".json", ".jsonl", ".js"):
            return False
        head = upload.head_text
        num_controls = sum(char < " " and not char.isspace() for char in head)
        is_page = head.lstrip()[:15].lower().startswith(("<!doctype", "<html", "<?xml", "%pdf-"))
        return not is_page and num_controls <= len(head) * _MAX_CONTROL_SHARE

    def read(self, upload: Upload) -> Archive:
        """Raises: BadUpload."""
        collector = Collector(upload.name)
        with upload.open_text() as text:
            for line in read_lines(text, upload.name):
                if line := line.strip():
                    collector.add(Post(None, line, line.startswith(RETWEET_START), created_at=None))
        posts, left_out = collector.finish()
        return Archive(None, None, "text", posts, left_out)
