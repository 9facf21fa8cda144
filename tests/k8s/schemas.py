"""Documents against the schemas of their kinds, as strictly as an API server that refuses unknown fields.

Kubernetes' own kinds: the OpenAPI schemas of a release, which the package kubernetes-validate brings. Custom kinds:
the CustomResourceDefinitions in a folder, with the rules on lists and the CEL rules that they carry. Knows nothing of
what no schema says; that is in `kubernetes_rules` and `kuberay_rules`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from jsonschema import Draft202012Validator, ValidationError  # type: ignore[import-untyped]
from jsonschema.validators import extend  # type: ignore[import-untyped]
from kubernetes_validate.utils import schema_contents  # type: ignore[import-untyped]
from referencing import Registry, Resource

from tests.k8s.rendered import LOADER, ROOT, Json, Rendering, title

KUBERNETES = "1.37.0"
DEFINITIONS = ROOT.parent / "shared" / "kuberay-crds"  # which may lie beside the checkout
_SCHEMAS = f"kubernetes-json-schema/v{KUBERNETES}-local-strict"

# The CEL rules of KubeRay's definitions, as Python; None: of changes alone, and whatever is made anew has none.
_CEL: Mapping[str, Callable[[Any], bool] | None] = {
    "self == oldSelf": None,
    "self in ['ray.io/kuberay-operator', 'kueue.x-k8s.io/multikueue']": (
        lambda value: value in ("ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue")
    ),
}


def schema_errors(rendering: Rendering, definitions: Path) -> list[str]:
    """A sentence for everything that a schema refuses; `definitions`: a folder of CustomResourceDefinitions."""
    return [error for document in rendering.documents for error in _errors_of(document, definitions)]


def _errors_of(document: Json, definitions: Path) -> Iterator[str]:
    kind = (str(document.get("apiVersion")), str(document.get("kind")))
    validator = _built_in(*kind) or _custom(definitions, *kind)
    if validator is None:
        yield f"{title(document)}: {kind[0]} has no kind {kind[1]} that is known here."
        return
    for error in validator.iter_errors(document):
        yield f"{title(document)}: {_sentence(error)}"


def _sentence(error: ValidationError) -> str:
    path = ".".join(map(str, error.absolute_path)) or "it"
    return f"{path}: {error.message[:300]}."


# --- Kubernetes' own kinds ----------------------------------------------------------------------------------


@cache
def _built_in(api_version: str, kind: str) -> Any:
    """None where Kubernetes has no such kind."""
    group, _, version = api_version.rpartition("/")
    name = "-".join(filter(None, (kind.lower(), group.partition(".")[0], version)))
    try:
        schema = schema_contents(f"{_SCHEMAS}/{name}.json", KUBERNETES)
    except FileNotFoundError:
        return None
    if api_version not in schema["properties"]["apiVersion"].get("enum", [api_version]):
        return None  # the file is named by the first word of the group alone
    registry = Resource.from_contents(schema) @ _shared_definitions()
    return Draft202012Validator(schema, registry=registry)


@cache
def _shared_definitions() -> Registry[Any]:
    definitions = Resource.from_contents(schema_contents(f"{_SCHEMAS}/_definitions.json", KUBERNETES))
    return definitions @ Registry()


# --- Custom kinds -------------------------------------------------------------------------------------------


@cache
def _custom(folder: Path, api_version: str, kind: str) -> Any:
    """None where the folder defines no such kind."""
    for spec in _definitions_of(folder, kind):
        for version in spec["versions"]:
            if version["served"] and f"{spec['group']}/{version['name']}" == api_version:
                return _StructuralSchema(strict(version["schema"]["openAPIV3Schema"]))
    return None


@cache
def _definitions_of(folder: Path, kind: str) -> list[Json]:
    """The files that define a kind; no other is parsed, for each is long."""
    texts = (path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.yaml")))
    named = re.compile(rf"^    kind: {re.escape(kind)}$", re.MULTILINE)
    return [yaml.load(text, Loader=LOADER)["spec"] for text in texts if named.search(text)]


def strict(schema: Json) -> Json:
    """An OpenAPI schema as JSON schema that refuses what an API server would prune or refuse. Source: its README."""
    made = {name: _strict_part(name, value) for name, value in schema.items() if name not in ("format", "description")}
    properties: Json = made.get("properties", {})
    if properties and not (schema.keys() & {"additionalProperties", "x-kubernetes-preserve-unknown-fields"}):
        made["additionalProperties"] = False
    if "required" in made:  # defaults are filled in before it is looked at
        made["required"] = [name for name in made["required"] if "default" not in properties.get(name, {})]
    if made.pop("x-kubernetes-int-or-string", False):
        made.pop("type", None)
        made["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    if made.pop("nullable", False):
        made["type"] = [made["type"], "null"]
    return made


def _strict_part(name: str, value: Any) -> Any:
    if name == "properties":
        return {key: strict(one) for key, one in value.items()}
    if name in ("items", "additionalProperties", "not") and isinstance(value, dict):
        return strict(value)
    if name in ("allOf", "anyOf", "oneOf"):
        return [strict(one) for one in value]
    return value


def _unique(validator: Any, keys: list[str], items: Any, schema: Json) -> Iterator[ValidationError]:
    """Of a list whose items have keys, no two have the same."""
    seen: set[Hashable] = set()
    defaults = {key: schema["items"]["properties"][key].get("default") for key in keys}
    for item in items if isinstance(items, list) else ():
        key = tuple(item.get(name, defaults[name]) for name in keys)
        if key in seen:
            yield ValidationError(f"two have {' and '.join(keys)} {', '.join(map(str, key))}")
        seen.add(key)


def _cel(validator: Any, rules: list[Json], value: Any, schema: Json) -> Iterator[ValidationError]:
    for rule in rules:
        text = re.sub(r"\s+", " ", rule["rule"]).strip()
        if text not in _CEL:
            yield ValidationError(f"the CEL rule {text!r} is not known here, so nobody looked")
        elif (holds := _CEL[text]) is not None and not holds(value):
            yield ValidationError(rule["message"])


_StructuralSchema = extend(
    Draft202012Validator, {"x-kubernetes-list-map-keys": _unique, "x-kubernetes-validations": _cel}
)
