"""What KubeRay's operator refuses although the schema lets it through, and what would leave its pods waiting for ever.

Source: KubeRay 1.7, ray-operator/controllers/ray/utils/validation.go and common/pod.go; feature gates as they are by
default. Knows nothing of Rookery.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator

from tests.k8s.quantities import parse
from tests.k8s.rendered import Json, Rendering, Rule, title

_NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")  # RFC 1035
_LONGEST_NAME = 47  # of 63: `-serve-svc` is put behind it, and six letters that tell one cluster from the next
_GROUP_NAME = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?")
_DURATION = re.compile(r"(\d+(\.\d+)?(ns|us|ms|s|m|h))+|\d+")
_OLDEST_WITH_TOKENS = (2, 52)
_ON = ("1", "true")
_BOOKED = ("num-cpus", "num-gpus", "memory", "resources")
_OF_FAULT_TOLERANCE = ("RAY_REDIS_ADDRESS", "REDIS_PASSWORD")
_UPGRADES = ("NewCluster", "NewClusterWithIncrementalUpgrade", "None")


def operator_errors(rendering: Rendering) -> list[str]:
    """A sentence for everything that the operator would refuse."""
    return [sentence for rule in RULES for sentence in rule(rendering)]


def the_name_leaves_room_for_others(rendering: Rendering) -> Iterator[str]:
    name = rendering.ray_service["metadata"]["name"]
    if len(name) > _LONGEST_NAME or not _NAME.fullmatch(name):
        yield f"A RayService cannot be named {name!r}: small letters, digits and -, at most {_LONGEST_NAME} of them."


def the_annotations_can_be_read(rendering: Rendering) -> Iterator[str]:
    text = rendering.ray_service["metadata"].get("annotations", {}).get("ray.io/initializing-timeout", "1s")
    if not _DURATION.fullmatch(text) or not re.search("[1-9]", text):
        yield f"ray.io/initializing-timeout is {text!r}, which is no duration."


def there_is_something_to_serve(rendering: Rendering) -> Iterator[str]:
    text = rendering.ray_service["spec"].get("serveConfigV2", "")
    if not text.strip():
        yield f"{title(rendering.ray_service)} has no serveConfigV2."
    elif not isinstance(rendering.serve_config, dict) or not rendering.serve_config.get("applications"):
        yield f"{title(rendering.ray_service)}: serveConfigV2 names no application."


def groups_book_in_one_place(rendering: Rendering) -> Iterator[str]:
    for name, group in _groups(rendering):
        parameters = group.get("rayStartParams", {})
        if group.get("resources") and any(parameters.get(one) for one in _BOOKED):
            yield f"The group {name} has resources and, in rayStartParams, amounts of them; one of the two is refused."
        if "labels" in parameters:
            yield f"The group {name} has labels in rayStartParams, where they are not looked for."
        if "resources" in parameters and not _is_book(parameters["resources"]):
            yield f"The group {name}: {parameters['resources']!r} is not JSON of numbers within quotes for a shell."


def _is_book(text: str) -> bool:
    """Twice read: as JSON without the quotes around it by the operator, as a word by the shell that starts Ray."""
    try:
        return bool(json.loads(text.strip("'\"` ")) == json.loads(*shlex.split(text)))
    except (ValueError, TypeError):
        return False


def groups_have_names_and_sizes(rendering: Rendering) -> Iterator[str]:
    names = [name for name, _ in _groups(rendering)]
    if len(set(names)) != len(names):
        yield f"Two groups have one name: {', '.join(names)}."
    for name, group in rendering.groups.items():
        least, most = group.get("minReplicas", 0), group.get("maxReplicas", 2**31 - 1)
        if not _GROUP_NAME.fullmatch(name) or len(name) > 63:
            yield f"{name!r} cannot be the name of a group: it is the value of a label."
        if not least <= group.get("replicas", least) <= most:
            yield f"The group {name} is to have {group.get('replicas')} pods, of {least} at least and {most} at most."
        if group.get("suspend"):
            yield f"The group {name} is suspended, which needs a feature gate that is off."
        if group.get("numOfHosts", 1) != 1:
            yield f"The group {name} has replicas of {group['numOfHosts']} pods each."
        if group.get("idleTimeoutSeconds") is not None and not _scales(rendering):
            yield f"The group {name} has an idleTimeoutSeconds, which is the autoscaler's."


def the_autoscaler_is_told_once(rendering: Rendering) -> Iterator[str]:
    cluster, switch = rendering.ray_cluster, _environment(rendering).get("RAY_enable_autoscaler_v2")
    version = cluster.get("autoscalerOptions", {}).get("version")
    if not _scales(rendering):
        if switch in _ON:
            yield "RAY_enable_autoscaler_v2 is on, but enableInTreeAutoscaling is not."
        if "autoscalerOptions" in cluster:
            yield "There are autoscalerOptions, but no autoscaler: enableInTreeAutoscaling is not set."
        return
    if version is not None and switch is not None:
        yield "The autoscaler's version is told twice: in autoscalerOptions and by RAY_enable_autoscaler_v2."
    if version == "v2":
        for pod in rendering.pods:
            if pod.group and pod.spec.get("restartPolicy", "Never") != "Never":
                yield f"{pod.where}: restartPolicy is {pod.spec['restartPolicy']}; autoscaler v2 wants Never."


def fault_tolerance_is_told_once(rendering: Rendering) -> Iterator[str]:
    cluster, environment = rendering.ray_cluster, _environment(rendering)
    parameters = cluster["headGroupSpec"].get("rayStartParams", {})
    annotations = rendering.ray_service["metadata"].get("annotations", {})
    options = cluster.get("gcsFaultToleranceOptions")
    for name in {"redis-username", "REDIS_USERNAME"} & (parameters.keys() | environment.keys()):
        yield f"{name} is for gcsFaultToleranceOptions.redisUsername to say."
    if options is None:
        if "RAY_REDIS_ADDRESS" in environment and annotations.get("ray.io/ft-enabled") != "true":
            yield "RAY_REDIS_ADDRESS is set, but not gcsFaultToleranceOptions."
        return
    for name in _OF_FAULT_TOLERANCE:
        if name in environment:
            yield f"{name} is in the head's environment; gcsFaultToleranceOptions is to say it alone."
    for name in annotations.keys() & {"ray.io/ft-enabled", "ray.io/external-storage-namespace"}:
        yield f"The annotation {name} says what gcsFaultToleranceOptions says."
    if "redis-password" in parameters:
        yield "redis-password is in rayStartParams; gcsFaultToleranceOptions is to say it alone."
    if options.get("backend", "redis") == "redis" and not options.get("redisAddress"):
        yield "gcsFaultToleranceOptions names no redisAddress."
    if options.get("backend", "redis") != "redis":
        yield f"The backend {options['backend']} needs a feature gate that is off."


def tokens_need_a_version(rendering: Rendering) -> Iterator[str]:
    cluster = rendering.ray_cluster
    options, version = cluster.get("authOptions", {}), str(cluster.get("rayVersion", ""))
    if options.get("mode") != "token":
        return
    match = re.match(r"(\d+)\.(\d+)", version)
    if match is None or (int(match[1]), int(match[2])) < _OLDEST_WITH_TOKENS:
        yield f"Tokens need a rayVersion of 2.52 or later, not {version!r}."
    if options.get("enableK8sTokenAuth"):
        yield "enableK8sTokenAuth is not to be had for a RayService."


def upgrades_have_all_they_need(rendering: Rendering) -> Iterator[str]:
    spec = rendering.ray_service["spec"]
    strategy = spec.get("upgradeStrategy", {})
    kind = strategy.get("type", "NewCluster")
    if kind not in _UPGRADES:
        yield f"upgradeStrategy.type is {kind!r}, not one of {', '.join(_UPGRADES)}."
    if spec.get("rayClusterDeletionDelaySeconds", 0) < 0:
        yield f"rayClusterDeletionDelaySeconds is {spec['rayClusterDeletionDelaySeconds']}."
    if rendering.ray_cluster["headGroupSpec"].get("headService", {}).get("metadata", {}).get("name"):
        yield "headService has a name, which is the operator's to give."
    if kind == "NewClusterWithIncrementalUpgrade":
        yield from _incremental_errors(strategy.get("clusterUpgradeOptions", {}), _scales(rendering))


def _incremental_errors(options: Json, scales: bool) -> Iterator[str]:
    surge, step = options.get("maxSurgePercent", 100), options.get("stepSizePercent", -1)
    if not scales:
        yield "NewClusterWithIncrementalUpgrade needs the autoscaler."
    if not 0 <= step <= surge <= 100:
        yield f"An upgrade of {step} % a step and {surge} % more at most cannot be done."
    if options.get("intervalSeconds", 0) <= 0 or not options.get("gatewayClassName"):
        yield "NewClusterWithIncrementalUpgrade needs intervalSeconds above 0 and a gatewayClassName."


def ray_starts_in_the_first_container(rendering: Rendering) -> Iterator[str]:
    for pod in rendering.pods:
        first = next((one for one in pod.containers if not one.is_init), None)
        if not pod.group or first is None:
            continue
        if first.spec.get("command") or first.spec.get("args"):
            yield f"{first.where} has a command of its own, which would run before `ray start` does."
        if not parse(first.spec.get("resources", {}).get("limits", {}).get("memory", 0)):
            yield f"{first.where} has no limit of memory, so Ray would take the whole node's for its own."


def _groups(rendering: Rendering) -> Iterator[tuple[str, Json]]:
    yield "headgroup", rendering.ray_cluster["headGroupSpec"]
    for group in rendering.ray_cluster.get("workerGroupSpecs", ()):
        yield group["groupName"], group


def _scales(rendering: Rendering) -> bool:
    return bool(rendering.ray_cluster.get("enableInTreeAutoscaling"))


def _environment(rendering: Rendering) -> dict[str, str | None]:
    """Of the head's Ray container, as it is written there."""
    head = rendering.ray_cluster["headGroupSpec"]["template"]["spec"]["containers"][0]
    return {variable["name"]: variable.get("value") for variable in head.get("env", ())}


RULES: tuple[Rule, ...] = (
    the_name_leaves_room_for_others,
    the_annotations_can_be_read,
    there_is_something_to_serve,
    groups_book_in_one_place,
    groups_have_names_and_sizes,
    the_autoscaler_is_told_once,
    fault_tolerance_is_told_once,
    tokens_need_a_version,
    upgrades_have_all_they_need,
    ray_starts_in_the_first_container,
)
