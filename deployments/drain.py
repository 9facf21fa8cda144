"""Takes the node of this machine or pod out of its cluster without losing a request; what a pod runs before its end.

    python -m deployments.drain --timeout 640

Asks the head to drain the node. Ray Serve then starts its replicas elsewhere, ends those here once their requests are
answered, and lets HAProxy answer 503 to who asks for its health. Where no head answers (a whole cluster is deleted at
once), the replicas go on by themselves, and it waits until nothing is asked of them. A head waits until the nodes that
leave at the same time have left. Says what it does, and ends with 0 whatever happens: the pod is ended all the same.
It is itself no part of the cluster, and changes nothing where no Ray runs.
"""

from __future__ import annotations

import argparse
import csv
import os
import socket
import time
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from serve.logs import configure, get_logger
from serve.settings import Settings

log = get_logger()

TIMEOUT_S = 640.0  # less than a pod's grace period (660 s) by what Ray needs to end; longer than any answer (600 s)
_POLL_S = 0.5
_RPC_S = 5.0
_ASK_AGAIN_S = 5.0
_MAX_SILENCE_S = 15.0  # of a head that answered before; it may be restarting
_QUIET_S = 5.0  # a gateway may be between two requests of one caller
# Until whoever sends requests has heard that this pod is leaving, and pods that leave with it have begun.
_NEWS_S = 10.0
# What runs for us: replicas, and the proxy that leads to them. Ray names a worker's process after its actor.
_OURS = ("ray::ServeReplica:", "ray::HAProxyManager", "ray::ProxyActor")


@dataclass(frozen=True, slots=True)
class Node:
    """A node of Ray's, as its raylet's own command line tells it."""

    raylet: psutil.Process
    node_id: str
    head_address: str
    is_head: bool

    def at_work(self) -> list[str]:
        """The processes of ours on it, by name; none once it has ended."""
        names = [arguments[0] for _, arguments in self._processes() if arguments]
        return sorted(name.removeprefix("ray::") for name in names if name.startswith(_OURS))

    def num_sessions(self) -> int:
        """Requests inside its HAProxy; one that has been replaced goes on until its last, and counts as one."""
        configs = Counter(
            Path(arguments[arguments.index("-f") + 1])
            for name, arguments in self._processes()
            if name == "haproxy" and "-f" in arguments
        )
        return sum(num - 1 + _num_sessions(config.parent / "admin.sock") for config, num in configs.items())

    def _processes(self) -> Iterator[tuple[str, list[str]]]:
        """Name and command line of all that the raylet has started."""
        with suppress(psutil.NoSuchProcess):
            for process in self.raylet.children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    yield process.name(), process.cmdline()

    def has_ended(self) -> bool:
        try:
            return bool(self.raylet.status() == psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return True


def find_node() -> Node | None:
    """The one of this machine or pod; None where no Ray runs. Raises: LookupError where several do."""
    found = [node for process in psutil.process_iter() if (node := _as_node(process))]
    if len(found) > 1:
        raise LookupError(f"{len(found)} nodes run on this machine; it is not known which of them is to leave")
    return found[0] if found else None


def _as_node(process: psutil.Process) -> Node | None:
    try:
        if process.name() != "raylet" or process.status() == psutil.STATUS_ZOMBIE:
            return None
        options = dict(option.split("=", 1) for option in process.cmdline() if "=" in option)
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return None
    if not {"--node_id", "--gcs-address"} <= options.keys():
        return None
    is_head = "node:__internal_head__" in options.get("--static_resource_list", "")
    return Node(process, options["--node_id"], options["--gcs-address"], is_head)


class Head:
    """What keeps the list of nodes. Every question raises OSError when it does not answer."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._client: Any = None

    def drain(self, node_id: str, deadline_s: float) -> str:
        """Why the node may not leave; "" when it does from now on. Replicas are ended by `deadline_s` (since 1970)."""
        from ray.core.generated.autoscaler_pb2 import DRAIN_NODE_REASON_PREEMPTION as MUST_LEAVE

        accepted, why = self._ask("drain_node", node_id, MUST_LEAVE, "the pod ends", int(deadline_s * 1000))
        return "" if accepted else str(why)

    def others(self) -> tuple[set[str], set[str]]:
        """The nodes beside its own that stay, and those that are leaving."""
        from ray.core.generated.gcs_pb2 import GcsNodeInfo

        nodes = self._ask("get_all_node_info").items()
        alive = {key.hex() for key, node in nodes if node.state == GcsNodeInfo.ALIVE and not node.is_head_node}
        leaving = set(self._ask("get_draining_nodes"))
        return alive - leaving, alive & leaving

    def _ask(self, method: str, *arguments: Any) -> Any:
        from ray._raylet import GcsClient  # type: ignore[attr-defined]
        from ray.exceptions import RayError

        try:
            self._check_port()
            self._client = self._client or GcsClient(address=self._address)
            return getattr(self._client, method)(*arguments, timeout=_RPC_S)
        except (RayError, RuntimeError, ValueError) as exc:
            self._client = None
            raise ConnectionError(f"{type(exc).__name__}: {exc}") from exc

    def _check_port(self) -> None:
        """Ray's client would try for a minute."""
        host, _, port = self._address.rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), timeout=_RPC_S).close()


@dataclass(slots=True)
class Activity:
    """Whether anything is asked of this node, without asking Ray: by its HAProxy and by the counts of its replicas."""

    node: Node
    metrics_port: int | None
    _steps: float = -1.0
    _since: float = field(default_factory=time.monotonic)

    def quiet_s(self) -> float:
        """How long nothing has been."""
        counts = self._counts()
        steps = counts["rookery_step_duration_seconds_count"]
        open_now = sum(counts[f"rookery_{name}"] for name in ("requests_in_progress", "queue_depth", "pool_waiting"))
        if open_now or steps != self._steps or self.node.num_sessions():
            self._steps, self._since = steps, time.monotonic()
        return time.monotonic() - self._since

    def _counts(self) -> Mapping[str, float]:
        """Of all replicas of the node, by metric."""
        total = defaultdict[str, float](float)
        if self.metrics_port is None:
            return total
        with (
            suppress(OSError),
            urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}", timeout=_RPC_S) as answer,
        ):
            for line in answer.read().decode().splitlines():
                if not line.startswith("#"):
                    name, _, value = line.rpartition(" ")
                    total[name.partition("{")[0]] += float(value)
        return total


def _num_sessions(admin: Path) -> int:
    said = b""
    with suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(_RPC_S)
        connection.connect(str(admin))
        connection.sendall(b"show stat\n")
        while part := connection.recv(65_536):
            said += part
    rows = csv.DictReader(said.decode().removeprefix("# ").splitlines())
    return sum(int(row["scur"] or 0) for row in rows if row["svname"] == "BACKEND")


def drain(node: Node, timeout_s: float, say: Callable[[str], None]) -> bool:
    """Returns when nothing of ours is left on the node, or nothing is asked of it; False when the time is over."""
    head, deadline = Head(node.head_address), time.monotonic() + timeout_s
    if node.is_head:
        return _outlast_others(node, head, deadline, say)
    try:
        refused = head.drain(node.node_id, time.time() + timeout_s)
    except OSError as exc:
        say(f"The head at {node.head_address} does not answer ({exc}); waiting until nothing is asked of this node.")
        return _wait_until_quiet(node, deadline, say)
    if refused:
        say(f"The head does not let the node go ({refused}); waiting until nothing is asked of it.")
        return _wait_until_quiet(node, deadline, say)
    say(f"Node {node.node_id[:12]} is leaving.")
    return _wait_until_empty(node, head, deadline, say)


def _wait_until_empty(node: Node, head: Head, deadline: float, say: Callable[[str], None]) -> bool:
    """Until Ray Serve has ended what ran here; without a head, or without a node to go to, it would not."""
    before: list[str] = []
    answered_at = asked_at = time.monotonic()
    while time.monotonic() < deadline:
        if node.has_ended() or not (left := node.at_work()):
            say("Nothing of ours runs here any more.")
            return True
        if left != before:
            say(f"Still here: {', '.join(left)}")
            before = left
        if time.monotonic() - asked_at > _ASK_AGAIN_S:
            asked_at = time.monotonic()
            with suppress(OSError):
                if not head.others()[0]:
                    say("All nodes are leaving; waiting until nothing is asked of this one.")
                    return _wait_until_quiet(node, deadline, say)
                answered_at = time.monotonic()
            if time.monotonic() - answered_at > _MAX_SILENCE_S:
                say("The head has gone; waiting until nothing is asked of this node.")
                return _wait_until_quiet(node, deadline, say)
        time.sleep(_POLL_S)
    say(f"The time is over; left: {', '.join(node.at_work()) or 'nothing'}")
    return False


def _wait_until_quiet(node: Node, deadline: float, say: Callable[[str], None]) -> bool:
    began, activity = time.monotonic(), Activity(node, int(os.environ.get("ROOKERY_METRICS_PORT") or 0) or None)
    while time.monotonic() < deadline:
        quiet_s = activity.quiet_s()
        if node.has_ended() or not node.at_work():
            say("Nothing of ours runs here any more.")
            return True
        if quiet_s >= _QUIET_S and time.monotonic() - began >= _NEWS_S:
            say(f"Nothing has been asked of this node for {quiet_s:.0f} s.")
            return True
        time.sleep(_POLL_S)
    say("The time is over, and requests are still being answered.")
    return False


def _outlast_others(node: Node, head: Head, deadline: float, say: Callable[[str], None]) -> bool:
    """While other nodes leave as well; a head that goes alone is soon replaced, and they get along without it."""
    alone_at = time.monotonic() + _NEWS_S
    while time.monotonic() < deadline and not node.has_ended():
        try:
            staying, leaving = head.others()
        except OSError as exc:
            say(f"This head does not answer ({exc}).")
            return False
        if not leaving and (not staying or time.monotonic() > alone_at):
            say(f"Other nodes, which stay: {len(staying)}.")
            return True
        time.sleep(_POLL_S)
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timeout", type=float, default=TIMEOUT_S, metavar="SECONDS", help="the most it may take")
    timeout_s = parser.parse_args().timeout
    if os.environ.get("ROOKERY_LOG_FILE"):  # what a hook prints is read by nobody
        configure(Settings.from_env(), part="drain")
    began = time.monotonic()

    def say(sentence: str) -> None:
        print(f"{time.monotonic() - began:6.1f} s  {sentence}", flush=True)  # noqa: T201

    try:
        node = find_node()
        if node is None:
            say("No Ray runs here.")
            return
        log.info("node_leaving", node=node.node_id)
        is_empty = drain(node, timeout_s, say)
        log.info("node_left", node=node.node_id, empty=is_empty, duration_ms=round((time.monotonic() - began) * 1000))
    except Exception as exc:  # the pod is ended all the same: a hook that fails would only hide why
        say(f"It cannot be drained: {type(exc).__name__}: {exc}")
        log.warning("node_not_drained", exc_info=True)


if __name__ == "__main__":
    main()
