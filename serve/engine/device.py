"""What suits this machine: device, precision and memory, where the settings leave them open."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from serve.engine.engine import EngineConfig
from serve.engine.native.library import team
from serve.engine.selection import check_weights, is_native
from serve.logs import get_logger
from serve.settings import Settings

log = get_logger()


def engine_config(settings: Settings) -> EngineConfig:
    """Device, precision and sizes of the engine; sets torch's number of threads. Raises: BadSetting."""
    use_cuda = settings.device == "cuda" or (settings.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda" if use_cuda else "cpu")
    if not use_cuda:
        # Said outright: a process that Ray starts is told to use as many threads as it has booked cores.
        torch.set_num_threads(settings.threads or num_cores())
    weights = settings.dtype
    if weights == "auto":
        weights = "bfloat16" if multiplies_bfloat16(device) else "float32"
    check_weights(weights, device)
    if is_native(weights, device):
        team()  # made here, not in the thread of the first load, whose niceness it would inherit
    elif not use_cuda:
        log.warning("slow_cpu_engine", weights=weights, reason="no AVX-512, or the library was not compiled")
    return EngineConfig(
        device=device,
        weights=weights,
        budget_bytes=settings.memory_bytes or _budget_bytes(device),
        max_sequences=settings.max_sequences,
        max_step_rows=settings.max_step_rows,
    )


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether bf16 is faster than float32 there: half the bytes, and instructions for it."""
    if device.type == "cuda":
        return True
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _budget_bytes(device: torch.device) -> int:
    """Half of a computer's memory is others'; of a device's, what is left is for activations and logits."""
    free = _free_bytes(device)
    return free // 2 if device.type == "cpu" else free * 17 // 20


def _free_bytes(device: torch.device) -> int:
    """Memory that nobody uses now, on the device or within this process's limits."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    with open("/proc/meminfo") as lines:
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    return available if text == "max" else min(available, int(text))
