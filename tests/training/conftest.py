"""A program that several tests train is compiled once: its code follows from its text and the target."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tvm")

import tvm
from wasat.backends.tvm import build as backend
from wasat.backends.tvm.targets import Target
from wasat.ir import Program


@pytest.fixture(scope="session", autouse=True)
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    build = backend.build
    libraries: dict[tuple[str, str], backend.Library] = {}
    files: dict[int, Path] = {}
    folder = tmp_path_factory.mktemp("compiled")

    def build_once(program: Program, target: Target, *rest: Any) -> backend.Library:
        key = str(program), f"{target.tvm} {target.threads}"
        if key not in libraries:
            libraries[key] = build(program, target, *rest)
        return libraries[key]

    def linked_once(library: backend.Library) -> Any:
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
