"""Mistakes to make in a rendering, each a function that makes it: what rules and policies are shown to find.

Places are JSON pointers, as in kustomize's patches; `-` is the end of a list.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import yaml  # type: ignore[import-untyped]

from tests.k8s.rendered import Json, Rendering

Break = Callable[[Rendering], object]

CLUSTER = "/spec/rayClusterConfig"
HEAD = f"{CLUSTER}/headGroupSpec"
GATEWAY, GENERATOR, TRAINER = (f"{CLUSTER}/workerGroupSpecs/{number}" for number in range(3))
POD = "/template/spec"
RAY = f"{POD}/containers/0"


@dataclass(frozen=True, slots=True)
class Mistake:
    """`rule` must say `sentence`, or something that it is a part of, once `make` was called; before, nothing."""

    rule: Callable[[Rendering], Any]
    sentence: str
    make: Break

    @property
    def name(self) -> str:
        return f"{self.rule.__name__}: {self.sentence}"

    def is_found(self, rendering: Rendering) -> bool:
        """Raises: AssertionError with what was said instead."""
        assert not list(self.rule(rendering))
        said = list(self.rule(rendering.broken(self.make)))
        assert any(self.sentence in sentence for sentence in said), said
        return True


def put(kind: str, pointer: str, value: Any, *, name: str | None = None) -> Break:
    """In the first document of a kind, or in the one of that name."""

    def make(rendering: Rendering) -> None:
        parent, key = _find(_document(rendering, kind, name), pointer)
        if key == "-":
            parent.append(value)
        else:
            parent[key] = value

    return make


def drop(kind: str, pointer: str, *, name: str | None = None) -> Break:
    """Takes something out of a document."""

    def make(rendering: Rendering) -> None:
        parent, key = _find(_document(rendering, kind, name), pointer)
        del parent[key]

    return make


def ray(pointer: str, value: Any) -> Break:
    """Puts something into the RayService."""
    return put("RayService", pointer, value)


def without(kind: str, name: str) -> Break:
    """Takes a document away; names of ConfigMaps may go on with a hash."""

    def make(rendering: Rendering) -> None:
        rendering.documents = [one for one in rendering.documents if one is not _document(rendering, kind, name)]

    return make


def also(kind: str, api_version: str = "v1", *, name: str = "extra", **fields: Any) -> Break:
    """Puts one more document beside the others."""
    document = {"apiVersion": api_version, "kind": kind, "metadata": {"name": name, "namespace": "rookery"}, **fields}

    def make(rendering: Rendering) -> None:
        rendering.documents = [*rendering.documents, document]

    return make


def variable(group: str, name: str, value: str) -> Break:
    """Tells Ray's container of a group one more variable."""
    return ray(f"{group}{RAY}/env/-", {"name": name, "value": value})


def setting(key: str, value: str) -> Break:
    """Puts a setting among those of all pods."""
    return put("ConfigMap", f"/data/{key}", value, name="rookery-settings")


def serve(change: Callable[[Json], object]) -> Break:
    """Changes what Ray Serve is told."""

    def make(rendering: Rendering) -> None:
        spec = rendering.ray_service["spec"]
        config = yaml.safe_load(spec["serveConfigV2"])
        change(config)
        spec["serveConfigV2"] = yaml.safe_dump(config)

    return make


def both(*makes: Break) -> Break:
    """One mistake of several."""

    def make(rendering: Rendering) -> None:
        for one in makes:
            one(rendering)

    return make


def _document(rendering: Rendering, kind: str, name: str | None) -> Json:
    return next(
        one
        for one in rendering.of(kind)
        if name is None or one["metadata"]["name"] == name or one["metadata"]["name"].startswith(f"{name}-")
    )


def _find(document: Json, pointer: str) -> tuple[Any, Any]:
    """The dict or list that a pointer ends in, and the key there."""
    *steps, last = [step.replace("~1", "/").replace("~0", "~") for step in pointer.lstrip("/").split("/")]
    node: Any = document
    for step in steps:
        node = node[int(step)] if isinstance(node, list) else node.setdefault(step, {})
    return node, int(last) if isinstance(node, list) and last != "-" else last
