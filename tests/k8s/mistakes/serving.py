"""What Ray Serve runs: mistakes that the policies of this name find."""

from __future__ import annotations

from tests.k8s.mistakes import CLUSTER, GATEWAY, GENERATOR, HEAD, RAY, TRAINER, Mistake, drop, ray, serve
from tests.k8s.policies import serving

MISTAKES = [
    Mistake(
        serving.the_application_is_ours,
        "not rookery alone",
        serve(lambda config: config["applications"].append({"name": "other", "import_path": "deployments.app:build"})),
    ),
    Mistake(
        serving.the_application_is_ours,
        "not our application",
        serve(lambda config: config["applications"][0].update(import_path="deployments.app:app")),
    ),
    Mistake(
        serving.the_application_is_ours,
        "brings code with it",
        serve(lambda config: config["applications"][0].update(runtime_env={"pip": ["requests"]})),
    ),
    Mistake(
        serving.the_configuration_is_the_one_in_deployments,
        "is not what deployments/ha.yaml says",
        serve(lambda config: config["applications"][0]["args"].update(num_gateways=3)),
    ),
    Mistake(
        serving.every_option_is_known_to_ray,
        "max_ongoing_request is no option",
        serve(lambda config: config["applications"][0]["deployments"][0].update(max_ongoing_request=8)),
    ),
    Mistake(
        serving.every_option_is_known_to_ray,
        "hosts is no option of Ray's HTTPOptionsSchema",
        serve(lambda config: config["http_options"].update(hosts="::")),
    ),
    Mistake(
        serving.every_option_is_known_to_ray,
        "target_requests is no option of Ray's AutoscalingConfig",
        serve(
            lambda config: config["applications"][0]["deployments"][0].update(autoscaling_config={"target_requests": 2})
        ),
    ),
    Mistake(
        serving.every_option_is_known_to_ray,
        "max_ongoing_requests",
        serve(lambda config: config["applications"][0]["deployments"][0].update(max_ongoing_requests=0)),
    ),
    Mistake(
        serving.the_application_can_be_built,
        "cannot be built",
        serve(lambda config: config["applications"][0]["args"].update(num_gateway=2)),
    ),
    Mistake(
        serving.the_application_can_be_built,
        "no deployment of ours",
        serve(lambda config: config["applications"][0]["deployments"].append({"name": "engine"})),
    ),
    Mistake(
        serving.the_application_can_be_built,
        "not there to be imported",
        serve(
            lambda config: config["applications"][0].update(
                autoscaling_policy={"policy_function": "deployments.scaling:scale"}
            )
        ),
    ),
    Mistake(serving.replicas_have_room, "no pods for the deployment", ray(f"{GATEWAY}/groupName", "front")),
    Mistake(
        serving.replicas_have_room,
        "set `placed`",
        serve(lambda config: config["applications"][0]["args"].update(placed=False)),
    ),
    Mistake(
        serving.replicas_have_room,
        "1 generator; a pod of its group offers 1 CPU",
        ray(f"{GENERATOR}{RAY}/resources/limits/cpu", "1"),
    ),
    Mistake(
        serving.replicas_have_room,
        "A replica of trainer books",
        drop("RayService", f"{TRAINER}/rayStartParams/resources"),
    ),
    Mistake(serving.replicas_have_room, "but pods for 3", ray(f"{GENERATOR}/maxReplicas", 3)),
    Mistake(
        serving.replicas_have_room,
        "256 replicas of generator",
        serve(lambda config: config["applications"][0]["deployments"][0].update(max_surge_percent=700)),
    ),
    Mistake(serving.replicas_have_room, "but replicas for fewer", ray(f"{GATEWAY}/minReplicas", 5)),
    Mistake(serving.replicas_have_room, "but its pods do not", ray(f"{CLUSTER}/enableInTreeAutoscaling", False)),
    Mistake(
        serving.replicas_have_room,
        "more than one generator books",
        ray(f"{GENERATOR}{RAY}/resources/limits/nvidia.com~1gpu", "4"),
    ),
    Mistake(
        serving.clusters_with_gpus_grow_and_shrink,
        "at all times",
        drop("RayService", f"{CLUSTER}/enableInTreeAutoscaling"),
    ),
    Mistake(serving.clusters_with_gpus_grow_and_shrink, "is not v2", ray(f"{CLUSTER}/autoscalerOptions/version", "v1")),
    Mistake(serving.clusters_with_gpus_grow_and_shrink, "wait for jobs", ray(f"{TRAINER}/minReplicas", 1)),
    Mistake(serving.the_head_does_no_work, "num-cpus is not 0", drop("RayService", f"{HEAD}/rayStartParams/num-cpus")),
    Mistake(
        serving.the_head_does_no_work, "offers gateway", ray(f"{HEAD}/rayStartParams/resources", "'{\"gateway\": 1}'")
    ),
    Mistake(serving.the_head_does_no_work, "requests go to", drop("RayService", "/spec/excludeHeadPodFromServeSvc")),
    Mistake(
        serving.no_answer_is_cut_off_by_a_clock,
        "ends a request after 60 s",
        serve(lambda config: config["http_options"].update(request_timeout_s=60)),
    ),
    Mistake(
        serving.no_answer_is_cut_off_by_a_clock,
        "that is to go has 20 s",
        serve(lambda config: config["applications"][0]["deployments"][1].update(graceful_shutdown_timeout_s=20)),
    ),
    Mistake(serving.upgrades_have_both_clusters, "change nothing", ray("/spec/upgradeStrategy/type", "None")),
    Mistake(serving.upgrades_have_both_clusters, "is gone 5 s", ray("/spec/rayClusterDeletionDelaySeconds", 5)),
]
