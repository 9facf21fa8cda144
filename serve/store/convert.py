"""Turns other people's weights into one ``model.safetensors``, in a process of its own that is thrown away.

    python -m serve.store.convert IN OUT     IN: a .bin, or the .index.json of a sharded checkpoint

A ``.bin`` is a pickle: the reader admits tensors only (``weights_only``), and should that ever fail, the process
knows no token, has little memory and time, and its result is checked like any stranger's file.
"""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serve.errors import ModelUnusable
from serve.shape import canonical_name

if TYPE_CHECKING:
    import torch

TIMEOUT_S = 600
SHARD_NAME = re.compile(r"(pytorch_model|model)-\d{5}-of-\d{5}\.(bin|safetensors)", re.ASCII)

_REFUSED = 3  # exit status: the reason is on stdout
_BASE_ADDRESS_SPACE = 8 * 2**30  # importing torch maps up to 5 GiB, most of it never touched


def convert_weights(source: Path, target: Path, *, timeout_s: float = TIMEOUT_S) -> None:
    """Writes `target` from `source`, dtypes unchanged. Raises: ModelUnusable with the reason."""
    package_root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-s", "-P", "-m", "serve.store.convert", str(source.resolve()), str(target.resolve())]
    # Nothing of our environment: no token, no proxy, no Hub setting.
    environment = {"PATH": os.defpath, "PYTHONPATH": str(package_root), "CUDA_VISIBLE_DEVICES": "", "LANG": "C.UTF-8"}
    try:
        done = subprocess.run(
            command, env=environment, cwd="/", stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout_s
        )
    except subprocess.TimeoutExpired as exc:
        raise ModelUnusable(f"The weights could not be converted to safetensors within {timeout_s:g} s.") from exc
    if done.returncode == 0 and target.is_file():
        return
    target.unlink(missing_ok=True)
    if done.returncode == _REFUSED:
        raise ModelUnusable(done.stdout.decode("utf-8", "replace").strip()[:500])
    raise ModelUnusable("The weights could not be read as a PyTorch checkpoint; the file is damaged or not one.")


def shard_names(index: Path) -> list[str]:
    """The files a sharded checkpoint consists of, beside its index. Raises: ModelUnusable for any other path."""
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        raise ModelUnusable(f"{index.name} is not the index of a checkpoint.") from exc
    if not names or not all(isinstance(name, str) and SHARD_NAME.fullmatch(name) for name in names):
        raise ModelUnusable(f"{index.name} names files that are not shards of a checkpoint.")
    return names


# --- In the throw-away process ------------------------------------------------------------------------------


def main(arguments: list[str]) -> int:
    source, target = map(Path, arguments)
    files = [source.parent / name for name in shard_names(source)] if source.suffix == ".json" else [source]
    _limit_resources(sum(file.stat().st_size for file in files))
    try:
        tensors = _select({name: tensor for file in files for name, tensor in _load(file).items()})
    except ModelUnusable as exc:
        sys.stdout.write(exc.message)
        return _REFUSED
    from safetensors.torch import save_file

    save_file(tensors, target, metadata={"format": "pt"})
    return 0


def _limit_resources(num_bytes: int) -> None:
    limits = {
        resource.RLIMIT_AS: _BASE_ADDRESS_SPACE + 4 * num_bytes,
        resource.RLIMIT_FSIZE: 2 * num_bytes + 2**20,
        resource.RLIMIT_CPU: TIMEOUT_S,
        resource.RLIMIT_CORE: 0,
    }
    for kind, limit in limits.items():
        _, hard = resource.getrlimit(kind)
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (limit, limit))


def _load(file: Path) -> dict[str, torch.Tensor]:
    import pickle

    import torch
    from safetensors.torch import load_file

    if file.suffix == ".safetensors":
        return dict(load_file(file))
    try:
        state: Any = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as exc:
        raise ModelUnusable("The .bin holds more than tensors, or is damaged; it was not opened further.") from exc
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise ModelUnusable("The .bin is not a table of named tensors.")
    return state


def _select(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Real weights only, each with memory of its own; `lm_head` only where it differs from the embedding."""
    import torch

    tensors = {}
    for name, tensor in state.items():
        if canonical_name(name) is None:
            continue
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.is_quantized:
            raise ModelUnusable(f"{name[:60]!r} in the checkpoint is not a plain tensor.")
        tensors[name] = tensor.detach().contiguous()
    embedding = tensors.get("transformer.wte.weight", tensors.get("wte.weight"))
    head = tensors.get("lm_head.weight")
    if head is not None and embedding is not None and torch.equal(head, embedding):
        del tensors["lm_head.weight"]
    # Views of one storage are written apart, so that a file has no more bytes than its shapes say.
    return {name: tensor.clone() for name, tensor in tensors.items()}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
