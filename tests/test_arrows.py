"""The house's walls: which room may import which, and how long a file may be."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).parents[1]
ALLOWED = {
    "ir": set(),
    "frontend": {"ir"},
    "passes": {"ir"},
    "backends": {"ir"},
    "runtime": set(),
    "training": {"ir", "passes", "backends"},
    "wasat": {"ir", "frontend", "passes", "backends", "runtime", "training"},
}
"""Room -> the rooms that it may import besides itself (DESIGN: the house)."""
ROOT_OF_ERRORS = "wasat.errors"
"""A class alone: what every room may import."""
DEPLOYED = {
    "numpy", "tokenizers", "tvm_ffi", "ml_dtypes", "safetensors",
    "PIL", "av", "jinja2", "wgpu", "pyopencl",  # as extras
}  # fmt: skip
"""What runtime/, which runs where the compiler is not installed, may import beyond the standard library."""
LONGEST = 500


def files(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def imports(source: str, package: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """Line and absolute name of each import in a module of ``package``, those inside functions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, f"{module}.{alias.name}"


def package_of(path: Path) -> tuple[str, ...]:
    parts = path.relative_to(ROOT).parts[:-1]
    return parts if parts[0] == "wasat" else ("wasat", *parts)


def room_of(name: str) -> str | None:
    """The room an absolute import reaches into; the face itself is ``wasat``."""
    parts = name.split(".")
    if parts[:2] == ROOT_OF_ERRORS.split("."):
        return None
    if parts[0] in ALLOWED and parts[0] != "wasat":
        return "not installed under this name"
    if parts[0] != "wasat":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in ALLOWED else "wasat"


def broken(room: str, path: Path, source: str) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{line} imports {name}; {room}/ may import {sorted(ALLOWED[room])}"
        for line, name in imports(source, package_of(path))
        if room_of(name) not in {None, room, *ALLOWED[room]}
    ]


@pytest.mark.parametrize("room", ALLOWED)
def test_rooms_import_what_the_table_allows(room: str) -> None:
    assert files(room), f"{room}/ has no Python files: is this the right folder?"
    assert not [line for path in files(room) for line in broken(room, path, path.read_text())]


@pytest.mark.parametrize("room, source", [
    ("ir", "from wasat.passes import core"), ("ir", "def f():\n    import wasat.backends.tvm"),
    ("frontend", "from ..passes import x"),
    ("passes", "from wasat import compile"), ("passes", "import backends"), ("runtime", "from wasat.ir import DType"),
    ("runtime", "from .. import ir"), ("training", "from wasat.frontend import nn"), ("backends", "import wasat"),
])  # fmt: skip
def test_a_forbidden_import_is_seen(room: str, source: str) -> None:
    assert broken(room, ROOT / room / "module.py", source)


@pytest.mark.parametrize("room, source", [
    ("ir", "from .dims import Dim"), ("passes", "from wasat.ir import Graph"), ("backends", "from ...ir import x"),
    ("wasat", "from .runtime import load"), ("training", "from wasat.passes.core import x"), ("ir", "import numpy as np"),
])  # fmt: skip
def test_an_allowed_import_passes(room: str, source: str) -> None:
    inner = ROOT / room / "tvm" / "m.py" if room == "backends" else ROOT / room / "module.py"
    assert not broken(room, inner, source)


def test_the_runtime_needs_no_compiler() -> None:
    import sys

    outside = {
        name.split(".")[0]
        for path in files("runtime")
        for _, name in imports(path.read_text(), package_of(path))
        if room_of(name) is None and not name.startswith(ROOT_OF_ERRORS)
    }
    assert outside - set(sys.stdlib_module_names) <= DEPLOYED


def _loaded(body: list[ast.stmt], package: tuple[str, ...]) -> Iterator[str]:
    """What the statements of a module import when it is loaded: not inside functions, nor for types alone."""
    for node in body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from (name for _, name in imports(ast.unparse(node), package))
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield from _loaded(getattr(node, "body", []), package)


def circles(sources: dict[str, tuple[str, tuple[str, ...]]]) -> list[list[str]]:
    """Modules that import each other, of name to source and package."""
    graph = nx.DiGraph()
    for module, (source, package) in sources.items():
        for name in _loaded(ast.parse(source).body, package):
            known = name if name in sources else name.rpartition(".")[0]
            if known in sources:
                graph.add_edge(module, known)
    return [sorted(c) for c in nx.strongly_connected_components(graph) if len(c) > 1]


def test_no_imports_go_in_circles() -> None:
    sources = {}
    for path in (p for room in ALLOWED for p in files(room)):
        package = package_of(path)
        name = ".".join(package if path.name == "__init__.py" else (*package, path.stem))
        sources[name] = (path.read_text(), package)
    assert len(sources) > 200
    assert not circles(sources)


def test_a_circle_is_seen() -> None:
    modules = {"a.x": "from . import y", "a.y": "import a.x", "a.z": "if TYPE_CHECKING:\n    import a.w\nimport a.x",
               "a.w": "import a.z\ndef f():\n    import a.x"}  # fmt: skip
    assert circles({k: (v, ("a",)) for k, v in modules.items()}) == [["a.x", "a.y"]]


def asked_for(source: str) -> Iterator[tuple[int, str]]:
    """Line and name of every operation that a source asks a node or value for, in words of its own."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("is_a", "made_by"):
            yield from ((x.lineno, x.value) for x in node.args if isinstance(x, ast.Constant))


def by_name(source: str) -> list[int]:
    """Lines that compare an operation's name."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Compare) and any(ast.unparse(x).endswith("op.name") for x in (node.left, *node.comparators))
    ]


def test_patterns_look_for_operations_that_there_are() -> None:
    """What is true of an operation stands on its class; a pattern that looks for some asks ``is_a`` or ``made_by``."""
    from wasat.ir import OPS

    found = 0
    for room in ALLOWED:
        for path in files(room):
            names = list(asked_for(path.read_text()))
            found += len(names)
            unknown = [f"{path.relative_to(ROOT)}:{line} {name}" for line, name in names if name not in OPS]
            assert not unknown, f"there are no such operations: {unknown}"
    assert found > 100


def test_rooms_compare_no_names_of_operations() -> None:
    rooms = [room for room in ALLOWED if room not in ("ir", "backends")]
    lines = [f"{p.relative_to(ROOT)}:{n}" for room in rooms for p in files(room) for n in by_name(p.read_text())]
    assert len(lines) <= 1, f"a fact of the operation, or is_a and made_by, instead of its name: {lines}"


def reads_name(source: str) -> list[int]:
    """Lines that read ``x.op.name``, but for text."""
    tree = ast.parse(source)
    texts = {id(x) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for x in ast.walk(node)}
    read = (x for x in ast.walk(tree) if id(x) not in texts and isinstance(x, ast.Attribute))
    return [x.lineno for x in read if ast.unparse(x).endswith("op.name")]


def test_passes_branch_by_name_in_their_own_patterns_alone() -> None:
    """What an operation is stands on its class. What stays by name is what a pass looks for or makes (docs/architecture.md)."""
    lines = [f"{p.relative_to(ROOT)}:{n}" for p in files("passes") for n in reads_name(p.read_text())]
    assert len(lines) <= 20, lines


def test_a_comparison_of_names_is_seen() -> None:
    assert reads_name('name = node.op.name\nf"{node.op.name}"\nRULES.get(x.op.name)') == [1, 3]
    assert by_name('if node.op.name == "add" or x.op.name not in NAMES:\n    pass') == [1, 1]
    assert list(asked_for('v.made_by("add", name)\nnode.is_a("mul")')) == [(1, "add"), (2, "mul")]


def test_no_file_is_two_files() -> None:
    every = [p for room in (*ALLOWED, "tests", "benchmarks", "examples") for p in files(room)]
    long = {str(p.relative_to(ROOT)): n for p in every if (n := len(p.read_text().splitlines())) > LONGEST}
    assert not long, f"past {LONGEST} lines a file is two files: {long}"


def test_no_two_files_of_tests_have_one_name() -> None:
    """pytest imports them by their names."""
    count = Counter(p.name for p in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, n in count.items() if n > 1] == []


def test_types_are_ignored_in_few_places() -> None:
    lines = [f"{p.relative_to(ROOT)}:{i}" for room in ALLOWED for p in files(room)
             for i, line in enumerate(p.read_text().splitlines(), 1) if "# type: ignore" in line]  # fmt: skip
    assert len(lines) <= 26, lines


def test_the_drawing_is_of_the_imports() -> None:
    """docs/architecture.md shows what docs/draw_rooms.py prints."""
    drawn = subprocess.run([sys.executable, ROOT / "docs" / "draw_rooms.py"], capture_output=True, text=True, check=True).stdout
    assert drawn in (ROOT / "docs" / "architecture.md").read_text()
