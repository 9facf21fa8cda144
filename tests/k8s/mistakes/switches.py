"""What processes are told: mistakes that the policies of this name find."""

from __future__ import annotations

from tests.k8s.mistakes import GATEWAY, GENERATOR, HEAD, RAY, Mistake, drop, put, ray, setting, variable
from tests.k8s.policies import switches

MISTAKES = [
    Mistake(switches.settings_are_known, "ROOKERY_METRIC_PORT is not a", setting("ROOKERY_METRIC_PORT", "9464")),
    Mistake(switches.settings_are_known, "no whole number", setting("ROOKERY_METRICS_PORT", "many")),
    Mistake(switches.settings_are_known, "is not one of", variable(GENERATOR, "ROOKERY_DTYPE", "float16")),
    Mistake(
        switches.settings_are_there,
        "not told ROOKERY_DATA",
        drop("ConfigMap", "/data/ROOKERY_DATA", name="rookery-settings"),
    ),
    Mistake(switches.settings_are_there, "nothing is mounted", setting("ROOKERY_DATA", "/data")),
    Mistake(switches.settings_are_there, "gone with its pod", setting("ROOKERY_DATA", "/tmp")),
    Mistake(switches.settings_are_there, "everybody's", ray(f"{GATEWAY}{RAY}/env", [])),
    Mistake(
        switches.settings_are_there,
        "to be read alone",
        ray(
            f"{GENERATOR}{RAY}/volumeMounts",
            [{"name": "data", "mountPath": "/var/lib/rookery", "readOnly": True}],
        ),
    ),
    Mistake(
        switches.switches_are_known,
        "RAY_SERVE_ENABLE_HAPROXY is no switch",
        put("ConfigMap", "/data/RAY_SERVE_ENABLE_HAPROXY", "1", name="rookery-ray"),
    ),
    Mistake(
        switches.switches_are_known,
        "RAY_worker_nicenes is no switch",
        put("ConfigMap", "/data/RAY_worker_nicenes", "1", name="rookery-ray"),
    ),
    Mistake(switches.switches_are_known, "is empty", variable(HEAD, "RAY_AUTH_MODE", "")),
    Mistake(
        switches.ray_is_told_the_same_everywhere, "told another", variable(GATEWAY, "RAY_SERVE_ENABLE_HA_PROXY", "0")
    ),
    Mistake(
        switches.ray_is_told_the_same_everywhere,
        "only one is told",
        variable(GATEWAY, "RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S", "1"),
    ),
]
