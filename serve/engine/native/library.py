"""The compiled library: finding it, its structures, and one thread team for the process.

It is built from the C++ beside this file when the project is installed; where there was no compiler, or the
processor lacks AVX-512, `is_supported` says so and the engine computes with torch alone.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import time
from ctypes import POINTER, Structure, c_float, c_int32, c_uint64, c_void_p

import torch

ABI = 1  # of library.cpp: changes with every function and structure below
FORMATS = {"float32": 0, "bfloat16": 1, "int8": 2}
SOURCE_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class CShape(Structure):
    """`Shape` of model.hpp."""

    _fields_ = [
        *((name, c_int32) for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner")),
        *((name, c_int32) for name in ("tanh_gelu", "scale_attention", "scale_by_layer", "tied")),
        ("epsilon", c_float),
    ]


class CSource(Structure):
    """`Source` of pack.hpp."""

    _fields_ = [("data", c_void_p), ("type", c_int32)]


class CStep(Structure):
    """`Step` of step.hpp; the arrays must outlive the call."""

    _fields_ = [
        ("num_rows", c_int32),
        ("tokens", c_void_p),
        ("positions", c_void_p),
        ("kv_rows", c_void_p),
        ("num_groups", c_int32),
        ("slots", c_void_p),
        ("bounds", c_void_p),
        ("head_rows", c_void_p),
        ("head_bounds", c_void_p),
        ("logits", c_void_p),
    ]


class CDraw(Structure):
    """`Draw` of draw.hpp."""

    _fields_ = [
        ("logits", c_void_p),
        ("uniforms", c_void_p),
        ("inverse_temperature", c_float),
        ("top_p", c_float),
        ("banned", c_int32),
        ("greedy", c_int32),
        ("token", c_int32),
        ("logprob", c_float),
    ]


_SIGNATURES: dict[str, tuple[type | None, list[type]]] = {
    "supports": (c_int32, [c_int32]),
    "team_new": (c_void_p, [c_int32]),
    "layout_new": (c_void_p, [POINTER(CShape), c_int32]),
    "layout_free": (None, [c_void_p]),
    "layout_bytes": (c_uint64, [c_void_p]),
    "pack": (None, [c_void_p, c_void_p, POINTER(CSource), c_int32, c_float]),
    "runner_new": (c_void_p, [POINTER(CShape), c_int32, c_void_p, c_void_p, c_int32]),
    "runner_free": (None, [c_void_p]),
    "step": (None, [c_void_p, c_void_p, POINTER(CStep)]),
    "draw": (None, [c_void_p, POINTER(CDraw), c_int32, c_int32, c_int32]),
    "populate": (None, [c_void_p, c_uint64]),
    "read": (c_uint64, [c_void_p, c_void_p, c_uint64]),
}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library with its signatures, None where it was not built. Calls into it let other Python threads run."""
    spec = importlib.util.find_spec("serve.engine.native._rookery")
    if spec is None or spec.origin is None:
        return None
    loaded = ctypes.CDLL(spec.origin)
    if not hasattr(loaded, "rookery_abi") or loaded.rookery_abi() != ABI:
        return None  # built from other sources: `make install` builds it anew
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(loaded, f"rookery_{name}")
        function.restype, function.argtypes = result, arguments
    return loaded


def is_supported(weights: str) -> bool:
    """Whether this processor can compute with weights in that format here."""
    loaded = library()
    return loaded is not None and bool(loaded.rookery_supports(FORMATS[weights]))


def team() -> int:
    """Handle of a team of as many threads as torch has been told to use; made once, asleep while nothing runs."""
    return _team(torch.get_num_threads())


@functools.cache
def _team(size: int) -> int:
    loaded = library()
    assert loaded is not None, "ask is_supported first"
    return int(loaded.rookery_team_new(size))


def read_seconds(data: torch.Tensor) -> float:
    """How long the team takes to read all bytes of `data` once and do nothing else: the floor of a step."""
    loaded = library()
    assert loaded is not None, "ask is_supported first"
    started = time.perf_counter()
    loaded.rookery_read(team(), data.data_ptr(), data.nbytes)
    return time.perf_counter() - started
