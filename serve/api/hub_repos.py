"""Finding the model, the revision and the file that a Hub client names, for the caller who asks."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import anyio
import anyio.to_thread
from fastapi import Request

from serve.api.hub_route import EntryNotFound, RepoNotFound, RevisionNotFound
from serve.api.service import Service
from serve.errors import ModelNotFound, NotFound
from serve.types import ModelId, ModelInfo, RepoFile

T = TypeVar("T")

_MAX_THREADS = 16
_REFS = ("refs/heads/", "refs/tags/")
_REVISION_AND_PATH = re.compile(r"(refs/[^/]*/[^/]*|[^/]*)/?(.*)", re.DOTALL)


class Repos:
    """The catalogue as a Hub client sees it. All but `in_thread` blocks."""

    def __init__(self, service: Service) -> None:
        self._catalogue, self._access = service.catalogue, service.access
        self._limiter = anyio.CapacityLimiter(_MAX_THREADS)

    async def in_thread(self, read: Callable[..., T], *arguments: object) -> T:
        """In one of the Hub's own: who waits for the digests of a large file must not hold up all other routes."""
        return await anyio.to_thread.run_sync(partial(read, *arguments), limiter=self._limiter)

    def find(self, request: Request, model: str, revision: str | None = None) -> ModelInfo:
        """The model, or one revision of it. Raises: RepoNotFound, RevisionNotFound."""
        name = _model_name(model)
        named = name if revision is None else f"{name}@{_short(revision)}"
        try:
            return self._access.find_model(self._catalogue, named, request)
        except ModelNotFound as exc:
            if revision is not None and self.has(request, name):
                raise RevisionNotFound(f"'{name}' has no such revision here.") from exc
            raise RepoNotFound("There is no such model here.") from exc

    def has(self, request: Request, model: str) -> bool:
        """Whether the caller may see a model of that name."""
        try:
            self._access.find_model(self._catalogue, model, request)
        except ModelNotFound:
            return False
        return True

    def find_file(self, request: Request, model: str, revision: str, name: str) -> tuple[ModelInfo, RepoFile]:
        """With its digests. Raises: RepoNotFound, RevisionNotFound, EntryNotFound."""
        info = self.find(request, model, revision)
        try:
            return info, self._catalogue.find_file(f"{info.model_id}@{info.revision}", name)
        except NotFound as exc:
            raise EntryNotFound(f"'{info.model_id}' has no such file in this revision.", info.revision) from exc

    def list_files(self, info: ModelInfo) -> tuple[RepoFile, ...]:
        """With their digests."""
        return self._catalogue.list_files(f"{info.model_id}@{info.revision}", with_digests=True)


def split_revision(rest: str) -> tuple[str, str]:
    """What stands behind `/tree/` or `/resolve/`: a revision, whose slashes are those of git's refs, and a path."""
    match = _REVISION_AND_PATH.fullmatch(rest)
    assert match is not None
    return match[1], match[2]


def commit_headers(info: ModelInfo) -> dict[str, str]:
    """Which revision an answer is about."""
    return {"x-repo-commit": info.revision}


def _model_name(model: str) -> str:
    try:
        whole = ModelId.parse(model)
    except ModelNotFound as exc:
        raise RepoNotFound("There is no such model here.") from exc
    if whole.revision:
        raise RepoNotFound("There is no such model here; a revision does not belong into its name.")
    return str(whole)


def _short(revision: str) -> str:
    """As we call it: without git's `refs/heads/` or `refs/tags/`."""
    return next((revision.removeprefix(ref) for ref in _REFS if revision.startswith(ref)), revision)
