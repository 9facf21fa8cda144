"""CSV of any making: delimiter, column names, encoding and line ends are found out.

Knows the columns of the API's, Excel's, GetOldTweets', snscrape's, twarc's, twint's and Twitter's own tables.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TextIO

from serve.errors import BadUpload
from serve.training.archives.archive import Archive, Collector, Post
from serve.training.archives.json_stream import as_text
from serve.training.archives.tweets import (
    RETWEET_START,
    Owner,
    as_handle,
    is_marked_retweet,
    parse_time,
    plain_name,
    post_id,
    reason_to_leave_out,
)
from serve.training.archives.upload import MAX_LINE_CHARS, Upload, read_lines

_DELIMITERS = ",;\t|"
# Names as `plain_name` writes them; best first, since a table may have both `full_text` and `text`.
_TEXT = ("fulltext", "text", "tweettext", "rawcontent", "content", "tweet", "tweetcontent", "body")
_ID = ("idstr", "tweetid", "id", "statusid", "tweetidstr")
_TIME = ("createdat", "timestamp", "datetime", "date", "time", "tweetcreatedat")
_HANDLE = ("username", "screenname", "handle", "userscreenname", "authorusername", "userusername", "user", "author")
_ACCOUNT_ID = ("authorid", "authoridstr", "userid", "useridstr", "accountid")
_MAX_COLUMN_NAME_CHARS = 60

_EXCEL_LINE = re.compile(r"(?:sep=.)?\s*", re.IGNORECASE)  # says the delimiter; or blank
_MAX_LINES_BEFORE = 10

_BYTES_LITERAL = re.compile(r"""b(['"])(.*)\1""", re.DOTALL | re.ASCII)
_BYTES_ESCAPE = re.compile(rb"\\(?:x([0-9a-fA-F]{2})|(.))", re.DOTALL)
_ESCAPED_CONTROLS = {b"n": b"\n", b"r": b"\r", b"t": b"\t"}
_BARE_PICTURE_LINK = re.compile(r"…?(?<!/)(?=pic\.twitter\.com/\w)")
_GLUED_LINK = re.compile(r"(?<=\S)(?=https?://)")


class Table:
    """Delimited text with a first line of column names."""

    expects = "CSV with a column named 'text' or 'full_text'"

    def recognises(self, upload: Upload) -> bool:
        if upload.members is not None:
            return False
        if upload.extension in (".csv", ".tsv"):
            return True
        # A line of prose may have the word "text" between two commas; a header has an id, a date or a user beside it.
        columns = _find_columns(_read_first_line(io.StringIO(upload.head_text, newline=None)))
        return columns is not None and (columns.id, columns.time, columns.handle) != (None, None, None)

    def read(self, upload: Upload) -> Archive:
        """Raises: BadUpload."""
        collector = Collector(upload.name)
        with upload.open_text() as text:
            handle = read_table(text, upload.name, collector)
        posts, left_out = collector.finish()
        return Archive(handle, None, "csv", posts, left_out)


@dataclass(frozen=True, slots=True)
class Columns:
    """Where in a row to find what, and the delimiter between."""

    delimiter: str
    names: tuple[str, ...]
    text: int
    id: int | None
    time: int | None
    handle: int | None
    account_id: int | None

    @property
    def is_scraped_page(self) -> bool:
        """GetOldTweets read web pages, where links are glued to the word before."""
        return "permalink" in self.names


def read_table(text: TextIO, name: str, collector: Collector) -> str | None:
    """Adds each row's post; gives the handle if the rows name one account. Raises: BadUpload."""
    columns = _find_columns(_read_first_line(text))
    if columns is None:
        raise BadUpload(
            f"{name} is read as CSV, but none of its columns is named 'text', 'full_text', 'tweet' or 'content' "
            "in the first line.",
            param="file",
        )
    owner = Owner(name)
    for row in _rows(text, columns.delimiter, name):
        cell = as_text(_cell(row, columns.text, columns))
        if cell is None:
            collector.leave_out("no_text")
            continue
        fields = dict(zip(columns.names, row, strict=False))
        if reason := reason_to_leave_out(fields):
            collector.leave_out(reason)
            continue
        post = _to_post(row, cell, fields, columns)
        if not post.is_retweet:  # twint gives those under the name of who wrote them
            account_id = post_id(_cell(row, columns.account_id, columns))
            owner.see(account_id, as_handle(_cell(row, columns.handle, columns)))
        collector.add(post)
    return owner.handle


def _read_first_line(text: TextIO) -> str:
    """The first that is neither blank nor Excel's `sep=;`."""
    lines = (text.readline(2**16).removeprefix("\ufeff") for _ in range(_MAX_LINES_BEFORE))
    return next((line for line in lines if not _EXCEL_LINE.fullmatch(line)), "")


def _find_columns(first_line: str) -> Columns | None:
    """By the delimiter that gives a text column and the most columns."""
    found = []
    for delimiter in _DELIMITERS:
        try:
            header = next(csv.reader([first_line], delimiter=delimiter), [])
        except csv.Error:
            continue
        if max(map(len, header), default=0) > _MAX_COLUMN_NAME_CHARS:
            continue
        names = tuple(map(plain_name, header))
        if (text := _position(names, _TEXT)) is not None:
            others = (_position(names, wanted) for wanted in (_ID, _TIME, _HANDLE, _ACCOUNT_ID))
            found.append(Columns(delimiter, names, text, *others))
    return max(found, key=lambda columns: len(columns.names), default=None)


def _position(names: tuple[str, ...], wanted: tuple[str, ...]) -> int | None:
    return next((names.index(name) for name in wanted if name in names), None)


def _rows(text: TextIO, delimiter: str, name: str) -> Iterator[list[str]]:
    num_chars = 0  # of the row that is being read: with line breaks in quotes it may have any number of lines

    def lines() -> Iterator[str]:
        nonlocal num_chars
        for line in read_lines(text, name):
            num_chars += len(line)
            if num_chars > 2 * MAX_LINE_CHARS:
                raise BadUpload(f"{name} has a row of more than {num_chars:,} characters.", param="file")
            yield line

    reader = csv.reader(lines(), delimiter=delimiter)
    try:
        for row in reader:
            num_chars = 0
            if row:
                yield row
    except csv.Error as exc:  # above all a quote that is never closed, which would swallow the rest
        raise BadUpload(f"{name} is not a sound CSV near line {reader.line_num + 1:,}: {exc}.", param="file") from exc


def _cell(row: list[str], position: int | None, columns: Columns) -> str:
    """Rows may be ragged: too short (Twitter's own), or too long where the text comes last and is not quoted."""
    if position is None or position >= len(row):
        return ""
    if position == columns.text == len(columns.names) - 1:
        return columns.delimiter.join(row[position:])
    return row[position]


def _to_post(row: list[str], cell: str, fields: Mapping[str, str], columns: Columns) -> Post:
    text = _decode_bytes_literal(cell)
    if columns.is_scraped_page or "pic.twitter.com/" in text:
        text = _GLUED_LINK.sub(" ", _BARE_PICTURE_LINK.sub(" https://", text))
    return Post(
        id=post_id(_cell(row, columns.id, columns)),
        text=text,
        is_retweet=text.startswith(RETWEET_START) or is_marked_retweet(fields),
        created_at=parse_time(_cell(row, columns.time, columns)),
    )


def _decode_bytes_literal(cell: str) -> str:
    """`b'caf\\xc3\\xa9'`, which Python 2 habits leave in files, as text."""
    match = _BYTES_LITERAL.fullmatch(cell)
    if match is None or not cell.isascii():
        return cell

    def unescape(escape: re.Match[bytes]) -> bytes:
        return bytes([int(escape[1], 16)]) if escape[1] else _ESCAPED_CONTROLS.get(escape[2], escape[2])

    return _BYTES_ESCAPE.sub(unescape, match[2].encode("ascii")).decode("utf-8", "replace")
