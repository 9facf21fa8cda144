"""Small archives for tests, made in every format that users have."""

from __future__ import annotations

import gzip
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


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


def write_lines(path: Path, records: Sequence[Any]) -> Path:
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return path
