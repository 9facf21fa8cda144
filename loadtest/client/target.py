"""Whom a load test asks, and how that server is spoken to where it differs from what the plan says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from loadtest.traffic.plan import Api


@dataclass(frozen=True, slots=True)
class Target:
    """`api`: instead of the flows' own. `extra`: goes into each body; a field of None is left out of it."""

    url: str
    name: str = "rookery"
    key: str = ""
    api: Api | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def at(self, path: str) -> str:
        """The whole address of `path`, which begins with a slash."""
        return self.url.rstrip("/") + path
