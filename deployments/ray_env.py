"""Ray's switches, said once: what every Ray of ours is started with, on a laptop and in a cluster.

    python -m deployments.ray_env > k8s/base/ray.env

prints the cluster's as an environment file. Ray reads them when it is imported, so they must be in the environment
before. Imports no Ray, and knows no setting of ours.
"""

from __future__ import annotations

from deployments import haproxy

_HEADER = """\
# Ray's switches for every container that runs Ray. Written by `python -m deployments.ray_env`, where the reasons are.
"""

# A piece of text between deployments by gRPC costs a fifth of what it costs by Ray's object store, and one loop instead
# of three threads halves the rest: one token in 3.6 ms with HAProxy, in 8.4 ms without, in 13.4 ms with none of these
# (2 busy cores, November 2026).
COMMON = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_worker_niceness": "0",  # Ray's own 15 would put generators behind everything, training included
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "2",  # a dead proxy is back after 6 s, not 30
    # It may start beside generators that read their models: by Ray's 5 s it was killed and started anew for 90 s.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    # Of glibc, not of Ray: by its own 8 a core, threads that come and go fill one heap after the other for days.
    "MALLOC_ARENA_MAX": "2",
}

# Ray's own lines are in files of Ray's. What is logged for people to read is ours, by other ways: see
# `deployments/README.md`.
QUIET = {"RAY_SERVE_LOG_TO_STDERR": "0"}
# Two lines for each request, where nobody reads them, cost 32 streams of 60 tokens 5 % of their tokens a second: a
# hundred are written at a time, and at once from the first error on; a thousand took 2 MB of each process. A cluster's
# configuration has none written.
SELDOM = {"RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "100"}
# All lines are shown: Ray would leave out those of one replica that look like another's.
VERBOSE = {"RAY_DEDUP_LOGS": "0"}

LAPTOP = {
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",  # HAProxy's wait for other nodes: here there is one
    # An idle service takes 5 % of a core, not 9 %: the controller looks twice a second, not ten times, and Ray's own
    # metrics, which nothing here would read, are not gathered.
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
    "RAY_enable_metrics_collection": "0",
}

CLUSTER = {
    # A machine that is silent for some 12 s is given up, and what ran there is started elsewhere; by Ray's own figures
    # that takes more than a minute. No work of ours keeps a raylet from answering for 12 s: it is its own process.
    "RAY_health_check_initial_delay_ms": "5000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "3",
    # Without its head a node goes on serving for ten minutes: a new head pod takes one or two, and a big image longer.
    "RAY_gcs_rpc_server_reconnect_timeout_s": "600",
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # `deployments.drain` has seen to it: a pod's hook is before SIGTERM
    # A gateway that leaves still answers HAProxies that have not heard of it; Ray's 30 s would slow every update.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "10",
    # Each of a pod's logs may take 96 MiB; by Ray's figures it is 3 GiB, with which a few fill the pod's /tmp.
    "RAY_ROTATION_MAX_BYTES": str(32 << 20),
    "RAY_ROTATION_BACKUP_COUNT": "2",
    **haproxy.switches(haproxy.CLUSTER_FOLDER, program=haproxy.CLUSTER_PROGRAM, fallback_port=8500),
}


def for_laptop(*, verbose: bool) -> dict[str, str]:
    """All but HAProxy's, whose folder is another at each start."""
    return {**COMMON, **LAPTOP, **(VERBOSE if verbose else QUIET | SELDOM)}


def for_cluster() -> dict[str, str]:
    """The same for all nodes: Ray on one must not be told something else than on another."""
    return {**COMMON, **QUIET, **CLUSTER}


def as_env_file(switches: dict[str, str]) -> str:
    """A name and its value a line, in the order of names, after a remark on where they are from."""
    return _HEADER + "".join(f"{name}={value}\n" for name, value in sorted(switches.items()))


if __name__ == "__main__":
    print(as_env_file(for_cluster()), end="")  # noqa: T201
