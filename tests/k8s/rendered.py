"""What `kubectl kustomize` makes of an overlay, as documents that can be asked, and copied with a mistake in them.

Knows kinds and where pods are described in them, KubeRay's too; what is right is for others to say.
"""

from __future__ import annotations

import copy
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

Json = dict[str, Any]

ROOT = Path(__file__).resolve().parents[2]
OVERLAYS = ("kind", "gpu", "ha")
_FOLDER = ROOT / "k8s" / "overlays"
# Where a kind describes the pods that it makes.
_TEMPLATES: Mapping[str, tuple[str, ...]] = {
    "Pod": (),
    "Deployment": ("spec", "template"),
    "StatefulSet": ("spec", "template"),
    "DaemonSet": ("spec", "template"),
    "Job": ("spec", "template"),
    "CronJob": ("spec", "jobTemplate", "spec", "template"),
}
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class NoKubectl(RuntimeError):
    """The program that renders is not on this machine."""


@dataclass(frozen=True, slots=True)
class Container:
    """One of a pod's, in the order in which they start. `is_init`: it has ended before the others begin."""

    where: str
    spec: Json
    is_init: bool

    @property
    def name(self) -> str:
        return str(self.spec.get("name", ""))

    @property
    def ports(self) -> list[Json]:
        return list(self.spec.get("ports", ()))

    @property
    def mounts(self) -> list[Json]:
        return list(self.spec.get("volumeMounts", ()))


@dataclass(frozen=True, slots=True)
class Pod:
    """A description of pods, with the labels that they will have; `group`: of a RayService, the head's is `head`."""

    where: str
    namespace: str
    labels: Mapping[str, str]
    spec: Json
    containers: Sequence[Container]
    group: str

    @property
    def ends(self) -> bool:
        """Whether it ends by itself, like a job's."""
        return self.where.startswith(("Job ", "CronJob "))

    @property
    def volumes(self) -> dict[str, Json]:
        return {str(volume.get("name")): volume for volume in self.spec.get("volumes", ())}


class Rendering:
    """The documents of one overlay."""

    def __init__(self, overlay: str, documents: Sequence[Json]) -> None:
        self.overlay = overlay
        self.documents = documents

    def of(self, *kinds: str) -> list[Json]:
        """Those of some kinds."""
        return [one for one in self.documents if one.get("kind") in kinds]

    def named(self, kind: str, name: str) -> Json | None:
        return next((one for one in self.of(kind) if one["metadata"].get("name") == name), None)

    def broken(self, break_it: Callable[[Rendering], object]) -> Rendering:
        """A copy with a mistake in it. Does not modify this one."""
        other = Rendering(self.overlay, copy.deepcopy(list(self.documents)))
        break_it(other)
        return other.fresh()

    def fresh(self) -> Rendering:
        """The same documents, looked at again."""
        return Rendering(self.overlay, self.documents)

    @cached_property
    def pods(self) -> list[Pod]:
        """Every kind of pod that the documents, or the operator for them, will make."""
        return list(self._pods())

    @cached_property
    def ray_service(self) -> Json:
        """The one there is."""
        found = self.of("RayService")
        assert len(found) == 1, f"{self.overlay} has {len(found)} RayServices"
        return found[0]

    @property
    def ray_cluster(self) -> Json:
        cluster: Json = self.ray_service["spec"]["rayClusterConfig"]
        return cluster

    @property
    def groups(self) -> dict[str, Json]:
        """The worker groups of the Ray cluster by name."""
        return {group["groupName"]: group for group in self.ray_cluster.get("workerGroupSpecs", ())}

    @cached_property
    def serve_config(self) -> Json:
        """What Ray Serve is told to run."""
        config: Json = yaml.safe_load(self.ray_service["spec"]["serveConfigV2"])
        return config

    def _pods(self) -> Iterator[Pod]:
        for document in self.documents:
            if document["kind"] in _TEMPLATES:
                template: Json = document
                for step in _TEMPLATES[document["kind"]]:
                    template = template[step]
                yield _pod(title(document), document, template)
            elif document["kind"] in ("RayService", "RayCluster"):
                yield from _ray_pods(document)


Rule = Callable[[Rendering], Iterator[str]]  # says a sentence of each place that breaks it


def walk(node: Any) -> Iterator[tuple[str, Any]]:
    """Every key with its value, anywhere inside."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield key, value
            yield from walk(value)
    elif isinstance(node, list):
        for one in node:
            yield from walk(one)


def title(document: Json) -> str:
    """How sentences name a document."""
    return f"{document.get('kind')} {document.get('metadata', {}).get('name')}"


def _pod(where: str, document: Json, template: Json, group: str = "", labels: Mapping[str, str] | None = None) -> Pod:
    labels = template.get("metadata", {}).get("labels", {}) if labels is None else labels
    spec = template.get("spec", {})
    containers = [
        Container(f"{where}, {one.get('name')}", one, is_init=part == "initContainers")
        for part in ("initContainers", "containers")
        for one in spec.get(part, ())
    ]
    return Pod(where, document["metadata"].get("namespace", ""), labels, spec, containers, group)


def _ray_pods(document: Json) -> Iterator[Pod]:
    """With the labels that KubeRay adds, and its autoscaler beside the head. Source: KubeRay's common/pod.go."""
    spec = document["spec"]
    cluster = spec.get("rayClusterConfig", spec)
    head = cluster["headGroupSpec"]
    labels = _ray_labels(head, "head", "headgroup")
    pod = _pod(f"{title(document)}, head", document, head["template"], "head", labels)
    if cluster.get("enableInTreeAutoscaling"):
        autoscaler = {"name": "autoscaler", **_as_container(cluster.get("autoscalerOptions", {}), head["template"])}
        containers = [*pod.containers, Container(f"{pod.where}, autoscaler", autoscaler, is_init=False)]
        pod = replace(pod, containers=containers)
    yield pod
    for group in cluster.get("workerGroupSpecs", ()):
        name = group["groupName"]
        labels = _ray_labels(group, "worker", name)
        yield _pod(f"{title(document)}, {name}", document, group["template"], name, labels)


def _ray_labels(group: Json, node_type: str, name: str) -> dict[str, str]:
    """A cluster's own name is left out: it changes with every upgrade."""
    default = {"app.kubernetes.io/name": "kuberay", "app.kubernetes.io/created-by": "kuberay-operator"}
    own = group["template"].get("metadata", {}).get("labels", {}) | group.get("labels", {})
    serves = {"ray.io/serve": str(node_type == "worker").lower(), "ray.io/is-ray-node": "yes"}
    return {**default, **serves, **own, "ray.io/node-type": node_type, "ray.io/group": name}


def _as_container(options: Json, head: Json) -> Json:
    """What of the autoscaler's options is a container's; its image is the head's unless they name another."""
    taken = ("resources", "image", "imagePullPolicy", "env", "envFrom", "volumeMounts", "securityContext")
    given = {name: options[name] for name in taken if name in options}
    return {"image": head["spec"]["containers"][0].get("image"), **given}


def find_kubectl() -> str:
    """Raises: NoKubectl."""
    found = shutil.which("kubectl")
    if found is None:
        raise NoKubectl("kubectl is not on the PATH; Debian has it as the package kubectl.")
    return found


@cache
def render_text(folder: Path) -> str:
    """What is handed to the API server. Raises: NoKubectl, CalledProcessError with kustomize's own words."""
    command = [find_kubectl(), "kustomize", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


@cache
def render(overlay: str) -> Rendering:
    """An overlay by name; the same object every time, so change only `broken` copies. Raises: as `render_text`."""
    text = render_text(_FOLDER / overlay)
    return Rendering(overlay, [one for one in yaml.load_all(text, Loader=LOADER) if one])
