"""The manifests, checked as far as a machine without Kubernetes can: `make k8s-check`.

    python -m tests.k8s.check [--offline] [--definitions FOLDER]

Renders each overlay; holds every document to the schema of its kind, to what Kubernetes and KubeRay refuse beyond
schemas, and to our own policies. Then starts a Ray cluster of several pods on this machine and counts the requests that
fail while it is used, upgraded, drained and a node of it dies. What is found goes to stderr, a sentence each. Ends with
one JSON line, and status 0 if all is well; 2 where it cannot be tried.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tests.k8s import cluster
from tests.k8s.kuberay_rules import operator_errors
from tests.k8s.kubernetes_rules import api_errors
from tests.k8s.pods import why_impossible
from tests.k8s.policies import policy_errors
from tests.k8s.rendered import OVERLAYS, NoKubectl, Rendering, render
from tests.k8s.schemas import DEFINITIONS, schema_errors

_RUNS = ("smoke", "upgrade", "node_kill", "drain")  # each without a failed request; `tests.k8s.cluster` has more
_FIRST = ("overlays", "manifests", "schema_errors", "policy_errors")

Figures = dict[str, Any]


def check_manifests(definitions: Path) -> Figures:
    """How many documents there are, and how many sentences can be said against them. Raises: NoKubectl."""
    renderings = [render(overlay) for overlay in OVERLAYS]
    refused = [_said(one, _refused(one, definitions)) for one in renderings]
    unkept = [_said(one, policy_errors(one)) for one in renderings]
    return {
        "overlays": len(renderings),
        "manifests": sum(len(one.documents) for one in renderings),
        "schema_errors": sum(refused),
        "policy_errors": sum(unkept),
    }


def _refused(rendering: Rendering, definitions: Path) -> list[str]:
    return [*schema_errors(rendering, definitions), *api_errors(rendering), *operator_errors(rendering)]


def _said(rendering: Rendering, sentences: Iterable[str]) -> int:
    found = list(dict.fromkeys(sentences))
    for sentence in found:
        _say(f"{rendering.overlay}: {sentence}")
    return len(found)


def check_cluster(names: Iterable[str]) -> Figures:
    """What became of the requests in each run, one after the other on one cluster."""
    figures: Figures = {}
    with cluster.open_stage() as stage:
        for name in names:
            began, words = time.monotonic(), name.replace("_", " ")
            _say(f"{words} ...")
            outcome = cluster.RUNS[name](stage)
            figures |= {f"{name}_requests": outcome.requests, f"{name}_failed_requests": outcome.failed}
            took = f"{time.monotonic() - began:.0f} s"
            _say(f"{words}: {outcome.failed} of {outcome.requests} requests failed ({took}) {outcome.detail}")
    return figures


def _is_well(figures: Mapping[str, Any], names: Iterable[str]) -> bool:
    """Also that something was asked: nothing fails where nothing is done."""
    return (
        figures["manifests"] > 0
        and figures["schema_errors"] == figures["policy_errors"] == 0
        and all(figures[f"{name}_requests"] and figures[f"{name}_failed_requests"] == 0 for name in names)
    )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _why_not(arguments: argparse.Namespace) -> str:
    if not arguments.definitions.is_dir():
        return f"KubeRay's CustomResourceDefinitions are not at {arguments.definitions}; name their --definitions."
    why = "" if arguments.offline else why_impossible()
    return f"{why}. Without a cluster: --offline" if why else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--offline", action="store_true", help="the manifests alone; starts nothing")
    parser.add_argument("--definitions", type=Path, default=DEFINITIONS, help="of KubeRay's custom kinds")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # through all that cleans up
    if why := _why_not(arguments):
        _say(why)
        return 2
    names = () if arguments.offline else _RUNS
    figures: Figures = dict.fromkeys(f"{name}{end}" for name in _RUNS for end in ("_requests", "_failed_requests"))
    try:
        figures |= check_manifests(arguments.definitions)
    except NoKubectl as exc:
        _say(str(exc))
        return 2
    if names:
        figures |= check_cluster(names)
    first = (*_FIRST, "upgrade_failed_requests", "node_kill_failed_requests")
    print(json.dumps({name: figures[name] for name in first} | figures))
    return 0 if _is_well(figures, names) else 1


if __name__ == "__main__":
    sys.exit(main())
