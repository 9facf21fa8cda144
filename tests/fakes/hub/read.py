"""The read side: what the Hub tells of a model, and its files. Source: huggingface_hub 2.4, and huggingface.co."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from tests.fakes.hub.messages import Answer, Request, as_json, refusal
from tests.fakes.hub.repos import Commit, Repo, blob_id, etag, is_large, sha256

if TYPE_CHECKING:
    from tests.fakes.hub.server import FakeHub

Handler = Callable[["FakeHub", Request, "re.Match[str]"], Answer]
Route = tuple[str, "re.Pattern[str]", Handler]

_ID = r"(?P<repo>[^/]+(?:/[^/]+)?)"
_DATE = "2023-01-02T03:04:05.000Z"


def list_models(hub: FakeHub, request: Request, match: re.Match[str]) -> Answer:
    wanted = request.query.get("search", [""])[0].lower()
    repos = [repo for repo in hub.repos.values() if wanted in repo.id.lower() and not repo.head.info.get("private")]
    return as_json([_info(repo, repo.head, with_blobs=False) for repo in repos])


def get_info(hub: FakeHub, request: Request, match: re.Match[str]) -> Answer:
    found = _find(hub, request, match)
    return found if isinstance(found, Answer) else as_json(_info(*found, with_blobs="blobs" in request.query))


def list_tree(hub: FakeHub, request: Request, match: re.Match[str]) -> Answer:
    found = _find(hub, request, match)
    if isinstance(found, Answer):
        return found
    commit, under = found[1], match["under"] or ""
    names = [(file, commit.name_of(file)) for file in commit.files()]
    files = [(file, name) for file, name in names if name.startswith(under and f"{under}/")]
    if request.query.get("recursive", [""])[0].lower() not in ("true", "1"):
        files = [(file, name) for file, name in files if "/" not in name.removeprefix(under and f"{under}/")]
    return as_json([_tree_entry(file, name) for file, name in files])


def get_paths_info(hub: FakeHub, request: Request, match: re.Match[str]) -> Answer:
    found = _find(hub, request, match)
    if isinstance(found, Answer):
        return found
    wanted = parse_qs(request.body.decode()).get("paths", [])
    commit = found[1]
    files = [(file, commit.name_of(file)) for file in commit.files()]
    return as_json([_tree_entry(file, name) for file, name in files if name in wanted])


def list_refs(hub: FakeHub, request: Request, match: re.Match[str]) -> Answer:
    found = _find(hub, request, match)
    if isinstance(found, Answer):
        return found
    repo = found[0]
    branches = [_ref("heads", name, sha) for name, sha in repo.branches.items()]
    tags = [_ref("tags", name, sha) for name, sha in repo.tags.items()]
    return as_json({"branches": branches, "tags": tags, "converts": []})


def list_commits(hub: FakeHub, request: Request, match: re.Match[str]) -> Answer:
    found = _find(hub, request, match)
    if isinstance(found, Answer):
        return found
    repo, last = found
    commits = repo.commits[: repo.commits.index(last) + 1]
    title = {"title": "Commit", "message": "", "authors": [{"user": "ada"}], "date": _DATE}
    return as_json([{"id": commit.sha, **title} for commit in reversed(commits)])


def get_file(hub: FakeHub, request: Request, match: re.Match[str]) -> Answer:
    """Small files come at once (or from the resolve cache); of large ones the answer says where they are."""
    found = _find(hub, request, match, is_file=True)
    if isinstance(found, Answer):
        return found
    repo, commit = found
    file = commit.folder / match["file"]
    if not file.is_file():
        return refusal(404, "EntryNotFound", "Entry not found")
    headers = {"X-Repo-Commit": commit.sha}
    where = f"{repo.id}/resolve/{commit.sha}/{match['file']}"
    if is_large(file):
        headers |= {"X-Linked-ETag": f'"{etag(file)}"', "X-Linked-Size": str(file.stat().st_size)}
        return Answer(302, b"", headers | {"Location": f"{hub.storage}/storage/{where}"})
    if hub.has_resolve_cache:
        headers |= {"X-Linked-ETag": f'"{etag(file)}"', "X-Linked-Size": str(file.stat().st_size)}
        return Answer(307, b"", headers | {"Location": f"/api/resolve-cache/models/{where}"})
    return _content(request, file, headers)


def get_stored(hub: FakeHub, request: Request, match: re.Match[str]) -> Answer:
    """The bytes themselves, which need no token: the address is the secret."""
    repo = hub.repos.get(match["repo"])
    commit = repo and repo.find(match["revision"])
    if not commit or not (commit.folder / match["file"]).is_file():
        return Answer(404)
    cached = {"X-Repo-Commit": commit.sha} if "resolve-cache" in request.path else {}
    return _content(request, commit.folder / match["file"], cached)


READ_ROUTES: tuple[Route, ...] = tuple(
    (method, re.compile(pattern), handler)
    for method, pattern, handler in (
        ("GET", r"/api/models/?", list_models),
        ("GET", rf"/(?:storage|api/resolve-cache/models)/{_ID}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", get_stored),
        ("GET", rf"/api/models/{_ID}/tree/(?P<revision>[^/]+)(?:/(?P<under>.+))?", list_tree),
        ("POST", rf"/api/models/{_ID}/paths-info/(?P<revision>[^/]+)", get_paths_info),
        ("GET", rf"/api/models/{_ID}/refs", list_refs),
        ("GET", rf"/api/models/{_ID}/commits/(?P<revision>[^/]+)", list_commits),
        ("GET", rf"/api/models/{_ID}(?:/revision/(?P<revision>[^/]+))?", get_info),
        ("GET", rf"/{_ID}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", get_file),
    )
)


def _find(
    hub: FakeHub, request: Request, match: re.Match[str], *, is_file: bool = False
) -> tuple[Repo, Commit] | Answer:
    """The commit that the request names, or what the Hub says in its place."""
    name, is_known = match["repo"], hub.tokens.get(request.token or "")
    if new := hub.moved_to(name):
        return Answer(307, b"", {"Location": request.path.replace(name, new, 1)})
    repo = hub.repos.get(name)
    if repo is None or (repo.head.info.get("private") and not is_known):
        # Strangers are told 401, so that the names of private repositories stay private.
        return refusal(401 if is_known is None else 404, "RepoNotFound", "Repository not found")
    if is_file and repo.head.info.get("gated") and not is_known:
        return refusal(401 if is_known is None else 403, "GatedRepo", f"Access to model {name} is restricted.")
    commit = repo.find(match.groupdict().get("revision") or "main")
    return (repo, commit) if commit else refusal(404, "RevisionNotFound", "Invalid rev id")


def _info(repo: Repo, commit: Commit, *, with_blobs: bool) -> dict[str, Any]:
    siblings = [_sibling(commit, file, with_blobs) for file in commit.files()]
    info = {"_id": "0" * 24, "id": repo.id, "modelId": repo.id, "sha": commit.sha, "private": False, "gated": False}
    info |= {"disabled": False, "lastModified": _DATE, "createdAt": _DATE, "downloads": 0, "likes": 0}
    return info | {"tags": ["gpt2"], "siblings": siblings} | commit.info


def _sibling(commit: Commit, file: Path, with_blobs: bool) -> dict[str, Any]:
    entry: dict[str, Any] = {"rfilename": commit.name_of(file)}
    if with_blobs:
        size = file.stat().st_size
        entry |= {"size": size, "blobId": blob_id(file)}
        if is_large(file):
            entry["lfs"] = {"sha256": sha256(file), "size": size, "pointerSize": 134}
    return entry


def _tree_entry(file: Path, name: str) -> dict[str, Any]:
    size = file.stat().st_size
    lfs = {"lfs": {"oid": sha256(file), "size": size, "pointerSize": 134}} if is_large(file) else {}
    return {"type": "file", "oid": blob_id(file), "size": size, "path": name, **lfs}


def _ref(kind: str, name: str, sha: str) -> dict[str, str]:
    return {"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": sha}


def _content(request: Request, file: Path, headers: dict[str, str]) -> Answer:
    """The whole file, or the range that is asked for while the file is still the one that `If-Range` names."""
    content, tag = file.read_bytes(), f'"{etag(file)}"'
    headers = headers | {"ETag": tag, "Accept-Ranges": "bytes", "Content-Type": _kind(file)}
    asked = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("range", ""))
    is_same = request.headers.get("if-range", tag) == tag
    if request.method == "HEAD" or not asked or not (asked[1] or asked[2]) or not is_same:
        return Answer(200, content, headers)
    size = len(content)
    start = int(asked[1]) if asked[1] else max(0, size - int(asked[2]))
    end = min(int(asked[2]) + 1, size) if asked[1] and asked[2] else size
    if start >= end:
        return Answer(416, b"", headers | {"Content-Range": f"bytes */{size}"})
    return Answer(206, content[start:end], headers | {"Content-Range": f"bytes {start}-{end - 1}/{size}"})


def _kind(file: Path) -> str:
    return "text/plain; charset=utf-8" if file.suffix in (".json", ".txt", ".md") else "application/octet-stream"
