"""What k8s/README.md tells people to type names what the manifests have."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

from tests.docs.documents import ROOT, blocks
from tests.k8s.rendered import OVERLAYS, Rendering, render

README = ROOT / "k8s" / "README.md"
TEXT = re.sub(r"\\\n\s*", " ", README.read_text())
COMMANDS = [command for block in blocks() if block.path == README for command in block.commands]
KUBECTL = [command for command in COMMANDS if command.startswith("kubectl")] + re.findall(r"`(kubectl [^`]+)`", TEXT)


def test_there_are_commands() -> None:
    assert len(KUBECTL) > 15


def test_every_folder_that_is_applied_is_there() -> None:
    named = {found for command in KUBECTL for found in re.findall(r"-k (\S+)", command)}
    folders = {name.replace("NAME", overlay) for name in named for overlay in OVERLAYS}
    assert folders >= {f"k8s/overlays/{overlay}" for overlay in OVERLAYS}
    assert not [name for name in folders if not (ROOT / name / "kustomization.yaml").exists()]


def test_every_object_that_is_named_is_in_the_overlay_that_has_all(kubectl: str) -> None:
    ha = render("ha")
    known = {(str(one["kind"]).lower(), one["metadata"]["name"]) for one in ha.documents}
    known |= {("pod", f"{name}-0") for kind, name in known if kind == "statefulset"} | {("secret", "rookery")}
    named = re.findall(r"\b(rayservice|service|secret|cronjob|pvc)[ /](rookery[\w-]*)", "\n".join(KUBECTL))
    named += [("pod", name) for name in re.findall(r"exec (?:-i )?(\S+) --", "\n".join(KUBECTL))]
    assert named
    assert not set(named) - known


def test_every_label_selects_pods(rendering: Rendering) -> None:
    for command in KUBECTL:
        for key, value in re.findall(r"-l (\S+?)=(\S+)", command):
            assert [pod for pod in rendering.pods if pod.labels.get(key) == value], command


def test_every_patch_fits(rendering: Rendering) -> None:
    patches = [words[words.index("-p") + 1] for words in map(shlex.split, KUBECTL) if "--type" in words]
    assert patches
    for operation in [one for patch in patches for one in json.loads(patch)]:
        *parents, last = operation["path"].strip("/").split("/")
        found: Any = rendering.ray_service
        for part in parents:
            found = found[int(part) if isinstance(found, list) else part]
        assert operation["op"] == "add" and isinstance(found, dict) and last


def test_every_file_that_it_leads_to_is_there() -> None:
    assert not [name for name in re.findall(r"\]\((?!http)([^)#]+)", TEXT) if not (README.parent / Path(name)).exists()]
