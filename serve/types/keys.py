"""API keys, what each opens, whose work is whose, and how much a key may ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol


class Scope(StrEnum):
    """What a key may do. `admin` includes all others; none of the others includes another one."""

    GENERATE = "generate"  # have texts written
    READ = "read"  # list and look: models, files, jobs
    TRAIN = "train"  # upload, train, publish, change and delete one's own
    ADMIN = "admin"  # see and change everybody's; operate the server


@dataclass(frozen=True, slots=True)
class KeyLimits:
    """How much a key may ask for; None: as the server's settings say."""

    requests_per_s: float | None = None
    tokens_per_min: int | None = None  # of prompts and texts together
    in_flight: int | None = None  # generations at once
    jobs: int | None = None  # that have not ended
    storage_bytes: int | None = None  # of files and models


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One key as the server knows it, which is not enough to use it.

    `tenant`: whose the things are that are made with it; keys of one tenant see the same. A rotated key keeps its id,
    its tenant and its limits.
    """

    id: str  # "key-..."
    name: str
    tenant: str
    scopes: frozenset[Scope]
    created_at: int  # Unix seconds
    limits: KeyLimits = KeyLimits()
    expires_at: int | None = None
    revoked_at: int | None = None
    last_used_at: int | None = None  # to the minute


@dataclass(frozen=True, slots=True)
class Viewer:
    """Whose eyes look at models: private ones are there for their tenant, and for whoever sees all."""

    tenant: str = ""  # "": a stranger
    sees_all: bool = False

    def may_see(self, owner: str, is_private: bool) -> bool:
        """Whether a model of the tenant `owner` exists for them."""
        return not is_private or self.may_change(owner)

    def may_change(self, owner: str) -> bool:
        """Whether it is theirs to change: their tenant's, or whoever's for those who see all."""
        return self.sees_all or (self.tenant != "" and self.tenant == owner)


EVERYBODY = Viewer()
ALL_SEEING = Viewer(sees_all=True)


class Keys(Protocol):
    """The keys of a server. Cheap: what it reads it remembers for a second."""

    @property
    def are_needed(self) -> bool:
        """Whether any key was ever made. Then nobody without one is let in, even when all are revoked."""
        ...

    def find(self, sent: str) -> ApiKey | None:
        """The key that this text is, where it is neither revoked nor expired. Compares in constant time."""
        ...

    def list_keys(self) -> Sequence[ApiKey]:
        """All that were ever made, the oldest first."""
        ...
