"""What the command line shows to people: tables, progress bars, texts. Knows the server's JSON, no HTTP."""

from __future__ import annotations

import json
import re
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from deployments.client import JobView
from serve.types import JobStatus

COUNTS = ("downloaded", "retweets", "short", "kept")

_STATUS = {
    "ok": "enough to learn from",
    "warn_few": "little to learn from: the bot will repeat it",
    "too_few": "too little to learn from",
}
_NOT_LEARNT = {"retweets": "others' posts, passed on", "short": "fewer than 3 words of their own"}

# Texts come from archives and models; a terminal must not obey them.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


_LINE_ENDS = re.compile("[\x85\u2028\u2029]")
_FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)


def plain(text: str) -> str:
    """`text` without control characters other than tab and newline."""
    return _CONTROL.sub("", text)


def json_line(value: object) -> str:
    """JSON that is one line also for programs that end lines where Unicode says."""
    return _LINE_ENDS.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(value, ensure_ascii=False))


def as_bytes(count: int | None) -> str:
    """ "17.3 MB"."""
    if count is None:
        return "-"
    return f"{count / 1e6:,.1f} MB" if count >= 100_000 else f"{count / 1e3:,.1f} kB"


def as_date(seconds: int | None) -> str:
    """Local time, to the minute."""
    return "-" if seconds is None else datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")


# --- Tables -----------------------------------------------------------------------------------------------


def table(*columns: str, rows: Sequence[Sequence[object]], title: str | None = None) -> Table:
    """Columns whose name ends in a blank are numbers, to the right. Ids are never cut."""
    made = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        right = column.endswith(" ")
        made.add_column(column.strip(), justify="right" if right else "left", overflow="fold")
    for row in rows:
        made.add_row(*(Text(plain(str(cell))) for cell in row))
    return made


def counts_table(counts: Mapping[str, Mapping[str, int]]) -> Table:
    """How many posts of each person were taken, and why not the others."""
    return _counts_table((f"@{handle}", of) for handle, of in counts.items())


def _counts_table(rows: Iterable[tuple[str, Mapping[str, int]]]) -> Table:
    cells = [[name, *(f"{of.get(count, 0):,}" for count in COUNTS)] for name, of in rows]
    return table("handle", *(f"{count} " for count in COUNTS), rows=cells)


def show_preview(console: Console, report: Mapping[str, Any]) -> None:
    """What archives are, whether they are enough, what a bot would not learn from them and why, and some posts."""
    console.print(facts_table({"format": report["format"], "status": _STATUS.get(report["status"], report["status"])}))
    for warning in _warnings(report):
        console.print(Text(plain(warning), "yellow"), soft_wrap=True)
    alone = [(_owner(one), one) for one in report.get("archives", ())]
    console.print(_counts_table([*alone, ("together", report)] if alone else [(_owner(report), report)]))
    if left_out := _left_out(report):
        console.print(table("left out ", "because", rows=left_out))
    show_texts(console, "", report["samples"])


def _owner(report: Mapping[str, Any]) -> str:
    return f"@{report['handle'] or '?'}"


def _warnings(report: Mapping[str, Any]) -> list[str]:
    """Those of the whole, then those of each archive that is not alone."""
    each = [f"{_owner(one)}: {warning}" for one in report.get("archives", ()) for warning in one["warnings"]]
    return [*report["warnings"], *each]


def _left_out(report: Mapping[str, Any]) -> list[list[str]]:
    counts = {name: report[name] for name in _NOT_LEARNT} | dict(report["left_out"])
    reasons = {**_NOT_LEARNT, **report["reasons"]}
    return [[f"{count:,}", reasons[name]] for name, count in counts.items() if count]


def models_table(models: Sequence[Mapping[str, Any]]) -> Table:
    rows = [
        [model["id"], _kept(model), as_date(model.get("created")), as_bytes(model.get("bytes"))] for model in models
    ]
    return table("model", "kept posts ", "created", "size ", rows=rows)


def _kept(model: Mapping[str, Any]) -> str:
    """Of all whom it learnt from."""
    counts = model.get("counts") or {}
    return f"{sum(of.get('kept', 0) for of in counts.values()):,}" if counts else "-"


def model_facts(model: Mapping[str, Any], num_versions: int) -> Table:
    """What is known of a model, but for the counts of posts."""
    names = model.get("names") or {}
    whose = [f"{names[handle]} (@{handle})" if names.get(handle) else f"@{handle}" for handle in model["handles"]]
    return facts_table(
        {
            "model": model["id"],
            "learnt from": ", ".join(whose),
            "sample": model.get("sample"),
            "revision": model["revision"],
            "versions": num_versions,
            "base": model["base_model"],
            "made by": model["owned_by"],
            "created": as_date(model["created"]),
            "size": as_bytes(model["bytes"]),
            "parameters": f"{model['num_parameters']:,}" if model["num_parameters"] else None,
            "context": model["context_length"],
            "private": "yes" if model["private"] else None,
        }
    )


def residents_table(residents: Sequence[Mapping[str, Any]]) -> Table:
    rows = [
        [one["model"], one["tier"], as_bytes(one["bytes"]), one["leases"], f"{one['idle_s']:.0f} s", one["replica"]]
        for one in residents
    ]
    return table("model", "tier", "size ", "in use ", "idle ", "replica", rows=rows)


def jobs_table(jobs: Sequence[Mapping[str, Any]]) -> Table:
    rows = [
        [
            *(job["id"], job["status"], _whose(job), job["fine_tuned_model"] or "-", job.get("priority") or "-"),
            *(_as_wait(job.get("estimated_finish")), as_date(job["created_at"])),
        ]
        for job in jobs
    ]
    return table("job", "status", "handles", "model", "priority", "ready in ", "created", rows=rows)


def _as_wait(until: int | None) -> str:
    return "-" if until is None else _as_minutes(max(0.0, until - time.time()))


def _as_minutes(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02}"


def event_line(event: Mapping[str, Any]) -> Text:
    """One event of a job's history: when, how bad, what."""
    at = datetime.fromtimestamp(event["created_at"]).strftime("%H:%M:%S")
    level = {"error": "red", "warn": "yellow"}.get(event["level"], "")
    return Text.assemble((at, "dim"), "  ", (f"{event['level']:5}", level), "  ", plain(event["message"]))


def versions_table(versions: Sequence[Mapping[str, Any]]) -> Table:
    """Newest first, with a word on what each is for."""
    rows = [
        [
            *(one["revision"], as_date(one["created"]), as_bytes(one["bytes"])),
            *(_as_loss(one["losses"]), one["job_id"] or "-", _role(one)),
        ]
        for one in versions
    ]
    return table("revision", "created", "size ", "held-out loss ", "job", "", rows=rows)


def _as_loss(losses: Mapping[str, float]) -> str:
    loss = next((losses[name] for name in ("held_out_after", "valid_loss") if losses.get(name) is not None), None)
    return "-" if loss is None else f"{loss:.3f}"


def _role(version: Mapping[str, Any]) -> str:
    if version["is_main"]:
        return "answers now"
    return "" if version["step"] is None else f"checkpoint of step {version['step']:,}"


def show_run(console: Console, run: Mapping[str, Any]) -> None:
    """A run's name, where its data came from and went, its settings and results, and its examples."""
    console.print(Text(plain(run["name"]), "bold"))
    lineage = [["used", _type_and_id(one)] for one in run["inputs"]]
    lineage += [["made", _type_and_id(one)] for one in run["outputs"]]
    facts = [[name, value] for name, value in [*run["config"].items(), *run["summary"].items()] if _is_plain(value)]
    made = table("", "", rows=lineage + facts)
    made.show_header = False
    console.print(made)
    if examples := run["tables"].get("examples"):
        console.print(table(*examples["columns"], rows=examples["data"]))


def _type_and_id(artifact: Mapping[str, Any]) -> str:
    return f"{artifact['type']} {artifact['id']}"


def _is_plain(value: object) -> bool:
    return isinstance(value, str | int | float)


def _whose(job: Mapping[str, Any]) -> str:
    handles = [file["handle"] for file in job.get("training_files", []) if file.get("handle")]
    return " ".join(f"@{handle}" for handle in handles) or "-"


def facts_table(facts: Mapping[str, object]) -> Table:
    """Name and value, a line each; what is not known is left out."""
    made = table("", "", rows=[[name, value] for name, value in facts.items() if value not in (None, "")])
    made.show_header = False
    return made


# --- Texts ------------------------------------------------------------------------------------------------


def show_texts(console: Console, prompt: str, texts: Iterable[str]) -> None:
    """One text a line, the prompt set off in a terminal."""
    for text in texts:
        console.print(_as_text(prompt, text), soft_wrap=True)


def show_apart(console: Console, prompt: str, texts: Iterable[str]) -> None:
    """Texts with an empty line between."""
    for number, text in enumerate(texts):
        if number:
            console.print()
        console.print(_as_text(prompt, text), soft_wrap=True)


def show_stream(console: Console, prompt: str, pieces: Iterable[Mapping[str, Any]]) -> list[str]:
    """The same while they are written, from the pieces of a completion; the whole texts.

    Nothing is shown before the first piece: the request may yet be refused.
    """
    texts: list[str] = []
    is_over = True
    try:
        for index, text, is_over in _in_turn(pieces):
            if index == len(texts):
                texts.append("")
                if index:
                    console.print()
                console.print(Text(plain(prompt), "dim"), end="", soft_wrap=True)
            texts[index] += text
            console.print(Text(plain(text)), end="\n" if is_over else "", soft_wrap=True)
    finally:
        if not is_over:
            console.print()
    return texts


def _in_turn(pieces: Iterable[Mapping[str, Any]]) -> Iterator[tuple[int, str, bool]]:
    """Text after text: what comes of a later one waits for those before it. Which text, what comes, is it over."""
    turn = 0
    waiting: defaultdict[int, str] = defaultdict(str)
    over: set[int] = set()
    for piece in pieces:
        waiting[piece["index"]] += piece["text"]
        if piece["finish_reason"]:
            over.add(piece["index"])
        while turn in waiting:
            yield turn, waiting.pop(turn), turn in over
            if turn not in over:
                break
            turn += 1


def _as_text(prompt: str, text: str) -> Text:
    return Text.assemble((plain(prompt), "dim"), plain(text))


def show_card(console: Console, card: str) -> None:
    """Markdown, without the facts for programs in front of it. Links are shown as what they say alone."""
    from rich.markdown import Markdown  # which takes a quarter of the time of all our imports

    console.print(Markdown(plain(_FRONT_MATTER.sub("", card, count=1)), hyperlinks=False))


def show_result(console: Console, job: Mapping[str, Any]) -> None:
    """What a finished job has to show: counts, then samples."""
    result = job.get("result") or {}
    if counts := result.get("counts"):
        console.print(counts_table(counts))
    if line := validation_line(job):
        console.print(line)
    for sample in (result.get("samples") or [])[:5]:
        console.print(Text.assemble(("  · ", "dim"), plain(str(sample))), soft_wrap=True)


def validation_line(job: Mapping[str, Any]) -> str:
    """How well posts that were held out are foretold, before and after; empty where it is not known."""
    losses = (job.get("result") or {}).get("losses") or {}
    before, after = losses.get("held_out_before"), losses.get("held_out_after")
    if before is None or after is None:
        return ""
    return f"validation loss {before:.2f} before, {after:.2f} after (nats a token)"


# --- Progress ---------------------------------------------------------------------------------------------


class _Numbers(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(_numbers(task.fields["metrics"]))


class JobProgress:
    """A live bar for each job; where there is no terminal, a line at each new phase and quarter."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            TextColumn("{task.fields[phase]}", style="cyan", markup=False),
            BarColumn(bar_width=30),
            _Numbers(),
            console=console,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._told: dict[str, tuple[str, int]] = {}  # job id -> phase and quarter of its last line
        self._held_out: dict[str, float] = {}  # job id -> loss of held-out posts, told once an epoch

    def __enter__(self) -> JobProgress:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def update(self, view: JobView, title: str) -> None:
        """Shows where the job stands."""
        phase, job_id = _phase(view), view.job["id"]
        self._show_samples(view)
        metrics = self._with_held_out(job_id, view.metrics)
        total, done = metrics.get("total_steps"), metrics.get("step", 0)
        if not self._console.is_terminal:
            stage = phase, 4 * done // total if total else 0
            if self._told.get(job_id) != stage:
                self._told[job_id] = stage
                self._console.print(Text(f"{plain(title)} {phase} {_numbers(metrics)}".strip()))
            return
        if job_id not in self._tasks:
            self._tasks[job_id] = self._bars.add_task(plain(title), total=None, phase=phase, metrics={})
        if view.status is JobStatus.SUCCEEDED:
            total = done = total or 1
        self._bars.update(self._tasks[job_id], total=total, completed=done, phase=phase, metrics=metrics)

    def _show_samples(self, view: JobView) -> None:
        """What it writes as it learns; the last ones are shown with the result."""
        for event in view.events:
            numbers = event.get("data") or {}
            if numbers.get("samples") and numbers["step"] < numbers["total_steps"]:
                self._console.print(
                    Text(f"After {numbers['step']} of {numbers['total_steps']} steps it writes:", "dim")
                )
                for sample in numbers["samples"]:
                    self._console.print(Text.assemble(("  · ", "dim"), plain(str(sample))), soft_wrap=True)

    def _with_held_out(self, job_id: str, metrics: Mapping[str, Any]) -> Mapping[str, Any]:
        if metrics.get("valid_loss") is not None:
            self._held_out[job_id] = metrics["valid_loss"]
        return {**metrics, "valid_loss": self._held_out.get(job_id)} if metrics else metrics


class TransferProgress:
    """A live bar of a model on its way; where there is no terminal, a line at each new phase and quarter."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Progress(
            TextColumn("{task.description}", style="cyan", markup=False),
            BarColumn(bar_width=30),
            _Transferred(),
            TextColumn("{task.fields[file]}", style="dim", markup=False),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task: TaskID | None = None
        self._told: tuple[str, int] | None = None

    def __enter__(self) -> TransferProgress:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def pause(self) -> None:
        """Gives the terminal to another's bars, until the next `update`."""
        self._bars.stop()

    def update(self, phase: str, file: str, num_bytes: int, total_bytes: int) -> None:
        """Shows how far it is. `total_bytes` 0: nobody knows yet."""
        if not self._console.is_terminal:
            stage = phase, 4 * num_bytes // total_bytes if total_bytes else 0
            if self._told != stage:
                self._told = stage
                self._console.print(Text(f"{phase} {_transferred(num_bytes, total_bytes)}".strip()), soft_wrap=True)
            return
        self._bars.start()
        if self._task is None:
            self._task = self._bars.add_task(phase, total=None, file="")
        total = total_bytes or None
        self._bars.update(self._task, description=phase, total=total, completed=num_bytes, file=plain(file))


class _Transferred(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(_transferred(int(task.completed), int(task.total or 0)))


def _transferred(num_bytes: int, total_bytes: int) -> str:
    return f"{as_bytes(num_bytes)} of {as_bytes(total_bytes)}" if total_bytes else ""


def _phase(view: JobView) -> str:
    """`running` says little; whether there were steps yet, and how many are left, says more."""
    if view.status is not JobStatus.RUNNING:
        return view.status.value
    if not view.metrics:
        return "preparing"
    return "training" if view.metrics["step"] < view.metrics["total_steps"] else "publishing"


def _numbers(metrics: Mapping[str, Any]) -> str:
    """`12/80  loss 4.02  held-out 4.31  0:41 left`; empty before the first step."""
    if not metrics.get("step"):
        return ""
    told = [f"{metrics['step']}/{metrics['total_steps']}"]
    for name, word in (("train_loss", "loss"), ("valid_loss", "held-out")):
        if metrics.get(name) is not None:
            told.append(f"{word} {metrics[name]:.2f}")
    if metrics["step"] < metrics["total_steps"] and metrics.get("seconds_left") is not None:
        told.append(f"{_as_minutes(metrics['seconds_left'])} left")
    return "  ".join(told)
