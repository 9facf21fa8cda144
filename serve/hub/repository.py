"""What a Hub says of one commit of a model: the answer to GET /api/models/{id}/revision/{revision}?blobs=true, checked.

Nothing of it is believed further than its form: sizes and digests are what the files must have when they come.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from serve.errors import ModelNotFound, StoreUnavailable
from serve.store.convert import SHARD_NAME
from serve.store.model_files import LOOKS, MODEL_FILES, WEIGHT_FILES
from serve.store.revisions import MAIN
from serve.types import ModelId

COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_TAGS = 50


@dataclass(frozen=True, slots=True)
class HubFile:
    """As the Hub describes it: git's `blob_id`, and of a large file the `sha256`."""

    name: str
    num_bytes: int | None
    sha256: str | None
    blob_id: str | None


@dataclass(frozen=True, slots=True)
class Repository:
    """`model_id`: how the model is to be spelled here; `hub_id`: where its files are. `files`: those we could want."""

    model_id: str
    hub_id: str
    sha: str
    files: Mapping[str, HubFile]
    is_private: bool
    is_disabled: bool
    created_at: int
    base_model: str | None
    tags: tuple[str, ...]

    @classmethod
    def parse(cls, said: Any, wanted: ModelId) -> Repository:
        """Raises: StoreUnavailable when it is not what a Hub answers."""
        try:
            return cls._parse(said, wanted)
        except (ValueError, KeyError, TypeError, AttributeError, ModelNotFound) as exc:
            raise StoreUnavailable(f"The Hub's answer about '{wanted}' is not readable.", retry_after_s=60) from exc

    @classmethod
    def _parse(cls, said: Any, wanted: ModelId) -> Repository:
        hub_id, sha = said["id"], said["sha"]
        ModelId.parse(hub_id)  # it becomes a part of addresses
        if not COMMIT.fullmatch(sha) or (COMMIT.fullmatch(wanted.revision or "") and sha != wanted.revision):
            raise ValueError("the answer names no commit, or another than was asked for")
        is_disabled = bool(said.get("disabled"))
        siblings = [] if is_disabled else said["siblings"]
        base_model = (said.get("cardData") or {}).get("base_model")
        return cls(
            # The Hub's own spelling, except where it has renamed the model: it stays what it was asked for.
            model_id=hub_id if hub_id.lower() == str(wanted).lower() else str(wanted),
            hub_id=hub_id,
            sha=sha,
            files={file.name: file for file in map(_parse_file, siblings) if _is_wanted(file.name)},
            is_private=bool(said.get("private") or said.get("gated")),
            is_disabled=is_disabled,
            created_at=_parse_time(said.get("lastModified")),
            base_model=base_model if isinstance(base_model, str) else None,
            tags=tuple(tag for tag in said.get("tags") or () if isinstance(tag, str))[:_MAX_TAGS],
        )

    @property
    def is_complete(self) -> bool:
        """Whether every file has a size and a digest to be checked by."""
        return all(file.num_bytes is not None and (file.sha256 or file.blob_id) for file in self.files.values())

    def alias_for(self, revision: str | None) -> str | None:
        """The alias by which the commit was asked for; None where it was by how the commit begins."""
        revision = revision or MAIN
        return None if len(revision) >= 7 and self.sha.startswith(revision.lower()) else revision

    @property
    def provenance(self) -> dict[str, Any]:
        """What is written beside the files."""
        return {
            "source": "hub",
            "hub_id": self.hub_id,
            "hub_revision": self.sha,
            "created_at": self.created_at,
            "base_model": self.base_model,
            "tags": list(self.tags),
        }


def _is_wanted(name: str) -> bool:
    return name in (*MODEL_FILES, *WEIGHT_FILES, *LOOKS) or bool(SHARD_NAME.fullmatch(name))


def _parse_file(said: Any) -> HubFile:
    large = said.get("lfs") or {}
    name, num_bytes = said["rfilename"], said.get("size", large.get("size"))
    if not isinstance(name, str) or not (num_bytes is None or (type(num_bytes) is int and num_bytes >= 0)):
        raise ValueError("a file has no name, or no number as its size")
    return HubFile(name, num_bytes, _digest(_SHA256, large.get("sha256")), _digest(COMMIT, said.get("blobId")))


def _digest(form: re.Pattern[str], said: Any) -> str | None:
    return said if isinstance(said, str) and form.fullmatch(said) else None


def _parse_time(said: Any) -> int:
    try:
        return int(datetime.fromisoformat(said).timestamp())
    except (ValueError, TypeError, OverflowError):
        return int(time.time())
