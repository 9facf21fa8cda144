"""A Ray cluster of several nodes on one machine, as KubeRay makes one.

Each node is a pod of `tests.k8s.pods`, started with the `ray start` and the variables that KubeRay 1.7 gives it, and
with `deployments.ray_env`. Redis and PostgreSQL are pods as well. It knows nothing of those who ask.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from deployments import haproxy, ray_env
from tests.k8s.pods import ROOT, Network, Pod, killed_at_end
from tests.k8s.service import Service

BIN = Path(sys.prefix) / "bin"
START_S = 240.0
_OBJECT_STORE = 80 << 20


@dataclass(eq=False, slots=True)
class Node:
    """A pod in which Ray runs."""

    pod: Pod
    group: str
    command: Sequence[str]
    env: Mapping[str, str]
    process: subprocess.Popen[str] = field(init=False)

    def __post_init__(self) -> None:
        with (self.pod.folder / "ray.log").open("ab") as log:
            self.process = self.pod.popen(*self.command, env=self.env, out=log)

    def restart(self) -> None:
        """What its first start has left behind ends with it."""
        with contextlib.suppress(RuntimeError):
            self.pod.run("sh", "-c", "kill -9 -1")
        self.__post_init__()


class Cluster:
    """A head that does no work, and workers by group; the data and the database may be shared with others."""

    def __init__(
        self,
        network: Network,
        data: Path,
        *,
        name: str = "blue",
        redis: Pod | None = None,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        self.name, self.network, self.nodes = name, network, list[Node]()
        self._redis, self._count = redis, 0
        self._token = secrets.token_hex(32)
        self._program = network.folder / "haproxy"
        if not self._program.exists():
            _write_haproxy(self._program)
        self._env = _base_env(data, settings or {})

    @property
    def head(self) -> Node:
        return next(node for node in self.nodes if node.group == "head")

    def of(self, group: str) -> list[Node]:
        return [node for node in self.nodes if node.group == group]

    def start(self, groups: Mapping[str, int], *, resources: Mapping[str, Mapping[str, float]] | None = None) -> None:
        """The head, then so many nodes of each group, all at once; `resources` where a group offers not just itself."""
        self.start_head()
        wanted = [group for group, count in groups.items() for _ in range(count)]
        with ThreadPoolExecutor(max(len(wanted), 1)) as pool:
            list(pool.map(lambda group: self.start_worker(group, (resources or {}).get(group)), wanted))

        def are_there() -> bool:
            self.restart_ended()
            return len(self.alive_nodes()) == len(self.nodes)

        wait_until(are_there, START_S, "all nodes are in the cluster")

    def start_head(self) -> Node:
        pod = self.network.pod(self._pod_name("head"))
        self.network.names[f"{self.name}-head"] = pod.address  # a headless Service's: each head has another
        params = ["--head", "--port=6379", "--num-cpus=0", "--dashboard-host=0.0.0.0", "--dashboard-port=8265"]
        env = {"RAY_ADDRESS": "127.0.0.1:6379"}
        if self._redis:
            env |= {
                "RAY_REDIS_ADDRESS": f"redis://{self._redis.address}:6379",
                "RAY_external_storage_namespace": self.name,
                "REDIS_PASSWORD": REDIS_PASSWORD,
            }
            params.append(f"--redis-password={REDIS_PASSWORD}")
        node = self._start(pod, "head", params, env)

        def answers() -> bool:
            self.restart_ended()
            return self._ask(pod, "/api/version") is not None

        wait_until(answers, START_S, "the dashboard answers", node)
        return node

    def start_worker(self, group: str, resources: Mapping[str, float] | None = None) -> Node:
        pod = self.network.pod(self._pod_name(group))
        address = f"{self.name}-head:6379"
        params = [f"--address={address}", "--num-cpus=4", f"--resources={json.dumps(resources or {group: 1})}"]
        return self._start(pod, group, params, {"RAY_ADDRESS": address})

    def deploy(self, config: Mapping[str, Any], timeout_s: float = START_S) -> None:
        """As the operator does: hands it over, then waits until it is so."""
        path = self.network.folder / f"{self.name}-serve.yaml"
        path.write_text(yaml.safe_dump(dict(config), sort_keys=False))
        before = self.deployed_at()
        self.run(self.head, BIN / "serve", "deploy", path, "--address", "http://127.0.0.1:8265", timeout_s=90)
        wait_until(
            lambda: self.deployed_at() > before and self.is_running(), timeout_s, "the application runs", self.head
        )

    def application(self) -> dict[str, Any]:
        answer = self._ask(self.head.pod, "/api/serve/applications/") or {}
        return dict(answer.get("applications", {}).get("rookery", {}))

    def deployed_at(self) -> float:
        return float(self.application().get("last_deployed_time_s", 0))

    def is_running(self) -> bool:
        status = self.application().get("status")
        if status == "DEPLOY_FAILED":
            raise AssertionError(f"the deployment failed: {self.application()}")
        return status == "RUNNING"

    def replicas(self, deployment: str) -> list[dict[str, Any]]:
        """Those that run, with the address of their node in `node_ip`."""
        found = self.application().get("deployments", {}).get(deployment, {}).get("replicas", [])
        return [replica for replica in found if replica["state"] == "RUNNING"]

    def alive_nodes(self) -> list[str]:
        """Addresses of the nodes that Ray believes to be alive."""
        answer = self._ask(self.head.pod, "/api/v0/nodes?limit=100&timeout=5") or {}
        rows = (answer.get("data") or {}).get("result", {}).get("result", [])
        return [row["node_ip"] for row in rows if row["state"] == "ALIVE"]

    def run(self, node: Node, *command: str | Path, timeout_s: float = 60.0) -> str:
        """A command in a node's pod, with the node's environment, as `kubectl exec` or a hook runs it."""
        return node.pod.run(*command, env=self._node_env(node.pod, node.group), timeout_s=timeout_s)

    def kill(self, node: Node) -> None:
        """Every process of the node, by SIGKILL."""
        node.pod.kill()
        self.nodes.remove(node)

    def terminate(self, node: Node, service: Service | None, grace_s: float = 180.0) -> float:
        """What a kubelet does to a pod that is to go: no new connections, the hook, SIGTERM, SIGKILL; its seconds."""
        began = time.monotonic()
        if service:
            service.remove(node.pod)
        with contextlib.suppress(RuntimeError):
            self.run(node, sys.executable, "-m", "deployments.drain", timeout_s=grace_s)
        with contextlib.suppress(subprocess.TimeoutExpired):
            os.killpg(node.process.pid, signal.SIGTERM)
            node.process.wait(max(1.0, grace_s - (time.monotonic() - began)))
        self.kill(node)
        return time.monotonic() - began

    def stop(self) -> None:
        for node in [*self.nodes]:
            self.kill(node)

    def _pod_name(self, group: str) -> str:
        self._count += 1
        return f"{self.name}-{group}-{self._count}"

    def _start(self, pod: Pod, group: str, params: Sequence[str], env: Mapping[str, str]) -> Node:
        common = ["--metrics-export-port=8080", "--dashboard-agent-listen-port=52365", "--block"]
        store = f"--object-store-memory={_OBJECT_STORE}"
        command = [str(BIN / "ray"), "start", *params, *common, store]
        node = Node(pod, group, command, self._node_env(pod, group) | dict(env))
        self.nodes.append(node)
        return node

    def restart_ended(self) -> None:
        """As a kubelet does: Ray gives a node 30 s to start, and on a busy machine it may need more."""
        for node in self.nodes:
            if node.process.poll() is not None:
                node.restart()

    def _node_env(self, pod: Pod, group: str) -> dict[str, str]:
        """Ours, and what KubeRay adds for a RayService."""
        return self._env | {
            "RAY_AUTH_TOKEN": self._token,
            "RAY_SERVE_HAPROXY_BINARY_PATH": str(self._program),
            "RAY_CLUSTER_NAME": self.name,
            "RAY_CLOUD_INSTANCE_ID": pod.name,
            "RAY_NODE_TYPE_NAME": group,
            "RAY_PORT": "6379",
            "RAY_timeout_ms_task_wait_for_death_info": "0",
            "RAY_gcs_server_request_timeout_seconds": "5",
            "RAY_SERVE_KV_TIMEOUT_S": "5",
        }

    def _ask(self, head: Pod, path: str) -> dict[str, Any] | None:
        """The dashboard; None while it does not answer."""
        request = urllib.request.Request(
            f"http://{head.address}:8265{path}", headers={"Authorization": f"Bearer {self._token}"}
        )

        def ask() -> dict[str, Any]:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return dict(json.load(answer))

        try:
            return head.call(ask)
        except (OSError, ValueError):
            return None


REDIS_PASSWORD = "a-password-of-the-test"


@contextlib.contextmanager
def redis_server(network: Network) -> Iterator[Pod]:
    """One in a pod of its own."""
    pod = network.pod("redis")
    command = ["redis-server", "--bind", "0.0.0.0", "--requirepass", REDIS_PASSWORD, "--save", "", "--dir", "/tmp"]
    with (pod.folder / "redis.log").open("wb") as log, killed_at_end(pod.popen(*command, out=log)):
        yield pod


@contextlib.contextmanager
def postgres_server(network: Network, programs: Path) -> Iterator[str]:
    """Another, by what `find_postgres` found; the URL of its database."""
    pod = network.pod("postgres")
    as_user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
    initdb, postgres = (str(programs / name) for name in ("initdb", "postgres"))
    env = {"LC_ALL": "C.UTF-8", "PATH": os.environ["PATH"]}
    pod.run(*as_user, initdb, "-D", "/tmp/data", "-U", "rookery", "-A", "trust", "-E", "UTF8", "--no-sync", env=env)
    pod.run("sh", "-c", "echo host all all samenet trust >> /tmp/data/pg_hba.conf")
    options = ["-c", "listen_addresses=*", "-c", "unix_socket_directories=/tmp", "-c", "fsync=off"]
    server = [*as_user, postgres, "-D", "/tmp/data", *options]
    with (pod.folder / "postgres.log").open("wb") as log, killed_at_end(pod.popen(*server, env=env, out=log)):
        url = f"postgresql+psycopg://rookery@{pod.address}/postgres"
        wait_until(lambda: pod.call(lambda: _answers(pod.address, 5432)), 30, "PostgreSQL listens")
        yield url


def find_postgres() -> Path | None:
    """The folder of its programs: Debian's, or one on the PATH."""
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    found = debian[-1] if debian else shutil.which("initdb")
    return Path(found).parent if found else None


def _answers(address: str, port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((address, port), 2):
        return True
    return False


def serve_config(name: str = "ha", **args: Any) -> dict[str, Any]:
    """`deployments/NAME.yaml` as it is, but for two nodes of a group, processors, memory for tiny models, and no keys.

    Nothing here brings another pod when there is no room, so the new do not wait for it: replicas change in place.
    """
    config = dict(yaml.safe_load((ROOT / "deployments" / f"{name}.yaml").read_text()))
    small = {"device": "cpu", "num_gateways": 2, "num_generators": 2, "max_gateways": 2, "max_generators": 2}
    small |= {"num_trainers": 0, "max_trainers": 1, "needs_keys": False, "settings": {"max_sequences": 64}}
    (application,) = config["applications"]
    application["args"] |= small | args
    for deployment in application["deployments"]:
        deployment.pop("max_surge_percent", None)
    return config


def wait_until(is_so: Callable[[], bool], timeout_s: float, what: str, node: Node | None = None) -> float:
    """The seconds that it took. Raises: TimeoutError, which ends with what the node said."""
    began = time.monotonic()
    while not is_so():
        if time.monotonic() > began + timeout_s or (node and not node.pod.is_alive):
            said = (node.pod.folder / "ray.log").read_text()[-3000:] if node else ""
            raise TimeoutError(f"not after {timeout_s:g} s: {what}\n{said}")
        time.sleep(0.2)
    return time.monotonic() - began


def _base_env(data: Path, settings: Mapping[str, str]) -> dict[str, str]:
    kept = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
    ours = {
        "ROOKERY_DATA": str(data),
        "ROOKERY_HUB_ENABLED": "false",
        "ROOKERY_MEMORY_BYTES": "500000000",
        "ROOKERY_THREADS": "1",
        "ROOKERY_TRAINER_THREADS": "1",
        "ROOKERY_DTYPE": "float32",  # bfloat16 rounds by the shape of the batch, which then decides close draws
        "ROOKERY_METRICS_PORT": "9464",
        "ROOKERY_METRICS_HOST": "0.0.0.0",
    }
    return {**kept, "HOME": "/tmp", "PYTHONPATH": str(ROOT), **ray_env.for_cluster(), **ours, **settings}


def _write_haproxy(program: Path) -> None:
    binary = haproxy.find_haproxy()
    assert binary, "there is no HAProxy that runs here"
    haproxy.write_start(haproxy.CLUSTER_FOLDER, program, binary)
