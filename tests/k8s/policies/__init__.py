"""What Rookery asks of its manifests beyond what Kubernetes and KubeRay do.

A policy is a function that says a sentence for each thing that is not as it should be, and nothing when all is well.
`POLICIES` has all.
"""

from __future__ import annotations

from tests.k8s.policies import amounts, network, references, security, serving, switches, watching
from tests.k8s.rendered import Rendering, Rule

POLICIES: tuple[Rule, ...] = (
    *security.POLICIES,
    *amounts.POLICIES,
    *references.POLICIES,
    *network.POLICIES,
    *switches.POLICIES,
    *serving.POLICIES,
    *watching.POLICIES,
)


def policy_errors(rendering: Rendering) -> list[str]:
    """A sentence for everything that a policy finds."""
    return [sentence for policy in POLICIES for sentence in policy(rendering)]
