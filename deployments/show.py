"""What the command line shows to people: tables and texts. Knows the server's JSON, no HTTP."""

from __future__ import annotations

import json
import re
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

COUNTS = ("downloaded", "retweets", "short", "kept")

_STATUS = {
    "ok": "enough to learn from",
    "warn_few": "little to learn from: the bot will repeat it",
    "too_few": "too little to learn from",
}
_NOT_LEARNT = {"retweets": "others' posts, passed on", "short": "fewer than 3 words of their own"}

# Texts come from archives and models; a terminal must not obey them. What turns the direction of writing and has no end
# of its own (U+202A-202E) turns what follows, too; the isolates that came after those end with the text.
_UNSAFE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]")
_UNSAFE_IN_JSON = re.compile(r"[\x7f-\x9f\u2028-\u202e\ud800-\udfff]")  # it escapes those below U+0020 itself
_IDS = frozenset({"handle", "job", "model", "revision"})  # columns that people copy from
_LEAST_WIDTH = 16  # of a date, or of the longest handle
_GAP = 2  # between columns
_FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)


def plain(text: str) -> str:
    """`text` without what a terminal obeys, other than tab and newline."""
    return _UNSAFE.sub("", text)


def json_text(value: object, *, indent: int | None = None) -> str:
    """JSON that no terminal obeys, UTF-8 can hold, and nobody finds ends of lines in; without `indent` one line."""
    made = json.dumps(value, indent=indent, ensure_ascii=False)
    return _UNSAFE_IN_JSON.sub(lambda found: f"\\u{ord(found[0]):04x}", made)


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
    """Columns whose name ends in a blank are numbers, to the right. Ids are never cut; see `show_table`."""
    made = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, _GAP, 0, 0))
    for number, column in enumerate(columns):
        cells = [plain(str(row[number])) for row in rows]
        width = max(cell_len(line) for cell in [column.strip(), *cells] for line in cell.split("\n"))
        made.add_column(
            Text(plain(column.strip())),
            justify="right" if column.endswith(" ") else "left",
            overflow="fold",
            no_wrap=column in _IDS,
            min_width=width if column in _IDS else min(width, _LEAST_WIDTH),
        )
    for row in rows:
        made.add_row(*(Text(plain(str(cell))) for cell in row))
    return made


def show_table(console: Console, made: Table) -> None:
    """Runs over the edge where the ids have no room: a terminal folds such a line and still copies them whole."""
    least = sum((column.min_width or 0) + _GAP for column in made.columns) - _GAP
    made.width = least if least > console.width else None
    console.print(made, crop=False)


def _without_usual(columns: Sequence[str], rows: list[list[object]], usual: Mapping[str, object]) -> Table:
    """A table without those of the columns in `usual` that have nothing else to say."""
    kept = [i for i, name in enumerate(columns) if name not in usual or any(row[i] != usual[name] for row in rows)]
    return table(*(columns[i] for i in kept), rows=[[row[i] for i in kept] for row in rows])


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
    show_list(console, report["samples"])


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


def show_ids(console: Console, listed: Iterable[Mapping[str, Any]]) -> None:
    """One a line, for other programs."""
    for one in listed:
        console.print(Text(plain(one["id"])), soft_wrap=True)


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
            *(job["id"], job["status"], _whose(job), job["fine_tuned_model"] or "-", job.get("priority") or "normal"),
            *(_as_wait(job.get("estimated_finish")), as_date(job["created_at"])),
        ]
        for job in jobs
    ]
    columns = ("job", "status", "handles", "model", "priority", "ready in ", "created")
    return _without_usual(columns, rows, {"priority": "normal", "ready in ": "-"})


def keys_table(keys: Sequence[Mapping[str, Any]]) -> Table:
    rows: list[list[object]] = [
        [
            *(key["id"], key["name"] or "-", key["tenant"], ",".join(key["scopes"]), _state_of_key(key)),
            *(as_date(key["created_at"]), as_date(key["last_used_at"])),
        ]
        for key in keys
    ]
    return table("key", "name", "tenant", "scopes", "state", "created", "last used", rows=rows)


def _state_of_key(key: Mapping[str, Any]) -> str:
    if key["revoked_at"] is not None:
        return "revoked"
    ends = key["expires_at"]
    if ends is None:
        return "good"
    return "expired" if ends <= time.time() else f"until {as_date(ends)}"


def _as_wait(until: int | None) -> str:
    return "-" if until is None else as_minutes(max(0.0, until - time.time()))


def as_minutes(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02}"


def event_line(event: Mapping[str, Any]) -> Text:
    """One event of a job's history: when, how bad, what."""
    at = datetime.fromtimestamp(event["created_at"]).strftime("%H:%M:%S")
    level = {"error": "red", "warn": "yellow"}.get(event["level"], "")
    return Text.assemble((at, "dim"), "  ", (f"{plain(event['level']):5}", level), "  ", plain(event["message"]))


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
        show_table(console, table(*map(str, examples["columns"]), rows=examples["data"]))


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


def show_list(console: Console, texts: Iterable[object]) -> None:
    """Short texts, a dot before each."""
    for text in texts:
        console.print(Text.assemble(("  · ", "dim"), plain(str(text)).replace("\n", "\n    ")), soft_wrap=True)


def show_texts(console: Console, prompt: str, texts: Iterable[str]) -> None:
    """Texts with an empty line between, the prompt set off in a terminal."""
    for number, text in enumerate(texts):
        if number:
            console.print()
        console.print(Text.assemble((plain(prompt), "dim"), plain(text)), soft_wrap=True)


def show_stream(console: Console, prompt: str, pieces: Iterable[Mapping[str, Any]], texts: list[str]) -> None:
    """The same while they are written, from the pieces of a completion; `texts` gets them, as far as they come.

    Nothing is shown before the first piece: the request may yet be refused.
    """
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
    show_list(console, (result.get("samples") or [])[:5])


def validation_line(job: Mapping[str, Any]) -> str:
    """How well posts that were held out are foretold, before and after; empty where it is not known."""
    losses = (job.get("result") or {}).get("losses") or {}
    before, after = losses.get("held_out_before"), losses.get("held_out_after")
    if before is None or after is None:
        return ""
    return f"validation loss {before:.2f} before, {after:.2f} after (nats a token)"
