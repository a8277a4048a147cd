"""Property tests draw the same examples in every run; to search further: ``pytest --hypothesis-profile=search``.

``pytest --check-passes``: every pass that promises to keep results is checked by the interpreter, wherever one runs (slow).
``pytest --checked``: compiled kernels check the shapes and types of what the program hands them (slow).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

HERE = Path(__file__).parent
MANY = 9

settings.register_profile("same", derandomize=True, deadline=None, max_examples=100)
settings.register_profile("search", deadline=None, max_examples=3000)
settings.load_profile("same")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--check-passes", action="store_true", help="compare results around every pass, in all tests")
    parser.addoption("--checked", action="store_true", help="kernels check the shapes and types of their operands")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--check-passes"):
        from wasat import driver

        for function in (driver.optimize, driver.compile):
            function.__kwdefaults__["check"] = True
    if config.getoption("--checked"):
        from wasat.backends.tvm import targets

        targets.CHECKED = True


@pytest.hookimpl(tryfirst=True)  # before pytest chooses by marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Kernels for sets that this processor lacks, whose instructions are computed in software: `make test` runs a sixth of the
    cases of a test that has many, `make test-slow` half, `make test-all` the rest.

    Every set gets other cases, so that each case runs on one of any three sets before anything lands.
    """
    cases: dict[str, dict[str, list[pytest.Item]]] = {}  # the items of each test, and in it of each set
    for item in items:
        isa = item.callspec.params.get("isa") if isinstance(item, pytest.Function) and hasattr(item, "callspec") else None
        soft = isa is not None and isa.name.startswith("soft-") and item.get_closest_marker("skip") is None
        if soft and HERE / "backends" in item.path.parents:
            cases.setdefault(item.nodeid.partition("[")[0], {}).setdefault(isa.name, []).append(item)
    for sets in cases.values():
        for first, found in enumerate(sets.values()):
            for i, item in enumerate(found):
                turn = (i - first) % 6 if len(found) > MANY else 0
                if turn > 0:
                    item.add_marker(pytest.mark.slow)
                if turn > 3:
                    item.add_marker(pytest.mark.sweep)


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A program that several tests of a module train is compiled once: its code follows from its text and the target."""
    import tvm
    from wasat.backends.tvm import build as backend

    build, folder = backend.build, tmp_path_factory.mktemp("compiled")
    libraries: dict[tuple[str, ...], Any] = {}
    files: dict[int, Path] = {}

    def build_once(program: Any, target: Any, *rest: Any) -> Any:
        key = str(program), f"{target.tvm} {target.threads}", *map(str, rest)
        if key not in libraries:
            libraries[key] = build(program, target, *rest)
        return libraries[key]

    def linked_once(library: Any) -> Any:
        if id(library) not in files:  # kept above: an id is of one library
            files[id(library)] = folder / f"{len(files)}.so"
            library.export(files[id(library)])
        copy = folder / f"{len(list(folder.iterdir()))}.copy.so"  # the system takes a path it has loaded for what it has
        shutil.copy(files[id(library)], copy)
        return tvm.runtime.load_module(str(copy))

    with pytest.MonkeyPatch.context() as m:
        m.setattr(backend, "build", build_once)
        m.setattr(backend, "_linked", linked_once)
        yield
