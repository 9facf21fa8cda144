"""A cluster that grows with what is asked for and shrinks in silence: by models, texts and jobs; no request fails."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from threading import Event
from typing import Any

import httpx
import pytest
import yaml  # type: ignore[import-untyped]

from serve.store.revisions import Store
from tests.fakes.models import write_tiny_gpt2
from tests.k8s.cluster import Cluster, Node, wait_until
from tests.k8s.pods import ROOT, Network, Pod, why_impossible

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(900)]

ARCHIVE = ROOT / "deployments" / "archives" / "unit_seven.zip"
BASE = "tiny/base"
FLOCK = [f"flock/m{number}" for number in range(8)]  # of 4 MB each: a generator has room for six
SETTINGS = {"ROOKERY_BASE": BASE, "ROOKERY_MEMORY_BYTES": str(25_000_000), "ROOKERY_MAX_SEQUENCES": "4"}
SOON_S = 120.0  # with processes that start on two busy cores


def config() -> dict[str, Any]:
    """deployments/ha.yaml for two cores, and in a hurry."""
    whole: dict[str, Any] = yaml.safe_load((ROOT / "deployments" / "ha.yaml").read_text())
    (application,) = whole["applications"]
    numbers = {"gateway": (1, 1), "generator": (1, 2), "trainer": (0, 2)}
    most = {f"max_{name}s": most for name, (_, most) in numbers.items()}
    fewest = {f"num_{name}s": fewest for name, (fewest, _) in numbers.items()}
    application["args"] = {"placed": True, "device": "cpu", "working_set_s": 8.0, "needs_keys": False, **fewest, **most}
    delays = {"upscale_delay_s": 1, "downscale_delay_s": 5, "look_back_period_s": 4, "metrics_interval_s": 1}
    application["deployments"] = [
        {"name": name, "autoscaling_config": {"min_replicas": fewest, "max_replicas": most, **delays}}
        for name, (fewest, most) in numbers.items()
    ]
    return whole


class OneNode(Cluster):
    """A head that does the work, too: with places for all that there may be."""

    def start_head(self) -> Node:
        places = json.dumps({"gateway": 1, "generator": 2, "trainer": 2})
        params = ["--head", "--port=6379", "--num-cpus=4", f"--resources={places}"]
        dashboard = ["--dashboard-host=0.0.0.0", "--dashboard-port=8265"]
        node = self._start(self.network.pod("head"), "head", [*params, *dashboard], {"RAY_ADDRESS": "127.0.0.1:6379"})
        wait_until(lambda: self._ask(node.pod, "/api/version") is not None, SOON_S, "the dashboard answers", node)
        return node


@dataclass
class Life:
    """The cluster, and a client whose every answer is counted."""

    cluster: Cluster
    client: Pod
    url: str
    statuses: Counter[int | str] = field(default_factory=Counter)

    def num(self, deployment: str) -> int:
        return len(self.cluster.replicas(deployment))

    def until(self, deployment: str, number: int) -> float:
        return wait_until(lambda: self.num(deployment) == number, SOON_S, f"{number} of {deployment}")

    def ask(self, model: str, *, n: int, max_tokens: int) -> None:
        body = {"model": model, "prompt": "My dream", "n": n, "max_tokens": max_tokens}
        try:
            self.statuses[httpx.post(f"{self.url}/v1/completions", json=body, timeout=60).status_code] += 1
        except httpx.HTTPError as exc:
            self.statuses[type(exc).__name__] += 1

    def keep_asking(self, models: list[str], *, clients: int, pause_s: float = 0.0, **what: int) -> Asking:
        end = Event()

        def go_on() -> None:
            for model in cycle(models):
                if end.wait(pause_s):
                    return
                self.ask(model, **what)

        return Asking(end, [self.client.begin(go_on) for _ in range(clients)])

    def call(self, method: str, path: str, **what: Any) -> dict[str, Any]:
        return self.client.call(
            lambda: dict(httpx.request(method, f"{self.url}{path}", timeout=60, **what).raise_for_status().json())
        )

    def train(self) -> str:
        with ARCHIVE.open("rb") as archive:
            file = self.call("POST", "/v1/files", files={"file": archive}, data={"purpose": "fine-tune"})
        hyperparameters = {"n_epochs": 1}
        job = {"model": BASE, "training_file": file["id"], "suffix": "seven", "hyperparameters": hyperparameters}
        return str(self.call("POST", "/v1/fine_tuning/jobs", json=job)["id"])

    def has_succeeded(self, job_id: str) -> bool:
        job = self.call("GET", f"/v1/fine_tuning/jobs/{job_id}")
        assert job["status"] not in ("failed", "cancelled"), job
        return bool(job["status"] == "succeeded")


@dataclass
class Asking:
    """Clients that ask until the `with` ends."""

    end: Event
    threads: list[Future[None]]

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        self.end.set()
        for thread in self.threads:
            thread.result(90)


@pytest.fixture
def life(tmp_path: Path) -> Iterator[Life]:
    if why := why_impossible():
        pytest.skip(why)
    store = Store(tmp_path / "data", embedded={})
    store.import_folder(write_tiny_gpt2(tmp_path / "tiny", n_embd=96), BASE)
    folder = write_tiny_gpt2(tmp_path / "flock", n_embd=192)
    for model in FLOCK:
        store.import_folder(folder, model)
    with Network(tmp_path) as network:
        cluster = OneNode(network, tmp_path / "data", settings=SETTINGS)
        cluster.start_head()
        cluster.deploy(config())
        life = Life(cluster, network.pod("client"), f"http://{cluster.head.pod.address}:8000")
        wait_until(lambda: _is_ready(life), SOON_S, "the gateway is ready")
        yield life
        process = cluster.head.process
        cluster.stop()
        process.wait(30)


def test_a_cluster_grows_with_models_texts_and_jobs_and_shrinks_in_silence(
    life: Life, record_property: Callable[[str, object], None]
) -> None:
    took: dict[str, float] = {}
    assert (life.num("gateway"), life.num("generator"), life.num("trainer")) == (1, 1, 0)

    # 1. Eight models in turn, one at a time: nobody waits in a queue, but each pushes out another one.
    with life.keep_asking(FLOCK, clients=1, pause_s=0.05, n=1, max_tokens=1):
        took["second generator, by bytes"] = life.until("generator", 2)

    # 2. A job, while there is no trainer.
    job = life.train()
    took["first trainer"] = life.until("trainer", 1)
    took["job's success since then"] = wait_until(lambda: life.has_succeeded(job), SOON_S, "the job succeeds")
    took["no trainer, in silence"] = life.until("trainer", 0)
    took["one generator, in silence"] = life.until("generator", 1)

    # 3. One model whose texts are many more than the four of a batch.
    with life.keep_asking([BASE], clients=4, n=16, max_tokens=50):
        took["second generator, by texts"] = life.until("generator", 2)
        time.sleep(5)  # so that some are asked of it
    took["one generator again"] = life.until("generator", 1)

    record_property("seconds", took)
    print({name: round(seconds, 1) for name, seconds in took.items()}, dict(life.statuses))
    assert set(life.statuses) == {200}, life.statuses


def _is_ready(life: Life) -> bool:
    try:
        return bool(life.client.call(lambda: httpx.get(f"{life.url}/readyz", timeout=5).status_code == 200))
    except httpx.HTTPError:
        return False
