"""OpenAI's lists: a page of objects with ids, and how to ask for the next one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, TypeVar

from fastapi import Path, Query

from serve.errors import NotFound
from serve.types import Page

T = TypeVar("T")

# The last id of the page before, and an id in a path. None has other characters, and no database need see them.
After = Annotated[str | None, Query(max_length=256, pattern="^[!-~]*$")]
PathId = Annotated[str, Path(max_length=128, pattern="^[!-~]+$")]


def as_list(data: Sequence[dict[str, Any]], has_more: bool = False) -> dict[str, Any]:
    """OpenAI's page of a list."""
    ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": None, "last_id": None}
    return {"object": "list", "data": data, "has_more": has_more, **ends}


def page_of(items: Sequence[T], ids: Sequence[str], limit: int, after: str | None) -> Page[T]:
    """A page of what is in memory whole. Raises: NotFound when nothing is called `after`."""
    if after is not None and after not in ids:
        raise NotFound("Nothing in this list has the id that 'after' names.", param="after")
    start = 0 if after is None else ids.index(after) + 1
    return Page(tuple(items[start : start + limit]), start + limit < len(items))
