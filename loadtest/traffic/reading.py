"""Plans between TOML and the dataclasses of `plan`: reading them, and writing them down beside results.

`[arrivals]`, `[models]` and `[requests]` at the top are what flows have in common; each `[[flow]]` says what it has of
its own. A file without a flow has one, called like the plan. It knows types and spelling; values are `limits`'.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar, get_args

from loadtest.checks import Check, Unfit, number, one_of, text, truth, whole
from loadtest.traffic.limits import check
from loadtest.traffic.plan import (
    Api,
    Arrivals,
    BadPlan,
    Flow,
    Lengths,
    Models,
    Plan,
    Popularity,
    Process,
    Requests,
    Training,
)

PLANS = Path(__file__).parents[1] / "plans"

Part = TypeVar("Part", Arrivals, Models, Requests, Training)


def plan_names() -> list[str]:
    """The plans that come with the package."""
    return sorted(path.stem for path in PLANS.glob("*.toml"))


def read_plan(name_or_path: str) -> Plan:
    """A plan that comes with the package, by its name, or that of a file.

    Raises: BadPlan
    """
    named = PLANS / f"{name_or_path}.toml"
    path = named if name_or_path in plan_names() else Path(name_or_path)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as exc:
        names = ", ".join(plan_names())
        raise BadPlan(f"there is no plan {name_or_path!r}: name one of {names}, or a TOML file") from exc
    except OSError as exc:
        raise BadPlan(f"{path}: cannot be read: {exc.strerror}") from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise BadPlan(f"{path}: not TOML: {exc}") from exc
    return plan_of(table, source=str(path), name=path.stem, folder=path.parent)


def plan_of(table: Mapping[str, Any], *, source: str, name: str = "plan", folder: Path | None = None) -> Plan:
    """The plan that a mapping spells, as TOML or `as_mapping` does. Traces are looked for in `folder`.

    Raises: BadPlan naming `source`.
    """
    return check(_Reader(source, folder or Path()).plan(table, name), source)


def as_mapping(plan: Plan) -> dict[str, Any]:
    """Plain values that JSON can hold, and from which `plan_of` makes the same plan. API keys are left out."""
    own = {name: getattr(plan, name) for name in ("name", *_PLAN)}
    return own | {"training": asdict(plan.training), "flow": [_flow_as_mapping(flow) for flow in plan.flows]}


def _flow_as_mapping(flow: Flow) -> dict[str, Any]:
    requests = _present(asdict(flow.requests)) | {
        "choices": {str(n): weight for n, weight in flow.requests.choices.items()},
        "prompt_tokens": _spelled(flow.requests.prompt_tokens),
        "output_tokens": _spelled(flow.requests.output_tokens),
    }
    arrivals = _present(asdict(flow.arrivals))
    if flow.arrivals.trace is not None:
        arrivals["trace"] = str(flow.arrivals.trace)
    own = {name: getattr(flow, name) for name in ("name", "begins_s", "ends_s")}
    return _present(own) | {"arrivals": arrivals, "models": _present(asdict(flow.models)), "requests": requests}


def _present(table: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in table.items() if value is not None}  # neither TOML nor `plan_of` knows null


def _spelled(lengths: Lengths) -> str | list[int]:
    return "tweets" if lengths.like_tweets else [lengths.least, lengths.most]


def _merged(defaults: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """What a flow says, and of the defaults what that does not replace: a rate also replaces a `times_capacity`."""
    replaced = {_MULTIPLE_OF[key] for key in own if key in _MULTIPLE_OF}
    return {key: value for key, value in defaults.items() if key not in replaced} | dict(own)


_MULTIPLE_OF = {"rate": "times_capacity", "count": "times_fit"}


def _lengths(value: Any) -> Lengths:
    if value == "tweets":
        return Lengths()
    if isinstance(value, int) and not isinstance(value, bool):
        return Lengths(like_tweets=False, least=value, most=value)
    match value:
        case [int(least), int(most)] if not isinstance(least, bool) and not isinstance(most, bool):
            return Lengths(like_tweets=False, least=least, most=most)
    raise Unfit('"tweets", a number of tokens, or two: [least, most]')


def _choices(value: Any) -> dict[int, float]:
    try:
        return {int(n): number(weight) for n, weight in value.items()}
    except (AttributeError, ValueError, Unfit):
        raise Unfit("a table from numbers of texts to their weights, such as { 1 = 0.9, 4 = 0.1 }") from None


_PLAN: Mapping[str, Check] = {
    "about": text,
    "seed": whole,
    "duration_s": number,
    "warmup_s": number,
    "timeout_s": number,
}
_FLOW: Mapping[str, Check] = {"begins_s": number, "ends_s": number, "key": text}
_BY_TYPE: Mapping[str, Check] = {
    "float": number,
    "float | None": number,
    "int": whole,
    "bool": truth,
    "Lengths": _lengths,
    "Mapping[int, float]": _choices,
    "Path | None": text,
    "Process": one_of(get_args(Process)),
    "Popularity": one_of(get_args(Popularity)),
    "Api": one_of(get_args(Api)),
}


class _Reader:
    """Tables of one source -> a plan."""

    def __init__(self, source: str, folder: Path) -> None:
        self._source = source
        self._folder = folder

    def plan(self, table: Mapping[str, Any], name: str) -> Plan:
        defaults = {part: self._table(table, part, "") for part in ("arrivals", "models", "requests")}
        own = {key: value for key, value in table.items() if key not in (*defaults, "training", "flow")}
        values = self._values(own, {"name": text, **_PLAN}, "", more=(*defaults, "training", "flow"))
        values = {"name": name, "about": ""} | values
        flows = table.get("flow", [{"name": values["name"]}])
        if not isinstance(flows, list) or not all(isinstance(flow, dict) for flow in flows):
            raise self._bad("flow", flows, "a list of tables, each written [[flow]]")
        training = self._part(Training, self._table(table, "training", ""), "training.")
        return Plan(flows=tuple(self._flow(flow, defaults) for flow in flows), training=training, **values)

    def _flow(self, table: Mapping[str, Any], defaults: Mapping[str, Mapping[str, Any]]) -> Flow:
        where = f"flow {table.get('name', '')!r}: "
        own = {key: value for key, value in table.items() if key not in defaults}
        values = self._values(own, {"name": text, **_FLOW}, where, more=defaults)
        if "name" not in values:
            raise BadPlan(f"{self._source}: a [[flow]] has no name: give it one")
        merged = {part: _merged(defaults[part], self._table(table, part, where)) for part in defaults}
        return Flow(
            arrivals=self._part(Arrivals, merged["arrivals"], f"{where}arrivals."),
            models=self._part(Models, merged["models"], f"{where}models."),
            requests=self._part(Requests, merged["requests"], f"{where}requests."),
            **values,
        )

    def _part(self, part: type[Part], table: Mapping[str, Any], where: str) -> Part:
        values = self._values(table, {field.name: _BY_TYPE[str(field.type)] for field in fields(part)}, where)
        if "trace" in values:
            values["trace"] = (self._folder / values["trace"]).absolute()
        return part(**values)

    def _values(
        self, table: Mapping[str, Any], known: Mapping[str, Check], where: str, more: Iterable[str] = ()
    ) -> dict[str, Any]:
        values = {}
        for key, value in table.items():
            if key not in known:
                raise BadPlan(f"{self._source}: {where}{key} is not known: it takes {', '.join([*known, *more])}")
            try:
                values[key] = known[key](value)
            except Unfit as exc:
                raise self._bad(where + key, value, str(exc)) from None
        return values

    def _table(self, table: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
        part = table.get(key, {})
        if not isinstance(part, Mapping):
            raise self._bad(where + key, part, f"a table, written [{key}]")
        return part

    def _bad(self, key: str, value: Any, allowed: str) -> BadPlan:
        return BadPlan(f"{self._source}: {key} = {value!r}: must be {allowed}")
