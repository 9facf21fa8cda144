"""What a Hub client asks of a list, within bounds, and how the next page of it is asked for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import quote, urlencode

from fastapi import Request

from serve.api.hub_json import COMMON_TAGS, PROPERTIES
from serve.errors import InvalidRequest
from serve.types import ModelInfo

_PAGE, _FULL_PAGE = 1000, 100  # models on one page of the list; of those whose files are read, too
_MAX_TAGS = 16
_HOST = re.compile(r"[A-Za-z0-9._\[\]:-]{1,255}", re.ASCII)
_TIME_AND_ID = re.compile(r"(-?[0-9]{1,12})\.([A-Za-z0-9._/-]{1,256})", re.ASCII)
_FILTERS = ("filter", "tags", "tags[]", "library", "pipeline_tag", "apps", "inference_provider", "trained_dataset")

# What we do not count is the same for all, so that the order of ids is one by it.
_IS_BY_TIME = dict.fromkeys(("createdAt", "created_at", "lastModified", "last_modified"), True)
_IS_BY_TIME |= dict.fromkeys(("", "downloads", "likes", "likes7d", "trendingScore", "trending_score", "id"), False)


@dataclass(frozen=True, slots=True)
class ListQuery:
    """One page of the models. `tags` None: no model here can fit."""

    limit: int
    tags: tuple[str, ...] | None
    newest_first: bool
    after: str | None  # of the page before: the last one's id
    older_than: tuple[int, str] | None  # or, by time, when it was made and its id
    search: str | None
    author: str | None
    expand: tuple[str, ...]  # to be told alone
    properties: tuple[str, ...]  # to be told besides

    @classmethod
    def read(cls, request: Request) -> ListQuery:
        """Raises: InvalidRequest."""
        asked = request.query_params
        expand, properties = read_expand(request), _read_properties(request)
        newest_first = _read_sort(request)
        cursor = asked.get("cursor") or None
        return cls(
            limit=min(_read_limit(request), _FULL_PAGE if expand or properties else _PAGE),
            tags=_read_tags(request),
            newest_first=newest_first,
            after=None if newest_first else cursor,
            older_than=_read_time_and_id(cursor) if newest_first and cursor else None,
            search=asked.get("search") or None,
            author=asked.get("author") or None,
            expand=expand,
            properties=properties,
        )

    def cursor_after(self, info: ModelInfo) -> str:
        """That of the page which begins behind `info`."""
        return f"{info.created_at}.{info.model_id}" if self.newest_first else info.model_id


def read_expand(request: Request) -> tuple[str, ...]:
    """The properties to tell alone. Raises: InvalidRequest."""
    asked = request.query_params
    names = [name for key in ("expand", "expand[]") for name in asked.getlist(key) if name]
    if not all(name in PROPERTIES for name in names):
        raise InvalidRequest(f"'expand' takes {', '.join(PROPERTIES)}.", param="expand")
    return tuple(dict.fromkeys(names))


def flag(request: Request, name: str) -> bool:
    """Whether the address says so."""
    return any(map(is_true, request.query_params.getlist(name)))


def is_true(value: str) -> bool:
    """In any of the ways in which clients write it."""
    return value.lower() in ("1", "true", "yes", "on")


def next_page(request: Request, cursor: str) -> dict[str, str]:
    """The header that names it, at the address that the caller used. Raises: InvalidRequest for a strange one."""
    host, forwarded = request.headers.get("host", ""), request.headers.get("x-forwarded-proto", "")
    if not _HOST.fullmatch(host):
        raise InvalidRequest("The 'Host' header is no host, so the next page has no address.")
    scheme = forwarded.partition(",")[0].strip().lower()  # each proxy adds its own behind those before
    scheme = scheme if scheme in ("http", "https") else request.url.scheme
    asked = [(key, value) for key, value in request.query_params.multi_items() if key != "cursor"]
    path = f"{quote(request.url.path)}?{urlencode([*asked, ('cursor', cursor)])}"
    return {"link": f'<{scheme}://{host}{path}>; rel="next"'}


def _read_properties(request: Request) -> tuple[str, ...]:
    parts = [name for name in ("cardData", "config") if flag(request, name)]
    return (*parts, *(("siblings", "tags") if flag(request, "full") else ()))


def _read_limit(request: Request) -> int:
    said = request.query_params.get("limit") or str(_PAGE)
    if not re.fullmatch(r"[0-9]{1,9}", said, re.ASCII):
        raise InvalidRequest("'limit' must be a whole number.", param="limit")
    return int(said)


def _read_sort(request: Request) -> bool:
    """Whether the newest come first."""
    by, direction = request.query_params.get("sort", ""), request.query_params.get("direction", "-1")
    if by not in _IS_BY_TIME:
        raise InvalidRequest("'sort' takes createdAt, lastModified, downloads, likes or trendingScore.", param="sort")
    if _IS_BY_TIME[by] and direction not in ("-1", ""):
        raise InvalidRequest("By time, models are listed newest first: 'direction' must be -1.", param="direction")
    return _IS_BY_TIME[by]


def _read_time_and_id(cursor: str) -> tuple[int, str]:
    match = _TIME_AND_ID.fullmatch(cursor)
    if match is None:
        raise InvalidRequest("'cursor' must be the one in the 'Link' header of the page before.", param="cursor")
    return int(match[1]), match[2]


def _read_tags(request: Request) -> tuple[str, ...] | None:
    """The tags that a model must have, without those that all have."""
    asked = request.query_params
    if asked.get("num_parameters"):
        raise InvalidRequest("Models cannot be chosen by 'num_parameters' here.", param="num_parameters")
    said = (tag.strip() for name in _FILTERS for value in asked.getlist(name) for tag in value.split(","))
    tags = tuple(dict.fromkeys(tag for tag in said if tag and tag not in COMMON_TAGS))
    if len(tags) > _MAX_TAGS:
        raise InvalidRequest(f"Models can be chosen by at most {_MAX_TAGS} tags at once.", param="filter")
    return None if is_true(asked.get("gated", "")) or asked.get("inference") else tags
