"""What an API server refuses beyond what schemas say: names, references inside a pod, amounts, selectors.

Each rule is a generator of sentences; `RULES` has all. Knows nothing of Rookery or of KubeRay, but that a RayService
describes pods. Source: the validation of Kubernetes' own kinds, as its documentation describes it.
"""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tests.k8s.quantities import BadQuantity, parse
from tests.k8s.rendered import Container, Json, Pod, Rendering, Rule, title, walk

_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")  # RFC 1123
_SERVICE = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")  # RFC 1035
_SUBDOMAIN = re.compile(r"(?=.{1,253}$)[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_RBAC = re.compile(r"(?!\.{1,2}$)[^/%]+")
_QUALIFIED = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)")
_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
_PORT_NAME = re.compile(r"(?=.{1,15}$)(?=.*[a-z])(?!.*--)[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_ENV = re.compile(r"[-._a-zA-Z][-._a-zA-Z0-9]*")
_KEY = re.compile(r"(?!\.{1,2}$)[-._a-zA-Z0-9]{1,253}")
_PERCENT = re.compile(r"(100|[0-9]{1,2})%")

_NAMES: Mapping[str, re.Pattern[str]] = {
    "Namespace": _LABEL,
    "Service": _SERVICE,
    **dict.fromkeys(("Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding"), _RBAC),
}
_LONGEST_NAME = {"StatefulSet": 52, "CronJob": 52}  # of the pods' and jobs' names a part is Kubernetes'
_CLUSTER_WIDE = {"Namespace", "PriorityClass", "ClusterRole", "ClusterRoleBinding", "StorageClass"}
_METADATA = {"name", "namespace", "labels", "annotations", "finalizers"}
_CONFIG_MAP_BYTES = 1 << 20
_ANNOTATION_BYTES = 256 << 10
_HIGHEST_PRIORITY = 10**9
_PROBES = ("startupProbe", "readinessProbe", "livenessProbe")
_HANDLERS = {"exec", "httpGet", "tcpSocket", "grpc", "sleep"}


def api_errors(rendering: Rendering) -> list[str]:
    """A sentence for everything that an API server would refuse."""
    return [sentence for rule in RULES for sentence in rule(rendering)]


# --- What every document has --------------------------------------------------------------------------------


def documents_have_names_of_their_own(rendering: Rendering) -> Iterator[str]:
    names = Counter(
        (one["apiVersion"], one["kind"], one["metadata"].get("namespace", ""), one["metadata"].get("name"))
        for one in rendering.documents
    )
    yield from (f"{kind} {name} is there {count} times." for (_, kind, _, name), count in names.items() if count > 1)
    for document in rendering.documents:
        kind, name = document["kind"], str(document["metadata"].get("name", ""))
        if not _NAMES.get(kind, _SUBDOMAIN).fullmatch(name) or len(name) > _LONGEST_NAME.get(kind, 253):
            yield f"{title(document)}: {name!r} cannot be a {kind}'s name."


def documents_say_where_they_belong(rendering: Rendering) -> Iterator[str]:
    namespaces = {one["metadata"]["name"] for one in rendering.of("Namespace")}
    for document in rendering.documents:
        namespace = document["metadata"].get("namespace")
        if document["kind"] in _CLUSTER_WIDE:
            if namespace:
                yield f"{title(document)} belongs to no namespace, but names {namespace}."
        elif namespace not in namespaces:
            yield f"{title(document)} is in the namespace {namespace}, which is not made here."


def metadata_can_be_kept(rendering: Rendering) -> Iterator[str]:
    for document in rendering.documents:
        if unknown := document["metadata"].keys() - _METADATA:
            yield f"{title(document)}: metadata has {', '.join(sorted(unknown))}, which is not for people to set."
        yield from _metadata_errors(title(document), document["metadata"])
    for pod in rendering.pods:
        yield from _labels_errors(pod.where, pod.labels)


def _metadata_errors(where: str, metadata: Json) -> Iterator[str]:
    yield from _labels_errors(where, metadata.get("labels") or {})
    annotations = metadata.get("annotations") or {}
    for key, value in annotations.items():
        if not isinstance(value, str):
            yield f"{where}: the annotation {key} is {value!r}, which is no text."
        if not _is_qualified(key):
            yield f"{where}: {key!r} cannot be an annotation's name."
    size = sum(len(str(key).encode()) + len(str(value).encode()) for key, value in annotations.items())
    if size > _ANNOTATION_BYTES:
        yield f"{where}: annotations of {size} bytes; {_ANNOTATION_BYTES} are the most."


def _labels_errors(where: str, labels: Mapping[str, Any]) -> Iterator[str]:
    for key, value in labels.items():
        if not isinstance(value, str) or not _LABEL_VALUE.fullmatch(value):
            yield f"{where}: the label {key} cannot be {value!r}."
        if not _is_qualified(key):
            yield f"{where}: {key!r} cannot be a label's name."


def _is_qualified(key: str) -> bool:
    prefix, slash, name = key.rpartition("/")
    return bool(_QUALIFIED.fullmatch(name)) and (not slash or bool(_SUBDOMAIN.fullmatch(prefix)))


# --- Pods ---------------------------------------------------------------------------------------------------


def containers_have_names_of_their_own(rendering: Rendering) -> Iterator[str]:
    for pod in rendering.pods:
        names = [container.name for container in pod.containers]
        yield from (f"{pod.where}: {name!r} cannot be a container's name." for name in _bad(_LABEL, names))
        yield from (f"{pod.where}: two containers are named {name}." for name in _twice(names))
        if all(container.is_init for container in pod.containers):
            yield f"{pod.where} has no container."


def ports_can_be_listened_on(rendering: Rendering) -> Iterator[str]:
    for container in _containers(rendering):
        names = [port["name"] for port in container.ports if "name" in port]
        yield from (f"{container.where}: {name!r} cannot be a port's name." for name in _bad(_PORT_NAME, names))
        yield from (f"{container.where}: two ports are named {name}." for name in _twice(names))
        numbers = [(port.get("containerPort"), port.get("protocol", "TCP")) for port in container.ports]
        yield from (f"{container.where}: port {number} is there twice." for number in _twice(numbers))
        for number, _ in numbers:
            if not _is_port(number):
                yield f"{container.where}: {number!r} is no port."


def environments_can_be_set(rendering: Rendering) -> Iterator[str]:
    for container in _containers(rendering):
        variables = container.spec.get("env", ())
        names = [variable.get("name", "") for variable in variables]
        yield from (f"{container.where}: {name!r} cannot be a variable's name." for name in _bad(_ENV, names))
        yield from (f"{container.where}: the variable {name} is set twice." for name in _twice(names))
        for variable in variables:
            if "valueFrom" in variable and ("value" in variable or len(variable["valueFrom"]) != 1):
                yield f"{container.where}: the variable {variable['name']} is to come from more than one place."
        for source in container.spec.get("envFrom", ()):
            if len(source.keys() & {"configMapRef", "secretRef"}) != 1:
                yield f"{container.where}: envFrom is to name one ConfigMap or one Secret."


def mounts_are_of_volumes(rendering: Rendering) -> Iterator[str]:
    for pod in rendering.pods:
        names = [str(volume.get("name", "")) for volume in pod.spec.get("volumes", ())]
        yield from (f"{pod.where}: {name!r} cannot be a volume's name." for name in _bad(_LABEL, names))
        yield from (f"{pod.where}: two volumes are named {name}." for name in _twice(names))
        for name, volume in pod.volumes.items():
            if len(volume) != 2:
                yield f"{pod.where}: the volume {name} is to have one source, not {len(volume) - 1}."
        claimed = _claimed_by_template(rendering, pod)
        for container in pod.containers:
            yield from _mount_errors(container, {*pod.volumes, *claimed})


def _mount_errors(container: Container, volumes: set[str]) -> Iterator[str]:
    paths = [str(mount.get("mountPath", "")) for mount in container.mounts]
    yield from (f"{container.where}: two volumes are mounted at {path}." for path in _twice(paths))
    for mount, path in zip(container.mounts, paths, strict=True):
        if str(mount.get("name")) not in volumes:
            yield f"{container.where} mounts {mount.get('name')}, which is no volume of its pod."
        if not path.startswith("/") or ":" in path:
            yield f"{container.where}: nothing can be mounted at {path!r}."
        if (sub := mount.get("subPath", "")).startswith("/") or ".." in sub.split("/"):
            yield f"{container.where}: {sub!r} leads out of its volume."


def _claimed_by_template(rendering: Rendering, pod: Pod) -> set[str]:
    owners = [one for one in rendering.of("StatefulSet") if title(one) == pod.where]
    return {claim["metadata"]["name"] for one in owners for claim in one["spec"].get("volumeClaimTemplates", ())}


def amounts_can_be_given(rendering: Rendering) -> Iterator[str]:
    for container in _containers(rendering):
        resources = container.spec.get("resources", {})
        for part in ("requests", "limits"):
            yield from _amount_errors(f"{container.where}, {part}", resources.get(part, {}))
        yield from _above_limit(container.where, resources.get("requests", {}), resources.get("limits", {}))
    for pod in rendering.pods:
        for name, volume in pod.volumes.items():
            limit = volume.get("emptyDir", {}).get("sizeLimit", 0)
            yield from _amount_errors(f"{pod.where}, volume {name}", {"sizeLimit": limit})
    for claim in rendering.of("PersistentVolumeClaim"):
        yield from _claim_errors(title(claim), claim["spec"])
    for owner in rendering.of("StatefulSet"):
        for claim in owner["spec"].get("volumeClaimTemplates", ()):
            yield from _claim_errors(f"{title(owner)}, {claim['metadata']['name']}", claim["spec"])


def _amount_errors(where: str, amounts: Mapping[str, Any]) -> Iterator[str]:
    for name, text in amounts.items():
        try:
            if parse(text) < 0:
                yield f"{where}: {name} is {text}, less than nothing."
            elif "/" in name and parse(text) % 1:
                yield f"{where}: {name} is {text}, but is to be had whole alone."
        except BadQuantity as exc:
            yield f"{where}: {name}: {exc}."


def _above_limit(where: str, requests: Mapping[str, Any], limits: Mapping[str, Any]) -> Iterator[str]:
    try:
        for name in requests.keys() & limits.keys():
            if parse(requests[name]) > parse(limits[name]):
                yield f"{where} requests {requests[name]} of {name}, and may have {limits[name]}."
        for name in requests.keys() | limits.keys():
            if "/" in name and name not in limits:
                yield f"{where} requests {name}, which needs a limit of as much."
            elif "/" in name and parse(requests.get(name, limits[name])) != parse(limits[name]):
                yield f"{where}: {name} is to be requested as it is limited."
    except BadQuantity:
        return  # said above


def _claim_errors(where: str, spec: Json) -> Iterator[str]:
    if not spec.get("accessModes"):
        yield f"{where} names no access mode."
    storage = spec.get("resources", {}).get("requests", {}).get("storage")
    if storage is None:
        yield f"{where} requests no storage."
    else:
        yield from _amount_errors(where, {"storage": storage})


def probes_and_hooks_can_run(rendering: Rendering) -> Iterator[str]:
    for container in _containers(rendering):
        ports = {port.get("name") for port in container.ports}
        for name in _PROBES:
            if (probe := container.spec.get(name)) is not None:
                if container.is_init and container.spec.get("restartPolicy") != "Always":
                    yield f"{container.where} ends before the others begin, and can have no {name}."
                yield from _probe_errors(f"{container.where}, {name}", name, probe, ports)
        for moment, hook in container.spec.get("lifecycle", {}).items():
            if len(hook.keys() & _HANDLERS) != 1:
                yield f"{container.where}: {moment} is to do one thing."
            elif hook.get("exec") is not None and not hook["exec"].get("command"):
                yield f"{container.where}: {moment} has no command."


def _probe_errors(where: str, name: str, probe: Json, ports: set[Any]) -> Iterator[str]:
    handlers = probe.keys() & _HANDLERS
    if len(handlers) != 1:
        yield f"{where} is to ask in one way, not {len(handlers)}."
    for number in ("periodSeconds", "timeoutSeconds", "failureThreshold", "successThreshold"):
        if probe.get(number, 1) < 1:
            yield f"{where}: {number} is {probe[number]}."
    if name != "readinessProbe" and probe.get("successThreshold", 1) != 1:
        yield f"{where} is to succeed once, not {probe['successThreshold']} times."
    for handler in handlers & {"httpGet", "tcpSocket", "grpc"}:
        port = probe[handler].get("port")
        if not _is_port(port) and port not in ports:
            yield f"{where} asks at port {port}, which the container does not have."


def pods_can_end(rendering: Rendering) -> Iterator[str]:
    for pod in rendering.pods:
        if pod.spec.get("terminationGracePeriodSeconds", 30) < 0:
            yield f"{pod.where}: terminationGracePeriodSeconds is {pod.spec['terminationGracePeriodSeconds']}."
        kind, policy = pod.where.split()[0], pod.spec.get("restartPolicy", "Always")
        allowed = ("Never", "OnFailure") if kind in ("Job", "CronJob") else ("Always",)
        if kind not in ("Pod", "RayService", "RayCluster") and policy not in allowed:
            yield f"{pod.where}: restartPolicy is {policy}, where {' or '.join(allowed)} is possible."


def spreads_can_be_kept(rendering: Rendering) -> Iterator[str]:
    for pod in rendering.pods:
        spreads = pod.spec.get("topologySpreadConstraints", ())
        for spread in spreads:
            if spread.get("maxSkew", 0) < 1:
                yield f"{pod.where}: maxSkew is {spread.get('maxSkew')}."
            if "minDomains" in spread and spread.get("whenUnsatisfiable") != "DoNotSchedule":
                yield f"{pod.where}: minDomains goes with DoNotSchedule alone."
        pairs = [(spread.get("topologyKey"), spread.get("whenUnsatisfiable")) for spread in spreads]
        yield from (f"{pod.where}: spread over {key} twice." for key, _ in _twice(pairs))


# --- Single kinds -------------------------------------------------------------------------------------------


def selectors_select_their_own_pods(rendering: Rendering) -> Iterator[str]:
    for document in rendering.of("Deployment", "StatefulSet", "DaemonSet"):
        selector = document["spec"].get("selector", {})
        labels = document["spec"]["template"].get("metadata", {}).get("labels", {})
        if not selector:
            yield f"{title(document)} selects no pods."
        elif not matches(selector, labels):
            yield f"{title(document)} does not select the pods that it makes."


def selectors_can_be_read(rendering: Rendering) -> Iterator[str]:
    for document in rendering.documents:
        for selector in _selectors(document):
            yield from _labels_errors(f"{title(document)}, selector", selector.get("matchLabels") or {})
            for one in selector.get("matchExpressions") or ():
                if (one.get("operator") in ("In", "NotIn")) != bool(one.get("values")):
                    yield f"{title(document)}: {one.get('operator')} of {one.get('key')} has the wrong values."


def services_have_ports(rendering: Rendering) -> Iterator[str]:
    for service in rendering.of("Service"):
        ports = service["spec"].get("ports", [])
        names = [port.get("name", "") for port in ports]
        if not ports and service["spec"].get("clusterIP") != "None":
            yield f"{title(service)} has no port."
        if len(ports) > 1:
            yield from (f"{title(service)}: {name!r} cannot be a port's name." for name in _bad(_LABEL, names))
            yield from (f"{title(service)}: two ports are named {name}." for name in _twice(names))
        for port in ports:
            target = port.get("targetPort", port.get("port"))
            if not _is_port(port.get("port")):
                yield f"{title(service)}: {port.get('port')!r} is no port."
            if not _is_port(target) and not _PORT_NAME.fullmatch(str(target)):
                yield f"{title(service)}: {target!r} is neither a port nor the name of one."


def network_policies_can_be_read(rendering: Rendering) -> Iterator[str]:
    for policy in rendering.of("NetworkPolicy"):
        spec, where = policy["spec"], title(policy)
        for direction, peers in (("ingress", "from"), ("egress", "to")):
            if spec.get(direction) and direction.capitalize() not in spec.get("policyTypes", ("Ingress",)):
                yield f"{where} has rules for {direction}, but is not about it."
            for rule in spec.get(direction) or ():
                for peer in rule.get(peers) or ():
                    yield from _peer_errors(where, peer)
                for port in rule.get("ports") or ():
                    yield from _policy_port_errors(where, port)


def _peer_errors(where: str, peer: Json) -> Iterator[str]:
    if not peer or ("ipBlock" in peer and len(peer) > 1):
        yield f"{where}: a peer is pods, namespaces or both, or else a block of addresses."
    block = peer.get("ipBlock", {})
    try:
        if block:
            network = ipaddress.ip_network(block.get("cidr", ""))
            for text in block.get("except", ()):
                hole = ipaddress.ip_network(text)
                if hole.version != network.version or hole == network or not hole.subnet_of(network):  # type: ignore[arg-type]
                    yield f"{where}: {text} is not within {network}."
    except ValueError as exc:
        yield f"{where}: {exc}."


def _policy_port_errors(where: str, port: Json) -> Iterator[str]:
    first, last = port.get("port"), port.get("endPort")
    if first is not None and not _is_port(first) and not _PORT_NAME.fullmatch(str(first)):
        yield f"{where}: {first!r} is no port."
    if last is not None and (not isinstance(first, int) or not _is_port(last) or last < first):
        yield f"{where}: no ports go from {first} to {last}."


def disruption_budgets_say_one_thing(rendering: Rendering) -> Iterator[str]:
    for budget in rendering.of("PodDisruptionBudget"):
        given = [budget["spec"][name] for name in ("minAvailable", "maxUnavailable") if name in budget["spec"]]
        if len(given) != 1:
            yield f"{title(budget)} is to have one of minAvailable and maxUnavailable."
        for number in given:
            if not (isinstance(number, int) and number >= 0) and not _PERCENT.fullmatch(str(number)):
                yield f"{title(budget)}: {number!r} is neither a number nor a share of pods."


def priorities_are_in_range(rendering: Rendering) -> Iterator[str]:
    for priority in rendering.of("PriorityClass"):
        if abs(priority.get("value", 0)) > _HIGHEST_PRIORITY:
            yield f"{title(priority)}: {priority['value']} is beyond {_HIGHEST_PRIORITY}, where the system's begin."
        if priority["metadata"]["name"].startswith("system-"):
            yield f"{title(priority)}: names that begin with system- are the system's."
    if sum(one.get("globalDefault", False) for one in rendering.of("PriorityClass")) > 1:
        yield "Two PriorityClasses are everybody's default."


def config_maps_can_be_kept(rendering: Rendering) -> Iterator[str]:
    for config in rendering.of("ConfigMap", "Secret"):
        data = {**config.get("data", {}), **config.get("binaryData", {}), **config.get("stringData", {})}
        yield from (f"{title(config)}: {key!r} cannot be a key." for key in _bad(_KEY, data))
        size = sum(len(key.encode()) + len(str(value).encode()) for key, value in data.items())
        if size > _CONFIG_MAP_BYTES:
            yield f"{title(config)} has {size} bytes; {_CONFIG_MAP_BYTES} are the most."


def schedules_can_be_kept(rendering: Rendering) -> Iterator[str]:
    for job in rendering.of("CronJob"):
        if not _is_schedule(job["spec"].get("schedule", "")):
            yield f"{title(job)}: {job['spec'].get('schedule')!r} is no schedule."


_CRON_FIELDS = ((0, 59), (0, 23), (1, 31), (1, 12), (0, 6))


def _is_schedule(text: str) -> bool:
    """As numbers, lists, ranges and steps, or one of the words for them; names of days are not known here."""
    if text in ("@yearly", "@annually", "@monthly", "@weekly", "@daily", "@midnight", "@hourly"):
        return True
    parts = text.split()
    return len(parts) == len(_CRON_FIELDS) and all(
        _is_cron_part(one, *limits) for part, limits in zip(parts, _CRON_FIELDS, strict=True) for one in part.split(",")
    )


def _is_cron_part(text: str, lowest: int, highest: int) -> bool:
    match = re.fullmatch(r"(?:\*|(\d+)(?:-(\d+))?)(?:/(\d+))?", text)
    if match is None or (match[3] is not None and int(match[3]) < 1):
        return False
    first = int(match[1]) if match[1] else lowest
    last = int(match[2]) if match[2] else first
    return lowest <= first <= last <= highest


def roles_can_be_bound(rendering: Rendering) -> Iterator[str]:
    for role in rendering.of("Role", "ClusterRole"):
        for rule in role.get("rules") or ():
            if not rule.get("verbs") or not (rule.get("resources") or rule.get("nonResourceURLs")):
                yield f"{title(role)} has a rule without verbs or without resources."
            elif rule.get("resources") and "apiGroups" not in rule:
                yield f"{title(role)} has a rule for resources of no group."
    for binding in rendering.of("RoleBinding", "ClusterRoleBinding"):
        for subject in binding.get("subjects") or ():
            if subject.get("kind") == "ServiceAccount" and not subject.get("namespace"):
                yield f"{title(binding)}: the ServiceAccount {subject.get('name')} has no namespace."


# --- Shared -------------------------------------------------------------------------------------------------


def matches(selector: Json, labels: Mapping[str, str]) -> bool:
    """Whether a LabelSelector chooses what has these labels; an empty one chooses everything."""
    expressions = selector.get("matchExpressions") or ()
    wanted = selector.get("matchLabels") or {}
    return all(labels.get(key) == value for key, value in wanted.items()) and all(
        _holds(one, labels.get(one["key"])) for one in expressions
    )


def _holds(expression: Json, value: str | None) -> bool:
    values = expression.get("values", ())
    return {
        "In": value in values,
        "NotIn": value not in values,
        "Exists": value is not None,
        "DoesNotExist": value is None,
    }[expression["operator"]]


def _selectors(document: Json) -> Iterator[Json]:
    """Every LabelSelector inside, by the names that it goes by."""
    for key, value in walk(document):
        is_one = key in ("podSelector", "namespaceSelector", "labelSelector", "selector") and isinstance(value, dict)
        if is_one and value.keys() <= {"matchLabels", "matchExpressions"}:
            yield value


def _containers(rendering: Rendering) -> Iterator[Container]:
    for pod in rendering.pods:
        yield from pod.containers


def _is_port(number: Any) -> bool:
    return isinstance(number, int) and 1 <= number <= 65535


def _bad(pattern: re.Pattern[str], names: Iterable[str]) -> list[str]:
    return [name for name in names if not pattern.fullmatch(str(name))]


def _twice(names: Iterable[Any]) -> list[Any]:
    return [name for name, count in Counter(names).items() if count > 1]


RULES: tuple[Rule, ...] = (
    documents_have_names_of_their_own,
    documents_say_where_they_belong,
    metadata_can_be_kept,
    containers_have_names_of_their_own,
    ports_can_be_listened_on,
    environments_can_be_set,
    mounts_are_of_volumes,
    amounts_can_be_given,
    probes_and_hooks_can_run,
    pods_can_end,
    spreads_can_be_kept,
    selectors_select_their_own_pods,
    selectors_can_be_read,
    services_have_ports,
    network_policies_can_be_read,
    disruption_budgets_say_one_thing,
    priorities_are_in_range,
    config_maps_can_be_kept,
    schedules_can_be_kept,
    roles_can_be_bound,
)
