"""Turns other people's weights into one ``model.safetensors``, in a process of its own that is thrown away.

    python -m serve.store.convert OUT tied|untied IN...     IN: a checkpoint's .bin or .safetensors, or its shards

A ``.bin`` is a pickle: the reader admits tensors only (``weights_only``). Should that ever fail, the process knows no
token and can do nothing but compute and fill OUT (`serve.store.sandbox`), and OUT is checked like any stranger's file.
"""

from __future__ import annotations

import codecs
import io
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from io import BufferedReader
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from serve.errors import ModelUnusable, RookeryError, StoreUnavailable, disk_error
from serve.shape import canonical_name
from serve.store.safetensors_file import TensorEntry, encode_header, parse_header
from serve.store.sandbox import CannotConfine, Limits, confine
from serve.store.validate import read_json

if TYPE_CHECKING:
    import torch

SHARD_NAME = re.compile(r"(pytorch_model|model)-\d{5}-of-\d{5}\.(bin|safetensors)", re.ASCII)

_REFUSED, _NOT_WRITTEN = 3, 4  # exit status: the reason is on stdout; or the error number of the disk
_MAX_TENSORS = 10_000  # GPT-2 xl with its masks has 677
_MAX_PICKLE_BYTES = 2**20  # of an archive's table of tensors: 160 KB for GPT-2 xl
# Each is several times what a checkpoint takes: one copy of it in memory, 1 s for 500 MB after 3 s of imports.
_MEMORY_BYTES, _MEMORY_PER_BYTE = 2**29, 3
_BASE_TIMEOUT_S, _BYTES_PER_S = 60.0, 2e7


def convert_weights(source: Path, target: Path, *, timeout_s: float | None = None) -> None:
    """Writes `target` from `source`, a checkpoint or a sharded one's index. Raises: ModelUnusable with the reason.

    Dtypes stay what they are, but float64 becomes float32. An output layer that equals the embedding is left out where
    the config.json beside `source` ties the two. Raises: StoreUnavailable where there is no disk or memory for it.
    """
    files = [source.parent / name for name in shard_names(source)] if source.suffix == ".json" else [source]
    if absent := next((file.name for file in files if not file.exists()), None):
        raise ModelUnusable(f"The checkpoint lacks {absent}, which it should have.")
    timeout_s = timeout_s or _BASE_TIMEOUT_S + sum(file.stat().st_size for file in files) / _BYTES_PER_S
    head = "tied" if _is_tied(source.parent / "config.json") else "untied"
    # A file, not a pipe: what a process gone astray writes there has a limit, and is not gathered in our memory.
    with tempfile.TemporaryFile(dir=target.parent) as report:
        try:
            status = run_apart(
                [str(target.resolve()), head, *(str(file.resolve()) for file in files)], report, timeout_s
            )
        except subprocess.TimeoutExpired as exc:
            target.unlink(missing_ok=True)
            raise ModelUnusable(f"The weights could not be converted to safetensors within {timeout_s:g} s.") from exc
        if status == 0 and target.is_file():
            return
        target.unlink(missing_ok=True)
        report.seek(0)
        raise _error(status, report.read(2000).decode("utf-8", "replace").strip())


def run_apart(arguments: list[str], report: IO[bytes], timeout_s: float) -> int:
    """Runs `main` in a new process, its stdout in `report`; returns its exit status. Raises: TimeoutExpired."""
    package_root = Path(__file__).resolve().parents[2]
    # Nothing of our environment: no token, no proxy, no Hub setting. One thread, since Landlock binds no others.
    environment = {"PATH": os.defpath, "PYTHONPATH": str(package_root), "CUDA_VISIBLE_DEVICES": "", "LANG": "C.UTF-8"}
    environment |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return subprocess.run(
        [sys.executable, "-s", "-P", "-m", "serve.store.convert", *arguments],
        env=environment,
        cwd="/",
        stdin=subprocess.DEVNULL,
        stdout=report,
        stderr=subprocess.DEVNULL,
        timeout=timeout_s,
    ).returncode


def shard_names(index: Path) -> list[str]:
    """The files a sharded checkpoint consists of, beside its index. Raises: ModelUnusable for any other path."""
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise ModelUnusable(f"{index.name} is not the index of a checkpoint.")
    if not all(isinstance(name, str) and SHARD_NAME.fullmatch(name) for name in table.values()):
        raise ModelUnusable(f"{index.name} names files that are not shards of a checkpoint.")
    return sorted(set(table.values()))


def _is_tied(config: Path) -> bool:
    return not config.is_file() or read_json(config).get("tie_word_embeddings", True) is not False


def _error(status: int, report: str) -> RookeryError:
    if status == _REFUSED and report:
        return ModelUnusable(report[:500])
    if status == _NOT_WRITTEN and report.isdecimal():
        return disk_error("convert the weights", OSError(int(report), os.strerror(int(report))))
    if status == -signal.SIGKILL:  # not by us: the kernel does it where memory ends
        return StoreUnavailable("The conversion of the weights was killed; try again later.", retry_after_s=60)
    if status == -signal.SIGXCPU:
        return ModelUnusable("The weights take far longer to read than weights of their size may.")
    return ModelUnusable("The weights could not be read as a PyTorch checkpoint; the file is damaged or not one.")


# --- In the throw-away process ------------------------------------------------------------------------------


def main(arguments: list[str]) -> int:
    target, head, *sources = arguments
    _rehearse()
    files = [Path(source).open("rb") for source in sources]  # noqa: SIM115 (closed by the end of the process)
    num_bytes = sum(os.fstat(file.fileno()).st_size for file in files)
    limits = Limits(
        memory_bytes=_MEMORY_BYTES + _MEMORY_PER_BYTE * num_bytes,
        file_bytes=2 * num_bytes + 2**20,
        cpu_s=int(_BASE_TIMEOUT_S + num_bytes / _BYTES_PER_S),
    )
    with open(target, "wb", buffering=0) as output:  # nothing is left to write when it is closed
        try:
            _confine(limits)
            # From here on the bytes are a stranger's.
            tensors = _select(_read_all(files), num_bytes, tied=head == "tied")
        except ModelUnusable as exc:
            return _report(_REFUSED, exc.message)
        except MemoryError:
            return _report(_REFUSED, "The weights need far more memory than weights of their size may.")
        try:
            _write(output, tensors)
        except OSError as exc:
            return _report(_NOT_WRITTEN, str(exc.errno))
    return 0


def _report(status: int, reason: str) -> int:
    os.write(1, reason.encode("utf-8", "replace"))
    return status


def _rehearse() -> None:
    """Reads and writes checkpoints of our own: what that imports cannot be imported once no file can be opened."""
    import pickle

    import torch

    torch.set_num_threads(1)
    for encoding in ("ascii", "cp437", "latin-1", "utf-8"):  # of the names in archives and pickles
        codecs.lookup(encoding)
    floats = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    weights = {str(dtype): torch.ones(2, 2, dtype=dtype).t() for dtype in floats}
    for zipped in (True, False):
        file = io.BytesIO()
        torch.save(OrderedDict(weights), file, _use_new_zipfile_serialization=zipped)
        state = _read_pickle(io.BytesIO(file.getvalue()))
        _write(io.BytesIO(), _select(state | {"lm_head.weight": weights["torch.float32"]}, file.tell(), tied=True))
    for damaged in (file.getvalue()[:-100], pickle.dumps(print, protocol=2)):
        with suppress(Exception):
            _read_pickle(io.BytesIO(damaged))


def _confine(limits: Limits) -> None:
    try:
        confine(limits)
    except CannotConfine as exc:
        raise ModelUnusable(
            f"This machine cannot lock away the program that reads .bin files ({exc}), so they are not opened here. "
            "Models with a model.safetensors work; convert this one elsewhere, or allow seccomp to this service."
        ) from exc


def _read_all(files: Sequence[BufferedReader]) -> dict[str, Any]:
    """All named values of all shards."""
    state: dict[str, Any] = {}
    for file in files:
        part = _read_safetensors(file) if file.name.endswith(".safetensors") else _read_pickle(file)
        if len(state) + len(part) > _MAX_TENSORS:
            raise ModelUnusable(f"The checkpoint has more than {_MAX_TENSORS:,} tensors; a GPT-2 has under 1,000.")
        if twice := next((name for name in part if name in state), None):
            raise ModelUnusable(f"Two shards of the checkpoint hold tensor {twice[:60]!r}.")
        state |= part
    return state


def _read_pickle(file: IO[bytes]) -> dict[str, Any]:
    import pickle

    _check_archive(file)
    try:
        state = load_pickle(file)
    except pickle.UnpicklingError as exc:
        raise ModelUnusable("The .bin holds more than tensors, or is damaged; it was not opened further.") from exc
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise ModelUnusable("The .bin is not a table of named tensors.")
    return state


def load_pickle(file: IO[bytes]) -> Any:
    """What a .bin holds, tensors and plain containers only; anything else is an UnpicklingError."""
    import torch

    return torch.load(file, map_location="cpu", weights_only=True)


def _check_archive(file: IO[bytes]) -> None:
    """A zip must hold its bytes as they are, once, and undamaged: torch itself would inflate, and checks no sum."""
    import zipfile

    is_archive = file.read(4) == b"PK\3\4"  # else the format of before torch 1.6, one pickle after the other
    file.seek(0)
    if not is_archive:
        return
    try:
        with zipfile.ZipFile(file) as archive:
            parts = archive.infolist()
            if len(parts) > _MAX_TENSORS or len({part.filename for part in parts}) < len(parts):
                raise ModelUnusable("The .bin is an archive of too many parts, or has one twice.")
            if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
                raise ModelUnusable("The .bin is a compressed archive; PyTorch writes none, and its size is unknown.")
            if any(part.filename.endswith("/data.pkl") and part.file_size > _MAX_PICKLE_BYTES for part in parts):
                raise ModelUnusable(f"The .bin describes its tensors in more than {_MAX_PICKLE_BYTES:,} bytes.")
            if damaged := archive.testzip():
                raise ModelUnusable(f"The .bin is damaged: part {damaged[:60]!r} has another checksum than it should.")
    except (zipfile.BadZipFile, EOFError, RuntimeError, ValueError) as exc:
        raise ModelUnusable("The .bin is a damaged archive.") from exc
    file.seek(0)


def _read_safetensors(file: BufferedReader) -> dict[str, torch.Tensor]:
    entries = [entry for entry in parse_header(file) if canonical_name(entry.name) is not None]
    return {entry.name: _read_entry(file, entry) for entry in entries}


def _read_entry(file: BufferedReader, entry: TensorEntry) -> torch.Tensor:
    import torch

    dtypes = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    if entry.dtype not in dtypes or entry.start == entry.end:
        raise ModelUnusable(f"Tensor {entry.name[:60]!r} is {entry.dtype} {list(entry.shape)}; weights are floats.")
    data = torch.empty(entry.end - entry.start, dtype=torch.uint8)
    file.seek(entry.start)
    if file.readinto(data.numpy().data) != len(data):
        raise ModelUnusable("A shard became shorter while it was read.")
    return data.view(dtypes[entry.dtype]).view(entry.shape)


def _select(state: dict[str, Any], num_bytes: int, *, tied: bool) -> dict[str, torch.Tensor]:
    """The weights, as plain tensors whose values are all in the file; `lm_head` only where it says something."""

    tensors = {name: value for name, value in state.items() if canonical_name(name) is not None}
    for name, tensor in tensors.items():
        _check_plain(name, tensor)
    # A tied output layer is written as one storage under two names.
    if sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) > 2 * num_bytes:
        raise ModelUnusable("The checkpoint describes far more weights than it has bytes.")
    canonical = {canonical_name(name): name for name in tensors}
    head, embedding = (canonical.get(name) for name in ("lm_head.weight", "wte.weight"))
    if tied and head and embedding and _are_equal(tensors[head], tensors[embedding]):
        del tensors[head]
    return tensors


def _are_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    import torch

    return one.dtype == other.dtype and torch.equal(one, other)


def _check_plain(name: str, tensor: Any) -> None:
    import torch

    floats = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.device.type == "cpu" and not tensor.is_nested
    if not plain or tensor.layout != torch.strided or tensor.is_quantized or tensor.is_neg():
        raise ModelUnusable(f"{name[:60]!r} in the checkpoint is not a plain tensor.")
    if tensor.dtype not in floats:
        raise ModelUnusable(f"{name[:60]!r} in the checkpoint is {tensor.dtype}; weights are 16- or 32-bit floats.")
    # From the innermost dimension on, each step must pass over all before it: else some values would be read twice.
    reach = 1
    for step, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1):
        if step < reach:
            raise ModelUnusable(f"{name[:60]!r} in the checkpoint repeats values that the file holds only once.")
        reach = step * size


def _write(output: IO[bytes], tensors: dict[str, torch.Tensor]) -> None:
    """One tensor at a time, so that a view of a shared storage needs no second copy of it all."""
    import torch

    words = {torch.float64: "F32", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    # Wide ones first: then all lie at multiples of their width.
    names = sorted(tensors, key=lambda name: (words[tensors[name].dtype] != "F32", name))
    described = [(name, words[tensors[name].dtype], tuple(tensors[name].shape)) for name in names]
    _write_all(output, encode_header(described))
    for name in names:
        tensor = tensors.pop(name).detach().contiguous()
        tensor = tensor.float() if tensor.dtype == torch.float64 else tensor
        _write_all(output, tensor.reshape(-1).view(torch.uint8).numpy().data)


def _write_all(output: IO[bytes], data: bytes | memoryview) -> None:
    left = memoryview(data)
    while left:
        left = left[output.write(left) :]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
