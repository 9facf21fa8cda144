"""A live service on a disk that is full, again and again: `python -m tests.faults.full_disk FOLDER SHARE`, as root.

Its data folder is a small disk in memory, which is filled before and while models are fetched and trained, files sent
and jobs created; texts are asked for all the time. Ends with a line of JSON; `wrong` tells of each thing that went
otherwise than it should. Run it by `tests.faults.own_mounts`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import httpx

from serve.store.budget import RESERVE_BYTES
from serve.store.integrity import is_intact
from serve.store.revisions import Store
from serve.store.validate import WEIGHTS, check_finite, check_folder
from tests.deployments.conftest import BASE, LiveService, import_tiny_model, start_service, stop_service, wait_until
from tests.fakes.hub import FakeHub, fake_hub
from tests.fakes.models import write_tiny_gpt2
from tests.faults.own_mounts import leave_free, mount_memory
from tests.faults.traffic import Traffic, make_asks
from tests.training.making import made_up_texts

NUM_ROUNDS = 10
DISK_BYTES = RESERVE_BYTES + 160 * 2**20
MODEL_BYTES = 4 * 2**20  # about, of each from the Hub
WIDTH = 192
NUM_CACHED = 4
LONG_AGO_S = 7200.0
_ENDED = ("succeeded", "failed", "cancelled")


class FullDisk:
    """One service and what was asked of it."""

    def __init__(self, live: LiveService, hub: FakeHub) -> None:
        self._live, self._hub = live, hub
        self._client = httpx.Client(base_url=live.url, timeout=60)
        self.wrong: list[str] = []
        self.checks = 0
        self.codes: dict[str, int] = {}

    def _expect(self, what: str, is_so: bool, saw: object = "") -> None:
        self.checks += 1
        if not is_so:
            self.wrong.append(f"{what}: {saw}")

    def _code(self, reply: httpx.Response) -> str:
        code = "ok" if reply.is_success else f"{reply.status_code} {reply.json()['error']['code']}"
        self.codes[code] = self.codes.get(code, 0) + 1
        return code

    def _generate(self, model: str) -> str:
        return self._code(self._client.post("/v1/completions", json={"model": model, "max_tokens": 2, "prompt": "I"}))

    def _upload(self, seed: int) -> httpx.Response:
        text = "\n".join(made_up_texts(150, seed)).encode()
        return self._client.post(
            "/v1/files", files={"file": ("tweets.txt", text)}, data={"purpose": "fine-tune"}, timeout=60
        )

    def _create_job(self, file_id: str, handle: str, epochs: int = 1) -> httpx.Response:
        wanted = {"hyperparameters": {"n_epochs": epochs}, "metadata": {"handle": handle}}
        return self._client.post("/v1/fine_tuning/jobs", json={"model": BASE, "training_file": file_id, **wanted})

    def _job(self, job_id: str) -> dict[str, Any]:
        job: dict[str, Any] = self._client.get(f"/v1/fine_tuning/jobs/{job_id}").json()
        return job

    def _end_of(self, job_id: str) -> str:
        """`succeeded`, or the code of the error."""
        wait_until(lambda: self._job(job_id).get("status") in _ENDED, 240, poll_s=0.3)
        job = self._job(job_id)
        return str((job.get("error") or {}).get("code") or job["status"])

    # --- What is done ---------------------------------------------------------------------------------------

    def fetch(self, number: int) -> None:
        """What is fetched makes room, by what has been used least recently and was not kept; or nothing goes."""
        data, mine = self._live.data, f"huggingtweets/new-{number}"
        self._hub.add(mine, write_tiny_gpt2(data.parent / f"new-{number}", seed=100 + number, n_embd=WIDTH))
        store = Store(data, embedded={})
        here = {one.model_id: one for one in store.fetched()}
        for age, one in enumerate(here.values(), start=1):
            at = time.time() - LONG_AGO_S - 600 * age  # the last of them is the oldest
            os.utime(one.path / WEIGHTS, (at, (one.path / WEIGHTS).stat().st_mtime))
        oldest = list(here)[-1]

        leave_free(data, RESERVE_BYTES - 60 * 2**20)  # more than all of them would free
        self._expect("fetched on a full disk", (code := self._generate(mine)) == "507 disk_full", code)
        now = {one.model_id for one in store.fetched()}
        self._expect("nothing goes in vain", now == here.keys(), here.keys() - now)

        leave_free(data, RESERVE_BYTES + MODEL_BYTES // 2)
        self._expect("fetched where room can be made", (code := self._generate(mine)) == "ok", code)
        now = {one.model_id for one in store.fetched()}
        self._expect("the least recently used one goes", now == here.keys() - {oldest} | {mine}, (here.keys(), now))
        self._expect("what was kept stays", bool(store.resolve("huggingtweets/kept")))
        leave_free(data, DISK_BYTES)
        self._expect("what has gone comes again", (code := self._generate(oldest)) == "ok", code)

    def upload(self, number: int) -> None:
        """Nothing can be sent, and no job created; then both, without a restart."""
        data = self._live.data
        known = self._upload(number)
        self._expect("sent with room", self._code(known) == "ok", known.text[:200])
        leave_free(data, 0)
        for what, reply in (
            ("sent", self._upload(number)),
            ("job created", self._create_job(known.json()["id"], f"none{number}")),
        ):
            self._expect(f"{what} on a full disk", (code := self._code(reply)) == "507 disk_full", code)
            self._expect(f"{what}: told when to come again", "retry-after" in reply.headers)
        self._expect("read on a full disk", self._client.get("/v1/fine_tuning/jobs").status_code == 200)
        left = [path.name for path in (data / "uploads").iterdir() if not path.name.startswith("file-")]
        self._expect("no upload is left half", left == [], left)
        leave_free(data, DISK_BYTES)
        self._expect("sent when there is room", (code := self._code(self._upload(number))) == "ok", code)

    def train(self, number: int) -> None:
        """Without room a job ends before it trains; one that meets a full disk later ends by name as well."""
        data = self._live.data
        file_id = self._upload(number).json()["id"]
        leave_free(data, 1_500_000)  # for the job's row, and not for its checkpoints
        job_id = self._create_job(file_id, f"small{number}").json()["id"]
        self._expect("trained without room", (end := self._end_of(job_id)) == "disk_full", end)
        events = self._client.get(f"/v1/fine_tuning/jobs/{job_id}/events", params={"limit": 100}).json()["data"]
        self._expect("it had not begun", not any(one["message"].startswith("Step") for one in events))

        leave_free(data, DISK_BYTES)
        job_id = self._create_job(file_id, f"long{number}", epochs=30).json()["id"]
        wait_until(lambda: self._has_begun(job_id), 120)
        leave_free(data, 0)
        time.sleep(8)  # in which it has checkpoints to write
        leave_free(data, DISK_BYTES)
        end = self._end_of(job_id)
        self._expect("trained on a disk that was full", end in ("disk_full", "succeeded"), end)
        self.codes[f"job {end}"] = self.codes.get(f"job {end}", 0) + 1

        job_id = self._create_job(file_id, f"after{number}").json()["id"]
        self._expect("trained when there is room", (end := self._end_of(job_id)) == "succeeded", end)

    def _has_begun(self, job_id: str) -> bool:
        events = self._client.get(f"/v1/fine_tuning/jobs/{job_id}/events", params={"limit": 20}).json()["data"]
        return any(one["message"].startswith("Step") for one in events) or self._job(job_id)["status"] in _ENDED


def _left(data: Path) -> list[str]:
    """What no fetch, job or upload should have left."""
    models = data / "models"
    found = [*(models / ".staging").iterdir(), *(data / "training").iterdir()]
    found += [path for path in (models / ".fetching").iterdir() if path.is_dir()]
    found += [path for path in (data / "uploads").iterdir() if not path.name.startswith("file-")]
    return [str(path.relative_to(data)) for path in found]


def _partial(data: Path) -> list[str]:
    """Revisions that can be found and are not whole."""
    store, partial = Store(data, embedded={}), []
    for model_id in store.model_ids():
        for found in store.published(model_id):
            try:
                check_folder(found.path)
                check_finite(found.path)
                is_whole = is_intact(found.path) is True
            except Exception:
                is_whole = False
            partial += [] if is_whole else [f"{model_id}@{found.revision}"]
    return partial


def run(folder: Path, share: float) -> dict[str, Any]:
    data = folder / "data"
    mount_memory(data, DISK_BYTES)
    import_tiny_model(data, BASE)
    rounds = max(1, round(NUM_ROUNDS * share))
    with fake_hub() as hub:
        for name in ("kept", *(f"old-{number}" for number in range(NUM_CACHED))):
            hub.add(f"huggingtweets/{name}", write_tiny_gpt2(folder / name, n_embd=WIDTH))
        live = start_service(
            data, ROOKERY_HUB_ENABLED="true", ROOKERY_HUB_ENDPOINT=hub.endpoint, ROOKERY_LEASE_TIMEOUT_S="20"
        )
        try:
            disk = FullDisk(live, hub)
            httpx.post(f"{live.url}/v1/models/huggingtweets/kept/pull", timeout=60).raise_for_status()
            for number in range(NUM_CACHED):
                disk._generate(f"huggingtweets/old-{number}")
            with Traffic(live.url, make_asks([BASE], 50), unary=2, streams=1, pause_s=0.2) as traffic:
                for number in range(rounds):
                    for do in (disk.fetch, disk.upload, disk.train):
                        do(number)
            verdict = traffic.verdict()
        finally:
            leave_free(data, DISK_BYTES)
            stop_service(live)
        return {
            "rounds": rounds,
            "checks": disk.checks,
            "wrong": disk.wrong,
            "codes": disk.codes,
            "requests": verdict.requests,
            "failed": verdict.requests - verdict.whole,
            "errors": dict(verdict.errors),
            "left": _left(data),
            "partial": _partial(data),
        }


if __name__ == "__main__":
    print(json.dumps(run(Path(sys.argv[1]), float(sys.argv[2]))))
