"""Whatever a document names is there, or is made by who installs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.util import find_spec
from typing import Any

import typer

from deployments.cli.app import app
from tests.k8s.rendered import Container, Json, Pod, Rendering, title

# What the documents count on and do not bring. The second may be missing.
SECRETS = {
    "rookery": {
        "ROOKERY_API_KEYS",
        "ROOKERY_DATABASE_URL",
        "ROOKERY_HUB_TOKEN",
        "REDIS_PASSWORD",
        "POSTGRES_PASSWORD",
    },
    "rookery-object-store": set[str](),  # what it holds is between the installer and the driver of the volumes
}
_OF_KUBERNETES = {"kube-root-ca.crt"}  # a ConfigMap that is in every namespace
_OPTIONAL = {"ROOKERY_HUB_TOKEN"}
_UNSEEN = re.compile(r"\bfor \w+ in [^\n;]*(\$\(|`)|\|\s*while\b")
_PRIORITIES = {"system-cluster-critical", "system-node-critical"}


def config_maps_and_secrets_are_there(rendering: Rendering) -> Iterator[str]:
    for pod in rendering.pods:
        for container in pod.containers:
            for kind, name, key, optional in _sources(container):
                yield from _missing(rendering, container.where, kind, name, key, optional=optional)
        for name, volume in pod.volumes.items():
            where = f"{pod.where}, volume {name}"
            for kind, source in _volume_sources(volume):
                wanted = source.get("name") or source.get("secretName", "")
                optional = bool(source.get("optional"))
                yield from _missing(rendering, where, kind, wanted, None, optional=optional)
                for item in source.get("items", ()):
                    yield from _missing(rendering, where, kind, wanted, item.get("key"), optional=optional)
    password = rendering.ray_cluster.get("gcsFaultToleranceOptions", {}).get("redisPassword", {}).get("valueFrom", {})
    if (reference := password.get("secretKeyRef")) is not None:
        yield from _missing(rendering, "redisPassword", "Secret", reference["name"], reference["key"], optional=False)


def _sources(container: Container) -> Iterator[tuple[str, str, str | None, bool]]:
    """(kind, name, key, may be missing) of all that fills the environment."""
    kinds = {
        "configMapRef": "ConfigMap",
        "secretRef": "Secret",
        "configMapKeyRef": "ConfigMap",
        "secretKeyRef": "Secret",
    }
    for entry in (
        *container.spec.get("envFrom", ()),
        *(one.get("valueFrom", {}) for one in container.spec.get("env", ())),
    ):
        for field, source in entry.items():
            if field in kinds:
                yield kinds[field], source.get("name", ""), source.get("key"), bool(source.get("optional"))


def _volume_sources(volume: Json) -> Iterator[tuple[str, Json]]:
    for source in (volume, *volume.get("projected", {}).get("sources", ())):
        for field, kind in (("configMap", "ConfigMap"), ("secret", "Secret")):
            if field in source:
                yield kind, source[field]


def _missing(
    rendering: Rendering, where: str, kind: str, name: str, key: str | None, *, optional: bool
) -> Iterator[str]:
    if name in _OF_KUBERNETES:
        return
    document = rendering.named(kind, name)
    keys = SECRETS.get(name) if kind == "Secret" else None
    if document is not None:
        keys = {*document.get("data", {}), *document.get("binaryData", {})}
    if keys is None:
        if not optional:
            yield f"{where} needs the {kind} {name}, which nobody makes."
    elif key is not None and key not in keys:
        yield f"{where} needs {key} of the {kind} {name}, which does not have it."
    elif key in _OPTIONAL and not optional:
        yield f"{where} does not start without {key}, which need not be there."


def claims_are_there(rendering: Rendering) -> Iterator[str]:
    for pod in rendering.pods:
        for name, volume in pod.volumes.items():
            claim = volume.get("persistentVolumeClaim", {}).get("claimName")
            if claim is not None and rendering.named("PersistentVolumeClaim", claim) is None:
                yield f"{pod.where}: the volume {name} is of the claim {claim}, which nobody makes."
    for claim in rendering.of("PersistentVolumeClaim"):
        kind = claim["spec"].get("storageClassName")
        if kind is not None and rendering.named("StorageClass", kind) is None:
            yield f"{title(claim)} is to be of the StorageClass {kind}, which nobody makes."
    for kind in rendering.of("StorageClass"):
        for name, secret in kind.get("parameters", {}).items():
            if name.endswith("-secret-name"):
                yield from _missing(rendering, title(kind), "Secret", secret, None, optional=False)


def claims_are_shared_as_they_can_be(rendering: Rendering) -> Iterator[str]:
    """A volume for one node alone, and pods of several groups that need it, is for a cluster of one node."""
    if rendering.overlay == "kind":
        return
    for claim in rendering.of("PersistentVolumeClaim"):
        users = [pod for pod in rendering.pods if _claims(pod, claim["metadata"]["name"])]
        if len(users) > 1 and not {"ReadWriteMany", "ReadOnlyMany"} & set(claim["spec"].get("accessModes", ())):
            yield f"{title(claim)} can be on one node, but pods of {len(users)} kinds need it."


def _claims(pod: Pod, name: str) -> bool:
    return any(volume.get("persistentVolumeClaim", {}).get("claimName") == name for volume in pod.volumes.values())


def accounts_and_priorities_are_there(rendering: Rendering) -> Iterator[str]:
    for pod in rendering.pods:
        account = pod.spec.get("serviceAccountName")
        if account not in (None, "default") and rendering.named("ServiceAccount", account) is None:
            yield f"{pod.where} is to run as the ServiceAccount {account}, which nobody makes."
        priority = pod.spec.get("priorityClassName")
        if priority is None:
            if not pod.ends:  # a job has the time to wait
                yield f"{pod.where} has no priority: who goes first is left to chance."
        elif priority not in _PRIORITIES and rendering.named("PriorityClass", priority) is None:
            yield f"{pod.where} has the priority {priority}, which nobody makes."
    for binding in rendering.of("RoleBinding"):
        if rendering.named(binding["roleRef"]["kind"], binding["roleRef"]["name"]) is None:
            yield f"{title(binding)} binds {binding['roleRef']['name']}, which nobody makes."


def commands_are_there(rendering: Rendering) -> Iterator[str]:
    """Of containers of our image: the command line's verbs with their options, and modules that can be run."""
    for pod in rendering.pods:
        for container in pod.containers:
            hooks = [one.get("exec", {}).get("command", []) for one in container.spec.get("lifecycle", {}).values()]
            for command in filter(None, (container.spec.get("command", []), *hooks)):
                yield from _unknown_command(container.where, command)


def _unknown_command(where: str, command: list[str]) -> Iterator[str]:
    if command[0] == "rookery":
        verb = _verbs().get(command[1]) if len(command) > 1 else None
        options = {name for one in verb.params for name in one.opts} if verb else set()
        unknown = [word for word in command[2:] if word.startswith("--") and word not in options]
        if verb is None or unknown:
            yield f"{where}: there is no `{' '.join(command)}`."
    elif command[:2] == ["python", "-m"] and find_spec(command[2]) is None:
        yield f"{where}: there is no module {command[2]}."


@cache
def _verbs() -> Mapping[str, Any]:
    group: Any = typer.main.get_command(app)
    found: Mapping[str, Any] = group.commands
    return found


def scripts_end_at_the_first_failure(rendering: Rendering) -> Iterator[str]:
    """A shell goes on unless it is told not to, and always where it is in a loop's own line or before a pipe."""
    for pod in rendering.pods:
        for container in pod.containers:
            words = [*container.spec.get("command", ()), *container.spec.get("args", ())]
            for script in (word for word in words if "\n" in word):
                if not script.startswith("set -e"):
                    yield f"{container.where}: its script goes on after a failure; begin it with `set -eu`."
                if _UNSEEN.search(script):
                    yield f"{container.where}: a failure in a loop's own line ends nothing; make the list before it."


def what_is_made_is_used(rendering: Rendering) -> Iterator[str]:
    """Dashboards and rules are for Grafana and Prometheus, which find them by their labels."""
    used = {(kind, name) for pod in rendering.pods for one in pod.containers for kind, name, *_ in _sources(one)}
    for pod in rendering.pods:
        for volume in pod.volumes.values():
            used |= {(kind, one.get("name") or one.get("secretName", "")) for kind, one in _volume_sources(volume)}
            used.add(("PersistentVolumeClaim", volume.get("persistentVolumeClaim", {}).get("claimName", "")))
        used.add(("PriorityClass", pod.spec.get("priorityClassName", "")))
        used.add(("ServiceAccount", pod.spec.get("serviceAccountName", "")))
    for document in rendering.of("ConfigMap", "PersistentVolumeClaim", "PriorityClass", "ServiceAccount"):
        name = document["metadata"]["name"]
        watched = name.startswith("rookery-") and any(word in name for word in ("dashboard", "rules", "alerts"))
        if (document["kind"], name) not in used and not watched:
            yield f"{title(document)} is used by nobody."


POLICIES = (
    config_maps_and_secrets_are_there,
    claims_are_there,
    claims_are_shared_as_they_can_be,
    accounts_and_priorities_are_there,
    commands_are_there,
    scripts_end_at_the_first_failure,
    what_is_made_is_used,
)
