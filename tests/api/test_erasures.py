"""The routes of an erasure, over an eraser that only remembers: who is asked for, in which turn, and what is told."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from serve.api import erasures
from serve.api.access import Access
from serve.api.app import build_api
from serve.errors import NotFound, StoreUnavailable
from serve.types import Belongings, Erasure, Removed, ReplicaView, Scope, Share, Viewer
from tests.fakes.generator import EchoGenerator
from tests.fakes.keys import MemoryKeys
from tests.fakes.memory import MemoryCatalogue, MemoryFiles, MemoryJobs

ADA = "huggingtweets/ada"
INC = Viewer("inc")


class MemoryEraser:
    """Finds a model of everybody, for who sees everybody's. `is_open`: what is looked for is found."""

    def __init__(self) -> None:
        self.receipts: dict[str, Erasure] = {}
        self.calls: list[tuple[str, Viewer]] = []
        self.cut_off: list[Erasure] = []
        self.is_open, self.begin_fails, self.left = threading.Event(), False, ""
        self.is_open.set()
        self.num_looking = self.most_looking = 0
        self._lock = threading.Lock()

    def find(self, handle: str, viewer: Viewer) -> Belongings:
        with self._lock:
            self.calls.append(("find", viewer))
            self.num_looking += 1
            self.most_looking = max(self.most_looking, self.num_looking)
        assert self.is_open.wait(10)
        self.num_looking -= 1
        return Belongings((ADA,)) if viewer.sees_all else Belongings()

    def begin(self, handle: str, by: str, viewer: Viewer) -> Belongings:
        self.calls.append(("begin", viewer))
        if self.begin_fails:
            raise StoreUnavailable("The disk is away.")
        return self.find(handle, viewer)

    def finish(self, handle: str, begun: Belongings, by: str, viewer: Viewer) -> Removed:
        self.calls.append(("finish", viewer))
        return Removed(begun, {"models": Share(len(begun.models), 9)}, (), self.left)

    def lift(self, handle: str) -> bool:
        return False

    def save(self, erasure: Erasure) -> None:
        self.receipts[erasure.id] = erasure

    def load(self, erasure_id: str) -> Erasure:
        if erasure_id not in self.receipts:
            raise NotFound("There is no such erasure.")
        return self.receipts[erasure_id]

    def beat(self, erasure_id: str) -> None:
        self.calls.append(("beat", Viewer()))

    def take_up(self) -> Sequence[Erasure]:
        taken, self.cut_off = self.cut_off, []
        return taken


class SilentGenerator(EchoGenerator):
    async def replicas(self) -> list[ReplicaView]:
        raise StoreUnavailable("No generator answers now; try again soon.")

    async def forget(self, model_id: str, *, at_once: bool = False) -> None:
        raise StoreUnavailable("No generator answers now; try again soon.")


class Town:
    """A server with the eraser, and a client of a tenant and one of the operator."""

    def __init__(self, folder: Path, generator: EchoGenerator | None = None) -> None:
        self.eraser = MemoryEraser()
        files = MemoryFiles(folder / "files")
        self.app = build_api(
            generator=generator or EchoGenerator(),
            catalogue=MemoryCatalogue("fledgling"),
            files=files,
            jobs=MemoryJobs(files),
            upload_dir=folder / "uploads",
            eraser=self.eraser,
            access=Access(MemoryKeys("operator").add("tenant", INC.tenant, [Scope.TRAIN])),
        )
        self.tenant, self.operator = self._client("tenant"), self._client("operator")

    def _client(self, key: str) -> httpx.AsyncClient:
        headers = {"authorization": f"Bearer {key}"}
        return httpx.AsyncClient(
            transport=httpx.ASGITransport(app=self.app), base_url="http://rookery", headers=headers
        )

    async def erase(self, client: httpx.AsyncClient, dry_run: bool = False) -> httpx.Response:
        return await client.post("/v1/erasures", json={"handle": "@ada", "dry_run": dry_run})

    async def ended(self, erasure_id: str) -> Erasure:
        async with asyncio.timeout(10):
            while self.eraser.load(erasure_id).status == "running":
                await asyncio.sleep(0.005)
        return self.eraser.load(erasure_id)


@pytest.fixture
def town(tmp_path: Path) -> Town:
    return Town(tmp_path)


async def test_a_tenants_erasure_is_of_its_own_from_the_first_look_to_the_last(town: Town) -> None:
    looked = await town.erase(town.tenant, dry_run=True)
    assert (looked.status_code, looked.json()["models"]) == (200, [])  # whatever others have
    begun = await town.erase(town.tenant)
    assert begun.status_code == 202 and "viewer" not in begun.json()
    assert (await town.ended(begun.json()["id"])).status == "done"
    assert {call for call, _ in town.eraser.calls} == {"find", "begin", "finish"}
    assert {viewer for _, viewer in town.eraser.calls} == {INC}
    assert (await town.erase(town.operator, dry_run=True)).json()["models"] == [ADA]


async def test_one_looks_at_a_time_and_more_than_a_few_are_sent_away(town: Town) -> None:
    town.eraser.is_open.clear()
    asked = [asyncio.create_task(town.erase(town.tenant, dry_run=True)) for _ in range(40)]
    refused: list[httpx.Response] = []
    async with asyncio.timeout(10):
        while len(refused) < 40 - 1 - erasures._MAX_WAITING:
            refused = [task.result() for task in asked if task.done()]
            await asyncio.sleep(0.005)
    assert {(answer.status_code, answer.headers["retry-after"]) for answer in refused} == {(429, "10")}
    assert (await town.operator.get("/v1/models")).status_code == 200
    town.eraser.is_open.set()
    answers = await asyncio.gather(*asked)
    assert [answer.status_code for answer in answers].count(200) == 1 + erasures._MAX_WAITING
    assert town.eraser.most_looking == 1


async def test_one_that_cannot_begin_or_end_says_so_on_its_receipt(town: Town) -> None:
    town.eraser.begin_fails = True
    assert (await town.erase(town.operator)).status_code == 503
    [failed] = town.eraser.receipts.values()
    assert (failed.status, failed.message) == ("failed", "The disk is away.") and failed.finished_at
    town.eraser.begin_fails, town.eraser.left = False, "A tracker is being told: erase again."
    done = await town.ended((await town.erase(town.operator)).json()["id"])
    assert (done.status, done.message) == ("failed", town.eraser.left) and done.tiers["models"].count == 1


async def test_generators_that_do_not_answer_keep_nothing_on_the_disk(tmp_path: Path) -> None:
    town = Town(tmp_path, SilentGenerator())
    done = await town.ended((await town.erase(town.operator)).json()["id"])
    assert (done.status, done.models) == ("done", (ADA,)) and "do not answer" in done.unreached[0]


async def test_what_another_gateway_had_to_leave_is_taken_up(town: Town, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(erasures, "BEAT_S", 0.01)
    first = Erasure("erasure-1", "@ada", "running", 1, models=(ADA,), viewer=INC)
    later = replace(first, id="erasure-2")
    for one in (first, later):
        town.eraser.save(one)
    town.eraser.cut_off = [first]
    async with town.app.router.lifespan_context(town.app):
        assert (await town.ended(first.id)).tiers["models"].count == 1
        town.eraser.cut_off = [later]
        assert (await town.ended(later.id)).status == "done"
    assert {viewer for call, viewer in town.eraser.calls if call == "finish"} == {INC}
