"""The verbs of the service itself: start it, end it, see how it is, find out what is missing."""

from __future__ import annotations

import sys
import threading
import time
import webbrowser
from dataclasses import asdict, replace
from enum import StrEnum
from itertools import chain
from typing import Annotated, Any

import psutil  # type: ignore[import-untyped]
import typer

from deployments import running, show
from deployments.checklist import Checklist
from deployments.cli.app import COMPLETE, SERVICE, Exit, command
from deployments.cli.background import DidNotStart, start
from deployments.cli.options import AsJson, Data, console, print_json, remark, remarks, settings_of, tell
from deployments.cli.terminal import is_tty
from deployments.client import Client, ServerUnreachable
from serve.errors import Conflict

_Port = Annotated[int, typer.Option(min=1, max=65_535, help="The port of the HTTP API and the page.")]
_StatusUrl = Annotated[
    str | None,
    typer.Option("--url", envvar="ROOKERY_URL", help="A server elsewhere. Default: the one over the data folder."),
]


@command(
    SERVICE,
    """
    rookery up
    rookery up --detach && rookery status
    rookery up --port 9000 --data ~/bots --generators 2
    """,
)
def up(
    port: _Port = 8000,
    data: Data = None,
    base: Annotated[str | None, typer.Option(help="The base model of new bots.")] = None,
    generators: Annotated[int, typer.Option(min=1, help="Replicas that write text; each holds its own models.")] = 1,
    gateways: Annotated[int, typer.Option(min=1, help="Replicas that speak HTTP.")] = 1,
    detach: Annotated[
        bool,
        typer.Option(
            "--detach",
            "-d",
            help=f"Return when it is ready. What it would show here goes to DATA/{running.OUTPUT}; what its processes "
            f"log, to DATA/{running.EVENTS}.",
        ),
    ] = False,
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Do not open the page in a browser.")] = False,
    verbose: Annotated[
        bool,
        typer.Option("--verbose", help=f"Show what all processes log, instead of keeping it in DATA/{running.EVENTS}."),
    ] = False,
) -> None:
    """Start the service and stay with it; Ctrl-C ends it. Where one runs already, say so."""
    from deployments.up import Plan, find_service, main

    settings = settings_of(data)
    if base is not None:
        settings = replace(settings, base=base)
    plan = Plan(port, generators, gateways, verbose=verbose)
    show_page = _show_page if is_tty(sys.stdout) and not no_browser else None
    if not detach:
        return main(plan, settings, remarks, show_page)
    arguments = [f"--port={port}", f"--data={settings.data}", f"--base={settings.base}"]
    arguments += [f"--generators={generators}", f"--gateways={gateways}"]
    arguments += ["--verbose"] * verbose
    try:
        if find_service(plan.url, settings.data, remarks, waits=True):
            return
        try:
            url = start(arguments, settings.data, Checklist(remarks))
        except DidNotStart:
            if running.find(settings.data) and find_service(plan.url, settings.data, remarks, waits=True):
                return  # another `up` was quicker
            raise
    except KeyboardInterrupt:
        remark("\nIt goes on starting. See it with: rookery status")
        raise typer.Exit(Exit.INTERRUPTED) from None
    typer.echo(f"ready {url}")
    remark("It runs in the background. End it with: rookery down")
    if show_page is not None:
        show_page(url)


def _show_page(url: str) -> None:
    threading.Thread(target=webbrowser.open, args=[url], daemon=True).start()  # some stay until they are closed


@command(
    SERVICE,
    """
    rookery down
    rookery down --data ~/bots --timeout 120
    """,
)
def down(
    data: Data = None,
    timeout: Annotated[float, typer.Option(min=1, help="How many seconds to wait for its end.")] = 60,
    as_json: AsJson = False,
) -> None:
    """End the service over the data folder. A training that runs goes on after the next start."""
    folder = settings_of(data).data
    found = running.find(folder)
    if found is None:
        if as_json:
            return print_json({"stopped": False, "left": []})
        return tell(f"Nothing runs over {folder.absolute()}.")
    remark(f"Ending the service at {found.url} (process {found.pid}) ...")
    try:
        left = running.stop(found, timeout)
    except psutil.AccessDenied as exc:
        raise Conflict(f"Process {found.pid} is another user's; end it as that user.") from exc
    if as_json:
        print_json({"stopped": not left, **asdict(found), "left": left})
    elif not left:
        tell(f"The service at {found.url} has ended.")
    if left:
        raise Conflict(f"After {timeout:g} s there is still: {', '.join(left)}. Wait, or end them with: kill -9 PID")


@command(
    SERVICE,
    """
    rookery status
    rookery status --json
    rookery status --url http://10.0.0.5:8000
    """,
)
def status(data: Data = None, url: _StatusUrl = None, as_json: AsJson = False) -> None:
    """Tell whether the service runs, where, and how it is; ends with 5 when none does."""
    settings = settings_of(data)
    found = None if url else running.find(settings.data)
    at = url or (found.url if found else settings.url)
    facts: dict[str, Any] = {"up": found is not None, "url": at, "pid": found.pid if found else None}
    facts |= {"uptime_s": round(time.time() - found.started_at, 1) if found else None, "ready": False}
    try:
        with Client(at) as client:
            facts |= {**client.status(), "up": True}
            is_stranger, has_key = "models" not in facts, bool(client.key)
        trouble = None
    except ServerUnreachable as error:
        trouble = error
    if as_json:
        print_json(facts)
    elif facts["up"]:
        console.print(show.facts_table(_as_rows(facts)))
    if trouble is None and is_stranger:
        why = "does not take the key in ROOKERY_API_KEY" if has_key else "needs a key (ROOKERY_API_KEY) to tell more"
        remark(f"{at} {why}.")
    if found and trouble:
        trouble = ServerUnreachable("It is starting, or does not answer; see its log.")
    if trouble:
        raise trouble


@command(
    SERVICE,
    """
    rookery doctor
    rookery doctor --port 9000 --data ~/bots
    rookery doctor --json | jq '.checks[] | select(.mark != "ok")'
    """,
)
def doctor(port: _Port = 8000, data: Data = None, as_json: AsJson = False) -> None:
    """Look for what is amiss on this machine, and say what to do; ends with 1 when `rookery up` could not start."""
    from deployments.cli.doctor import examine, read_settings

    settings, first = read_settings(data)
    findings, checklist = [], Checklist(console)
    for finding in chain([first], examine(settings, port)):
        findings.append(finding)
        if not as_json:
            checklist.line(finding.mark, finding.name, "\n".join(filter(None, [finding.said, finding.advice])))
    is_ok = all(finding.mark != "problem" for finding in findings)
    if as_json:
        print_json({"ok": is_ok, "checks": [asdict(finding) for finding in findings]})
    if not is_ok:
        raise typer.Exit(Exit.REFUSED)


class _Shell(StrEnum):
    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"


@command(
    SERVICE,
    """
    source <(rookery completion bash)
    rookery completion bash >> ~/.bashrc
    rookery completion zsh > ~/.zfunc/_rookery
    rookery completion fish > ~/.config/fish/completions/rookery.fish
    """,
)
def completion(shell: Annotated[_Shell, typer.Argument(metavar="SHELL", help="bash, zsh or fish.")]) -> None:
    """Print the script by which a shell completes verbs, options, models and jobs with the Tab key."""
    from typer.completion import get_completion_script  # type: ignore[attr-defined]

    typer.echo(get_completion_script(prog_name="rookery", complete_var=COMPLETE, shell=shell.value))


def _as_rows(facts: dict[str, Any]) -> dict[str, object]:
    def told(*names: str) -> bool:
        return all(facts.get(name) is not None for name in names)

    jobs = [f"{count:,} {state}" for state, count in (facts.get("jobs") or {}).items() if count]
    memory = f"models: {facts['resident_models']:,}" if told("resident_models") else None
    if memory and told("used_bytes", "budget_bytes"):
        memory += f", {show.as_bytes(facts['used_bytes'])} of {show.as_bytes(facts['budget_bytes'])}"
    texts = f"{facts['running']:,} being written, {facts['queued']:,} waiting" if told("running", "queued") else None
    return {
        "address": facts["url"],
        "state": "ready" if facts["ready"] else "starting",
        "process": facts["pid"],
        "up for": None if facts["uptime_s"] is None else _as_duration(facts["uptime_s"]),
        "version": facts.get("version"),
        "base model": facts.get("base_model"),
        "models": f"{facts['models']:,}" if told("models") else None,
        "in memory": memory,
        "texts": texts,
        "replicas": facts.get("replicas"),
        "jobs": ", ".join(jobs) or ("none" if "jobs" in facts else None),
        "Hub": None if "hub" not in facts else "on" if facts["hub"]["enabled"] else "off",
    }


def _as_duration(seconds: float) -> str:
    minutes, hours, days = int(seconds // 60), int(seconds // 3600), int(seconds // 86_400)
    if days:
        return f"{days} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min {seconds % 60:.0f} s" if minutes else f"{seconds:.0f} s"
