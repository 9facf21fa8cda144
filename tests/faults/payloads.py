"""Pickles that do harm: each makes the folder `harm` when something runs it."""

from __future__ import annotations

import codecs
import functools
import importlib
import io
import operator
import os
import pickle
import pty
import runpy
import subprocess
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch


class Call:
    """Calls `function` when unpickled. Arguments may be calls themselves."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.arguments

    def __call__(self) -> None:
        """Never called: pickle asks whether what it is to call later can be."""


def payloads(harm: Path) -> dict[str, Any]:
    """Name -> what to put in a checkpoint. `harm`'s parent holds what a payload needs besides."""
    path = str(harm)
    python = f"__import__('os').mkdir({path!r})"
    script = harm.with_name("harm.py")
    script.write_text(python)
    inner = harm.with_name("inner.pkl")
    inner.write_bytes(pickle.dumps(Call(os.mkdir, path)))
    mkdir: Callable[[], None] = functools.partial(os.mkdir, path)
    return {
        "os.mkdir": Call(os.mkdir, path),
        "posix.system": Call(os.system, f"mkdir {path}"),
        "subprocess": Call(subprocess.check_call, ["mkdir", path]),
        "eval": Call(eval, python),
        "exec": Call(exec, python),
        "__import__": Call(Call(getattr, Call(__import__, "os"), "mkdir"), path),
        "functools.partial": Call(mkdir),
        "importlib": Call(operator.methodcaller("mkdir", path), Call(importlib.import_module, "os")),
        "pty": Call(pty.spawn, ["mkdir", path]),
        "codecs": Call(exec, Call(codecs.decode, codecs.encode(python, "rot13"), "rot13")),
        "numpy object array": np.array([Call(os.mkdir, path)], dtype=object),
        "torch._tensor": Call(torch._tensor._rebuild_from_type_v2, os.mkdir, torch.Tensor, (path,), {}),
        "torch.load": Call(functools.partial(torch.load, weights_only=False), str(inner)),
        "torch.hub": Call(torch.hub._add_to_sys_path, Call(os.mkdir, path)),
        "runpy": Call(runpy.run_path, str(script)),
        "inside a container": OrderedDict(a=[{"b": (Call(os.mkdir, path),)}]),
    }


def write_payload(file: Path, payload: Any, *, zipped: bool = True) -> Path:
    """A checkpoint whose one value is `payload`."""
    torch.save({"transformer.wte.weight": payload}, file, _use_new_zipfile_serialization=zipped)
    return file


def with_table(archive: bytes, table: bytes) -> bytes:
    """The zip of a checkpoint with another data.pkl."""
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(target, "w") as new:
        for part in old.infolist():
            new.writestr(part.filename, table if part.filename.endswith("/data.pkl") else old.read(part))
    return target.getvalue()
