"""Who may do what: mistakes that the policies of this name find."""

from __future__ import annotations

from tests.k8s.mistakes import (
    CLUSTER,
    GATEWAY,
    GENERATOR,
    HEAD,
    POD,
    RAY,
    TRAINER,
    Break,
    Mistake,
    also,
    both,
    drop,
    put,
    ray,
    setting,
    variable,
)
from tests.k8s.policies import security

_RBAC = "rbac.authorization.k8s.io/v1"
_TOKEN = {"name": "token", "projected": {"sources": [{"serviceAccountToken": {"path": "token"}}]}}


def _security(pointer: str, value: object) -> Break:
    return ray(f"{GATEWAY}{RAY}/securityContext/{pointer}", value)


MISTAKES = [
    Mistake(security.images_are_pinned, "may be another one", ray(f"{HEAD}{RAY}/image", "rookery:latest")),
    Mistake(security.images_are_pinned, "may be another one", put("StatefulSet", f"/spec{RAY}/image", "redis")),
    Mistake(security.images_are_pinned, "may be another one", ray(f"{GATEWAY}{POD}/initContainers/0/image", "rookery")),
    Mistake(security.images_are_pinned, "not of this release", ray(f"{HEAD}{RAY}/image", "rookery:9.9.9")),
    Mistake(security.ray_is_the_one_in_the_image, "but the image has", ray(f"{CLUSTER}/rayVersion", "2.9.0")),
    Mistake(
        security.the_namespace_takes_restricted_pods_alone,
        "baseline",
        put("Namespace", "/metadata/labels/pod-security.kubernetes.io~1enforce", "baseline"),
    ),
    Mistake(security.pods_are_restricted, "hostNetwork", ray(f"{HEAD}{POD}/hostNetwork", True)),
    Mistake(
        security.pods_are_restricted,
        "the volume node is hostPath",
        ray(f"{HEAD}{POD}/volumes/-", {"name": "node", "hostPath": {"path": "/"}}),
    ),
    Mistake(
        security.pods_are_restricted,
        "sets kernel.msgmax",
        ray(f"{HEAD}{POD}/securityContext/sysctls", [{"name": "kernel.msgmax", "value": "1"}]),
    ),
    Mistake(security.pods_are_restricted, "is privileged", _security("privileged", True)),
    Mistake(security.pods_are_restricted, "may gain privileges", _security("allowPrivilegeEscalation", True)),
    Mistake(security.pods_are_restricted, "keeps capabilities", _security("capabilities/drop", ["NET_RAW"])),
    Mistake(security.pods_are_restricted, "keeps capabilities", _security("capabilities/add", ["SYS_ADMIN"])),
    Mistake(security.pods_are_restricted, "may run as root", _security("runAsUser", 0)),
    Mistake(
        security.pods_are_restricted,
        "autoscaler may gain",
        drop("RayService", f"{CLUSTER}/autoscalerOptions/securityContext"),
    ),
    Mistake(
        security.pods_are_restricted, "no seccomp", drop("RayService", f"{GATEWAY}{POD}/securityContext/seccompProfile")
    ),
    Mistake(security.pods_are_restricted, "a port of its node", ray(f"{GATEWAY}{RAY}/ports/0/hostPort", 80)),
    Mistake(
        security.root_file_systems_are_read_only, "can write to its image", _security("readOnlyRootFilesystem", False)
    ),
    Mistake(
        security.root_file_systems_are_read_only,
        "Ray needs /tmp",
        ray(f"{GATEWAY}{RAY}/volumeMounts/0/mountPath", "/temp"),
    ),
    Mistake(
        security.nobody_but_the_autoscaler_has_a_token,
        "gateway is given",
        drop("RayService", f"{GATEWAY}{POD}/automountServiceAccountToken"),
    ),
    Mistake(
        security.nobody_but_the_autoscaler_has_a_token,
        "by token",
        both(
            ray(f"{HEAD}{POD}/volumes/-", _TOKEN),
            ray(f"{HEAD}{RAY}/volumeMounts/-", {"name": "token", "mountPath": "/token"}),
        ),
    ),
    Mistake(
        security.nobody_but_the_autoscaler_has_a_token,
        "cannot ask for pods",
        ray(f"{CLUSTER}/autoscalerOptions/volumeMounts", []),
    ),
    Mistake(
        security.services_are_not_in_the_environment,
        "enableServiceLinks",
        drop("RayService", f"{TRAINER}{POD}/enableServiceLinks"),
    ),
    Mistake(security.nothing_secret_is_written_down, "everybody can read", also("Secret", data={"a": "YQ=="})),
    Mistake(
        security.nothing_secret_is_written_down,
        "ROOKERY_HUB_TOKEN is written down",
        variable(HEAD, "ROOKERY_HUB_TOKEN", "x"),
    ),
    Mistake(security.nothing_secret_is_written_down, "API_KEYS is written down", setting("ROOKERY_API_KEYS", "k1,k2")),
    Mistake(
        security.nothing_secret_is_written_down,
        "looks like a key",
        setting("ROOKERY_HUB_ENDPOINT", "https://me:secret@hub.example"),
    ),
    Mistake(
        security.nothing_secret_is_written_down,
        "looks like a key",
        put("StatefulSet", f"/spec{RAY}/args", ["--token", f"hf_{'a' * 34}"]),
    ),
    Mistake(
        security.pods_run_as_the_images_user,
        "the image is made for 10001",
        ray(f"{GATEWAY}{POD}/securityContext/fsGroup", 1000),
    ),
    Mistake(
        security.pods_go_where_the_image_runs,
        "that its image is not for",
        drop("RayService", f"{GENERATOR}{POD}/nodeSelector"),
    ),
    Mistake(
        security.pods_go_where_the_image_runs,
        "the label nvidia.com/gpu.present",
        ray(f"{GENERATOR}{POD}/nodeSelector/nvidia.com~1gpu.present", "true"),
    ),
    Mistake(security.everybody_needs_a_key, "is told no keys", ray(f"{GATEWAY}{RAY}/env", [])),
    Mistake(
        security.everybody_needs_a_key,
        "starts without keys",
        ray(
            f"{GATEWAY}{RAY}/env",
            [
                {
                    "name": "ROOKERY_API_KEYS",
                    "valueFrom": {"secretKeyRef": {"name": "rookery", "key": "ROOKERY_API_KEYS", "optional": True}},
                }
            ],
        ),
    ),
    Mistake(security.ray_wants_tokens, "not token", ray(f"{CLUSTER}/authOptions/mode", "disabled")),
    Mistake(security.roles_are_small, "beyond the namespace", also("ClusterRole", _RBAC)),
    Mistake(
        security.roles_are_small,
        "allows everything",
        also("Role", _RBAC, rules=[{"apiGroups": [""], "resources": ["pods"], "verbs": ["*"]}]),
    ),
    Mistake(
        security.roles_are_small,
        "read secrets",
        also("Role", _RBAC, rules=[{"apiGroups": [""], "resources": ["secrets"], "verbs": ["get"]}]),
    ),
    Mistake(
        security.nothing_is_open_to_the_world,
        "open to other machines",
        put("Service", "/spec/type", "LoadBalancer", name="rookery"),
    ),
    Mistake(security.nothing_is_open_to_the_world, "dashboard is open", ray(f"{HEAD}/serviceType", "NodePort")),
    Mistake(security.nothing_is_open_to_the_world, "dashboard is open", ray(f"{HEAD}/enableIngress", True)),
    Mistake(security.nothing_is_open_to_the_world, "for the installer", also("Ingress", "networking.k8s.io/v1")),
]
