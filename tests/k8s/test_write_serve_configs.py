from __future__ import annotations

from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]

from tests.k8s.write_serve_configs import OVERLAYS, ROOT, written


@pytest.mark.parametrize("path", written(), ids=str)
def test_the_cluster_has_what_the_project_has(path: Path) -> None:
    text = (ROOT / path).read_text()
    assert text == written()[path], "run: python -m tests.k8s.write_serve_configs"


@pytest.mark.parametrize("name", OVERLAYS)
def test_a_serve_configuration_survives_its_way_through_the_manifest(name: str) -> None:
    manifest = yaml.safe_load(written()[Path(f"k8s/overlays/{name}/serve.yaml")])
    source = ROOT / f"deployments/{name}.yaml"
    assert yaml.safe_load(manifest["spec"]["serveConfigV2"]) == yaml.safe_load(source.read_text())


def test_the_rules_survive_their_way_through_the_manifest() -> None:
    manifest = yaml.safe_load(written()[Path("k8s/monitoring/operator/rules.yaml")])
    source = ROOT / "k8s/monitoring/rules/rookery.yaml"
    assert manifest["spec"] == yaml.safe_load(source.read_text())
