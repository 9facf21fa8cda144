"""Which backend serves a layout, by device and weight format: the one place that knows them all."""

from __future__ import annotations

import torch

from serve.engine.backend import Backend
from serve.engine.grouped import weights as grouped
from serve.engine.grouped.backend import GroupedBackend
from serve.engine.native import backend as native
from serve.engine.native.library import is_supported
from serve.settings import BadSetting
from serve.shape import GPT2Shape


def build_backend(
    shape: GPT2Shape, num_slots: int, kv_rows: int, weights: str, device: torch.device, *, tied: bool
) -> Backend:
    """A backend of `num_slots` models and `kv_rows` sequences. Raises: BadSetting."""
    check_weights(weights, device)
    if is_native(weights, device):
        return native.NativeBackend(shape, num_slots, kv_rows, weights, tied=tied)
    return GroupedBackend(shape, num_slots, kv_rows, getattr(torch, weights), device, tied=tied)


def slot_bytes(shape: GPT2Shape, weights: str, device: torch.device, *, tied: bool) -> int:
    """Bytes that one model takes in a slot there."""
    if is_native(weights, device):
        return native.slot_bytes(shape, weights, tied=tied)
    return grouped.slot_bytes(shape, getattr(torch, weights), tied=tied)


def check_weights(weights: str, device: torch.device) -> None:
    """Whether some backend has the format there, said before anything is allocated. Raises: BadSetting."""
    if weights != "int8" or is_native(weights, device):
        return
    if device.type != "cpu":
        raise BadSetting("ROOKERY_DTYPE=int8 is for CPUs; use bfloat16 on this device.")
    raise BadSetting(
        "ROOKERY_DTYPE=int8 needs a processor with AVX-512 VNNI and the compiled library, which is built when the "
        "project is installed where a C++ compiler is; use float32 or bfloat16 here."
    )


def is_native(weights: str, device: torch.device) -> bool:
    """Whether the compiled library serves the format there; otherwise torch does."""
    return device.type == "cpu" and is_supported(weights)
