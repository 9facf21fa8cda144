"""`transformers serve` as a peer, through its chat completions.

Its completions end a stream without the mark by which OpenAI's clients know that it is over. The models' chat template
is the text itself, so the prompt is that of the others; and it samples as they do because the models' own settings say
top-k 0, where it would take 50. It has no limit on models in memory, only a time after which an idle one is dropped; so
what it takes is reported beside what it does.
"""

from __future__ import annotations

import sys
from pathlib import Path

from loadtest.client.target import Target
from loadtest.peers.fleet import Fleet
from loadtest.peers.peer import PeerUnavailableError, Process, Started
from loadtest.server import free_port

_LOAD_MARK = "Loading "  # of its line for each model that it loads; what follows is the id
_MAIN = "from transformers.cli.transformers import main; main()"


class TransformersServe(Started):
    """A peer. `--continuous-batching` is left out: it serves one model at a time, and stops at each change of model."""

    name = "transformers"
    about = "`transformers serve`"
    keeps_limit = False
    start_s = 7.0
    restarts = False

    def __init__(self, scratch: Path) -> None:
        self._log = scratch / "transformers.log"

    def start(self, fleet: Fleet, memory: int) -> Target:
        from transformers.utils.import_utils import is_serve_available

        if not is_serve_available():
            raise PeerUnavailableError("transformers serve wants: pip install 'transformers[serving]'")
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        self._process = Process(
            [
                sys.executable, "-c", _MAIN, "serve", "--device", "cpu", "--dtype", "bfloat16",
                "--host", "127.0.0.1", "--port", str(port),
            ],
            self._log,
            environ={"HF_HUB_OFFLINE": "1"},
            folder=fleet.models,  # so that a model's id is the path of its folder
        )  # fmt: skip
        self._process.wait_answering(f"{url}/health")
        return Target(url, self.name, api="chat")

    def num_loads(self) -> int:
        lines = self._log.read_text(errors="replace").splitlines()
        return sum(_LOAD_MARK in line and line.endswith("@main") for line in lines)
