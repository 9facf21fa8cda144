"""The read side of the Hugging Face Hub's API over our own models, as its unmodified clients ask for it.

    /api/models, /api/models/{id}, and what is below it     models, files and versions, as JSON
    /{id}/resolve/{revision}/{file}, /{id}/raw/...          the files themselves

What is not here is not fetched from the Hub on its account. A revision may be called by an alias, as git calls that,
by its hash or by how that begins. Nothing is written but who meets a model.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from serve.api.access import Access, sent_key
from serve.api.body import Body, read_json
from serve.api.hub_files import Downloads, Trees
from serve.api.hub_json import (
    LIBRARY,
    PIPELINE_TAG,
    PROPERTIES,
    Repo,
    commit_json,
    details_json,
    expanded_json,
    iso_time,
    sibling_json,
    summary_json,
)
from serve.api.hub_query import ListQuery, flag, next_page, read_expand
from serve.api.hub_repos import Repos, commit_headers
from serve.api.hub_route import HubRoute, RepoNotFound
from serve.api.service import Service
from serve.api.status import KeyNeeded, MethodNotAllowed, json_reply
from serve.errors import InvalidRequest, ModelNotFound, NotFound
from serve.types import ModelInfo, Scope, Visibility

_MODEL = "/api/models/{model:path}"

# Below every model, and the same for each.
_SAME_FOR_ALL: dict[str, Any] = {
    "auth-check": {},
    "likers": [],
    "discussions": {"discussions": [], "count": 0, "start": 0, "numClosedDiscussions": 0},
}


class SettingsBody(Body):
    private: bool | None = None
    visibility: Annotated[Visibility, Field(strict=False)] | None = None
    gated: bool | str | None = None


def router(service: Service) -> APIRouter:
    """/api and the files of models. Its paths begin with any model's name, so it comes after all other routers."""
    routes = APIRouter(route_class=HubRoute, include_in_schema=False)
    repos = Repos(service)
    models, trees, downloads = Models(service, repos), Trees(repos, service), Downloads(repos)
    read = partial(routes.add_api_route, dependencies=service.access.needs(Scope.READ))
    changes = service.access.needs(Scope.TRAIN)

    # The first that fits answers, and a model may be called like a word in a path: the longer ones come first.
    read("/api/models", models.list_models)
    read("/api/models-tags-by-type", list_tags)
    for kind in ("datasets", "spaces", "kernels"):
        read(f"/api/{kind}", list_nothing)
        read(f"/api/{kind}/{{rest:path}}", find_nothing)
    routes.add_api_route("/api/whoami-v2", Account(service.access).who_am_i)
    read(f"{_MODEL}/tree/{{rest:path}}", trees.list_tree)
    read(f"{_MODEL}/paths-info/{{revision:path}}", trees.look_up_paths, methods=["POST"])
    read(f"{_MODEL}/refs", models.list_refs)
    read(f"{_MODEL}/commits/{{revision:path}}", models.list_commits)
    read(f"{_MODEL}/discussions/{{number:int}}", models.find_no_discussion)
    routes.add_api_route(f"{_MODEL}/settings", models.change_settings, methods=["PUT"], dependencies=changes)
    read(f"{_MODEL}/{{word}}", models.read_small)
    read(_MODEL, models.retrieve_model)
    read("/{model:path}/resolve/{rest:path}", downloads.resolve, methods=["GET", "HEAD"])
    read("/{model:path}/raw/{rest:path}", downloads.read_raw, methods=["GET", "HEAD"])
    read("/api/{rest:path}", refuse_to_write, methods=["POST", "PUT", "PATCH", "DELETE"])
    read("/{model:path}.git/{rest:path}", refuse_to_write, methods=["POST"])
    return routes


class Models:
    """The list of models, and what there is to know of one."""

    def __init__(self, service: Service, repos: Repos) -> None:
        self._catalogue, self._access, self._service = service.catalogue, service.access, service
        self._repos = repos

    # --- The list -----------------------------------------------------------------------------------------

    async def list_models(self, request: Request) -> Response:
        return await self._repos.in_thread(self._list, ListQuery.read(request), request)

    def _list(self, asked: ListQuery, request: Request) -> Response:
        if asked.tags is None or asked.limit == 0:
            return json_reply([])
        page = self._catalogue.list_models(
            limit=asked.limit,
            after=asked.after,
            older_than=asked.older_than,
            query=asked.search,
            owner=asked.author,
            tags=asked.tags,
            newest_first=asked.newest_first,
            viewer=self._access.caller(request).viewer,
        )
        found = [entry for info in page.items if (entry := self._entry(info, asked)) is not None]
        link = next_page(request, asked.cursor_after(page.items[-1])) if page.has_more else {}
        return json_reply(found, headers=link)

    def _entry(self, info: ModelInfo, asked: ListQuery) -> dict[str, Any] | None:
        repo = Repo(info, self._catalogue)
        try:
            if asked.expand:
                return expanded_json(repo, asked.expand)
            return summary_json(info) | {name: PROPERTIES[name](repo) for name in asked.properties}
        except ModelNotFound:
            return None  # deleted since

    # --- One model ----------------------------------------------------------------------------------------

    async def retrieve_model(self, model: str, request: Request) -> Response:
        return await self._repos.in_thread(self._retrieve, model, request)

    def _retrieve(self, model: str, request: Request) -> Response:
        expand = read_expand(request)
        name, separator, revision = model.rpartition("/revision/")
        info = self._repos.find(request, name, revision) if separator else self._repos.find(request, model)
        repo = Repo(info, self._catalogue)
        found = expanded_json(repo, expand) if expand else self._details(repo, request)
        return json_reply(found, headers=commit_headers(info))

    def _details(self, repo: Repo, request: Request) -> dict[str, Any]:
        found = details_json(repo)
        if flag(request, "blobs"):
            found["siblings"] = [sibling_json(file) for file in self._repos.list_files(repo.info)]
        if flag(request, "securityStatus"):
            found["securityRepoStatus"] = {"scansDone": False, "filesWithIssues": []}
        return found

    async def read_small(self, model: str, word: str, request: Request) -> Response:
        """Of a model that the caller may see. And the bot called as such a thing is."""
        return await self._repos.in_thread(self._read_small, model, word, request)

    def _read_small(self, model: str, word: str, request: Request) -> Response:
        if word not in _SAME_FOR_ALL or self._repos.has(request, f"{model}/{word}"):
            return self._retrieve(f"{model}/{word}", request)
        self._repos.find(request, model)
        return json_reply(_SAME_FOR_ALL[word])

    async def find_no_discussion(self, model: str, number: int, request: Request) -> Response:
        await self._repos.in_thread(self._repos.find, request, model)
        raise NotFound("Nothing is discussed here.")

    async def change_settings(self, model: str, request: Request) -> Response:
        body = await read_json(request, SettingsBody, self._service)
        if body.gated or (body.private is None and body.visibility is None):
            raise InvalidRequest(
                "All that can be set of a model is who meets it: 'private' or 'visibility'.", param="private"
            )
        visibility = body.visibility or (Visibility.PRIVATE if body.private else Visibility.PUBLIC)
        info = await self._repos.in_thread(self._repos.find, request, model)
        viewer = self._access.caller(request).viewer
        await self._repos.in_thread(self._catalogue.set_visibility, info.model_id, visibility, viewer)
        return json_reply({"private": visibility is Visibility.PRIVATE, "visibility": visibility.value})

    # --- Its versions -------------------------------------------------------------------------------------

    async def list_refs(self, model: str, request: Request) -> Response:
        return await self._repos.in_thread(self._list_refs, model, request)

    def _list_refs(self, model: str, request: Request) -> Response:
        if self._repos.has(request, f"{model}/refs"):  # the bot of @refs
            return self._retrieve(f"{model}/refs", request)
        aliases = self._catalogue.list_aliases(self._repos.find(request, model).model_id)
        tags = [_ref("tags", name, aliases[name]) for name in sorted(aliases) if name != "main"]
        branches = [_ref("heads", "main", aliases["main"])] if "main" in aliases else []
        refs = {"branches": branches, "converts": [], "tags": tags}
        return json_reply(refs | ({"pullRequests": []} if flag(request, "include_prs") else {}))

    async def list_commits(self, model: str, revision: str, request: Request) -> Response:
        return await self._repos.in_thread(self._list_commits, model, revision, request)

    def _list_commits(self, model: str, revision: str, request: Request) -> Response:
        info = self._repos.find(request, model, revision)
        found = self._catalogue.list_revisions(info.model_id)
        names = [one.revision for one in found]
        start = names.index(info.revision) if info.revision in names else 0
        # A checkpoint is nobody's past; the one that was asked for heads its own list.
        listed = [one for i, one in enumerate(found[start:]) if i == 0 or one.step is None]
        is_formatted = "formatted" in request.query_params.getlist("expand[]")
        commits = [commit_json(one, info.owned_by, is_formatted=is_formatted) for one in listed]
        return json_reply(commits, headers=commit_headers(info))


class Account:
    """Who a key belongs to: always the same one."""

    def __init__(self, access: Access) -> None:
        self._access = access

    async def who_am_i(self, request: Request) -> Response:
        key = self._access.caller(request).key
        if not sent_key(request) or (key is None and self._access.needs_keys):
            raise KeyNeeded("Invalid credentials in Authorization header")  # the Hub's words, which clients know
        token = {"displayName": "rookery", "role": "read", "createdAt": iso_time(0)}
        return json_reply(
            {
                "type": "user",
                "id": "rookery",
                "name": "rookery",
                "fullname": "Rookery",
                "email": None,
                "emailVerified": False,
                "canPay": False,
                "isPro": False,
                "periodEnd": None,
                "avatarUrl": "",
                "orgs": [],
                "auth": {"type": "access_token", "accessToken": token},
            }
        )


async def list_tags() -> Response:
    """Those that clients complete names by."""
    return json_reply(
        {
            "pipeline_tag": [_tag("pipeline_tag", PIPELINE_TAG, "Text Generation")],
            "library": [_tag("library", LIBRARY, "Transformers"), _tag("library", "safetensors", "Safetensors")],
            **{kind: [] for kind in ("dataset", "language", "license", "region")},
            "other": [_tag("other", "gpt2", "gpt2"), _tag("other", "huggingtweets", "huggingtweets")],
        }
    )


async def list_nothing() -> Response:
    return json_reply([])


async def find_nothing() -> Response:
    raise RepoNotFound("There are only models here.")


async def refuse_to_write() -> Response:
    raise MethodNotAllowed("This Hub is read-only: its models come from training, 'rookery import' and 'rookery pull'.")


def _tag(kind: str, name: str, label: str) -> dict[str, str]:
    return {"type": kind, "id": name, "label": label}


def _ref(kind: str, name: str, revision: str) -> dict[str, str]:
    return {"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": revision}
