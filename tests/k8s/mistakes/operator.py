"""Mistakes that KubeRay's operator refuses."""

from __future__ import annotations

from tests.k8s.kuberay_rules import fault_tolerance_is_told_once as redis
from tests.k8s.kuberay_rules import groups_book_in_one_place as books
from tests.k8s.kuberay_rules import groups_have_names_and_sizes as groups
from tests.k8s.kuberay_rules import ray_starts_in_the_first_container as starts
from tests.k8s.kuberay_rules import the_annotations_can_be_read as remarks
from tests.k8s.kuberay_rules import the_autoscaler_is_told_once as autoscaler
from tests.k8s.kuberay_rules import the_name_leaves_room_for_others as name
from tests.k8s.kuberay_rules import there_is_something_to_serve as serves
from tests.k8s.kuberay_rules import tokens_need_a_version as tokens
from tests.k8s.kuberay_rules import upgrades_have_all_they_need as upgrades
from tests.k8s.mistakes import CLUSTER, GATEWAY, HEAD, POD, RAY, Break, Mistake, both, drop, ray

_INCREMENTAL = "NewClusterWithIncrementalUpgrade"


def _variable(key: str) -> Break:
    return ray(f"{HEAD}{RAY}/env/-", {"name": key, "value": "1"})


def _upgrade(**options: object) -> Break:
    return ray("/spec/upgradeStrategy", {"type": _INCREMENTAL, "clusterUpgradeOptions": options})


MISTAKES = [
    Mistake(name, "cannot be named 'rrr", ray("/metadata/name", "r" * 48)),
    Mistake(name, "cannot be named '1rookery'", ray("/metadata/name", "1rookery")),
    Mistake(remarks, "no duration", ray("/metadata/annotations", {"ray.io/initializing-timeout": "soon"})),
    Mistake(remarks, "no duration", ray("/metadata/annotations", {"ray.io/initializing-timeout": "0s"})),
    Mistake(serves, "has no serveConfigV2", drop("RayService", "/spec/serveConfigV2")),
    Mistake(serves, "names no application", ray("/spec/serveConfigV2", "applications: []")),
    Mistake(books, "one of the two is refused", ray(f"{HEAD}/resources", {"CPU": "1"})),
    Mistake(books, "not looked for", ray(f"{GATEWAY}/rayStartParams/labels", "a=b")),
    Mistake(books, "not JSON of numbers", ray(f"{GATEWAY}/rayStartParams/resources", '{"gateway": 1}')),
    Mistake(books, "not JSON of numbers", ray(f"{GATEWAY}/rayStartParams/resources", "gateway")),
    Mistake(groups, "Two groups have one name", ray(f"{GATEWAY}/groupName", "trainer")),
    Mistake(groups, "cannot be the name", ray(f"{GATEWAY}/groupName", "gate way")),
    Mistake(groups, "of 99 at least", ray(f"{GATEWAY}/minReplicas", 99)),
    Mistake(groups, "to have 99 pods", ray(f"{GATEWAY}/replicas", 99)),
    Mistake(groups, "is suspended", ray(f"{GATEWAY}/suspend", True)),
    Mistake(groups, "of 2 pods each", ray(f"{GATEWAY}/numOfHosts", 2)),
    Mistake(
        groups,
        "which is the autoscaler's",
        both(ray(f"{GATEWAY}/idleTimeoutSeconds", 60), drop("RayService", f"{CLUSTER}/enableInTreeAutoscaling")),
    ),
    Mistake(autoscaler, "but no autoscaler", drop("RayService", f"{CLUSTER}/enableInTreeAutoscaling")),
    Mistake(
        autoscaler,
        "is on, but",
        both(_variable("RAY_enable_autoscaler_v2"), ray(f"{CLUSTER}/enableInTreeAutoscaling", False)),
    ),
    Mistake(autoscaler, "told twice", _variable("RAY_enable_autoscaler_v2")),
    Mistake(autoscaler, "wants Never", ray(f"{GATEWAY}{POD}/restartPolicy", "Always")),
    Mistake(redis, "is to say it alone", _variable("REDIS_PASSWORD")),
    Mistake(redis, "is to say it alone", _variable("RAY_REDIS_ADDRESS")),
    Mistake(redis, "is to say it alone", ray(f"{HEAD}/rayStartParams/redis-password", "$REDIS_PASSWORD")),
    Mistake(redis, "redisUsername to say", _variable("REDIS_USERNAME")),
    Mistake(redis, "says what gcsFault", ray("/metadata/annotations", {"ray.io/ft-enabled": "true"})),
    Mistake(redis, "names no redisAddress", ray(f"{CLUSTER}/gcsFaultToleranceOptions/redisAddress", "")),
    Mistake(redis, "feature gate", ray(f"{CLUSTER}/gcsFaultToleranceOptions/backend", "rocksdb")),
    Mistake(
        redis,
        "is set, but not",
        both(drop("RayService", f"{CLUSTER}/gcsFaultToleranceOptions"), _variable("RAY_REDIS_ADDRESS")),
    ),
    Mistake(tokens, "not ''", drop("RayService", f"{CLUSTER}/rayVersion")),
    Mistake(tokens, "not '2.9.0'", ray(f"{CLUSTER}/rayVersion", "2.9.0")),
    Mistake(tokens, "not to be had", ray(f"{CLUSTER}/authOptions/enableK8sTokenAuth", True)),
    Mistake(upgrades, "not one of", ray("/spec/upgradeStrategy/type", "Rolling")),
    Mistake(upgrades, "is -1", ray("/spec/rayClusterDeletionDelaySeconds", -1)),
    Mistake(upgrades, "the operator's to give", ray(f"{HEAD}/headService", {"metadata": {"name": "head"}})),
    Mistake(upgrades, "cannot be done", _upgrade(stepSizePercent=50, maxSurgePercent=20)),
    Mistake(upgrades, "and a gatewayClassName", _upgrade(stepSizePercent=5, intervalSeconds=10)),
    Mistake(
        upgrades, "needs the autoscaler", both(_upgrade(), drop("RayService", f"{CLUSTER}/enableInTreeAutoscaling"))
    ),
    Mistake(starts, "has a command of its own", ray(f"{GATEWAY}{RAY}/command", ["rookery"])),
    Mistake(starts, "has no limit of memory", drop("RayService", f"{GATEWAY}{RAY}/resources/limits/memory")),
]
