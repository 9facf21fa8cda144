"""Who may import whom: the architecture, held by a test.

leaves <- engine, pool, store, database, api, flush <- hub <- loader, locator, planning, generator <- training
       <- deployments
api <- web <- deployments
loadtest imports nothing of ours; but its parts engine and training measure those without HTTP
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LEAVES = {"errors", "types", "shape", "settings", "metrics", "exposition", "metrics_port", "version", "logs"}
# Each part of `serve`, and the parts it may import beside the leaves and itself.
ALLOWED: dict[str, set[str]] = {
    "engine": set(),
    "pool": set(),
    "store": set(),
    "api": set(),
    "web": {"api"},
    "loader": {"engine", "pool", "store"},
    "planning": {"engine", "loader"},
    "hub": {"store"},
    "locator": {"store", "hub"},
    "flush": set(),
    "quarantine": set(),
    "currency": {"pool", "store"},
    "usage": set(),
    "account": set(),
    "admission": {"engine"},
    "generator": {
        "engine",
        "pool",
        "store",
        "hub",
        "loader",
        "locator",
        "planning",
        "flush",
        "usage",
        "account",
        "admission",
        "quarantine",
        "currency",
    },  # fmt: skip
    "database": set(),
    "keys": {"database", "store"},
    "training": {"engine", "store", "hub", "database"},
}
LEAF_ORDER: dict[str, set[str]] = {
    "errors": set(),
    "types": {"errors"},
    "shape": {"errors"},
    "settings": set(),
    "metrics": {"version"},
    "exposition": {"logs", "metrics"},
    "metrics_port": {"logs", "metrics"},
    "version": set(),
    "logs": {"errors", "settings"},
}
FILES = sorted(path for top in ("serve", "deployments", "loadtest", "tests") for path in (ROOT / top).rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """(module, line) of every import, those inside functions too; relative ones with their dots."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield base, node.lineno
            if node.module == "serve":  # `from serve import engine` reaches further than it says
                for alias in node.names:
                    yield f"serve.{alias.name}", node.lineno


def part_of(path: Path) -> str:
    """`engine` for serve/engine/x.py, `generator` for serve/generator.py."""
    return path.relative_to(ROOT / "serve").parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_what_lies_below_it(path: Path) -> None:
    top = path.relative_to(ROOT).parts[0]
    wrong: list[str] = []
    for module, line in imports(path):
        first, *rest = module.split(".")
        inside = rest[0] if rest else ""
        if module.startswith("."):
            wrong.append(f"line {line}: relative import {module}")
        elif first == "ray" and top in ("serve", "loadtest"):
            wrong.append(f"line {line}: only deployments may import ray")
        elif module == "serve" and top != "tests":
            wrong.append(f"line {line}: write 'from serve.x import Y'")
        elif first == "serve" and top == "loadtest" and path.parent.name not in ("engine", "training"):
            wrong.append(f"line {line}: loadtest speaks HTTP only")
        elif first == "deployments" and top in ("serve", "loadtest"):
            wrong.append(f"line {line}: {top} may not import deployments")
        elif first == "tests" and top != "tests":
            wrong.append(f"line {line}: product code may not import tests")
        elif first == "serve" and top == "serve":
            own = part_of(path)
            allowed = LEAF_ORDER[own] | {own} if own in LEAVES else LEAVES | ALLOWED[own] | {own}
            if inside and inside not in allowed:
                wrong.append(f"line {line}: serve.{own} may not import serve.{inside}")
    assert not wrong, "\n".join(wrong)


def test_every_part_of_serve_has_its_rule() -> None:
    parts = {part_of(path) for path in (ROOT / "serve").rglob("*.py")} - {"__init__"}
    assert parts <= LEAVES | ALLOWED.keys()


def test_there_are_no_import_cycles() -> None:
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in FILES
        if path.relative_to(ROOT).parts[0] != "tests"
    }
    graph = {name: {m for m, _ in imports(path) if m in modules and m != name} for name, path in modules.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, "cycle: " + " -> ".join((*trail[trail.index(name) :], name))
        if name not in done:
            for other in graph[name]:
                visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())
