"""What watches them: mistakes that the policies of this name find."""

from __future__ import annotations

from tests.k8s.mistakes import Mistake, drop, put, without
from tests.k8s.policies import watching

MISTAKES = [
    Mistake(
        watching.dashboards_and_rules_are_those_of_the_repository,
        "No ConfigMap has rookery.yaml",
        without("ConfigMap", "rookery-rules"),
    ),
    Mistake(
        watching.dashboards_and_rules_are_those_of_the_repository,
        "is not the one",
        put("ConfigMap", "/data/engine.json", "{}", name="rookery-dashboards"),
    ),
    Mistake(
        watching.dashboards_are_found,
        "Grafana does not see",
        drop("ConfigMap", "/metadata/labels/grafana_dashboard", name="rookery-dashboards"),
    ),
    Mistake(
        watching.queries_are_of_metrics_that_there_are,
        "asks for rookery_request_total",
        put(
            "ConfigMap",
            "/data/rookery.yaml",
            "groups: [{rules: [{alert: A, expr: 'rookery_request_total > 1'}]}]",
            name="rookery-rules",
        ),
    ),
]
