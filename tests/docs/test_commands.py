"""Every command of the documents, run as it stands, one document after the other, on one service that they start.

The public Hub is a fake one over a real socket; port 8000 is a free one. `make` targets and `git clone` are not run:
they are what runs this, or take longer than a test may.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from deployments.haproxy import free_port
from serve.store.opening import EMBEDDED
from tests.docs.documents import ROOT, Block, blocks
from tests.fakes.hub.server import fake_hub
from tests.fakes.hub_uploads import User, accept_uploads
from tests.fakes.models import write_tiny_gpt2

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(600)]

_NOT_RUN = ("make ", "git clone ")


@dataclass(frozen=True)
class Reader:
    """Somebody who does what the documents say, in a folder of their own."""

    folder: Path
    environment: dict[str, str]
    port: int

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=500, check=False
        )

    def here(self, text: str) -> str:
        """`text` with the port that is free."""
        return text.replace(":8000", f":{self.port}").replace("--port 8000", f"--port {self.port}")


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    folder, port = tmp_path_factory.mktemp("reader"), free_port()
    (folder / "deployments").symlink_to(ROOT / "deployments")
    shutil.copyfile(ROOT / "deployments" / "archives" / "unit_seven.zip", folder / "another.zip")
    shutil.copytree(EMBEDDED["fledgling"], folder / "folder")
    with fake_hub() as hub, accept_uploads(hub, tmp_path_factory.mktemp("uploads")) as uploads:
        uploads.users["hf_you"] = User("you")
        hub.add("huggingtweets/solarmonke", write_tiny_gpt2(tmp_path_factory.mktemp("solarmonke"), seed=1))
        environment = {
            **os.environ,
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PYTHONPATH": str(ROOT),
            "ROOKERY_URL": f"http://127.0.0.1:{port}",
            "ROOKERY_HUB_ENDPOINT": hub.endpoint,
            "HF_TOKEN": "hf_you",
            "HF_HOME": str(folder / "hf"),
            "MPLBACKEND": "agg",
        }
        reader = Reader(folder, environment, port)
        yield reader
        reader.run("rookery", "down")


def _id(block: Block) -> str:
    return f"{block}-{block.language}"


@pytest.mark.parametrize("block", [block for block in blocks() if block.language in ("sh", "python")], ids=_id)
def test_a_document_says_what_works(reader: Reader, block: Block) -> None:
    if block.language == "python":
        is_hub_client = "HF_ENDPOINT" in block.text
        endpoint = f"http://127.0.0.1:{reader.port}" if is_hub_client else reader.environment["ROOKERY_HUB_ENDPOINT"]
        reader.environment["HF_ENDPOINT"] = endpoint
        done = reader.run(sys.executable, "-c", reader.here(block.text))
        assert done.returncode == 0, done.stderr
        return
    reader.environment["HF_ENDPOINT"] = reader.environment["ROOKERY_HUB_ENDPOINT"]
    commands = [command for command in block.commands if not command.startswith(_NOT_RUN)]
    if not commands:
        pytest.skip("make targets alone")
    done = reader.run("bash", "-exuo", "pipefail", "-c", reader.here("\n".join(commands)))
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
