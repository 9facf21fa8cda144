"""The whole of Rookery in a minute or two: starts the service, trains three bots, lets each one speak.

The archives are those of three invented characters. What it makes stays in the data folder. In a terminal it goes
on serving until Ctrl-C; elsewhere, or with --exit, it stops what it started.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from deployments import show
from deployments.client import Client, Json
from deployments.haproxy import free_port
from deployments.progress import JobProgress
from serve.errors import RookeryError, StoreUnavailable, TrainingFailed
from serve.settings import BadSetting, Settings
from serve.types import JobStatus

ARCHIVES = Path(__file__).parent / "archives"
HANDLES = ("capt_barnacle", "grandma_ines", "unit_seven")
PROMPT = "My dream is"
NUM_TEXTS = 3
SEED = 0

_START_TIMEOUT_S = 300.0
_STOP_TIMEOUT_S = 60.0
_POLL_S = 0.5


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demo; the exit code."""
    options = _parse(arguments)
    console = Console(width=None if sys.stdout.isatty() else 240, highlight=False)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C, so the service ends too
    try:
        port = options.port if _is_free(options.port) else free_port()
        data: Path = options.data or Settings.from_env().data
        with _service(port, data) as process, Client(f"http://127.0.0.1:{port}") as client:
            _show_demo(console, client, process, data)
            if console.is_terminal and not options.exit:
                console.print("\nThe service goes on. Ctrl-C ends it.")
                return process.wait()
    except KeyboardInterrupt:
        return 130
    except (RookeryError, BadSetting) as error:
        print(f"demo: {error}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m deployments.demo", description="Three bots from three archives.")
    parser.add_argument("--port", type=int, default=8000, help="if it is taken, another one is used")
    parser.add_argument("--data", type=Path, help="where models, uploads and jobs are kept")
    parser.add_argument("--exit", action="store_true", help="stop the service at the end, in a terminal too")
    return parser.parse_args(arguments)


def _show_demo(console: Console, client: Client, process: subprocess.Popen[bytes], data: Path) -> None:
    started = time.monotonic()
    console.print(f"Starting the service; its log is {_log_of(data)}", markup=False, soft_wrap=True)
    _wait_until_ready(client, process, _log_of(data))
    console.print(f"{client.url} is ready after {time.monotonic() - started:.0f} s\n", markup=False)
    base = Settings.from_env().base
    console.print(f"{base}, which has learnt from nobody yet:", style="bold", markup=False)
    _speak(console, client, base)
    jobs = _train(console, client, started)
    console.print("What the bots have learnt from:", style="bold")
    console.print(show.counts_table({handle: job["result"]["counts"][handle] for handle, job in jobs.items()}))
    console.print("\nGo on with:", style="bold")
    console.print(_next_steps(client.url, data, jobs[HANDLES[0]]["fine_tuned_model"]), markup=False, soft_wrap=True)


def _train(console: Console, client: Client, started: float) -> dict[str, Json]:
    """Trains all bots, each of which speaks as soon as it can; their finished jobs by handle."""
    jobs = {handle: client.create_bot([ARCHIVES / f"{handle}.zip"], [handle], {"seed": SEED}) for handle in HANDLES}
    finished: dict[str, Json] = {}
    with JobProgress(console) as progress:
        while len(finished) < len(jobs):
            for handle in [handle for handle in jobs if handle not in finished]:
                view = client.view_job(jobs[handle]["id"])
                progress.update(view, f"@{handle}")
                if view.status.is_final:
                    finished[handle] = _require_success(view.job)
                    model, after_s = view.job["fine_tuned_model"], time.monotonic() - started
                    console.print(f"{model} answers after {after_s:.0f} s:", style="bold", markup=False)
                    _speak(console, client, model)
                    console.print(show.validation_line(view.job) + "\n", style="dim")
            time.sleep(_POLL_S)
    return {handle: finished[handle] for handle in HANDLES}


def _require_success(job: Json) -> Json:
    if job["status"] != JobStatus.SUCCEEDED:
        raise TrainingFailed(
            f"Job {job['id']} {job['status']}: {(job['error'] or {}).get('message', 'no reason given')}"
        )
    return job


def _speak(console: Console, client: Client, model: str) -> None:
    body = {
        "model": model,
        "prompt": PROMPT,
        "n": NUM_TEXTS,
        "max_tokens": 60,
        "seed": SEED,
        "temperature": 0.8,
        "add_bos": True,
    }
    texts = [choice["text"] for choice in client.complete(body)["choices"]]
    show.show_texts(console, PROMPT, texts)


def _next_steps(url: str, data: Path, model: str) -> str:
    rookery = os.path.relpath(Path(sys.executable).parent / "rookery")
    return f"""\
  {url}   # the page, in a browser

  {rookery} up --data {data}   # where the service has been stopped

  {rookery} generate {model} "{PROMPT}" -n 5 --url {url}

  curl -s {url}/v1/completions -H 'content-type: application/json' \\
    -d '{{"model": "{model}", "prompt": "{PROMPT}", "max_tokens": 60, "add_bos": true}}'

  from huggingface_hub import InferenceClient
  bot = InferenceClient(base_url="{url}/models/{model}")
  print(bot.text_generation("{PROMPT}", max_new_tokens=60))"""


# --- The service ------------------------------------------------------------------------------------------


@contextmanager
def _service(port: int, data: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`rookery up` as a child of this process; stopped when the block ends."""
    data.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "deployments.cli", "up", f"--port={port}", f"--data={data}", "--no-browser"]
    with _log_of(data).open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _log_of(data: Path) -> Path:
    return data / "demo.log"


def _wait_until_ready(client: Client, process: subprocess.Popen[bytes], log: Path) -> None:
    """Raises: StoreUnavailable with the end of the service's log."""
    deadline = time.monotonic() + _START_TIMEOUT_S
    while not client.is_ready():
        if process.poll() is not None or time.monotonic() > deadline:
            said = show.plain(log.read_text(errors="replace"))[-2000:]
            raise StoreUnavailable(f"The service did not start. The end of its log:\n{said}")
        time.sleep(_POLL_S)


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


if __name__ == "__main__":
    sys.exit(main())
