"""Dashboards and rules are in the cluster as they are in the repository, and ask for metrics that there are."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from tests.k8s.rendered import LOADER, Json, Rendering, title, walk
from tests.monitoring.queries import DASHBOARDS, RULES, declared, recorded, selectors

_PROMETHEUS_OWN = {"up", "ALERTS"}


def dashboards_and_rules_are_those_of_the_repository(rendering: Rendering) -> Iterator[str]:
    held: dict[str, tuple[str, str]] = {}
    for config in rendering.of("ConfigMap"):
        held |= {name: (title(config), text) for name, text in config.get("data", {}).items()}
    for path in (*DASHBOARDS, RULES):
        where, text = held.get(path.name, ("", None))
        if text is None:
            yield f"No ConfigMap has {path.name}."
        elif text != _read(path):
            yield f"{where}: {path.name} is not the one in k8s/monitoring."


def dashboards_are_found(rendering: Rendering) -> Iterator[str]:
    """By the label that Grafana's provisioning looks for."""
    for config in rendering.of("ConfigMap"):
        if _has_dashboards(config) and config["metadata"].get("labels", {}).get("grafana_dashboard") != "1":
            yield f"{title(config)} has dashboards, but Grafana does not see that."


def _has_dashboards(config: Json) -> bool:
    return bool(config.get("data", {}).keys() & {path.name for path in DASHBOARDS})


def queries_are_of_metrics_that_there_are(rendering: Rendering) -> Iterator[str]:
    for config in rendering.of("ConfigMap"):
        for name, text in config.get("data", {}).items():
            if name.endswith((".json", ".yaml")):
                yield from (
                    f"{title(config)}: {name} asks for {metric}, which nobody has." for metric in _unknown(text)
                )


@cache
def _unknown(text: str) -> tuple[str, ...]:
    """Metrics of a dashboard or of a file of rules that nothing shows or records; JSON is YAML."""
    known = declared().keys() | recorded().keys() | _PROMETHEUS_OWN
    asked = {one.metric for query in _queries(yaml.load(text, Loader=LOADER)) for one in selectors(query)}
    return tuple(sorted(asked - known))


def _queries(node: Any) -> Iterator[str]:
    for key, value in walk(node):
        if key in ("expr", "definition") and isinstance(value, str):
            yield value


@cache
def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


POLICIES = (
    dashboards_and_rules_are_those_of_the_repository,
    dashboards_are_found,
    queries_are_of_metrics_that_there_are,
)
