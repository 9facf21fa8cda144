"""What containers are given, how it is seen that they work, and who goes first when there is not enough for all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from decimal import Decimal
from math import inf
from typing import Any

from deployments import drain
from serve.api.service import Limits
from tests.k8s.kubernetes_rules import matches
from tests.k8s.policies.serving import replicas_of
from tests.k8s.quantities import BadQuantity, parse
from tests.k8s.rendered import Container, Pod, Rendering, title

GATEWAY, GENERATOR, TRAINER = "gateway", "generator", "trainer"
_SERVING = (GATEWAY, GENERATOR)
# A checkpoint has to be written; but a generator, with people behind it, may be waiting for the place.
_TRAINER_ENDS_S = (90.0, 180.0)
_OTHERS = 0  # the priority of whoever says nothing
_EXPENDABLE = -10  # below it the cluster's autoscaler makes no node for a pod
_DRAIN = ["python", "-m", "deployments.drain"]
_READY = "/readyz"
_STAYS = {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false", "karpenter.sh/do-not-disrupt": "true"}


def containers_know_their_limits(rendering: Rendering) -> Iterator[str]:
    """CPU has a request, and a limit too where others share the node; memory always has both."""
    for pod in rendering.pods:
        for container in pod.containers:
            resources = container.spec.get("resources", {})
            for part in ("requests", "limits"):
                for name in ("cpu", "memory"):
                    if name not in resources.get(part, {}):
                        yield f"{container.where} has no {part} of {name}."


def volumes_know_their_limits(rendering: Rendering) -> Iterator[str]:
    for pod in rendering.pods:
        for name, volume in pod.volumes.items():
            if "emptyDir" in volume and not (volume["emptyDir"] or {}).get("sizeLimit"):
                yield f"{pod.where}: the volume {name} may fill its node; give it a sizeLimit."
        for container in pod.containers:
            yield from _too_little_memory(pod, container)
            yield from _too_little_disk(pod, container)


def _too_little_memory(pod: Pod, container: Container) -> Iterator[str]:
    """What is written to a volume of memory counts as the container's own."""
    mounted = {str(mount.get("name")) for mount in container.mounts}
    volumes = [volume.get("emptyDir") or {} for name, volume in pod.volumes.items() if name in mounted]
    in_memory = [volume.get("sizeLimit", 0) for volume in volumes if volume.get("medium") == "Memory"]
    limit = container.spec.get("resources", {}).get("limits", {}).get("memory")
    try:
        taken = sum(map(parse, in_memory), Decimal(0))
        if limit is not None and not container.is_init and taken >= parse(limit):
            yield f"{container.where}: its volumes in memory may grow to {taken} bytes, all of its {limit}."
    except BadQuantity:
        return  # said by the rules of Kubernetes


def _too_little_disk(pod: Pod, container: Container) -> Iterator[str]:
    """A pod is taken from its node for more than its limit, though no volume is full."""
    mounted = {str(mount.get("name")) for mount in container.mounts}
    volumes = [volume.get("emptyDir") or {} for name, volume in pod.volumes.items() if name in mounted]
    on_disk = [volume.get("sizeLimit", 0) for volume in volumes if volume.get("medium") != "Memory"]
    limit = container.spec.get("resources", {}).get("limits", {}).get("ephemeral-storage")
    try:
        taken = sum(map(parse, on_disk), Decimal(0))
        if limit is not None and not container.is_init and container.name != "autoscaler" and taken > parse(limit):
            yield f"{container.where}: its volumes on disk may grow to {taken} bytes, beyond its {limit}."
    except BadQuantity:
        return


def probes_see_what_matters(rendering: Rendering) -> Iterator[str]:
    """To Ray's containers KubeRay adds readiness and liveness, where there are none: ours would take the place of
    those that see a dead raylet or proxy. What they do not see is whether the service behind a gateway answers.
    """
    for pod in rendering.pods:
        for container in pod.containers:
            if container.is_init or container.name == "autoscaler":
                continue  # KubeRay ends the head's pod with its autoscaler, which has nothing to ask at
            probes = {"readinessProbe", "livenessProbe"} & container.spec.keys()
            if not pod.group and not pod.ends and len(probes) < 2:
                yield f"{container.where} has no readinessProbe or no livenessProbe."
            if pod.group and probes and not _asks_ray(container, probes):
                yield f"{container.where}: {' and '.join(sorted(probes))} take the place of KubeRay's own."
        if pod.group == GATEWAY:
            yield from _gateway_probes(rendering, pod)


def _asks_ray(container: Container, probes: set[str]) -> bool:
    """A probe of ours is no loss where it asks what KubeRay's would."""
    return all("healthz" in str(container.spec[name]) for name in probes)


def _gateway_probes(rendering: Rendering, pod: Pod) -> Iterator[str]:
    container = next(one for one in pod.containers if not one.is_init)
    probe = container.spec.get("startupProbe", {})
    asked = probe.get("httpGet", {})
    named = {port.get("name"): port.get("containerPort") for port in container.ports}
    if asked.get("path") != _READY:
        yield f"{container.where}: its startupProbe does not ask {_READY}."
    elif named.get(asked.get("port"), asked.get("port")) != rendering.serve_config["http_options"]["port"]:
        yield f"{container.where}: its startupProbe asks {_READY} at {asked.get('port')}, where HTTP is not."
    if probe.get("timeoutSeconds", 1) <= 2:
        yield f"{container.where}: its startupProbe waits {probe.get('timeoutSeconds', 1)} s; {_READY} writes a token."


def pods_end_when_their_work_has(rendering: Rendering) -> Iterator[str]:
    """A generation may take what the gateway allows; a replica waits for its own as long as its options say. Training
    goes on elsewhere from its checkpoint, and somebody may be waiting for the place.
    """
    replicas = replicas_of(rendering)
    for pod in rendering.pods:
        if pod.group not in replicas:
            continue
        grace_s, (least_s, most_s) = pod.spec.get("terminationGracePeriodSeconds", 30), _TRAINER_ENDS_S
        if pod.group in _SERVING:
            least_s, most_s = max(replicas[pod.group].grace_s, Limits().generate_s), inf
        if grace_s <= least_s:
            yield f"{pod.where} is killed after {grace_s} s, but may have work for {least_s:g} s."
        if grace_s > most_s:
            yield f"{pod.where} keeps its place for {grace_s} s after it was told to go; {most_s:g} s are enough."
        yield from _drain_errors(pod, grace_s, Limits().generate_s if pod.group in _SERVING else least_s)


def _drain_errors(pod: Pod, grace_s: float, least_s: float) -> Iterator[str]:
    first = next(one for one in pod.containers if not one.is_init)
    command = first.spec.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [])
    drain_s = float(command[-1]) if command[-2:-1] == ["--timeout"] else drain.TIMEOUT_S
    if command[:3] != _DRAIN:
        yield f"{first.where} does not drain: its preStop is not {' '.join(_DRAIN)}."
    elif not least_s <= drain_s < grace_s:
        yield f"{first.where} drains for {drain_s:g} s; its work may take {least_s:g}, and all {grace_s}."


def serving_goes_before_training(rendering: Rendering) -> Iterator[str]:
    values = {one["metadata"]["name"]: one.get("value", 0) for one in rendering.of("PriorityClass")}
    given = {pod.group: values.get(pod.spec.get("priorityClassName", ""), 0) for pod in rendering.pods if pod.group}
    for name in {"head", *_SERVING} & given.keys():
        if TRAINER in given and given[name] <= given[TRAINER]:
            yield f"The {name} has priority {given[name]}, no more than training has."
    for one in rendering.of("PriorityClass"):
        if one.get("globalDefault"):
            yield f"{title(one)} is everybody's in the cluster."
        if one["value"] > _OTHERS:
            yield f"{title(one)}: with {one['value']} our pods put others out of the cluster."
        if one["value"] < _EXPENDABLE:
            yield f"{title(one)}: for pods of {one['value']} no node is made."


def two_are_not_sent_away_at_once(rendering: Rendering) -> Iterator[str]:
    """Wherever there are two, one can answer while the other moves."""
    replicas, budgets = replicas_of(rendering), rendering.of("PodDisruptionBudget")
    for pod in rendering.pods:
        are_two = pod.group in _SERVING and pod.group in replicas and replicas[pod.group].fewest > 1
        if are_two and not any(matches(one["spec"].get("selector", {}), pod.labels) for one in budgets):
            yield f"{pod.where}: all of them may be sent away at once; no PodDisruptionBudget is about them."


def heads_are_not_moved_to_save_a_node(rendering: Rendering) -> Iterator[str]:
    """There is one, and without it nothing heals or scales. A person who drains a node may all the same."""
    annotations = rendering.ray_cluster["headGroupSpec"]["template"].get("metadata", {}).get("annotations", {})
    for name, value in _STAYS.items():
        if annotations.get(name) != value:
            yield f"The head may be moved to save a node: the annotation {name} is not {value!r}."


def nothing_that_answers_is_alone(rendering: Rendering) -> Iterator[str]:
    """In the cluster that is to outlive any one of its pods and nodes."""
    if rendering.overlay != "ha":
        return
    replicas = replicas_of(rendering)
    for pod in rendering.pods:
        if pod.group in _SERVING:
            if pod.group in replicas and replicas[pod.group].fewest < 2:
                yield f"Of the {pod.group} there may be {replicas[pod.group].fewest}."
            if not pod.spec.get("topologySpreadConstraints"):
                yield f"{pod.where}: all of them may be on one node; nothing spreads them."
    if "gcsFaultToleranceOptions" not in rendering.ray_cluster:
        yield "Ray forgets the cluster with its head: gcsFaultToleranceOptions are not set."


def budgets_and_spreads_are_of_pods(rendering: Rendering) -> Iterator[str]:
    for budget in rendering.of("PodDisruptionBudget"):
        if not (chosen := select(rendering, budget["spec"].get("selector", {}))):
            yield f"{title(budget)} protects no pod."
        yield from (
            f"{title(budget)} never lets {pod.where} go." for pod in chosen if _is_stuck(rendering, budget, pod)
        )
    for pod in rendering.pods:
        for spread in pod.spec.get("topologySpreadConstraints", ()):
            if not matches(spread.get("labelSelector", {}), pod.labels):
                yield f"{pod.where} is spread among others, not among its own."


def _is_stuck(rendering: Rendering, budget: Mapping[str, Any], pod: Pod) -> bool:
    """Whether as many pods must stay as there are when nobody asks for anything."""
    spec = budget["spec"]
    if spec.get("maxUnavailable") in (0, "0%") or spec.get("minAvailable") == "100%":
        return True
    fewest = rendering.groups.get(pod.group, {}).get("minReplicas")
    return fewest is not None and isinstance(spec.get("minAvailable"), int) and spec["minAvailable"] >= max(fewest, 1)


def select(rendering: Rendering, selector: dict[str, Any]) -> list[Pod]:
    """The pods that a LabelSelector chooses."""
    return [pod for pod in rendering.pods if matches(selector, pod.labels)]


POLICIES = (
    containers_know_their_limits,
    volumes_know_their_limits,
    probes_see_what_matters,
    pods_end_when_their_work_has,
    serving_goes_before_training,
    two_are_not_sent_away_at_once,
    heads_are_not_moved_to_save_a_node,
    nothing_that_answers_is_alone,
    budgets_and_spreads_are_of_pods,
)
