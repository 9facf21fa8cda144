"""What a replica's work costs: steps, loads, requests. Measured, fitted by `calibrate`, or estimated; each says which.

All times are seconds of the replica. It knows nothing of traffic, and holds no state.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


class BadCosts(ValueError):
    """Costs that cannot be used; the message names the file or the preset and what is wrong."""


@dataclass(frozen=True, slots=True)
class StepCosts:
    """A step reads the weights of each distinct model once and computes a token for each row.

    Rows are cheap while reading dominates, and cost more beyond: `per_row_s` for the first `cheap_rows` of a step.
    """

    base_s: float
    per_model_s: float
    per_row_s: float
    cheap_rows: int = 8
    per_row_beyond_s: float | None = None  # None: as the first ones
    per_prompt_token_s: float = 0.0  # each token of a prompt beyond its first
    while_neighbour: float = 0.0  # a step takes so much longer while all other replicas of the host step, as a part
    reading_while_neighbour: float | None = None  # the part that reads weights, which share a bus; None: as the rest
    while_loading: float = 0.0  # the same, while this replica loads a model

    def step_s(self, num_models: int, num_rows: int) -> float:
        """One token for each of `num_rows` texts of `num_models` distinct models, alone on the host."""
        return self.slowed_s(num_models, num_rows, 0.0)

    def slowed_s(self, num_models: int, num_rows: int, neighbours: float) -> float:
        """The same while `neighbours`, a part of the host's other replicas, step too."""
        reading, rest = self.slower(neighbours)
        return reading * self.per_model_s * num_models + rest * self._rest_s(num_rows)

    def slower(self, neighbours: float) -> tuple[float, float]:
        """How many times as long reading weights takes then, and all else of a step."""
        reading = self.while_neighbour if self.reading_while_neighbour is None else self.reading_while_neighbour
        return 1 + neighbours * reading, 1 + neighbours * self.while_neighbour

    def _rest_s(self, num_rows: int) -> float:
        beyond_s = self.per_row_s if self.per_row_beyond_s is None else self.per_row_beyond_s
        cheap = min(num_rows, self.cheap_rows)
        return self.base_s + self.per_row_s * cheap + beyond_s * max(0, num_rows - cheap)


@dataclass(frozen=True, slots=True)
class LoadCosts:
    """How long one load takes by where the weights are: the host's page cache, its disk, the Hub."""

    host_s: float
    disk_s: float
    hub_s: float
    while_busy: float = 0.0  # a load takes so much longer while all replicas of the host step, as a part

    def of(self, tier: str) -> float:
        """0 for a model that is on the device."""
        return {"device": 0.0, "host": self.host_s, "disk": self.disk_s, "hub": self.hub_s}[tier]


@dataclass(frozen=True, slots=True)
class Costs:
    """One replica, and the host that it is on."""

    name: str
    source: str  # where and how the figures were had; says which are estimates
    step: StepCosts
    load: LoadCosts
    slots: int  # models in memory at once
    request_s: float = 0.0  # HTTP and routing, there and back, without the engine's time
    request_busy_s: float | None = None  # the same while all replicas of the host step; None: as else
    max_sequences: int = 64
    max_step_rows: int = 128
    parallel_loads: int = 2
    patience_s: float = 2.0  # a load that waited so long for room closes a leased model to new requests
    model_bytes: int = 251_000_000
    replicas_per_host: int = 1
    host_models: int = 256  # the host's page cache, in models; shared by its replicas
    disk_models: int | None = None  # None: all models are on the host's disk
    price_per_hour: float | None = None  # of a replica
    fit: dict[str, float] = field(default_factory=dict)  # of a calibration: how far it misses its own probes

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)


# GPT-2 small's shape in bfloat16 on two cores of an AMD EPYC (AVX-512 bf16, no AMX), over HTTP, quiet machine, November
# 2026: 1x1, 1x8, 1x32, 8x1 streams step in 4.9, 7.5, 18.5 and 35.2 ms (loadtest/engine/README.md); 8x4 would be 46.5
# and took 43.8. Loads are what a cold model adds to its first token.
_CPU = Costs(
    name="cpu",
    source="derived from measurements: two cores of an AMD EPYC, GPT-2 small in bfloat16 (loadtest/engine/README.md); "
    "estimated: the Hub",
    step=StepCosts(
        base_s=0.6e-3,
        per_model_s=3.95e-3,
        per_row_s=0.37e-3,
        per_row_beyond_s=0.46e-3,
        per_prompt_token_s=0.46e-3,
        while_loading=0.32,
    ),
    load=LoadCosts(host_s=0.023, disk_s=0.115, hub_s=5.0),
    slots=43,
    request_s=0.0054,
    host_models=40,
)

# NOTE: nothing here was measured on an H100 by us. 248 MB a model at 3.35 TB/s are 74 us; the rest is guessed from that
# card's data sheet and from what a row costs the engine's thread.
_H100 = Costs(
    name="h100",
    source="ESTIMATED, no figure was measured: 74 us a model a step (248 MB at 3.35 TB/s), 0.5 ms a step of launches, "
    "15 us a row, 10 ms a swap from pinned memory, 85 % of 80 GB in slots",
    step=StepCosts(
        base_s=0.5e-3, per_model_s=74e-6, per_row_s=15e-6, cheap_rows=64, per_prompt_token_s=2e-6, while_loading=0.1
    ),
    load=LoadCosts(host_s=0.010, disk_s=0.080, hub_s=5.0),
    slots=270,
    request_s=0.0054,
    max_sequences=64,
    replicas_per_host=8,
    host_models=6000,
)

PRESETS = {costs.name: costs for costs in (_CPU, _H100)}


def costs_of(text: str) -> Costs:
    """A preset by its name, or a JSON file as `Costs.to_json` writes it. Raises: BadCosts."""
    if text in PRESETS:
        return PRESETS[text]
    path = Path(text)
    if not path.is_file():
        raise BadCosts(f"{text!r} is neither a file nor one of the presets {', '.join(PRESETS)}.")
    try:
        return _from_json(json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, KeyError, ValueError) as exc:
        raise BadCosts(f"{text!r} does not hold costs: {exc}. Write one with `loadtest.capacity.calibrate`.") from exc


def _from_json(values: dict[str, Any]) -> Costs:
    return Costs(**{**values, "step": StepCosts(**values["step"]), "load": LoadCosts(**values["load"])})
