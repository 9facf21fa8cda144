"""What an API server, KubeRay and our own policies demand: the overlays keep it, and each rule finds its mistake."""

from __future__ import annotations

import pytest

from tests.k8s import kuberay_rules, kubernetes_rules
from tests.k8s.mistakes import (
    Mistake,
    amounts,
    api_server,
    network,
    operator,
    references,
    security,
    serving,
    switches,
    watching,
)
from tests.k8s.policies import POLICIES
from tests.k8s.rendered import Rendering, Rule, render

RULES = (*kubernetes_rules.RULES, *kuberay_rules.RULES, *POLICIES)
MISTAKES = [
    mistake
    for found_by in (api_server, operator, security, amounts, references, network, switches, serving, watching)
    for mistake in found_by.MISTAKES
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_every_overlay_keeps(rule: Rule, rendering: Rendering) -> None:
    assert list(rule(rendering)) == []


@pytest.mark.usefixtures("kubectl")
@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_a_mistake_is_found(mistake: Mistake) -> None:
    assert mistake.is_found(render("ha"))


def test_every_rule_is_shown_to_find_something() -> None:
    assert set(RULES) == {mistake.rule for mistake in MISTAKES}
