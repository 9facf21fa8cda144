"""Reads an uploaded file that may be anything: bounded, streamed, never unpacked to disk.

Knows zip, tar, gzip and text encodings, and no archive format. Whatever is wrong with the bytes becomes a
`BadUpload` here, so that importers only ever see text.
"""

from __future__ import annotations

import codecs
import gzip
import io
import re
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, BinaryIO, Protocol, TextIO, cast

from serve.errors import BadUpload

# An archive with media has thousands of members; each costs memory before one of them is opened.
MAX_MEMBERS = 20_000
# The zip directory of 20,000 members with names of 200 bytes and extra fields is about 6 MB.
MAX_DIRECTORY_BYTES = 16 * 2**20
# X cuts tweets.js into parts near 100 MB. All limits are on bytes that really came out, not on claims.
MAX_MEMBER_BYTES = 512 * 2**20
MAX_TOTAL_BYTES = 2 * 2**30
# JSON of tweets shrinks 5 to 20 times; deflate can reach 1,032, and only bombs go past 200.
MAX_RATIO = 200
RATIO_FLOOR_BYTES = 2**20  # an all-blank member this small does no harm, whatever its ratio
MAX_LINE_CHARS = 2**20  # CSV rows with all of a tweet's JSON in them have some 10,000

HEAD_BYTES = 64 * 2**10
_CHUNK_BYTES = 2**20
_TAR_BLOCK = 512
_MAX_TAR_PASSES = 4  # to find the members, then Mastodon's three
_TAR_MAGIC_AT = 257
# Names longer than 256 bytes, in GNU's or POSIX' way; a name has at most 4 KiB.
_MAX_TAR_HEADER_BYTES = 64 * 2**10
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_ZIP_STARTS = (b"PK\x03\x04", b"PK\x05\x06")  # a first member; the end of an empty zip
_DIRECTORY_ENTRY = b"PK\x01\x02"
_ENCRYPTED_BIT = 0x1
_LOCAL_HEADER_BYTES = 30
# All that zipfile, gzip and zlib raise on bytes made to break them.
_DAMAGE = (
    zipfile.BadZipFile,
    RuntimeError,  # also of a compression that zipfile lacks
    ValueError,
    OverflowError,
    EOFError,
    OSError,
    zlib.error,
    struct.error,
)


@dataclass
class _Budget:
    """Bytes that have come out of one upload, all members together."""

    limit: int = field(default_factory=lambda: MAX_TOTAL_BYTES)
    spent: int = 0


class _BoundedReader(io.RawIOBase):
    """A stream of unpacked bytes that refuses to become too many."""

    def __init__(self, source: IO[bytes], name: str, packed_bytes: int | None, budget: _Budget, max_bytes: int) -> None:
        self._source, self._name, self._packed_bytes, self._budget = source, name, packed_bytes, budget
        self._num_bytes, self._max_bytes = 0, max_bytes

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._source.read(len(buffer))
        except _DAMAGE as exc:
            raise BadUpload(f"{self._name} is damaged: it cannot be unpacked. Upload it anew.", param="file") from exc
        self._count(len(data))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._source.close()
        super().close()

    def _count(self, num_bytes: int) -> None:
        self._num_bytes += num_bytes
        self._budget.spent += num_bytes
        if self._num_bytes > self._max_bytes:
            raise BadUpload(f"{self._name} has more than {self._max_bytes // 2**20} MiB of text.", param="file")
        if self._budget.spent > self._budget.limit:
            raise BadUpload(f"The archive has more than {self._budget.limit // 2**30} GiB to read.", param="file")
        allowed = RATIO_FLOOR_BYTES if self._packed_bytes is None else self._packed_bytes * MAX_RATIO
        if self._packed_bytes is not None and self._num_bytes > max(allowed, RATIO_FLOOR_BYTES):
            raise BadUpload(
                f"{self._name} unpacks to more than {MAX_RATIO} times its size, which no real archive does.",
                param="file",
            )


class _BoundedFile(io.FileIO):
    """A file that no directory entry can make us read in one piece."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > MAX_DIRECTORY_BYTES:
            raise zipfile.BadZipFile(f"a directory of {size} bytes")
        data = super().read(size) or b""
        # Before zipfile makes an object of 1 KB of each entry of 46 bytes.
        if data.startswith(_DIRECTORY_ENTRY) and (number := data.count(_DIRECTORY_ENTRY)) > MAX_MEMBERS:
            raise BadUpload(f"The zip has {number:,} members; at most {MAX_MEMBERS:,} are read.", param="file")
        return data


class Members(Protocol):
    """The files in a zip or tar by name. Nothing is opened that is not asked for by name."""

    @property
    def names(self) -> tuple[str, ...]:
        """In the order of the file, without what macOS adds when it packs a folder."""
        ...

    def __contains__(self, member: str) -> bool: ...

    def open_bytes(self, member: str) -> AbstractContextManager[BinaryIO]:
        """Raises: BadUpload when it is absent, doubled, encrypted or odd."""
        ...

    def open_text(self, member: str) -> AbstractContextManager[TextIO]:
        """The member as UTF-8 text. Raises: BadUpload."""
        ...


def find_base(members: Members, wanted: re.Pattern[str], name: str) -> str:
    """The folder that has members of the form `wanted`, by its group `base`. Raises: BadUpload for several."""
    bases = {match["base"] for match in map(wanted.fullmatch, members.names) if match}
    if len(bases) > 1:
        raise BadUpload(f"{name} has archives in {len(bases)} folders; upload one at a time.", param="file")
    return bases.pop()


class ZipMembers:
    """Found by the directory at the zip's end."""

    def __init__(self, file: zipfile.ZipFile, name: str, budget: _Budget) -> None:
        self._file, self._name, self._budget = file, name, budget
        members = file.infolist()
        _check_no_overlap(members, file.start_dir, name)
        if any(_leads_outside(member.filename) for member in members):
            raise BadUpload(f"{name} has a member whose path leads out of the zip.", param="file")
        self._members: dict[str, list[zipfile.ZipInfo]] = {}
        for member in members:
            # Some programs on Windows write `data\\tweets.js`.
            self._members.setdefault(member.filename.replace("\\", "/"), []).append(member)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(filter(_is_wanted, self._members))

    def __contains__(self, member: str) -> bool:
        return member in self._members

    @contextmanager
    def open_bytes(self, member: str) -> Iterator[BinaryIO]:
        info = self._checked(member)
        shown = f"{quoted(member)} in {self._name}"
        try:
            source = self._file.open(info)
        except _DAMAGE as exc:
            raise BadUpload(
                f"{shown} is damaged: it cannot be opened. Download the archive anew.", param="file"
            ) from exc
        reader = _BoundedReader(source, shown, info.compress_size, self._budget, MAX_MEMBER_BYTES)
        with io.BufferedReader(reader, _CHUNK_BYTES) as stream:
            yield stream

    def open_text(self, member: str) -> AbstractContextManager[TextIO]:
        return _as_text(self.open_bytes(member))

    def _checked(self, member: str) -> zipfile.ZipInfo:
        found = self._members.get(member, [])
        shown = f"{quoted(member)} in {self._name}"
        if len(found) != 1:
            raise BadUpload(f"{shown} was expected once and is there {len(found)} times.", param="file")
        info = found[0]
        if info.flag_bits & _ENCRYPTED_BIT:
            raise BadUpload(f"{shown} is encrypted; upload the archive without a password.", param="file")
        if info.compress_type not in _METHODS:
            raise BadUpload(f"{shown} is packed by method {info.compress_type}; only deflate is read.", param="file")
        if stat.S_ISLNK(info.external_attr >> 16) or info.is_dir():
            raise BadUpload(f"{shown} is a link or a folder and not a file.", param="file")
        return info


def _check_no_overlap(members: list[zipfile.ZipInfo], start_of_directory: int, name: str) -> None:
    # Python 3.11.7 reads members that share bytes: 70 KB can claim 10 GB. A member's local header may be
    # longer than counted here, never shorter, so honest files always pass.
    ordered = sorted(members, key=lambda member: member.header_offset)
    starts = [*(member.header_offset for member in ordered), start_of_directory]
    for member, next_start in zip(ordered, starts[1:], strict=True):
        if member.header_offset + _LOCAL_HEADER_BYTES + member.compress_size > next_start:
            raise BadUpload(f"{name} has members that overlap each other, which no real archive does.", param="file")


class TarMembers:
    """Found by reading all of a tar once. Each member that is opened is come to by reading up to it again."""

    def __init__(self, open_tar: Callable[[_Budget], AbstractContextManager[BinaryIO]], name: str) -> None:
        self._open_tar, self._name = open_tar, name
        self._budget = _Budget(_MAX_TAR_PASSES * MAX_TOTAL_BYTES)  # of all that is read, to come to a member too
        self._places: dict[str, tuple[int, int]] = {}  # name -> (offset, bytes)
        with open_tar(self._budget) as tar:
            self._find_members(tar)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(filter(_is_wanted, self._places))

    def __contains__(self, member: str) -> bool:
        return member in self._places

    @contextmanager
    def open_bytes(self, member: str) -> Iterator[BinaryIO]:
        shown = f"{quoted(member)} in {self._name}"
        offset, num_bytes = self._places.get(member, (0, -1))
        if not 0 <= num_bytes <= MAX_MEMBER_BYTES:
            limit = f"and to have at most {MAX_MEMBER_BYTES // 2**20} MiB"
            raise BadUpload(f"{shown} was expected to be there {limit}.", param="file")
        with self._open_tar(self._budget) as tar:
            self._skip(tar, offset)
            part = _BoundedReader(cast(IO[bytes], _Part(tar, num_bytes)), shown, None, _Budget(), MAX_MEMBER_BYTES)
            with io.BufferedReader(part, _CHUNK_BYTES) as stream:
                yield stream

    def open_text(self, member: str) -> AbstractContextManager[TextIO]:
        return _as_text(self.open_bytes(member))

    def _find_members(self, tar: BinaryIO) -> None:
        offset, long_name, num_headers = 0, "", 0
        while header := self._read_header(tar):
            num_headers += 1
            data_bytes = -(-header.size // _TAR_BLOCK) * _TAR_BLOCK
            offset += _TAR_BLOCK
            if num_headers > 2 * MAX_MEMBERS:  # a long name has a header of its own
                raise BadUpload(f"{self._name} has more than {MAX_MEMBERS:,} members.", param="file")
            if header.type in _TAR_NAMES:
                long_name = _long_name(header, self._read_exactly(tar, data_bytes, _MAX_TAR_HEADER_BYTES)) or long_name
            else:
                self._add(header, long_name, offset)
                long_name = ""
                self._skip(tar, data_bytes)
            offset += data_bytes

    def _read_header(self, tar: BinaryIO) -> tarfile.TarInfo | None:
        block = self._read_exactly(tar, _TAR_BLOCK, _TAR_BLOCK)
        if block == bytes(_TAR_BLOCK):
            return None
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "replace")
        except (tarfile.HeaderError, ValueError, OverflowError) as exc:
            raise BadUpload(f"{self._name} is a damaged tar; download the archive anew.", param="file") from exc
        if not 0 <= header.size <= MAX_TOTAL_BYTES:
            raise BadUpload(f"{self._name} claims a member of {header.size:,} bytes.", param="file")
        return header

    def _add(self, header: tarfile.TarInfo, long_name: str, offset: int) -> None:
        name = (long_name or header.name).removeprefix("./")
        if header.type == tarfile.DIRTYPE:
            return
        if header.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
            raise BadUpload(f"{self._name} holds a link, a device or the like; pack only files.", param="file")
        if _leads_outside(name):
            raise BadUpload(f"{self._name} has a member whose path leads out of the tar.", param="file")
        if name in self._places:
            raise BadUpload(f"{self._name} has {quoted(name)} twice, which no real archive does.", param="file")
        self._places[name] = (offset, header.size)

    def _read_exactly(self, tar: BinaryIO, num_bytes: int, most: int) -> bytes:
        data = tar.read(num_bytes) if num_bytes <= most else b""
        if len(data) < num_bytes:
            raise BadUpload(f"{self._name} is a tar cut off or with headers too large to be honest.", param="file")
        return data

    def _skip(self, tar: BinaryIO, num_bytes: int) -> None:
        while num_bytes:
            num_bytes -= len(self._read_exactly(tar, min(num_bytes, _CHUNK_BYTES), _CHUNK_BYTES))


# What comes before a member with a long name: GNU's and POSIX' way, and POSIX' words on all members.
_TAR_NAMES = (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE)


def _long_name(header: tarfile.TarInfo, data: bytes) -> str:
    """The name that is given for the next member, if one is."""
    if header.type == tarfile.GNUTYPE_LONGNAME:
        return data[: header.size].rstrip(b"\0").decode("utf-8", "replace")
    if b"GNU.sparse" in data or re.search(rb"\d size=", data):
        raise BadUpload("The tar has a sparse or oddly sized member; pack the files as they are.", param="file")
    path = re.search(rb"\d+ path=([^\n]+)\n", data[: header.size])
    return path[1].decode("utf-8", "replace") if path and header.type == tarfile.XHDTYPE else ""


class _Part(io.RawIOBase):
    """The next bytes of a stream as if there were no others."""

    def __init__(self, stream: BinaryIO, num_bytes: int) -> None:
        self._stream, self._num_left = stream, num_bytes

    def read(self, size: int = -1, /) -> bytes:
        data = self._stream.read(min(size, self._num_left))
        self._num_left -= len(data)
        return data


@contextmanager
def _as_text(opened: AbstractContextManager[BinaryIO]) -> Iterator[TextIO]:
    with opened as stream, io.TextIOWrapper(stream, "utf-8-sig", errors="replace") as text:
        yield text


def _is_wanted(path: str) -> bool:
    return not path.startswith("__MACOSX/") and "/._" not in f"/{path}"


def _leads_outside(path: str) -> bool:
    return path.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", path) or path[1:2] == ":"


@dataclass
class Upload:
    """One uploaded file under the user's own name. `members` is there when it is a zip or a tar."""

    path: Path
    filename: str
    head: bytes  # the first 64 KiB, after gzip
    is_gzip: bool
    members: Members | None = None
    _budget: _Budget = field(default_factory=_Budget)
    _encoding: str | None = None

    @property
    def name(self) -> str:
        """For messages: printable and short, in quotes."""
        return quoted(self.filename)

    @property
    def extension(self) -> str:
        """`.csv` of `A.csv` and of `A.CSV.gz`."""
        return Path(self.filename.lower().removesuffix(".gz")).suffix

    @property
    def head_text(self) -> str:
        """The head, decoded; a character cut at its end is left out."""
        decoder = codecs.getincrementaldecoder(self.encoding)("replace")
        return decoder.decode(self.head).removeprefix("\ufeff")

    @property
    def encoding(self) -> str:
        if self._encoding is None:
            self._encoding = _encoding_of(self)
        return self._encoding

    @contextmanager
    def open_bytes(self, budget: _Budget | None = None) -> Iterator[BinaryIO]:
        with open(self.path, "rb") as file:
            packed_bytes = self.path.stat().st_size if self.is_gzip else None
            source = cast(IO[bytes], gzip.GzipFile(fileobj=file) if self.is_gzip else file)
            reader = _BoundedReader(source, self.name, packed_bytes, budget or _Budget(), MAX_TOTAL_BYTES)
            with io.BufferedReader(reader, _CHUNK_BYTES) as buffered:
                yield buffered

    @contextmanager
    def open_text(self) -> Iterator[TextIO]:
        """The whole as text, in whatever encoding it is; line ends as they are (lines end at CR, LF or CRLF)."""
        with self.open_bytes() as stream, io.TextIOWrapper(stream, self.encoding, "replace", newline="") as text:
            yield text


@contextmanager
def open_upload(path: Path, filename: str) -> Iterator[Upload]:
    """Raises: BadUpload for what cannot be opened, is empty or is a zip made to do harm."""
    name = quoted(filename)
    try:
        with _BoundedFile(path) as file:
            start = file.read(4)
            if not start:
                raise BadUpload(f"{name} is empty.", param="file")
            if start in _ZIP_STARTS:
                with _open_zip(file, name) as archive:
                    yield _zip_upload(path, filename, archive)
                return
    except OSError as exc:
        raise BadUpload(f"{name} cannot be read here.", param="file") from exc
    yield _plain_upload(path, filename, is_gzip=start.startswith(b"\x1f\x8b"))


def _zip_upload(path: Path, filename: str, archive: zipfile.ZipFile) -> Upload:
    upload = Upload(path, filename, b"", is_gzip=False)
    upload.members = ZipMembers(archive, upload.name, upload._budget)
    return upload


def _plain_upload(path: Path, filename: str, *, is_gzip: bool) -> Upload:
    upload = Upload(path, filename, b"", is_gzip)
    with upload.open_bytes() as stream:
        upload.head = stream.read(HEAD_BYTES)
    if upload.head[_TAR_MAGIC_AT:].startswith(b"ustar"):
        upload.members = TarMembers(upload.open_bytes, upload.name)
    elif not upload.head_text.strip():
        raise BadUpload(f"{upload.name} is empty.", param="file")
    return upload


def _open_zip(file: IO[bytes], name: str) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(file)
    except _DAMAGE as exc:
        raise BadUpload(f"{name} is a damaged or incomplete zip; download the archive anew.", param="file") from exc


_BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def _encoding_of(upload: Upload) -> str:
    """By byte-order mark; else UTF-8 unless most of what is not ASCII is not UTF-8 either: then Windows-1252."""
    for mark, encoding in _BOMS:
        if upload.head.startswith(mark):
            return encoding
    if upload.head[1:8:2] == bytes(4) or upload.head[:8:2] == bytes(4):
        return "utf-16-le" if upload.head[0] else "utf-16-be"
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    num_bad = num_foreign = 0
    with upload.open_bytes() as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            if not chunk.isascii():
                text = decoder.decode(chunk)
                num_bad += text.count("\ufffd")
                num_foreign += len(text) - len(text.encode("ascii", "ignore"))
    return "cp1252" if num_bad * 2 > num_foreign else "utf-8"


def read_lines(text: TextIO, name: str) -> Iterator[str]:
    """Lines with their ends. Raises: BadUpload for a line that no person wrote, before it fills memory."""
    while line := text.readline(MAX_LINE_CHARS):
        if len(line) == MAX_LINE_CHARS:
            raise BadUpload(f"{name} has a line of more than {MAX_LINE_CHARS:,} characters.", param="file")
        yield line


def quoted(filename: str) -> str:
    """A user's file name, fit for a message: with nothing in it that says anything to a page or a terminal."""
    base = re.split(r"[/\\]", filename)[-1]
    plain = "".join(char if char.isalnum() or char in " .-()" else "_" for char in base[:80])
    return f"'{plain}'"
