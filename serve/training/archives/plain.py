"""Plain text, one post a line: the format that anybody can write.

The last importer asked, so it refuses what is not text at all.
"""

from __future__ import annotations

from serve.errors import BadUpload
from serve.training.archives.archive import MAX_POST_CHARS, Archive, Collector, Post
from serve.training.archives.tweets import RETWEET_START
from serve.training.archives.upload import Upload, read_lines

# On average. A post seldom has 300; whoever writes longer ones has an archive in another format.
_MAX_LINE_CHARS = 1_000
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
