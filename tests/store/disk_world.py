"""A data folder for the index's tests: what is done to it, what lies there, and what is listed of it."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TypedDict, Unpack

from serve.errors import ModelNotFound
from serve.store.revisions import Store
from serve.types import ALL_SEEING, ModelInfo, Viewer, Visibility

EVERYTHING = 10_000


class Disk:
    """A data folder, and two stores on it, as two processes have them."""

    def __init__(self, root: Path, tiny: Path) -> None:
        self.models, self._tiny = root / "data/models", tiny
        self.embedded = {"base/fledgling": shutil.copytree(tiny, root / "fledgling")}
        self.stores = [Store(root / "data", embedded=self.embedded) for _ in range(2)]

    def publish(self, model_id: str, *, number: int = 0, by: int = 0, tenant: str = "", **facts: object) -> str:
        folder = shutil.copytree(self._tiny, self.stores[by].stage(), dirs_exist_ok=True)
        facts = {"created_at": 1_700_000_000 + number, **facts}
        (folder / "rookery.json").write_text(json.dumps({"number": number, **facts}))
        alias = None if "checkpoint_step" in facts else "main"
        return (
            self.stores[by].publish(model_id, folder, alias=alias, viewer=Viewer(tenant, sees_all=not tenant)).revision
        )

    def put(self, model_id: str, **facts: object) -> None:
        home = self.models / model_id
        home.mkdir(parents=True, exist_ok=True)
        shutil.copytree(self._tiny, home, dirs_exist_ok=True)
        (home / "rookery.json").write_text(json.dumps({"created_at": 1_600_000_000, **facts}))

    def take(self, model_id: str) -> None:
        shutil.rmtree(self.models / model_id)

    def truth(self) -> list[ModelInfo]:
        """By the folders alone."""
        homes = [home for space in self.models.iterdir() if space.name[0] != "." for home in space.iterdir()]
        ids = {f"{home.parent.name}/{home.name}".removeprefix("_/") for home in homes} | self.embedded.keys()
        found = {}
        for model_id in ids:
            with contextlib.suppress(ModelNotFound):
                info = self.stores[0].get_model(model_id)
                found[info.model_id] = info
        return [found[model_id] for model_id in sorted(found)]

    def check(self, **wanted: Unpack[Wanted]) -> None:
        """Both stores list the truth, in both orders."""
        truth = [info for info in self.truth() if _is_wanted(info, **wanted)]
        for store in self.stores:
            listed = list_all(store, **wanted)
            assert [(i.model_id, i.revision) for i in listed] == [(i.model_id, i.revision) for i in truth]
            assert listed == truth
            newest = sorted(truth, key=lambda info: (info.created_at, info.model_id), reverse=True)
            assert list_all(store, newest_first=True, **wanted) == newest


class Wanted(TypedDict, total=False):
    """What a catalogue can be asked for, besides a place in it."""

    query: str
    owner: str | None
    tags: tuple[str, ...]
    viewer: Viewer


def _is_wanted(
    info: ModelInfo,
    query: str = "",
    owner: str | None = None,
    tags: tuple[str, ...] = (),
    viewer: Viewer = ALL_SEEING,
) -> bool:
    return (
        query.lower() in info.model_id.lower()
        and (owner is None or info.model_id.lower().startswith(f"{owner.lower()}/"))
        and all(tag in info.tags for tag in tags)
        and (info.visibility is Visibility.PUBLIC or viewer.sees_all or viewer.tenant == info.owner != "")
    )


def list_all(
    store: Store,
    *,
    newest_first: bool = False,
    after: str | None = None,
    older_than: tuple[int, str] | None = None,
    **wanted: Unpack[Wanted],
) -> list[ModelInfo]:
    page = store.list_models(limit=EVERYTHING, newest_first=newest_first, after=after, older_than=older_than, **wanted)
    return list(page.items)


def list_ids(
    store: Store,
    *,
    newest_first: bool = False,
    after: str | None = None,
    older_than: tuple[int, str] | None = None,
    **wanted: Unpack[Wanted],
) -> list[str]:
    listed = list_all(store, newest_first=newest_first, after=after, older_than=older_than, **wanted)
    return [info.model_id for info in listed]


def list_by_pages(
    store: Store, limit: int, *, newest_first: bool = False, **wanted: Unpack[Wanted]
) -> Iterator[ModelInfo]:
    after, older_than = None, None
    while True:
        page = store.list_models(limit=limit, after=after, older_than=older_than, newest_first=newest_first, **wanted)
        assert len(page.items) == limit or not page.has_more
        yield from page.items
        if not page.has_more:
            return
        last = page.items[-1]
        after, older_than = (None, (last.created_at, last.model_id)) if newest_first else (last.model_id, None)
