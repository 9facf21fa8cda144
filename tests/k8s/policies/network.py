"""Who reaches whom, at which port: Services, NetworkPolicies and the ports that pods listen on, taken together.

A NetworkPolicy is judged by what it lets through: every flow that the service needs must pass, and whoever is outside
must get to the ports that are meant for it and to no other.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tests.k8s.kubernetes_rules import matches
from tests.k8s.policies.switches import environment
from tests.k8s.rendered import Json, Pod, Rendering, title

HTTP, METRICS, RAY_METRICS, GCS, DASHBOARD, CLIENT = 8000, 9464, 8080, 6379, 8265, 10001
AUTOSCALER_METRICS = 44217
_RAY_CHOOSES = 20_000  # stands for all ports that Ray's processes choose as they start
_DNS, _API_SERVER, _HTTPS, _POSTGRES = 53, 6443, 443, 5432
_RAY_NAMES = {
    "gcs-server": GCS,
    "gcs": GCS,
    "dashboard": DASHBOARD,
    "client": CLIENT,
    "metrics": RAY_METRICS,
    "as-metrics": AUTOSCALER_METRICS,
}
# What is asked from outside the namespace, and nothing else is.
_OPEN: Mapping[str, set[int]] = {
    "head": {DASHBOARD, RAY_METRICS, METRICS, AUTOSCALER_METRICS},  # the operator; Prometheus
    "gateway": {HTTP, RAY_METRICS, METRICS},
    "generator": {RAY_METRICS, METRICS},
    "trainer": {RAY_METRICS, METRICS},
    "postgres": {_POSTGRES},  # the driver of the volumes keeps its folders there
}
_PORTS = (
    HTTP,
    METRICS,
    RAY_METRICS,
    GCS,
    DASHBOARD,
    CLIENT,
    22,
    _POSTGRES,
    8404,
    9000,
    9101,
    30_000,
    52_365,
    AUTOSCALER_METRICS,
    _RAY_CHOOSES,
)


@dataclass(frozen=True, slots=True)
class Peer:
    """Somebody at the other end: with labels where it is a pod, with an address where it is none."""

    name: str
    namespace: Mapping[str, str]
    labels: Mapping[str, str]
    address: str = ""


_OUTSIDE = "elsewhere"
_STRANGER = Peer("a pod of another namespace", {"kubernetes.io/metadata.name": _OUTSIDE}, {})
_WORLD = Peer("the Internet", {}, {}, "203.0.113.7")
_NODE = Peer("the cloud's metadata", {}, {}, "169.254.169.254")
_HUB = Peer("the Hub", {}, {}, "203.0.113.7")
_API = Peer("the API server", {}, {}, "10.0.0.1")
# JuiceFS's: what mounts volumes, and what makes them.
_DRIVER = [
    Peer(name, {"kubernetes.io/metadata.name": "kube-system"}, {"app.kubernetes.io/name": name})
    for name in ("juicefs-mount", "juicefs-csi-driver")
]
_CLUSTER_DNS = Peer("the cluster's DNS", {"kubernetes.io/metadata.name": "kube-system"}, {"k8s-app": "kube-dns"})


def everything_is_denied_first(rendering: Rendering) -> Iterator[str]:
    for namespace in rendering.of("Namespace"):
        name = namespace["metadata"]["name"]
        if not any(_denies_all(one) and one["metadata"].get("namespace") == name for one in _policies(rendering)):
            yield f"{title(namespace)} has no NetworkPolicy that denies everything to everybody."


def _denies_all(policy: Json) -> bool:
    spec = policy["spec"]
    is_about_all = not spec.get("podSelector") and {"Ingress", "Egress"} <= set(spec.get("policyTypes", ()))
    return is_about_all and not spec.get("ingress") and not spec.get("egress")


def network_policies_choose_pods(rendering: Rendering) -> Iterator[str]:
    for policy in _policies(rendering):
        if not any(matches(policy["spec"].get("podSelector", {}), pod.labels) for pod in rendering.pods):
            yield f"{title(policy)} is about no pod."
        for direction, peers in (("ingress", "from"), ("egress", "to")):
            for rule in policy["spec"].get(direction) or ():
                for peer in rule.get(peers) or ():
                    if _is_inside(peer) and not any(matches(peer["podSelector"], pod.labels) for pod in rendering.pods):
                        yield f"{title(policy)}: {direction} names a peer that no pod is."


def network_policies_name_ports_that_are_listened_on(rendering: Rendering) -> Iterator[str]:
    for policy in _policies(rendering):
        chosen = [pod for pod in rendering.pods if matches(policy["spec"].get("podSelector", {}), pod.labels)]
        for rule in policy["spec"].get("ingress") or ():
            for port in rule.get("ports") or ():
                if "endPort" not in port and not any(_listens(pod, port.get("port")) for pod in chosen):
                    yield f"{title(policy)} opens port {port.get('port')}, at which none of its pods listens."


def outsiders_reach_what_is_for_them(rendering: Rendering) -> Iterator[str]:
    """Those whom a policy names, by their namespaces or addresses, and those whom none does."""
    for pod in rendering.pods:
        for port in _PORTS:
            for peer in (_STRANGER, _WORLD):
                if _enters(rendering, peer, pod, port):
                    yield f"{peer.name.capitalize()} gets to port {port} of {pod.where}."
        for policy in _policies_of(rendering, pod, "Ingress"):
            for rule in policy["spec"].get("ingress") or ():
                if not all(map(_is_inside, rule.get("from") or ())):
                    yield from _too_open(policy, pod, rule)


def _too_open(policy: Json, pod: Pod, rule: Json) -> Iterator[str]:
    allowed = _OPEN.get(pod.group or pod.labels.get("app.kubernetes.io/name", ""), set())
    if not rule.get("ports"):
        yield f"{title(policy)} opens every port of {pod.where} to others than the cluster's own pods."
    for port in rule.get("ports") or ():
        number = _number(pod, port.get("port"))
        if "endPort" in port or number not in allowed:
            yield f"{title(policy)} opens port {port.get('port')} of {pod.where} to others than the cluster's own pods."


def nobody_is_open_to_all(rendering: Rendering) -> Iterator[str]:
    for policy in _policies(rendering):
        for direction, peers in (("ingress", "from"), ("egress", "to")):
            for rule in policy["spec"].get(direction) or ():
                if not rule.get(peers):
                    yield f"{title(policy)}: {direction} is allowed for everybody."
    for pod in rendering.pods:
        if any(_leaves(rendering, pod, _NODE, port) for port in (80, _HTTPS)):
            yield f"{pod.where} gets to the cloud's metadata, where its node's rights are."


def what_is_needed_gets_through(rendering: Rendering) -> Iterator[str]:
    ray = [pod for pod in rendering.pods if pod.group]
    for source in ray:
        for target in ray:
            for port in (GCS, _RAY_CHOOSES) if target.group == "head" else (HTTP, _RAY_CHOOSES):
                yield from _stopped(rendering, source, target, port)
        for target in rendering.pods:
            yield from _cannot_reach_data(rendering, source, target)
    for pod in rendering.pods:
        if not _leaves(rendering, pod, _CLUSTER_DNS, _DNS, "UDP"):
            yield f"{pod.where} cannot ask for addresses."
        if pod.group in ("gateway", "generator", "trainer") and not _leaves(rendering, pod, _HUB, _HTTPS):
            yield f"{pod.where} cannot get to the Hub."
        if any(one.name == "autoscaler" for one in pod.containers) and not _leaves(rendering, pod, _API, _API_SERVER):
            yield f"{pod.where}: its autoscaler cannot get to the API server."


def volumes_can_be_mounted(rendering: Rendering) -> Iterator[str]:
    """By a driver that keeps their folders in our database."""
    if any(one["provisioner"] == "csi.juicefs.com" for one in rendering.of("StorageClass")):
        for pod in rendering.pods:
            if pod.labels.get("app.kubernetes.io/name") == "postgres":
                for peer in _DRIVER:
                    if not _enters(rendering, peer, pod, _POSTGRES):
                        yield f"{peer.name} cannot get to {pod.where}."


def _cannot_reach_data(rendering: Rendering, source: Pod, target: Pod) -> Iterator[str]:
    """The databases that run beside, for those that have them in their environment."""
    ports = {port.get("containerPort") for container in target.containers for port in container.ports}
    names = {name for container in source.containers for name in environment(rendering, container)}
    if _POSTGRES in ports and "ROOKERY_DATABASE_URL" in names:
        yield from _stopped(rendering, source, target, _POSTGRES)
    if not target.group and GCS in ports and source.group == "head":
        yield from _stopped(rendering, source, target, GCS)


def _stopped(rendering: Rendering, source: Pod, target: Pod, port: int) -> Iterator[str]:
    at_target = Peer(target.where, {}, target.labels)
    at_source = Peer(source.where, {}, source.labels)
    if not _leaves(rendering, source, at_target, port) or not _enters(rendering, at_source, target, port):
        yield f"{source.where} cannot get to port {port} of {target.where}."


def services_lead_to_ports_that_are_listened_on(rendering: Rendering) -> Iterator[str]:
    for service in rendering.of("Service"):
        selector = service["spec"].get("selector", {})
        chosen = [pod for pod in rendering.pods if selector and matches({"matchLabels": selector}, pod.labels)]
        if not chosen:
            yield f"{title(service)} leads to no pod."
        for pod in chosen:
            for port in service["spec"].get("ports", ()):
                target = port.get("targetPort", port["port"])
                if not _listens(pod, target):
                    yield f"{title(service)} leads to port {target}, at which {pod.where} does not listen."


def requests_get_to_gateways_alone(rendering: Rendering) -> Iterator[str]:
    """Also while two clusters are there: the operator's own Service turns from one to the other at a stroke."""
    service = rendering.named("Service", "rookery")
    if service is None:
        yield "There is no Service rookery."
        return
    groups = {pod.group for pod in rendering.pods if matches({"matchLabels": service["spec"]["selector"]}, pod.labels)}
    if groups != {"gateway"}:
        yield f"The Service rookery leads to {', '.join(sorted(groups)) or 'nobody'}, not to gateways alone."
    if "ray.io/cluster" in service["spec"]["selector"]:
        yield "The Service rookery leads to one cluster, and to none during an upgrade."


def databases_are_called_by_their_names(rendering: Rendering) -> Iterator[str]:
    address = str(rendering.ray_cluster.get("gcsFaultToleranceOptions", {}).get("redisAddress", ""))
    if address:
        host, _, port = address.removeprefix("redis://").partition(":")
        service = rendering.named("Service", host.partition(".")[0])
        if service is None or int(port or GCS) not in [one["port"] for one in service["spec"].get("ports", ())]:
            yield f"Ray is to keep its state at {address}, where no Service is."


def ports_are_those_that_are_listened_on(rendering: Rendering) -> Iterator[str]:
    http = rendering.serve_config["http_options"]["port"]
    if http != HTTP or rendering.serve_config["http_options"]["host"] != "0.0.0.0":
        yield f"HTTP is at port {http} of {rendering.serve_config['http_options']['host']}, where nobody looks for it."
    for pod in rendering.pods:
        if pod.group:
            first = next(one for one in pod.containers if not one.is_init)
            settings = environment(rendering, first)
            metrics = settings.get("ROOKERY_METRICS_PORT") or "0"
            expected = {**_RAY_NAMES, "serve": http, "http": http, "rookery-metrics": int(metrics)}
            for port in first.ports:
                if expected.get(str(port.get("name"))) != port.get("containerPort"):
                    yield f"{first.where}: nothing listens at {port.get('containerPort')} as {port.get('name')}."
            if pod.group != "head" and not {"serve", "rookery-metrics", "metrics"} <= {
                p.get("name") for p in first.ports
            }:
                yield f"{first.where} does not name its ports serve, rookery-metrics and metrics."
            if settings.get("ROOKERY_METRICS_HOST") != "0.0.0.0":
                yield f"{first.where}: its metrics are for its own machine alone: ROOKERY_METRICS_HOST is not 0.0.0.0."


# --- What a NetworkPolicy lets through ----------------------------------------------------------------------


def _enters(rendering: Rendering, peer: Peer, pod: Pod, port: int) -> bool:
    return _passes(_policies_of(rendering, pod, "Ingress"), "ingress", "from", peer, pod, port, "TCP")


def _leaves(rendering: Rendering, pod: Pod, peer: Peer, port: int, protocol: str = "TCP") -> bool:
    return _passes(_policies_of(rendering, pod, "Egress"), "egress", "to", peer, None, port, protocol)


def _passes(
    policies: list[Json], direction: str, peers: str, peer: Peer, target: Pod | None, port: int, protocol: str
) -> bool:
    """Whoever no policy is about may do everything."""
    return not policies or any(
        _names_peer(rule.get(peers), peer) and _names_port(rule.get("ports"), target, port, protocol)
        for policy in policies
        for rule in policy["spec"].get(direction) or ()
    )


def _names_peer(peers: list[Json] | None, peer: Peer) -> bool:
    return not peers or any(_is(one, peer) for one in peers)


def _is(described: Json, peer: Peer) -> bool:
    if "ipBlock" in described:
        block, holes = described["ipBlock"]["cidr"], described["ipBlock"].get("except", ())
        return (
            bool(peer.address) and _within(peer.address, block) and not any(_within(peer.address, one) for one in holes)
        )
    if peer.address:
        return False
    if "namespaceSelector" in described:
        if not matches(described["namespaceSelector"], peer.namespace):
            return False
    elif peer.namespace:
        return False
    return matches(described.get("podSelector", {}), peer.labels)


def _within(address: str, block: str) -> bool:
    return ipaddress.ip_address(address) in ipaddress.ip_network(block)


def _names_port(ports: list[Json] | None, target: Pod | None, port: int, protocol: str) -> bool:
    return not ports or any(
        one.get("protocol", "TCP") == protocol
        and (one.get("port") is None or _first(target, one) <= port <= one.get("endPort", _first(target, one)))
        for one in ports
    )


def _first(target: Pod | None, port: Json) -> int:
    return _number(target, port["port"]) or 0


def _number(pod: Pod | None, port: Any) -> int | None:
    if isinstance(port, int) or pod is None:
        return port if isinstance(port, int) else None
    named = (one for container in pod.containers for one in container.ports)
    return next((int(one["containerPort"]) for one in named if one.get("name") == port), None)


def _listens(pod: Pod, port: Any) -> bool:
    ports = [one for container in pod.containers for one in container.ports]
    return any(port in (one.get("name"), one.get("containerPort")) for one in ports)


def _is_inside(peer: Json) -> bool:
    """Of the policy's own namespace."""
    return "podSelector" in peer and "namespaceSelector" not in peer


def _policies(rendering: Rendering) -> list[Json]:
    return rendering.of("NetworkPolicy")


def _policies_of(rendering: Rendering, pod: Pod, direction: str) -> list[Json]:
    return [
        one
        for one in _policies(rendering)
        if direction in one["spec"].get("policyTypes", ("Ingress",))
        and one["metadata"].get("namespace") == pod.namespace
        and matches(one["spec"].get("podSelector", {}), pod.labels)
    ]


POLICIES = (
    everything_is_denied_first,
    network_policies_choose_pods,
    network_policies_name_ports_that_are_listened_on,
    outsiders_reach_what_is_for_them,
    nobody_is_open_to_all,
    what_is_needed_gets_through,
    volumes_can_be_mounted,
    services_lead_to_ports_that_are_listened_on,
    requests_get_to_gateways_alone,
    databases_are_called_by_their_names,
    ports_are_those_that_are_listened_on,
)
