"""Every knob, read once from `ROOKERY_*` variables. Defaults run on a laptop.

An unknown or malformed variable stops the start and names itself: a typo must not run with defaults.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from urllib.parse import quote

PREFIX = "ROOKERY_"


class BadSetting(ValueError):
    """A variable that cannot be used; the message names it."""


@dataclass(frozen=True, slots=True)
class Settings:
    """One field a variable: `data` is ``ROOKERY_DATA``. Empty text or 0 means: choose by the machine."""

    url: str = "http://127.0.0.1:8000"  # where the command line looks for the server
    data: Path = Path(".rookery")  # models, uploads, database
    cache: str = ""  # a folder of this machine alone, for copies of weights, where machines share `data`; "": none
    cache_bytes: int = 0  # of the copies, the least recently used go first; 0: while the disk has room
    base: str = "fledgling"  # the base model of new bots, and of requests that name none
    database_url: str = ""  # "": SQLite under `data`
    device: str = "auto"  # auto | cpu | cuda
    dtype: str = "auto"  # of the weights: auto | bfloat16 | float32 | int8 (CPU alone)
    memory_bytes: int = 0  # for weights, on a GPU for KV caches too; 0: half of what is free, of a GPU 85 %
    max_sequences: int = 64  # texts that one replica generates at once
    max_waiting: int = 0  # texts for which there is no place at a replica yet; more are refused. 0: `max_sequences`
    deadline_s: float = 600.0  # for a whole request; refused is what would take longer, as things stand
    max_step_rows: int = 128
    threads: int = 0  # of the engine; 0: all cores
    flush_interval_s: float = 0.025  # tokens of a stream are sent together this often
    lease_timeout_s: float = 120.0  # longest wait for a model's weights, and for a disk to give them
    parallel_loads: int = 2
    hub_enabled: bool = True
    hub_endpoint: str = ""  # "": the public Hub, or HF_ENDPOINT
    hub_token: str = ""
    hub_deadline_s: float = 600.0  # for all of a model's files; what came of them is kept for the next try
    hub_bytes: int = 0  # of models fetched from the Hub, the least recently used go first; 0: while the disk has room
    scrub_hours: float = 20.0  # in which every stored model is read once and compared with its hash; 0: never
    api_key: str = ""  # what the command line sends
    api_keys: str = ""  # with commas between; each may do everything. None, and none made: everybody may
    key_secret: str = ""  # under which the keys in the database are hashed; "": the file .key-secret under `data`
    anonymous: str = "generate,read"  # the scopes of callers without a key, where there are keys. "": none
    hosts: str = ""  # names by which the server may be called, with commas between. "": by any; `up` sets localhost
    trainer_threads: int = 0  # of a training process; 0: all cores
    max_jobs_per_key: int = 100  # that have not ended
    # Of each key that has no limit of its own; 0: none. See serve/api/quota.py.
    requests_per_s: float = 0.0  # twice as many may come at once
    tokens_per_min: int = 0  # of prompts and texts together
    in_flight: int = 0  # generations at once
    storage_bytes: int = 0  # of files and models
    # Of each address that sends no key.
    anonymous_requests_per_s: float = 0.0
    anonymous_tokens_per_min: int = 0
    anonymous_in_flight: int = 0
    address_header: str = ""  # that a proxy of ours writes the caller's address into, such as x-forwarded-for; "": none
    limits_url: str = ""  # redis://…, where all gateways count requests and tokens together; "": each for itself
    metrics_enabled: bool = True
    metrics_port: int = 0  # where every process of a node answers for all of that node's; 0: only /metrics of the API
    metrics_host: str = "127.0.0.1"
    log_format: str = "auto"  # text | json | auto: text where a person reads along
    log_level: str = "info"  # debug | info | warning | error
    log_file: str = ""  # that all processes of the machine append to; "": standard error
    trackers: str = ""  # that are told of every training, with commas between: wandb, trackio

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """Raises: BadSetting."""
        environ = os.environ if environ is None else environ
        kinds = {f.name: f.type for f in fields(cls)}
        values: dict[str, Any] = {}
        for variable, text in environ.items():
            if not variable.startswith(PREFIX):
                continue
            name = variable.removeprefix(PREFIX).lower()
            if name not in kinds:
                known = ", ".join(PREFIX + field.upper() for field in kinds)
                raise BadSetting(f"{variable} is not a setting. The settings are: {known}.")
            values[name] = _parse(variable, text, str(kinds[name]))
        settings = cls(**values)
        _check_choice("device", settings.device, ("auto", "cpu", "cuda"))
        _check_choice("dtype", settings.dtype, ("auto", "bfloat16", "float32", "int8"))
        _check_choice("log_format", settings.log_format, ("auto", "text", "json"))
        _check_choice("log_level", settings.log_level, ("debug", "info", "warning", "error"))
        return settings

    def to_env(self) -> dict[str, str]:
        """The variables that give these settings again, in another process."""
        return {PREFIX + f.name.upper(): str(getattr(self, f.name)) for f in fields(self)}

    @property
    def sql_url(self) -> str:
        return self.database_url or f"sqlite:///{quote(str(self.data.absolute() / 'rookery.db'))}"


def _parse(variable: str, text: str, kind: str) -> Any:
    try:
        if kind == "bool":
            return {"1": True, "true": True, "0": False, "false": False}[text.lower()]
        return {"int": int, "float": float, "Path": Path, "str": str}[kind](text)
    except (KeyError, ValueError) as exc:
        wanted = {"bool": "neither true (or 1) nor false (or 0)", "int": "no whole number", "float": "no number"}
        raise BadSetting(f"{variable}={text[:80]!r} is {wanted.get(kind, f'no {kind}')}.") from exc


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise BadSetting(f"{PREFIX}{name.upper()}={value[:80]!r} is not one of {', '.join(choices)}.")
