"""What caches may keep of a model, and what a client has already."""

from __future__ import annotations

import re

_WHOLE_REVISION = re.compile(r"[0-9a-f]{40}")


def cache_control(revision: str | None, *, is_private: bool) -> str:
    """Of what was asked for under `revision`: its whole hash names it for ever, anything else may name another soon."""
    if _WHOLE_REVISION.fullmatch(revision or ""):
        return f"{'private' if is_private else 'public'}, max-age=31536000, immutable"
    return "private, no-cache" if is_private else "no-cache"


def is_known(if_none_match: str | None, etag: str) -> bool:
    """Whether the header names `etag`, by the weak comparison."""
    known = {tag.strip().removeprefix("W/") for tag in (if_none_match or "").split(",")}
    return etag in known or "*" in known
