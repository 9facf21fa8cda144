"""A Ray cluster of several nodes on one machine, as KubeRay makes one: configured, upgraded, drained, and broken.

    python -m tests.k8s.cluster                 # every run, and what became of the requests
    python -m tests.k8s.cluster node_kill       # one

The nodes are those of `tests.k8s.nodes`; `tests.k8s.load` asks, through `tests.k8s.service`, which stands for kubelets
and kube-proxy. What is not here: images, schedulers, the operator's own timing.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from loadtest.models import write_linked_models
from tests.k8s.load import SLOW, Load, OpenaiLoad, Outcome
from tests.k8s.nodes import (
    START_S,
    Cluster,
    Node,
    find_postgres,
    postgres_server,
    redis_server,
    serve_config,
    wait_until,
)
from tests.k8s.pods import Network, Pod, why_impossible
from tests.k8s.service import Service

__all__ = ["GROUPS", "RUNS", "Cluster", "Node", "Outcome", "Stage", "open_stage", "wait_until"]

_TRAIL_S = 5.0
_EXIT_NOTICED_S = 1.5  # until a kubelet has told of a container's end, and kube-proxies have heard of it


@dataclass(eq=False, slots=True)
class Stage:
    """Two gateways and two generators, a pod each, behind a Service; a client."""

    network: Network
    data: Path
    cluster: Cluster
    service: Service
    client: Pod
    redis: Pod | None
    settings: Mapping[str, str]

    def load(self, plan: str | None = None) -> Load:
        return Load(self.network.folder, self.client, self.service.url, plan)

    def grow(self, group: str) -> Node:
        """One pod more, as the operator makes one for each that goes."""
        node = self.cluster.start_worker(group)
        if group == "gateway":
            self.service.add(node.pod)
        return node

    def wait_until_whole(self, timeout_s: float = START_S) -> float:
        """Until all there should be is there, and nothing else; the seconds that it took."""

        def is_whole() -> bool:
            self.cluster.restart_ended()
            addresses = {group: {node.pod.address for node in self.cluster.of(group)} for group in GROUPS}
            replicas = {group: [one["node_ip"] for one in self.cluster.replicas(group)] for group in GROUPS}
            is_placed = all(len(replicas[group]) == 2 and set(replicas[group]) == addresses[group] for group in GROUPS)
            return is_placed and self.cluster.is_running() and len(self.service.ready) == 2

        return wait_until(is_whole, timeout_s, "two gateways and two generators are there")


GROUPS = ("gateway", "generator")


@contextlib.contextmanager
def open_stage(folder: Path | None = None, *, settings: Mapping[str, str] | None = None) -> Iterator[Stage]:
    """Starts it all, with Redis and PostgreSQL where they are; afterwards nothing is left but `folder`, if given."""
    if why := why_impossible():
        raise RuntimeError(why)
    with contextlib.ExitStack() as ends:
        if folder is None:
            folder = Path(
                ends.enter_context(tempfile.TemporaryDirectory(prefix="rookery-k8s-", ignore_cleanup_errors=True))
            )
        data = folder / "data"
        data.mkdir()
        write_linked_models(data, 1, shape=SLOW)
        network = ends.enter_context(Network(folder))
        redis = ends.enter_context(redis_server(network)) if shutil.which("redis-server") else None
        settings = dict(settings or {})
        if programs := find_postgres():
            settings["ROOKERY_DATABASE_URL"] = ends.enter_context(postgres_server(network, programs))
        cluster = Cluster(network, data, redis=redis, settings=settings)
        cluster.start(dict.fromkeys(GROUPS, 2))
        cluster.deploy(serve_config())
        client = network.pod("client")
        service = ends.enter_context(Service(client))
        for node in cluster.of("gateway"):
            service.add(node.pod)
        stage = Stage(network, data, cluster, service, client, redis, settings)
        stage.wait_until_whole()
        yield stage


@contextlib.contextmanager
def _stage(stage: Stage | None) -> Iterator[Stage]:
    if stage:
        yield stage
    else:
        with open_stage() as new:
            yield new


# --- The runs ---------------------------------------------------------------------------------------------------


def run_smoke(stage: Stage | None = None) -> Outcome:
    """The load test's own first plan."""
    with _stage(stage) as on, on.load("smoke") as load:
        load.wait()
    return load.outcome()


def run_upgrade(stage: Stage | None = None) -> Outcome:
    """Another configuration, for which every replica has to be started anew."""
    with _stage(stage) as on, on.load() as load:
        began = time.monotonic()
        on.cluster.deploy(serve_config(settings={"max_sequences": 48}))
        on.wait_until_whole()
        took_s = time.monotonic() - began
        time.sleep(_TRAIL_S)
    return load.outcome(took_s=round(took_s, 1))


def run_node_kill(stage: Stage | None = None) -> Outcome:
    """A pod with a generator ends without a word to anybody; another one takes its place."""
    with _stage(stage) as on, on.load() as load:
        on.cluster.kill(on.cluster.of("generator")[0])
        on.grow("generator")
        healed_s = on.wait_until_whole()
        time.sleep(_TRAIL_S)
    return load.outcome(healed_s=round(healed_s, 1))


def run_node_loss(stage: Stage | None = None) -> Outcome:
    """The machine under a generator is gone: nothing says that its connections have ended."""
    with _stage(stage) as on, on.load() as load:
        node = on.cluster.of("generator")[0]
        on.network.unplug(node.pod)
        noticed_s = wait_until(lambda: node.pod.address not in on.cluster.alive_nodes(), 120, "the loss is noticed")
        on.cluster.kill(node)
        on.grow("generator")
        healed_s = on.wait_until_whole()
        time.sleep(_TRAIL_S)
    return load.outcome(noticed_s=round(noticed_s, 1), healed_s=round(healed_s, 1))


def run_gateway_kill(stage: Stage | None = None) -> Outcome:
    """A pod with a gateway ends without a word; what it was answering is lost, if its caller does not ask again."""
    with _stage(stage) as on, on.load() as load:
        openai = OpenaiLoad(on.client, on.service.url)
        time.sleep(_TRAIL_S)
        node = on.cluster.of("gateway")[0]
        on.cluster.kill(node)
        time.sleep(_EXIT_NOTICED_S)
        on.service.remove(node.pod)
        on.grow("gateway")
        healed_s = on.wait_until_whole()
        asked = openai.outcome()
    openai_detail = {"openai_requests": asked.requests, "openai_failed": asked.failed, "openai": asked.detail["kinds"]}
    return load.outcome(healed_s=round(healed_s, 1), **openai_detail)


def run_drain(stage: Stage | None = None) -> Outcome:
    """A pod of each group is told to go, as by `kubectl drain`; the operator replaces it at once."""
    took = {}
    with _stage(stage) as on, on.load() as load:
        for group in GROUPS:
            node = on.cluster.of(group)[0]
            on.grow(group)
            took[f"{group}_s"] = round(on.cluster.terminate(node, on.service), 1)
            on.wait_until_whole()
        time.sleep(_TRAIL_S)
    return load.outcome(**took)


def run_new_cluster(stage: Stage | None = None) -> Outcome:
    """A whole second cluster over the same data and database, then the first one goes: KubeRay's way to upgrade."""
    with _stage(stage) as on, on.load() as load:
        began = time.monotonic()
        old = on.cluster
        new = Cluster(
            on.network, on.data, name="green" if old.name == "blue" else "blue", redis=on.redis, settings=on.settings
        )
        try:
            new.start(dict.fromkeys(GROUPS, 2))
            new.deploy(serve_config())
            for node in new.of("gateway"):
                on.service.add(node.pod)
            on.service.wait_for(4, START_S)
        except BaseException:
            for node in new.of("gateway"):
                on.service.remove(node.pod)
            new.stop()
            raise
        both_s = time.monotonic() - began
        with ThreadPoolExecutor(len(old.nodes)) as pool:  # the operator deletes a cluster: all of its pods at once
            list(pool.map(lambda node: old.terminate(node, on.service), [*old.nodes]))
        on.cluster = new
        on.wait_until_whole()
        took_s = time.monotonic() - began
        time.sleep(_TRAIL_S)
    return load.outcome(ready_s=round(both_s, 1), took_s=round(took_s, 1))


def run_head_kill(stage: Stage | None = None) -> Outcome:
    """The head ends without a word; one at another address takes up what Redis kept. Then a replica dies."""
    with _stage(stage) as on, on.load() as load:
        assert on.redis, "a head that comes back needs redis-server: apt-get install redis-server"
        on.cluster.kill(on.cluster.head)
        time.sleep(_TRAIL_S)
        began = time.monotonic()
        on.cluster.start_head()
        on.wait_until_whole()
        back_s = time.monotonic() - began
        (replica, *_) = on.cluster.replicas("generator")
        node = next(one for one in on.cluster.of("generator") if one.pod.address == replica["node_ip"])
        on.cluster.run(node, "kill", "-9", str(replica["pid"]))
        wait_until(lambda: replica not in on.cluster.replicas("generator"), 60, "the death of a replica is noticed")
        healed_s = on.wait_until_whole()
        time.sleep(_TRAIL_S)
    return load.outcome(back_s=round(back_s, 1), healed_s=round(healed_s, 1))


RUNS: Mapping[str, Callable[[Stage | None], Outcome]] = {
    "smoke": run_smoke,
    "upgrade": run_upgrade,
    "node_kill": run_node_kill,
    "node_loss": run_node_loss,
    "gateway_kill": run_gateway_kill,
    "drain": run_drain,
    "head_kill": run_head_kill,
    "new_cluster": run_new_cluster,
}


def main() -> None:
    """Every run that is named, or all; the last line is JSON."""
    if why := why_impossible():
        raise SystemExit(f"No cluster can be made here: {why}.")
    names = sys.argv[1:] or list(RUNS)
    if unknown := set(names) - set(RUNS):
        raise SystemExit(f"There is no run {', '.join(sorted(unknown))}; there are {', '.join(RUNS)}.")
    outcomes = {}
    with open_stage() as stage:
        for name in names:
            outcomes[name] = RUNS[name](stage)
            print(f"{name}: {outcomes[name].failed} of {outcomes[name].requests} failed", file=sys.stderr)
    print(json.dumps({name: asdict(outcome) for name, outcome in outcomes.items()}))


if __name__ == "__main__":
    main()
