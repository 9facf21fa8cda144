"""What documents name: mistakes that the policies of this name find."""

from __future__ import annotations

from tests.k8s.mistakes import CLUSTER, GATEWAY, HEAD, POD, RAY, Break, Mistake, also, drop, put, ray, without
from tests.k8s.policies import references

_RBAC = "rbac.authorization.k8s.io/v1"
_TOKEN = {"name": "token", "projected": {"sources": [{"serviceAccountToken": {"path": "token"}}]}}


def _backup(script: str) -> Break:
    return put("CronJob", f"/spec/jobTemplate/spec{RAY}/command", ["sh", "-c", script])


MISTAKES = [
    Mistake(
        references.config_maps_and_secrets_are_there,
        "ConfigMap rookery-rays",
        ray(f"{HEAD}{RAY}/envFrom/0/configMapRef/name", "rookery-rays"),
    ),
    Mistake(
        references.config_maps_and_secrets_are_there,
        "needs HUB_TOKEN of",
        ray(
            f"{HEAD}{RAY}/env/-",
            {"name": "A", "valueFrom": {"secretKeyRef": {"name": "rookery", "key": "HUB_TOKEN"}}},
        ),
    ),
    Mistake(
        references.config_maps_and_secrets_are_there,
        "does not start without ROOKERY_HUB_TOKEN",
        ray(
            f"{HEAD}{RAY}/env/-",
            {"name": "A", "valueFrom": {"secretKeyRef": {"name": "rookery", "key": "ROOKERY_HUB_TOKEN"}}},
        ),
    ),
    Mistake(
        references.config_maps_and_secrets_are_there,
        "Secret certificate",
        ray(f"{HEAD}{POD}/volumes/-", {"name": "certificate", "secret": {"secretName": "certificate"}}),
    ),
    Mistake(
        references.config_maps_and_secrets_are_there,
        "redisPassword needs PASSWORD",
        ray(f"{CLUSTER}/gcsFaultToleranceOptions/redisPassword/valueFrom/secretKeyRef/key", "PASSWORD"),
    ),
    Mistake(references.claims_are_there, "of the claim", without("PersistentVolumeClaim", "rookery-data")),
    Mistake(references.claims_are_there, "StorageClass", without("StorageClass", "rookery-objects")),
    Mistake(
        references.claims_are_there,
        "Secret objects",
        put("StorageClass", "/parameters/csi.storage.k8s.io~1provisioner-secret-name", "objects"),
    ),
    Mistake(
        references.claims_are_shared_as_they_can_be,
        "on one node",
        put("PersistentVolumeClaim", "/spec/accessModes", ["ReadWriteOnce"], name="rookery-data"),
    ),
    Mistake(
        references.accounts_and_priorities_are_there,
        "ServiceAccount admin",
        ray(f"{HEAD}{POD}/serviceAccountName", "admin"),
    ),
    Mistake(
        references.accounts_and_priorities_are_there,
        "has no priority",
        drop("RayService", f"{HEAD}{POD}/priorityClassName"),
    ),
    Mistake(
        references.accounts_and_priorities_are_there, "which nobody makes", without("PriorityClass", "rookery-training")
    ),
    Mistake(
        references.accounts_and_priorities_are_there,
        "binds pods",
        also("RoleBinding", _RBAC, roleRef={"kind": "Role", "name": "pods"}),
    ),
    Mistake(
        references.commands_are_there,
        "no `rookery upgrade --wait 300`",
        ray(f"{GATEWAY}{POD}/initContainers/0/command", ["rookery", "upgrade", "--wait", "300"]),
    ),
    Mistake(
        references.commands_are_there,
        "no `rookery migrate --patience 300`",
        ray(f"{GATEWAY}{POD}/initContainers/0/command", ["rookery", "migrate", "--patience", "300"]),
    ),
    Mistake(
        references.commands_are_there,
        "no module deployments.drains",
        ray(f"{GATEWAY}{RAY}/lifecycle/preStop/exec/command", ["python", "-m", "deployments.drains"]),
    ),
    Mistake(references.scripts_end_at_the_first_failure, "begin it with `set -eu`", _backup("echo yes\necho no\n")),
    Mistake(
        references.scripts_end_at_the_first_failure,
        "make the list before it",
        _backup("set -eu\nfor name in $(psql -tAc 'SELECT 1'); do\n  pg_dump $name\ndone\n"),
    ),
    Mistake(
        references.scripts_end_at_the_first_failure,
        "make the list before it",
        _backup("set -eu\npsql -tAc 'SELECT 1' | while read -r name; do\n  pg_dump $name\ndone\n"),
    ),
    Mistake(references.what_is_made_is_used, "used by nobody", also("ConfigMap", data={"a": "1"})),
]
