"""Reads what W&B writes when it is offline: a `.wandb` file is a LevelDB log of protobuf records."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

_HEADER, _BLOCK, _RECORD = 7, 32768, struct.Struct("<IHB")  # checksum, length, kind
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


@dataclass
class OfflineRun:
    """What `wandb sync` would send."""

    run: Any = None
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    artifacts: list[Any] = field(default_factory=list)

    @property
    def inputs(self) -> list[tuple[str, str]]:
        return [(artifact.type, artifact.name) for artifact in self.artifacts if artifact.use_after_commit]

    @property
    def outputs(self) -> list[tuple[str, str]]:
        return [(artifact.type, artifact.name) for artifact in self.artifacts if not artifact.use_after_commit]


def read_offline_run(folder: Path) -> OfflineRun:
    [path] = folder.glob("*.wandb")
    found = OfflineRun()
    for payload in _records(path.read_bytes()):
        record = wandb_internal_pb2.Record()  # type: ignore[attr-defined,unused-ignore]
        record.ParseFromString(payload)
        match record.WhichOneof("record_type"):
            case "run":
                found.run = record.run
                found.config = {item.key: json.loads(item.value_json) for item in record.run.config.update}
            case "summary":
                found.summary |= {
                    item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.summary.update
                }
            case "history":
                found.history.append(
                    {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
                )
            case "artifact":
                found.artifacts.append(record.artifact)
    return found


def _records(data: bytes) -> Iterator[bytes]:
    """Source: LevelDB's log format, with W&B's own header before the first block's records."""
    at, parts = _HEADER, b""
    while at + _RECORD.size <= len(data):
        if _BLOCK - at % _BLOCK < _RECORD.size:
            at += _BLOCK - at % _BLOCK
            continue
        _, length, kind = _RECORD.unpack_from(data, at)
        at += _RECORD.size
        parts = data[at : at + length] if kind in (_FULL, _FIRST) else parts + data[at : at + length]
        at += length
        if kind in (_FULL, _LAST):
            yield parts
