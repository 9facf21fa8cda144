"""Who may do what inside a pod, what images run, and that nothing secret is written down."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import version
from typing import Any

from serve.version import VERSION
from tests.k8s.rendered import ROOT, Container, Json, Pod, Rendering, title

IMAGE = "rookery"
_ARCHITECTURE, _BUILT_FOR = "kubernetes.io/arch", "amd64"  # what k8s/requirements has the hashes of
_DIGEST = re.compile(r"@sha256:[0-9a-f]{64}$")
_VOLUMES = {"configMap", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
_HOST = ("hostNetwork", "hostPID", "hostIPC")
_SECCOMP = ("RuntimeDefault", "Localhost")
_SYSCTLS = ("kernel.shm_rmid_forced", "net.ipv4.ip_local_port_range", "net.ipv4.ip_unprivileged_port_start")
_SECRET_NAME = re.compile(r"TOKEN|PASSWORD|PASSWD|SECRET|API_?KEY|CREDENTIAL|PRIVATE_?KEY|DATABASE_URL", re.I)
_SECRET_TEXT = re.compile(
    r"://[^/\s:@]+:[^/\s:@$]+@"  # a password in an address; $(NAME) is a reference
    r"|\bhf_[A-Za-z0-9]{20,}|\bAKIA[0-9A-Z]{16}\b|\bghp_[A-Za-z0-9]{30,}|\bsk-[A-Za-z0-9]{20,}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)


def images_are_pinned(rendering: Rendering) -> Iterator[str]:
    for pod in rendering.pods:
        for container in pod.containers:
            image = str(container.spec.get("image", ""))
            name, _, tag = image.rpartition("/")[2].partition(":")
            if not _DIGEST.search(image) and tag in ("", "latest"):
                yield f"{container.where}: the image {image!r} may be another one tomorrow; name its version."
            if name.partition("@")[0] == IMAGE and not tag.startswith(VERSION):
                yield f"{container.where}: {image} is not of this release, {VERSION}."


def ray_is_the_one_in_the_image(rendering: Rendering) -> Iterator[str]:
    told, installed = rendering.ray_cluster.get("rayVersion"), version("ray")
    if told != installed:
        yield f"rayVersion is {told}, but the image has {installed}."


def the_namespace_takes_restricted_pods_alone(rendering: Rendering) -> Iterator[str]:
    for namespace in rendering.of("Namespace"):
        level = namespace["metadata"].get("labels", {}).get("pod-security.kubernetes.io/enforce")
        if level != "restricted":
            yield f"{title(namespace)} takes pods that are {level or 'anything'}, not restricted ones alone."


def pods_are_restricted(rendering: Rendering) -> Iterator[str]:
    """Kubernetes' own standard `restricted`, as far as our pods have what it speaks of, for the autoscaler too."""
    for pod in rendering.pods:
        for name in _HOST:
            if pod.spec.get(name):
                yield f"{pod.where} has {name}."
        for name, volume in pod.volumes.items():
            for source in volume.keys() - _VOLUMES - {"name"}:
                yield f"{pod.where}: the volume {name} is {source}, which restricted pods cannot have."
        for sysctl in pod.spec.get("securityContext", {}).get("sysctls", ()):
            if sysctl.get("name") not in _SYSCTLS:
                yield f"{pod.where} sets {sysctl.get('name')}."
        for container in pod.containers:
            yield from _not_restricted(pod, container)


def _not_restricted(pod: Pod, container: Container) -> Iterator[str]:
    own: Json = container.spec.get("securityContext", {})
    both: Json = {**pod.spec.get("securityContext", {}), **own}
    capabilities = own.get("capabilities", {})
    if own.get("privileged") or own.get("procMount", "Default") != "Default":
        yield f"{container.where} is privileged."
    if own.get("allowPrivilegeEscalation") is not False:
        yield f"{container.where} may gain privileges: allowPrivilegeEscalation is not false."
    if "ALL" not in capabilities.get("drop", ()) or set(capabilities.get("add", ())) - {"NET_BIND_SERVICE"}:
        yield f"{container.where} keeps capabilities."
    if both.get("runAsNonRoot") is not True or both.get("runAsUser", 1) == 0:
        yield f"{container.where} may run as root."
    if both.get("seccompProfile", {}).get("type") not in _SECCOMP:
        yield f"{container.where} has no seccomp profile."
    if any("hostPort" in port for port in container.ports):
        yield f"{container.where} takes a port of its node."


def pods_run_as_the_images_user(rendering: Rendering) -> Iterator[str]:
    """Whose the folders in it are; volumes belong to its group."""
    for pod in rendering.pods:
        if not any(_is_ours(container) for container in pod.containers):
            continue
        context = pod.spec.get("securityContext", {})
        given = [str(context.get(name)) for name in ("runAsUser", "runAsGroup", "fsGroup")]
        if set(given) != {_user_of_image()}:
            yield f"{pod.where} is user and groups {', '.join(given)}; the image is made for {_user_of_image()}."


def pods_go_where_the_image_runs(rendering: Rendering) -> Iterator[str]:
    """And by no label that only some clusters put on their nodes: no first node would be made for such a pod."""
    for pod in rendering.pods:
        chosen = pod.spec.get("nodeSelector", {})
        if any(map(_is_ours, pod.containers)) and chosen.get(_ARCHITECTURE) != _BUILT_FOR:
            yield f"{pod.where} may be put on a machine that its image is not for: {_ARCHITECTURE} is not {_BUILT_FOR}."
        for label in chosen.keys() - {_ARCHITECTURE, "kubernetes.io/os"}:
            yield f"{pod.where} goes to nodes with the label {label}, which not every cluster has."


def _is_ours(container: Container) -> bool:
    return re.match(rf"{IMAGE}[:@]", str(container.spec.get("image", ""))) is not None


@cache
def _user_of_image() -> str:
    users = re.findall(r"^USER (\d+):\1$", (ROOT / "k8s" / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    assert users, "k8s/Dockerfile names no user"
    return str(users[-1])


def root_file_systems_are_read_only(rendering: Rendering) -> Iterator[str]:
    for pod in rendering.pods:
        for container in pod.containers:
            if container.spec.get("securityContext", {}).get("readOnlyRootFilesystem") is not True:
                yield f"{container.where} can write to its image: readOnlyRootFilesystem is not true."
            elif container.name != "autoscaler" and pod.group and not _has(container, "/tmp"):
                yield f"{container.where} can write nowhere: Ray needs /tmp."


def _has(container: Container, path: str) -> bool:
    return any(mount.get("mountPath") == path for mount in container.mounts)


def nobody_but_the_autoscaler_has_a_token(rendering: Rendering) -> Iterator[str]:
    for pod in rendering.pods:
        if pod.spec.get("automountServiceAccountToken") is not False:
            yield f"{pod.where} is given a token of its service account."
        tokens = {name for name, volume in pod.volumes.items() if _gives_token(volume)}
        for container in pod.containers:
            taken = tokens & {str(mount.get("name")) for mount in container.mounts}
            if taken and container.name != "autoscaler":
                yield f"{container.where} is given a token of its service account, by {', '.join(sorted(taken))}."
            if container.name == "autoscaler" and not taken:
                yield f"{container.where} cannot ask for pods: it is given no token."


def _gives_token(volume: Json) -> bool:
    return any("serviceAccountToken" in source for source in volume.get("projected", {}).get("sources", ()))


def services_are_not_in_the_environment(rendering: Rendering) -> Iterator[str]:
    """A Service named rookery would put ROOKERY_PORT there, which the settings refuse."""
    for pod in rendering.pods:
        if pod.spec.get("enableServiceLinks") is not False:
            yield f"{pod.where} is told of every Service by its environment: enableServiceLinks is not false."


def nothing_secret_is_written_down(rendering: Rendering) -> Iterator[str]:
    yield from (f"{title(one)} is a secret that everybody can read here." for one in rendering.of("Secret"))
    for pod in rendering.pods:
        for container in pod.containers:
            for variable in container.spec.get("env", ()):
                if _SECRET_NAME.search(variable["name"]) and variable.get("value"):
                    yield f"{container.where}: {variable['name']} is written down; take it from a Secret."
    for config in rendering.of("ConfigMap"):
        for key, value in config.get("data", {}).items():
            if _SECRET_NAME.search(key) and value and "\n" not in value:
                yield f"{title(config)}: {key} is written down; take it from a Secret."
    for document in rendering.documents:
        for path, text in _texts(document):
            if _SECRET_TEXT.search(text):
                yield f"{title(document)}: {path} looks like a key or a password."


def _texts(node: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(node, str):
        yield path, node
    elif isinstance(node, Mapping):
        for key, value in node.items():
            yield from _texts(value, f"{path}.{key}".lstrip("."))
    elif isinstance(node, list):
        for number, value in enumerate(node):
            yield from _texts(value, f"{path}.{number}")


def everybody_needs_a_key(rendering: Rendering) -> Iterator[str]:
    """Without keys everybody sees everything: for a cluster of one's own alone."""
    if rendering.overlay == "kind":
        return
    for pod in rendering.pods:
        for container in pod.containers:
            for variable in container.spec.get("env", ()):
                if variable["name"] == "ROOKERY_API_KEYS":
                    if variable.get("valueFrom", {}).get("secretKeyRef", {}).get("optional"):
                        yield f"{container.where} starts without keys, and shows everybody everything."
                    break
            else:
                if pod.group == "gateway" and not container.is_init:
                    yield f"{container.where} is told no keys, and shows everybody everything."


def ray_wants_tokens(rendering: Rendering) -> Iterator[str]:
    if rendering.ray_cluster.get("authOptions", {}).get("mode") != "token":
        yield "Whoever reaches Ray's ports may run anything there: authOptions.mode is not token."


def roles_are_small(rendering: Rendering) -> Iterator[str]:
    for kind in ("ClusterRole", "ClusterRoleBinding"):
        yield from (f"{title(one)} reaches beyond the namespace." for one in rendering.of(kind))
    for role in rendering.of("Role"):
        for rule in role.get("rules") or ():
            if "*" in (*rule.get("verbs", ()), *rule.get("resources", ()), *rule.get("apiGroups", ())):
                yield f"{title(role)} allows everything of something."
            if "secrets" in rule.get("resources", ()):
                yield f"{title(role)} allows to read secrets."


def nothing_is_open_to_the_world(rendering: Rendering) -> Iterator[str]:
    for service in rendering.of("Service"):
        spec = service["spec"]
        if spec.get("type", "ClusterIP") != "ClusterIP" or spec.get("externalIPs"):
            yield f"{title(service)} is open to other machines than the cluster's."
    head = rendering.ray_cluster["headGroupSpec"]
    if head.get("serviceType", "ClusterIP") != "ClusterIP" or head.get("enableIngress"):
        yield "Ray's dashboard is open to other machines than the cluster's."
    yield from (f"{title(one)}: who may come in is for the installer to say." for one in rendering.of("Ingress"))


POLICIES = (
    images_are_pinned,
    ray_is_the_one_in_the_image,
    the_namespace_takes_restricted_pods_alone,
    pods_are_restricted,
    pods_run_as_the_images_user,
    pods_go_where_the_image_runs,
    root_file_systems_are_read_only,
    nobody_but_the_autoscaler_has_a_token,
    services_are_not_in_the_environment,
    nothing_secret_is_written_down,
    everybody_needs_a_key,
    ray_wants_tokens,
    roles_are_small,
    nothing_is_open_to_the_world,
)
