"""The files of models, as Hub clients list and fetch them.

They are served under the whole hash of their revision alone; other names are redirected there, so what a client has
learnt of a file and the bytes it then gets are of one revision.
"""

from __future__ import annotations

from urllib.parse import quote

from fastapi import Request
from starlette.responses import Response

from serve.api.body import read_fields
from serve.api.caching import cache_control
from serve.api.downloads import FileReply
from serve.api.hub_json import Tree, etag, last_commit_json
from serve.api.hub_query import flag, is_true, next_page
from serve.api.hub_repos import Repos, commit_headers, split_revision
from serve.api.hub_route import EntryNotFound
from serve.api.service import Service
from serve.api.status import json_reply
from serve.errors import InvalidRequest
from serve.types import ModelInfo, RepoFile

_PAGE = 1000  # entries of a tree
_MAX_PATHS = 1000

# NOTE: nothing here may run as a page: cards and names come from strangers.
_PLAIN = "text/plain; charset=utf-8"
_TYPES = {".json": "application/json", ".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg"}
_TYPES |= dict.fromkeys((".md", ".txt", ".html", ".htm", ".svg", ".xml", ".js", ".css", ".csv", ".py", ".yaml"), _PLAIN)
_GUARDS = {"content-security-policy": "default-src 'none'; sandbox"}


class Trees:
    """What a revision has, as git sees it."""

    def __init__(self, repos: Repos, service: Service) -> None:
        self._repos, self._service = repos, service

    async def list_tree(self, model: str, rest: str, request: Request) -> Response:
        """What is in one folder, or below it."""
        return await self._repos.in_thread(self._list, model, rest, request)

    async def look_up_paths(self, model: str, revision: str, request: Request) -> Response:
        """Those of some paths that there are."""
        fields = await read_fields(request, self._service)
        paths = [path.strip("/") for path in fields.get("paths", ())]
        if len(paths) > _MAX_PATHS:
            raise InvalidRequest(f"At most {_MAX_PATHS} 'paths' are looked up at once.", param="paths")
        is_expanded = any(map(is_true, fields.get("expand", ())))
        return await self._repos.in_thread(self._look_up, model, revision, paths, is_expanded, request)

    def _list(self, model: str, rest: str, request: Request) -> Response:
        revision, path = split_revision(rest)
        info = self._repos.find(request, model, revision)
        tree, folder = Tree(self._repos.list_files(info)), path.strip("/")
        if not tree.has_folder(folder):
            raise EntryNotFound(f"'{info.model_id}' has no such folder.", info.revision)
        after = request.query_params.get("cursor", "")
        found = tree.below(folder, is_recursive=flag(request, "recursive"))
        start = found.index(after) + 1 if after in found else 0
        page = found[start : start + _PAGE]
        commit = last_commit_json(info) if flag(request, "expand") else None
        link = next_page(request, page[-1]) if start + _PAGE < len(found) else {}
        return json_reply([tree.entry_json(one, commit) for one in page], headers=commit_headers(info) | link)

    def _look_up(self, model: str, revision: str, paths: list[str], is_expanded: bool, request: Request) -> Response:
        info = self._repos.find(request, model, revision)
        tree = Tree(self._repos.list_files(info))
        commit = last_commit_json(info) if is_expanded else None
        found = [tree.entry_json(path, commit) for path in dict.fromkeys(paths) if path in tree]
        return json_reply(found, headers=commit_headers(info))


class Downloads:
    """The files themselves."""

    def __init__(self, repos: Repos) -> None:
        self._repos = repos

    async def resolve(self, model: str, rest: str, request: Request) -> Response:
        """The file under its revision's whole hash; under another name, the way there."""
        return await self._repos.in_thread(self._resolve, model, rest, request)

    async def read_raw(self, model: str, rest: str, request: Request) -> Response:
        """What git would hold: of a large file, the pointer to it."""
        return await self._repos.in_thread(self._read_raw, model, rest, request)

    def _resolve(self, model: str, rest: str, request: Request) -> Response:
        revision, name = split_revision(rest)
        info, file = self._repos.find_file(request, model, revision, name)
        if revision == info.revision:
            return _reply(info, file, cache_control(revision, is_private=info.is_private))
        place = f"/{quote(info.model_id)}/resolve/{quote(info.revision)}/{quote(name)}"
        where = {"location": request.scope.get("root_path", "") + place, "cache-control": "no-cache"}
        return Response(None, 307, _headers(info, file) | where)

    def _read_raw(self, model: str, rest: str, request: Request) -> Response:
        revision, name = split_revision(rest)
        info, file = self._repos.find_file(request, model, revision, name)
        caching = cache_control(revision, is_private=info.is_private)
        if not file.sha256:
            return _reply(info, file, caching)
        return Response(file.lfs_pointer, 200, commit_headers(info) | _GUARDS | {"cache-control": caching}, _PLAIN)


def _reply(info: ModelInfo, file: RepoFile, caching: str) -> Response:
    headers = _headers(info, file) | {
        "cache-control": caching,
        "content-disposition": f"inline; filename*=UTF-8''{quote(file.location.name, safe='')}",
        "content-type": _TYPES.get(file.location.suffix.lower(), "application/octet-stream"),
    }
    try:
        return FileReply(file.open(), headers)
    except FileNotFoundError as exc:
        raise EntryNotFound("The model has just been deleted.", info.revision) from exc


def _headers(info: ModelInfo, file: RepoFile) -> dict[str, str]:
    name = f'"{etag(file)}"'
    linked = {"x-linked-etag": name, "x-linked-size": str(file.num_bytes)}
    return commit_headers(info) | _GUARDS | {"etag": name} | linked
