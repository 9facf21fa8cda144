"""How labels are matched, which rules of an API server go by."""

from __future__ import annotations

from tests.k8s.kubernetes_rules import matches


def test_a_selector_chooses_by_all_that_it_says() -> None:
    labels = {"app": "a", "tier": "b"}
    assert matches({}, labels)
    assert matches(
        {"matchLabels": {"app": "a"}, "matchExpressions": [{"key": "x", "operator": "DoesNotExist"}]}, labels
    )
    assert matches({"matchExpressions": [{"key": "app", "operator": "In", "values": ["a", "c"]}]}, labels)
    assert matches({"matchExpressions": [{"key": "x", "operator": "NotIn", "values": ["a"]}]}, labels)
    assert not matches({"matchLabels": {"app": "a", "tier": "c"}}, labels)
    assert not matches({"matchLabels": {"app": "a"}, "matchExpressions": [{"key": "x", "operator": "Exists"}]}, labels)
