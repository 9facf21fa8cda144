"""Who reaches whom: mistakes that the policies of this name find."""

from __future__ import annotations

from tests.k8s.mistakes import (
    CLUSTER,
    GATEWAY,
    RAY,
    TRAINER,
    Break,
    Mistake,
    also,
    drop,
    put,
    ray,
    serve,
    setting,
    without,
)
from tests.k8s.policies import network
from tests.k8s.rendered import Json

_ANY: Json = {"namespaceSelector": {}}
_INGRESS = "/spec/ingress/0"


def _egress(*peers: object, ports: list[object] | None = None) -> Break:
    rule = {"to": [*peers], **({"ports": ports} if ports else {})}
    spec = {"podSelector": {"matchLabels": {"ray.io/group": "gateway"}}, "policyTypes": ["Egress"], "egress": [rule]}
    return also("NetworkPolicy", "networking.k8s.io/v1", spec=spec)


MISTAKES = [
    Mistake(network.everything_is_denied_first, "denies everything", without("NetworkPolicy", "default-deny")),
    Mistake(
        network.network_policies_choose_pods,
        "about no pod",
        put("NetworkPolicy", "/spec/podSelector", {"matchLabels": {"ray.io/group": "gatway"}}, name="gateway"),
    ),
    Mistake(
        network.network_policies_choose_pods,
        "no pod is",
        put("NetworkPolicy", "/spec/ingress/0/from/0/podSelector/matchLabels/ray.io~1is-ray-node", "true", name="ray"),
    ),
    Mistake(
        network.network_policies_name_ports_that_are_listened_on,
        "opens port 8001",
        put("NetworkPolicy", f"{_INGRESS}/ports/0/port", 8001, name="gateway"),
    ),
    Mistake(
        network.outsiders_reach_what_is_for_them,
        "A pod of another namespace gets to port 8000",
        put("NetworkPolicy", f"{_INGRESS}/from/-", _ANY, name="gateway"),
    ),
    Mistake(
        network.outsiders_reach_what_is_for_them,
        "The internet gets to port 8000",
        put("NetworkPolicy", f"{_INGRESS}/from/-", {"ipBlock": {"cidr": "0.0.0.0/0"}}, name="gateway"),
    ),
    Mistake(
        network.outsiders_reach_what_is_for_them,
        "opens port 6379",
        put("NetworkPolicy", f"{_INGRESS}/ports/-", {"protocol": "TCP", "port": 6379}, name="operator"),
    ),
    Mistake(
        network.outsiders_reach_what_is_for_them,
        "opens every port",
        drop("NetworkPolicy", f"{_INGRESS}/ports", name="operator"),
    ),
    Mistake(
        network.nobody_is_open_to_all,
        "allowed for everybody",
        drop("NetworkPolicy", f"{_INGRESS}/from", name="gateway"),
    ),
    Mistake(network.nobody_is_open_to_all, "cloud's metadata", _egress({"ipBlock": {"cidr": "0.0.0.0/0"}})),
    Mistake(network.what_is_needed_gets_through, "cannot ask for addresses", without("NetworkPolicy", "dns")),
    Mistake(network.what_is_needed_gets_through, "port 6379 of RayService", without("NetworkPolicy", "ray")),
    Mistake(network.what_is_needed_gets_through, "to the Hub", without("NetworkPolicy", "hub")),
    Mistake(network.what_is_needed_gets_through, "to the API server", without("NetworkPolicy", "autoscaler")),
    Mistake(
        network.what_is_needed_gets_through,
        "trainer cannot get to port 5432",
        without("NetworkPolicy", "postgres"),
    ),
    Mistake(
        network.what_is_needed_gets_through,
        "gateway cannot get to port 5432",
        without("NetworkPolicy", "database"),
    ),
    Mistake(
        network.what_is_needed_gets_through,
        "head cannot get to port 6379 of StatefulSet",
        without("NetworkPolicy", "redis"),
    ),
    Mistake(
        network.volumes_can_be_mounted,
        "juicefs-csi-driver cannot",
        put(
            "NetworkPolicy",
            f"{_INGRESS}/from/0/podSelector",
            {"matchLabels": {"app.kubernetes.io/name": "juicefs-mount"}},
            name="object-store",
        ),
    ),
    Mistake(
        network.services_lead_to_ports_that_are_listened_on,
        "leads to no pod",
        put("Service", "/spec/selector/ray.io~1group", "gatway", name="rookery"),
    ),
    Mistake(
        network.services_lead_to_ports_that_are_listened_on,
        "leads to port http",
        put("Service", "/spec/ports/0/targetPort", "http", name="rookery"),
    ),
    Mistake(network.requests_get_to_gateways_alone, "no Service rookery", without("Service", "rookery")),
    Mistake(
        network.requests_get_to_gateways_alone,
        "not to gateways alone",
        drop("Service", "/spec/selector/ray.io~1group", name="rookery"),
    ),
    Mistake(
        network.requests_get_to_gateways_alone,
        "leads to nobody",
        put("Service", "/spec/selector/ray.io~1cluster", "rookery-abcde", name="rookery"),
    ),
    Mistake(
        network.databases_are_called_by_their_names,
        "where no Service is",
        ray(f"{CLUSTER}/gcsFaultToleranceOptions/redisAddress", "redis:6379"),
    ),
    Mistake(
        network.ports_are_those_that_are_listened_on,
        "HTTP is at port 8001",
        serve(lambda config: config["http_options"].update(port=8001)),
    ),
    Mistake(
        network.ports_are_those_that_are_listened_on,
        "nothing listens at 9465",
        ray(f"{GATEWAY}{RAY}/ports/1/containerPort", 9465),
    ),
    Mistake(
        network.ports_are_those_that_are_listened_on,
        "does not name its ports",
        drop("RayService", f"{TRAINER}{RAY}/ports"),
    ),
    Mistake(
        network.ports_are_those_that_are_listened_on,
        "for its own machine alone",
        setting("ROOKERY_METRICS_HOST", "127.0.0.1"),
    ),
]
