"""Mistakes that an API server refuses, though its schemas allow them."""

from __future__ import annotations

from tests.k8s.kubernetes_rules import amounts_can_be_given as amounts
from tests.k8s.kubernetes_rules import config_maps_can_be_kept as configs
from tests.k8s.kubernetes_rules import containers_have_names_of_their_own as containers
from tests.k8s.kubernetes_rules import disruption_budgets_say_one_thing as budgets
from tests.k8s.kubernetes_rules import documents_have_names_of_their_own
from tests.k8s.kubernetes_rules import documents_say_where_they_belong as places
from tests.k8s.kubernetes_rules import environments_can_be_set as environments
from tests.k8s.kubernetes_rules import metadata_can_be_kept as metadata
from tests.k8s.kubernetes_rules import mounts_are_of_volumes as mounts
from tests.k8s.kubernetes_rules import network_policies_can_be_read as networks
from tests.k8s.kubernetes_rules import pods_can_end as ends
from tests.k8s.kubernetes_rules import ports_can_be_listened_on as ports
from tests.k8s.kubernetes_rules import priorities_are_in_range as priorities
from tests.k8s.kubernetes_rules import probes_and_hooks_can_run as probes
from tests.k8s.kubernetes_rules import roles_can_be_bound as roles
from tests.k8s.kubernetes_rules import schedules_can_be_kept as schedules
from tests.k8s.kubernetes_rules import selectors_can_be_read as selectors
from tests.k8s.kubernetes_rules import selectors_select_their_own_pods as own_pods
from tests.k8s.kubernetes_rules import services_have_ports as services
from tests.k8s.kubernetes_rules import spreads_can_be_kept as spreads
from tests.k8s.mistakes import GATEWAY, GENERATOR, HEAD, POD, RAY, Mistake, also, drop, put, ray, without

_RBAC = "rbac.authorization.k8s.io/v1"
_SPREAD = {"topologyKey": "zone", "maxSkew": 1, "whenUnsatisfiable": "ScheduleAnyway"}


MISTAKES = [
    Mistake(documents_have_names_of_their_own, "is there 2 times", also("Service", name="rookery", spec={})),
    Mistake(documents_have_names_of_their_own, "cannot be a Service's", put("Service", "/metadata/name", "9.rookery")),
    Mistake(places, "belongs to no namespace", put("PriorityClass", "/metadata/namespace", "rookery")),
    Mistake(places, "is in the namespace None", drop("Service", "/metadata/namespace")),
    Mistake(places, "which is not made here", without("Namespace", "rookery")),
    Mistake(metadata, "not for people to set", put("Service", "/metadata/uid", "1")),
    Mistake(metadata, "the label app cannot be True", put("Service", "/metadata/labels", {"app": True})),
    Mistake(metadata, "cannot be 'a b'", ray(f"{HEAD}/template/metadata/labels/app", "a b")),
    Mistake(metadata, "'-/app' cannot be a label's", put("Service", "/metadata/labels", {"-/app": "a"})),
    Mistake(metadata, "the annotation a is 1", put("Service", "/metadata/annotations", {"a": 1})),
    Mistake(metadata, "annotations of 3000", put("Service", "/metadata/annotations", {"a": "a" * 300_000})),
    Mistake(containers, "'Ray' cannot be", ray(f"{HEAD}{RAY}/name", "Ray")),
    Mistake(containers, "two containers are named migrate", ray(f"{GATEWAY}{RAY}/name", "migrate")),
    Mistake(containers, "has no container", put("CronJob", "/spec/jobTemplate/spec/template/spec/containers", [])),
    Mistake(ports, "'rookery-metrics-port' cannot", ray(f"{GATEWAY}{RAY}/ports/0/name", "rookery-metrics-port")),
    Mistake(ports, "two ports are named metrics", ray(f"{GATEWAY}{RAY}/ports/0/name", "metrics")),
    Mistake(ports, "port (8080, 'TCP') is there twice", ray(f"{GATEWAY}{RAY}/ports/0/containerPort", 8080)),
    Mistake(ports, "99999 is no port", ray(f"{GATEWAY}{RAY}/ports/0/containerPort", 99999)),
    Mistake(environments, "'A=B' cannot be", ray(f"{HEAD}{RAY}/env/-", {"name": "A=B", "value": "1"})),
    Mistake(environments, "HOME is set twice", ray(f"{HEAD}{RAY}/env/-", {"name": "HOME", "value": "/"})),
    Mistake(
        environments,
        "more than one place",
        ray(
            f"{HEAD}{RAY}/env/-", {"name": "A", "value": "1", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}}
        ),
    ),
    Mistake(environments, "one ConfigMap or one Secret", ray(f"{HEAD}{RAY}/envFrom/-", {"prefix": "A_"})),
    Mistake(mounts, "two volumes are named tmp", ray(f"{HEAD}{POD}/volumes/-", {"name": "tmp", "emptyDir": {}})),
    Mistake(mounts, "have one source, not 0", ray(f"{HEAD}{POD}/volumes/-", {"name": "empty"})),
    Mistake(mounts, "'a_b' cannot be", ray(f"{HEAD}{POD}/volumes/-", {"name": "a_b", "emptyDir": {}})),
    Mistake(mounts, "which is no volume", ray(f"{HEAD}{RAY}/volumeMounts/0/name", "tnp")),
    Mistake(mounts, "two volumes are mounted at /tmp", ray(f"{HEAD}{RAY}/volumeMounts/1/mountPath", "/tmp")),
    Mistake(mounts, "nothing can be mounted at 'tmp'", ray(f"{HEAD}{RAY}/volumeMounts/0/mountPath", "tmp")),
    Mistake(mounts, "leads out of its volume", ray(f"{HEAD}{RAY}/volumeMounts/0/subPath", "a/../../b")),
    Mistake(amounts, "'2 GB' is no quantity", ray(f"{HEAD}{RAY}/resources/limits/memory", "2 GB")),
    Mistake(amounts, "less than nothing", ray(f"{HEAD}{RAY}/resources/limits/memory", "-1Gi")),
    Mistake(amounts, "requests 9999 of cpu", ray(f"{HEAD}{RAY}/resources/requests/cpu", "9999")),
    Mistake(amounts, "to be had whole", ray(f"{GENERATOR}{RAY}/resources/limits/nvidia.com~1gpu", "500m")),
    Mistake(amounts, "requested as it is limited", ray(f"{GENERATOR}{RAY}/resources/limits/nvidia.com~1gpu", "2")),
    Mistake(amounts, "needs a limit", drop("RayService", f"{GENERATOR}{RAY}/resources/limits/nvidia.com~1gpu")),
    Mistake(amounts, "volume tmp: sizeLimit", ray(f"{HEAD}{POD}/volumes/0/emptyDir/sizeLimit", "big")),
    Mistake(amounts, "names no access mode", put("PersistentVolumeClaim", "/spec/accessModes", [])),
    Mistake(amounts, "requests no storage", drop("PersistentVolumeClaim", "/spec/resources")),
    Mistake(probes, "in one way, not 2", ray(f"{GATEWAY}{RAY}/startupProbe/exec", {"command": ["true"]})),
    Mistake(probes, "periodSeconds is 0", ray(f"{GATEWAY}{RAY}/startupProbe/periodSeconds", 0)),
    Mistake(probes, "succeed once", ray(f"{GATEWAY}{RAY}/startupProbe/successThreshold", 2)),
    Mistake(probes, "asks at port http", ray(f"{GATEWAY}{RAY}/startupProbe/httpGet/port", "http")),
    Mistake(probes, "preStop is to do one thing", ray(f"{GATEWAY}{RAY}/lifecycle/preStop/sleep", {"seconds": 1})),
    Mistake(probes, "preStop has no command", ray(f"{GATEWAY}{RAY}/lifecycle/preStop/exec/command", [])),
    Mistake(
        probes,
        "ends before the others begin",
        ray(f"{GATEWAY}{POD}/initContainers/0/livenessProbe", {"tcpSocket": {"port": 80}}),
    ),
    Mistake(ends, "terminationGracePeriodSeconds is -1", ray(f"{HEAD}{POD}/terminationGracePeriodSeconds", -1)),
    Mistake(ends, "is possible", put("StatefulSet", "/spec/template/spec/restartPolicy", "Never")),
    Mistake(spreads, "maxSkew is 0", ray(f"{HEAD}{POD}/topologySpreadConstraints", [{**_SPREAD, "maxSkew": 0}])),
    Mistake(spreads, "minDomains", ray(f"{HEAD}{POD}/topologySpreadConstraints", [{**_SPREAD, "minDomains": 2}])),
    Mistake(spreads, "over zone twice", ray(f"{HEAD}{POD}/topologySpreadConstraints", [_SPREAD, _SPREAD])),
    Mistake(own_pods, "does not select", put("StatefulSet", "/spec/template/metadata/labels", {"app": "other"})),
    Mistake(own_pods, "selects no pods", put("StatefulSet", "/spec/selector", {})),
    Mistake(
        selectors,
        "has the wrong values",
        put("NetworkPolicy", "/spec/podSelector", {"matchExpressions": [{"key": "a", "operator": "In"}]}),
    ),
    Mistake(
        selectors, "cannot be 'a b'", put("PodDisruptionBudget", "/spec/selector", {"matchLabels": {"app": "a b"}})
    ),
    Mistake(services, "has no port", put("Service", "/spec/ports", [], name="rookery")),
    Mistake(services, "0 is no port", put("Service", "/spec/ports/0/port", 0, name="rookery")),
    Mistake(services, "neither a port nor", put("Service", "/spec/ports/0/targetPort", "the_port", name="rookery")),
    Mistake(
        services,
        "two ports are named http",
        put("Service", "/spec/ports/-", {"name": "http", "port": 81}, name="rookery"),
    ),
    Mistake(services, "'' cannot be a port's", put("Service", "/spec/ports/-", {"port": 81}, name="rookery")),
    Mistake(networks, "is not about it", put("NetworkPolicy", "/spec/policyTypes", ["Egress"], name="gateway")),
    Mistake(networks, "or else a block", put("NetworkPolicy", "/spec/ingress/0/from/-", {}, name="gateway")),
    Mistake(
        networks,
        "does not appear to be",
        put("NetworkPolicy", "/spec/ingress/0/from/-", {"ipBlock": {"cidr": "10.0.0.0/33"}}, name="gateway"),
    ),
    Mistake(
        networks,
        "has host bits set",
        put("NetworkPolicy", "/spec/ingress/0/from/-", {"ipBlock": {"cidr": "10.0.0.1/8"}}, name="gateway"),
    ),
    Mistake(
        networks,
        "is not within 10.0.0.0/8",
        put(
            "NetworkPolicy",
            "/spec/ingress/0/from/-",
            {"ipBlock": {"cidr": "10.0.0.0/8", "except": ["11.0.0.0/9"]}},
            name="gateway",
        ),
    ),
    Mistake(networks, "0 is no port", put("NetworkPolicy", "/spec/ingress/0/ports/0/port", 0, name="gateway")),
    Mistake(networks, "no ports go from", put("NetworkPolicy", "/spec/ingress/0/ports/0/endPort", 80, name="gateway")),
    Mistake(budgets, "one of minAvailable", put("PodDisruptionBudget", "/spec/maxUnavailable", 1)),
    Mistake(budgets, "neither a number nor", put("PodDisruptionBudget", "/spec/minAvailable", "half")),
    Mistake(priorities, "is beyond", put("PriorityClass", "/value", 2_000_000_000)),
    Mistake(priorities, "are the system's", put("PriorityClass", "/metadata/name", "system-mine")),
    Mistake(configs, "cannot be a key", put("ConfigMap", "/data/a b", "1")),
    Mistake(configs, "1048576 are the most", put("ConfigMap", "/data/a", "a" * (1 << 20))),
    Mistake(schedules, "is no schedule", put("CronJob", "/spec/schedule", "0 25 * * *")),
    Mistake(schedules, "is no schedule", put("CronJob", "/spec/schedule", "every day")),
    Mistake(roles, "without verbs", also("Role", _RBAC, rules=[{"apiGroups": [""], "resources": ["pods"]}])),
    Mistake(roles, "of no group", also("Role", _RBAC, rules=[{"verbs": ["get"], "resources": ["pods"]}])),
    Mistake(roles, "has no namespace", also("RoleBinding", _RBAC, subjects=[{"kind": "ServiceAccount", "name": "a"}])),
]
