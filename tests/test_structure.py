"""The code reads in one direction: rooms import only the rooms above them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "src" / "halfbyte"

# docs/design.md says what lives in each; generate and evaluate know nothing of each other, nor do
# export and report.
ROOMS = [
    ["redaction"],
    ["errors", "user_cache", "foreign_json"],
    ["recipe"],
    ["events"],
    ["data"],
    ["kernels"],
    ["quant"],
    ["model"],
    ["plan"],
    ["optim"],
    ["engine"],
    ["checkpoint"],
    ["mirror"],
    ["generate", "evaluate"],
    ["loop"],
    ["watching"],
    ["export", "report"],
    ["trackers"],
    ["run"],
    ["finished"],
    ["cli"],
]
LEVEL = {name: level for level, names in enumerate(ROOMS) for name in names}
# Package data, and what only leads to the rooms.
NO_ROOMS = {"__init__", "__main__", "demo"}


def imports_of(source: str, package: str) -> list[tuple[str, int]]:
    """Full names of the modules that ``source``, in ``package``, imports anywhere, with lines."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parent, base] if base else parent)
            # `from halfbyte import run` names a room in its second half.
            names = [alias.name for alias in node.names]
            found += [
                (f"{base}.{name}" if base == "halfbyte" else base, node.lineno) for name in names
            ]
            found += [("*", node.lineno) for name in names if name == "*"]
    return found


def room_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "halfbyte" and len(parts) > 1 else None


def wrong_arrows(files: dict[str, str]) -> list[str]:
    """What is wrong with the imports of ``files`` (module name: source)."""
    wrong = []
    for module, source in files.items():
        here = room_of(module)
        for imported, line in imports_of(source, module.rsplit(".", 1)[0]):
            there = room_of(imported)
            if imported == "*":
                wrong.append(f"{module}:{line} imports everything of a module")
            if here is None or here in NO_ROOMS or there is None or there == here:
                continue
            if there in NO_ROOMS or (there not in LEVEL and imported.count(".") == 1):
                continue  # package data, or a name of halfbyte/__init__.py such as __version__
            if there not in LEVEL or LEVEL[there] >= LEVEL[here]:
                wrong.append(f"{module}:{line} imports {imported}, which is below {here}")
    return wrong


def cycles(files: dict[str, str]) -> list[list[str]]:
    """Modules that import one another, imports inside functions included."""
    graph: dict[str, set[str]] = {}
    for module, source in files.items():
        package = module.rsplit(".", 1)[0]
        targets = {name for name, _ in imports_of(source, package)}
        graph[module] = {t for t in targets if t in files and t != module}
    state: dict[str, int] = {}
    found: list[list[str]] = []

    def visit(module: str, path: list[str]) -> None:
        state[module] = 1
        for target in sorted(graph[module]):
            if state.get(target) == 1:
                found.append([*path[path.index(target) :], target] if target in path else path)
            elif target not in state:
                visit(target, [*path, target])
        state[module] = 2

    for module in sorted(graph):
        if module not in state:
            visit(module, [module])
    return found


@pytest.fixture(scope="module")
def files() -> dict[str, str]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts)] = path.read_text(encoding="utf-8")
    return found


def test_every_module_belongs_to_a_room(files: dict[str, str]) -> None:
    assert {room_of(m) for m in files} - {None} <= LEVEL.keys() | NO_ROOMS


def test_arrows_point_up(files: dict[str, str]) -> None:
    assert wrong_arrows(files) == []


def test_no_cycles(files: dict[str, str]) -> None:
    packages = {m.removesuffix(".__init__"): s for m, s in files.items() if "__init__" not in m}
    assert cycles(packages) == []


def test_no_file_is_a_drawer(files: dict[str, str]) -> None:
    drawers = {"utils", "util", "helpers", "helper", "common", "misc"}
    assert [m for m in files if m.rsplit(".", 1)[-1] in drawers] == []


@pytest.mark.parametrize(
    "source",
    [
        "from halfbyte.run import train",
        "import halfbyte.cli.app",
        "from halfbyte import report",
        "from ..run import train",
        "def f():\n    from halfbyte.model.load import load_base",
        "from halfbyte.recipe import *",
    ],
)
def test_a_wrong_arrow_is_seen(source: str) -> None:
    assert wrong_arrows({"halfbyte.data.prepare": source})


def test_a_cycle_is_seen() -> None:
    a, b = "from halfbyte.data.b import x", "def f():\n    from halfbyte.data.a import y"
    assert cycles({"halfbyte.data.a": a, "halfbyte.data.b": b})
