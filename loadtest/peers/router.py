"""llama.cpp's `llama-server` in its router mode: one address for all models, a process each for those in memory.

The router starts a process for a model when it is asked for, ends the one that was used longest ago when there are too
many, and lets requests wait while all are busy. Built by `loadtest.peers.llamacpp`.
"""

from __future__ import annotations

from pathlib import Path

from loadtest.client.target import Target
from loadtest.peers.fleet import Fleet
from loadtest.peers.llamacpp import CONTEXT, build_server
from loadtest.peers.peer import Process, Started, cores
from loadtest.server import free_port

SLOTS = 8  # texts that a model's process writes at once: all clients may want the same model
_LOAD_MARK = "spawning server instance with name="  # the router's line for a load


class LlamaRouter(Started):
    """A peer. Started anew for other models: the best number of threads depends on them."""

    name = "llamacpp"
    about = "llama-server of llama.cpp, router mode"
    keeps_limit = True
    start_s = 1.0
    restarts = True

    def __init__(self, scratch: Path, cache: Path) -> None:
        self._scratch = scratch
        self._cache = cache
        self._log = scratch / "llamacpp.log"

    def start(self, fleet: Fleet, memory: int) -> Target:
        binary = build_server(self._cache)
        preset = self._scratch / "models.ini"
        preset.write_text(preset_of(fleet))
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        self._process = Process(command(binary, preset, port, memory, threads_for(fleet)), self._log)
        self._process.wait_answering(f"{url}/health")
        return Target(url, self.name)

    def num_loads(self) -> int:
        return self._log.read_text(errors="replace").count(_LOAD_MARK)


def threads_for(fleet: Fleet) -> int:
    """Of a model's process: all cores where it is the only one; else one, as two times two on two cores wait."""
    return cores() if len(fleet.ids) == 1 else 1


def preset_of(fleet: Fleet) -> str:
    """An INI file with a section a model."""
    sections = [f"[{model_id}]\nmodel = {fleet.gguf(model_id)}\n" for model_id in fleet.ids]
    return "version = 1\n\n" + "\n".join(sections)


def command(binary: Path, preset: Path, port: int, memory: int, threads: int) -> list[str]:
    return [
        str(binary), "--port", str(port), "--models-preset", str(preset), "--models-max", str(memory),
        "--threads", str(threads), "--parallel", str(SLOTS), "--ctx-size", str(SLOTS * CONTEXT),
        "-ub", "128",  # no more than a step can have, else it keeps 100 MB for logits of 512 rows
        "--cache-ram", "0",  # no prompt comes twice
        "--samplers", "top_p;temperature", "--ignore-eos",  # as for everyone
        "--no-webui", "--no-warmup", "--offline",
    ]  # fmt: skip
