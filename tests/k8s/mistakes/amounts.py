"""What pods are given: mistakes that the policies of this name find."""

from __future__ import annotations

from tests.k8s.mistakes import (
    CLUSTER,
    GATEWAY,
    GENERATOR,
    HEAD,
    POD,
    RAY,
    TRAINER,
    Mistake,
    drop,
    put,
    ray,
    serve,
    without,
)
from tests.k8s.policies import amounts

MISTAKES = [
    Mistake(
        amounts.containers_know_their_limits, "no limits of memory", drop("RayService", f"{HEAD}{RAY}/resources/limits")
    ),
    Mistake(
        amounts.containers_know_their_limits,
        "migrate has no requests",
        drop("RayService", f"{GATEWAY}{POD}/initContainers/0/resources"),
    ),
    Mistake(
        amounts.containers_know_their_limits,
        "autoscaler has no limits",
        drop("RayService", f"{CLUSTER}/autoscalerOptions/resources"),
    ),
    Mistake(amounts.volumes_know_their_limits, "may fill its node", ray(f"{HEAD}{POD}/volumes/0/emptyDir", {})),
    Mistake(
        amounts.volumes_know_their_limits, "all of its", ray(f"{GATEWAY}{POD}/volumes/1/emptyDir/sizeLimit", "64Gi")
    ),
    Mistake(
        amounts.volumes_know_their_limits, "beyond its", ray(f"{GENERATOR}{POD}/volumes/3/emptyDir/sizeLimit", "1Ti")
    ),
    Mistake(
        amounts.probes_see_what_matters,
        "no readinessProbe or",
        drop("StatefulSet", f"/spec{RAY}/livenessProbe"),
    ),
    Mistake(
        amounts.probes_see_what_matters,
        "place of KubeRay's",
        ray(f"{GENERATOR}{RAY}/livenessProbe", {"tcpSocket": {"port": 8000}}),
    ),
    Mistake(
        amounts.probes_see_what_matters, "does not ask /readyz", drop("RayService", f"{GATEWAY}{RAY}/startupProbe")
    ),
    Mistake(
        amounts.probes_see_what_matters, "where HTTP is not", ray(f"{GATEWAY}{RAY}/startupProbe/httpGet/port", 8080)
    ),
    Mistake(amounts.probes_see_what_matters, "waits 1 s", ray(f"{GATEWAY}{RAY}/startupProbe/timeoutSeconds", 1)),
    Mistake(
        amounts.pods_end_when_their_work_has,
        "killed after 600 s",
        ray(f"{GENERATOR}{POD}/terminationGracePeriodSeconds", 600),
    ),
    Mistake(
        amounts.pods_end_when_their_work_has,
        "killed after 30 s",
        drop("RayService", f"{TRAINER}{POD}/terminationGracePeriodSeconds"),
    ),
    Mistake(
        amounts.pods_end_when_their_work_has,
        "keeps its place for 660 s",
        ray(f"{TRAINER}{POD}/terminationGracePeriodSeconds", 660),
    ),
    Mistake(
        amounts.pods_end_when_their_work_has,
        "trainer, ray drains for 640 s",
        ray(f"{TRAINER}{RAY}/lifecycle/preStop/exec/command", ["python", "-m", "deployments.drain"]),
    ),
    Mistake(amounts.pods_end_when_their_work_has, "does not drain", drop("RayService", f"{GATEWAY}{RAY}/lifecycle")),
    Mistake(
        amounts.pods_end_when_their_work_has,
        "drains for 300 s",
        ray(
            f"{GATEWAY}{RAY}/lifecycle/preStop/exec/command",
            ["python", "-m", "deployments.drain", "--timeout", "300"],
        ),
    ),
    Mistake(
        amounts.nothing_that_answers_is_alone,
        "there may be 1",
        serve(lambda config: config["applications"][0]["args"].update(num_gateways=1)),
    ),
    Mistake(amounts.two_are_not_sent_away_at_once, "sent away at once", without("PodDisruptionBudget", "generator")),
    Mistake(amounts.two_are_not_sent_away_at_once, "sent away at once", without("PodDisruptionBudget", "gateway")),
    Mistake(
        amounts.heads_are_not_moved_to_save_a_node,
        "safe-to-evict is not 'false'",
        drop("RayService", f"{HEAD}/template/metadata/annotations/cluster-autoscaler.kubernetes.io~1safe-to-evict"),
    ),
    Mistake(
        amounts.heads_are_not_moved_to_save_a_node,
        "do-not-disrupt is not 'true'",
        ray(f"{HEAD}/template/metadata/annotations/karpenter.sh~1do-not-disrupt", "false"),
    ),
    Mistake(
        amounts.nothing_that_answers_is_alone,
        "on one node",
        drop("RayService", f"{GATEWAY}{POD}/topologySpreadConstraints"),
    ),
    Mistake(
        amounts.nothing_that_answers_is_alone, "forgets", drop("RayService", f"{CLUSTER}/gcsFaultToleranceOptions")
    ),
    Mistake(
        amounts.serving_goes_before_training,
        "generator has priority -5",
        ray(f"{GENERATOR}{POD}/priorityClassName", "rookery-training"),
    ),
    Mistake(amounts.serving_goes_before_training, "everybody's", put("PriorityClass", "/globalDefault", True)),
    Mistake(amounts.serving_goes_before_training, "put others out", put("PriorityClass", "/value", 100_000)),
    Mistake(
        amounts.serving_goes_before_training,
        "no node is made",
        put("PriorityClass", "/value", -11, name="rookery-training"),
    ),
    Mistake(
        amounts.budgets_and_spreads_are_of_pods,
        "protects no pod",
        put(
            "PodDisruptionBudget",
            "/spec/selector",
            {"matchLabels": {"ray.io/originated-from-cr-name": "rookery"}},
        ),
    ),
    Mistake(amounts.budgets_and_spreads_are_of_pods, "never lets", put("PodDisruptionBudget", "/spec/minAvailable", 2)),
    Mistake(
        amounts.budgets_and_spreads_are_of_pods,
        "never lets",
        put("PodDisruptionBudget", "/spec/minAvailable", "100%"),
    ),
    Mistake(
        amounts.budgets_and_spreads_are_of_pods,
        "among others",
        ray(f"{GATEWAY}{POD}/topologySpreadConstraints/0/labelSelector", {"matchLabels": {"ray.io/group": "gatway"}}),
    ),
]
