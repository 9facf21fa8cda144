"""Small archives for tests, made in every format that users have."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import libipld

from serve.training.archives import Archive

PUBLIC = "https://www.w3.org/ns/activitystreams#Public"
ADA = "https://social.example/users/ada"


def tweet(number: int, text: str, **more: Any) -> dict[str, Any]:
    """One tweet as X's archive has it: numbers are strings, `retweeted` is always false."""
    return {
        "retweeted": False,
        "id_str": str(10**18 + number),
        "id": str(10**18 + number),
        "created_at": f"Sat Nov 09 12:{number // 60 % 60:02}:{number % 60:02} +0000 2024",
        "full_text": text,
        **more,
    }


def wrapped(*tweets: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"tweet": one} for one in tweets]


def script(name: str, records: Any) -> str:
    return f"window.YTD.{name} = {json.dumps(records, indent=2, ensure_ascii=False)}"


def account(handle: str = "Ada_L") -> str:
    owner = {"email": "owner@example.org", "username": handle, "accountDisplayName": "Ada & Co"}
    return script("account.part0", [{"account": owner}])


def write_zip(path: Path, members: Mapping[str, str | bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def x_zip(path: Path, tweets: Sequence[Mapping[str, Any]], more: Mapping[str, str | bytes] | None = None) -> Path:
    members = {"data/account.js": account(), "data/tweets.js": script("tweets.part0", wrapped(*tweets))}
    return write_zip(path, {**members, **(more or {})})


def note(text: str, created_at: str) -> dict[str, Any]:
    return {"noteTweet": {"noteTweetId": "77", "createdAt": created_at, "core": {"text": text, "urls": []}}}


def texts(archive: Archive) -> list[str]:
    return [post.text for post in archive.posts]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_lines(path: Path, records: Sequence[Any]) -> Path:
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return path


# --- Mastodon -----------------------------------------------------------------------------------------------


def create(
    number: int, html: str, to: Sequence[str] = (PUBLIC,), cc: Sequence[str] = (), **more: Any
) -> dict[str, Any]:
    """A post in an outbox; `more` goes into its note."""
    audience = {"to": list(to), "cc": list(cc)}
    note = {"id": f"{ADA}/statuses/{number}", "type": "Note", "attributedTo": ADA, "content": html, **audience, **more}
    note["published"] = "2024-11-09T12:14:18Z"
    return {"id": f"{note['id']}/activity", "type": "Create", "actor": ADA, **audience, "object": note}


def boost(number: int) -> dict[str, Any]:
    other = f"https://other.example/users/bob/statuses/{number}"
    return {"id": f"{ADA}/boosts/{number}", "type": "Announce", "actor": ADA, "to": [PUBLIC], "object": other}


def outbox(*activities: Mapping[str, Any]) -> str:
    items = {"@context": "https://www.w3.org/ns/activitystreams", "id": "outbox.json", "type": "OrderedCollection"}
    return json.dumps({**items, "totalItems": len(activities), "orderedItems": activities}, ensure_ascii=False)


def mastodon_members(*activities: Mapping[str, Any]) -> dict[str, str | bytes]:
    actor = {"id": ADA, "type": "Person", "preferredUsername": "ada", "name": "Ada & Co", "summary": "CANARY-bio"}
    private = json.dumps({"orderedItems": ["CANARY-liked"]})
    return {
        "actor.json": json.dumps(actor),
        "outbox.json": outbox(*activities),
        "likes.json": private,
        "bookmarks.json": private,
        "avatar.png": PNG,
    }


PNG = b"\x89PNG\r\n\x1a\n" + bytes(60)


def write_tar(path: Path, members: Mapping[str, str | bytes], mode: str = "w:gz", **options: Any) -> Path:
    with tarfile.open(path, mode, **options) as tar:  # type: ignore[call-overload]
        for name, content in members.items():
            data = content.encode() if isinstance(content, str) else content
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return path


# --- Bluesky ------------------------------------------------------------------------------------------------

DID = "did:plc:abc"


class Car:
    """Blocks of a repository that is made bottom up, and the file that they make."""

    def __init__(self) -> None:
        self.blocks: dict[bytes, bytes] = {}

    def put(self, value: Any) -> bytes:
        """Adds a block; gives its CID."""
        return self.put_bytes(libipld.encode_dag_cbor(value))

    def put_bytes(self, data: bytes) -> bytes:
        cid = b"\x01\x71\x12\x20" + hashlib.sha256(data).digest()
        self.blocks[cid] = data
        return cid

    def node(self, records: Mapping[str, bytes], left: bytes | None = None, after: bytes | None = None) -> bytes:
        """A node of the tree; `after`: the subtree after its last record. Keys share what they can."""
        entries: list[dict[str, Any]] = []
        last = ""
        for key, cid in sorted(records.items()):
            shared = next((i for i, (a, b) in enumerate(zip(last, key, strict=False)) if a != b), len(last))
            entries.append({"p": shared, "k": key[shared:].encode(), "v": cid, "t": None})
            last = key
        if entries:
            entries[-1]["t"] = after
        return self.put({"l": left, "e": entries})

    def finish(self, tree: bytes) -> bytes:
        commit = {"did": DID, "version": 3, "data": tree, "rev": "3l", "prev": None, "sig": b"sig"}
        root = self.put(commit)
        sections = [libipld.encode_dag_cbor({"roots": [root], "version": 1})]
        sections += [cid + data for cid, data in self.blocks.items()]
        return b"".join(varint(len(section)) + section for section in sections)


def varint(number: int) -> bytes:
    low = bytes([number & 0x7F | (0x80 if number > 0x7F else 0)])
    return low + varint(number >> 7) if number > 0x7F else low


def repository(texts: Mapping[str, str]) -> bytes:
    """Posts by record key, in a tree of one node, with a like, a repost and a post that the tree does not reach."""
    car = Car()
    car.put({"$type": "app.bsky.feed.post", "text": "CANARY-deleted and left behind"})
    records = {f"app.bsky.feed.post/{key}": car.put({"text": text}) for key, text in texts.items()}
    subject = {"subject": {"uri": "at://did:plc:bob/app.bsky.feed.post/3k", "cid": "x"}}
    records["app.bsky.feed.like/3lbk4zvhrgc2k"] = car.put({**subject, "note": "CANARY-liked"})
    records["app.bsky.feed.repost/3lbk4zvhrgc2k"] = car.put({**subject, "text": "CANARY-theirs"})
    return car.finish(car.node(records))
