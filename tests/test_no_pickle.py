"""Nothing is read by unpickling it, or run as code, but in the converter, which locks itself in first.

Ray's own messages between the processes of one service are pickles too: who can send one has been let into the cluster
(a token, and no port that is reached from outside), see .github/SECURITY.md. Of libraries nothing is said here.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CONVERTER = "serve/store/convert.py"  # weights of strangers, in a process of its own under seccomp
_MODULES = {
    "pickle",
    "_pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "joblib",
    "marshal",
    "shelve",
    "pandas",
    "jsonpickle",
}
_CALLS = {"eval", "exec", "compile", "__import__"}
# module.function, and the argument without which it unpickles, or makes objects of any class.
_LOADERS = {
    ("torch", "load"): "weights_only",
    ("np", "load"): None,
    ("numpy", "load"): None,
    ("yaml", "load"): "Loader",
    ("yaml", "full_load"): None,
    ("yaml", "unsafe_load"): None,
    ("torch.jit", "load"): None,
    ("torch.hub", "load"): None,
}


def dangers(source: str) -> Iterator[str]:
    """What there is in a module that would run what it reads."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (f"import {one.name}" for one in node.names if one.name.partition(".")[0] in _MODULES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in _MODULES:
            yield f"from {node.module} import"
        elif isinstance(node, ast.Call):
            yield from _dangers_of(node)


def _dangers_of(call: ast.Call) -> Iterator[str]:
    if isinstance(call.func, ast.Name) and call.func.id in _CALLS:
        yield f"{call.func.id}()"
    if not isinstance(call.func, ast.Attribute):
        return
    name = (ast.unparse(call.func.value), call.func.attr)
    if name in _LOADERS and not _is_safe(call, _LOADERS[name]):
        yield ".".join(name)


def _is_safe(call: ast.Call, argument: str | None) -> bool:
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    if argument == "weights_only":
        value = given.get(argument)
        return isinstance(value, ast.Constant) and value.value is True
    # PyYAML's second argument; which loader it is, `test_yaml_makes_no_objects` asks.
    return argument == "Loader" and (argument in given or len(call.args) == 2)


FILES = [path for top in ("serve", "deployments") for path in sorted((ROOT / top).rglob("*.py"))]


def test_nothing_but_the_converter_unpickles() -> None:
    found = {path.relative_to(ROOT).as_posix(): list(dangers(path.read_text(encoding="utf-8"))) for path in FILES}
    assert {path for path, dangerous in found.items() if dangerous} <= {CONVERTER}
    assert set(found[CONVERTER]) == {"import pickle"}  # for its errors, and a trial of what it refuses


def test_yaml_makes_no_objects() -> None:
    from serve.api.hub_card import _LOADER

    with pytest.raises(Exception, match="could not determine a constructor"):
        import yaml  # type: ignore[import-untyped]

        yaml.load("!!python/object/apply:os.getcwd []", _LOADER)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "def f():\n    from joblib import load",
        "import torch\ntorch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=is_safe)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text)",
        "eval(text)",
    ],
)
def test_what_would_run_what_it_reads_is_seen(source: str) -> None:
    assert list(dangers(source))


def test_what_is_safe_is_no_danger() -> None:
    assert not list(
        dangers("import re, json\nmodel.eval()\nre.compile(x)\ntorch.load(p, weights_only=True)\njson.load(f)")
    )
