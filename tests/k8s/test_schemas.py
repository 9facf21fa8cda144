"""The overlays against the schemas of Kubernetes and of KubeRay; and that mistakes are seen."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]

from tests.k8s.kubernetes_rules import matches
from tests.k8s.mistakes import CLUSTER, HEAD, RAY, Break, also, drop, put, ray
from tests.k8s.rendered import LOADER, ROOT, Rendering, render, render_text
from tests.k8s.schemas import schema_errors

_BACKEND = f"{CLUSTER}/gcsFaultToleranceOptions/backend"

MISTAKES: list[tuple[str, Break]] = [
    ("'replica' was unexpected", ray(f"{CLUSTER}/workerGroupSpecs/0/replica", 1)),
    ("'imagePullPolicyy' was unexpected", ray(f"{HEAD}{RAY}/imagePullPolicyy", "Always")),
    ("num-cpus: 0 is not of type 'string'", ray(f"{HEAD}/rayStartParams/num-cpus", 0)),
    ("'v3' is not one of", ray(f"{CLUSTER}/autoscalerOptions/version", "v3")),
    ("is not of type 'string'", ray("/spec/serveConfigV2", {"applications": []})),
    ("'many' does not match", ray(f"{HEAD}{RAY}/resources/limits/memory", "many")),
    ("two have name rookery", ray(f"{HEAD}{RAY}/env", [{"name": "rookery"}, {"name": "rookery"}])),
    ("two have containerPort and protocol 6379, TCP", ray(f"{HEAD}{RAY}/ports/-", {"containerPort": 6379})),
    ("must be either 'ray.io/kuberay-operator'", ray("/spec/managedBy", "somebody")),
    ("'containers' is a required property", drop("RayService", f"{HEAD}/template/spec/containers")),
    ("'prot' was unexpected", put("Service", "/spec/ports/0/prot", "TCP", name="rookery")),
    ("'80' is not of type 'integer'", put("Service", "/spec/ports/0/port", "80", name="rookery")),
    ("'egres' was unexpected", put("NetworkPolicy", "/spec/egres", [])),
    ("'minAvailble' was unexpected", put("PodDisruptionBudget", "/spec/minAvailble", 1)),
    ("v1 has no kind Servise", also("Servise")),
    ("batch/v1beta1 has no kind CronJob", put("CronJob", "/apiVersion", "batch/v1beta1")),
    ("ray.io/v2 has no kind RayService", ray("/apiVersion", "ray.io/v2")),
]


def test_every_overlay_is_what_an_api_server_takes(rendering: Rendering, definitions: Path) -> None:
    assert schema_errors(rendering, definitions) == []


@pytest.mark.usefixtures("kubectl")
@pytest.mark.parametrize(("sentence", "make"), MISTAKES, ids=[sentence for sentence, _ in MISTAKES])
def test_a_mistake_is_no_document_of_its_kind(sentence: str, make: Break, definitions: Path) -> None:
    errors = schema_errors(render("ha").broken(make), definitions)
    assert any(sentence in error for error in errors), errors


@pytest.mark.usefixtures("kubectl")
@pytest.mark.parametrize("make", [ray("/spec/managedBy", "kueue.x-k8s.io/multikueue"), ray(_BACKEND, "redis")])
def test_what_the_cel_rules_allow_is_allowed(make: Break, definitions: Path) -> None:
    """A rule that nobody wrote down here would be an error."""
    assert schema_errors(render("ha").broken(make), definitions) == []


@pytest.fixture
def watched(kubectl: str) -> Rendering:
    """For the Prometheus operator; not in the overlays: without it the API server knows no such kinds."""
    text = render_text(ROOT / "k8s" / "monitoring" / "operator")
    return Rendering("operator", [one for one in yaml.load_all(text, Loader=LOADER) if one])


def test_monitoring_is_what_the_prometheus_operator_takes(watched: Rendering, definitions: Path) -> None:
    assert {"PodMonitor", "PrometheusRule"} <= {one["kind"] for one in watched.documents}
    assert schema_errors(watched, definitions) == []


def test_every_pod_of_ray_is_scraped_at_every_port_that_shows_metrics(watched: Rendering, rendering: Rendering) -> None:
    scraped = {
        (pod.group, endpoint["port"])
        for monitor in watched.of("PodMonitor")
        for pod in rendering.pods
        for endpoint in monitor["spec"]["podMetricsEndpoints"]
        if matches(monitor["spec"]["selector"], pod.labels)
    }
    shown = {
        (pod.group, port["name"])
        for pod in rendering.pods
        for container in pod.containers
        for port in container.ports
        if pod.group and "metrics" in port["name"]
    }
    assert shown <= scraped
    assert {("head", "metrics"), ("gateway", "rookery-metrics"), ("generator", "metrics")} <= shown
