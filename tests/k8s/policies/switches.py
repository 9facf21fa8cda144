"""Every variable is one that somebody reads: a setting of ours by its field, a switch of Ray's as it is installed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import fields
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from serve.settings import PREFIX, BadSetting, Settings
from tests.k8s.policies.references import SECRETS
from tests.k8s.rendered import Container, Pod, Rendering

_FIELDS = {PREFIX + field.name.upper(): str(field.type) for field in fields(Settings)}
_SAMPLES = {"int": "1", "float": "1", "bool": "true"}  # of values that only the cluster knows
_NAME = re.compile(r"RAY_\w+")
_RAY_PARTS = ("_common", "_private", "autoscaler", "dashboard", "serve", "util")
# Set by KubeRay, or read by the program that starts Ray.
_OTHERS = {"RAY_START_ULIMIT_OPEN_FILES"}
_APP_NEEDS = {"ROOKERY_DATA", "ROOKERY_METRICS_PORT", "ROOKERY_METRICS_HOST"}
_OF_DATABASE = ("gateway", "trainer")


def environment(rendering: Rendering, container: Container) -> dict[str, str | None]:
    """A container's variables as it will see them; None: of a value that only the cluster knows."""
    found: dict[str, str | None] = {}
    for source in container.spec.get("envFrom", ()):
        prefix = source.get("prefix", "")
        if "configMapRef" in source:
            config = rendering.named("ConfigMap", source["configMapRef"].get("name", ""))
            found |= {prefix + key: value for key, value in (config or {}).get("data", {}).items()}
        elif "secretRef" in source:
            found |= dict.fromkeys(SECRETS.get(source["secretRef"].get("name", ""), ()))
    return found | {one["name"]: one.get("value") for one in container.spec.get("env", ())}


def settings_are_known(rendering: Rendering) -> Iterator[str]:
    """And each container reads its own without complaint."""
    for container in _containers(rendering):
        found = {name: text for name, text in environment(rendering, container).items() if name.startswith(PREFIX)}
        known = {name: _sample(name) if text is None else text for name, text in found.items() if name in _FIELDS}
        for name in found.keys() - known.keys():
            yield f"{container.where}: {name} is not a setting."
        try:
            Settings.from_env(known)
        except BadSetting as exc:
            yield f"{container.where}: {exc}"


def _sample(name: str) -> str:
    return _SAMPLES.get(_FIELDS[name], "")


def settings_are_there(rendering: Rendering) -> Iterator[str]:
    """What a node of a cluster cannot do without; a folder that they name is mounted, and can be written to."""
    for pod in rendering.pods:
        if not pod.group:
            continue
        first = next(one for one in pod.containers if not one.is_init)
        found = environment(rendering, first)
        for name in sorted(_APP_NEEDS - found.keys()):
            yield f"{first.where} is not told {name}."
        if pod.group in _OF_DATABASE and "ROOKERY_DATABASE_URL" not in found and rendering.overlay != "kind":
            yield f"{first.where} is not told which database is everybody's: ROOKERY_DATABASE_URL."
        for name in ("ROOKERY_DATA", "ROOKERY_CACHE"):
            if pod.group != "head" and (path := found.get(name)):
                yield from _cannot_write(pod, first, name, path)


def _cannot_write(pod: Pod, container: Container, name: str, path: str) -> Iterator[str]:
    mount = next((one for one in container.mounts if one.get("mountPath") == path), None)
    if mount is None:
        yield f"{container.where}: {name} is {path}, where nothing is mounted."
    elif mount.get("readOnly"):
        yield f"{container.where}: {name} is {path}, which is mounted to be read alone."
    elif name == "ROOKERY_DATA" and "persistentVolumeClaim" not in pod.volumes.get(str(mount.get("name")), {}):
        yield f"{container.where}: {name} is {path}, which is gone with its pod."


def switches_are_known(rendering: Rendering) -> Iterator[str]:
    for container in _containers(rendering):
        for name, text in environment(rendering, container).items():
            if name.startswith("RAY_") and not is_switch(name):
                yield f"{container.where}: {name} is no switch of the Ray that is installed."
            elif name.startswith("RAY_") and text == "":
                yield f"{container.where}: {name} is empty."


def ray_is_told_the_same_everywhere(rendering: Rendering) -> Iterator[str]:
    """HAProxy and the transport between replicas must be chosen alike on all nodes."""
    told: dict[str, Mapping[str, str | None]] = {}
    for pod in rendering.pods:
        if pod.group:
            first = next(one for one in pod.containers if not one.is_init)
            found = environment(rendering, first)
            told[pod.group] = {name: text for name, text in found.items() if name.startswith("RAY_")}
    for group, switches in told.items():
        for name in sorted(switches.keys() ^ told["head"].keys()):
            yield f"Of the head and the group {group} only one is told {name}."
        for name in sorted(switches.keys() & told["head"].keys()):
            if switches[name] != told["head"][name]:
                yield f"The group {group} is told another {name} than the head."


@cache
def is_switch(name: str) -> bool:
    """Whether the installed Ray's Python reads it, or its C++, which drops the prefix."""
    return name in _OTHERS or name in _python_switches() or f"\0{name.removeprefix('RAY_')}\0".encode() in _library()


@cache
def _python_switches() -> frozenset[str]:
    sources = (path for part in _RAY_PARTS for path in (_ray() / part).rglob("*.py"))
    return frozenset(name for path in sources for name in _NAME.findall(path.read_text(encoding="utf-8")))


@cache
def _library() -> bytes:
    return (_ray() / "_raylet.so").read_bytes()


def _ray() -> Path:
    spec = find_spec("ray")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def _containers(rendering: Rendering) -> Iterator[Container]:
    for pod in rendering.pods:
        yield from pod.containers


POLICIES = (settings_are_known, settings_are_there, switches_are_known, ray_is_told_the_same_everywhere)
