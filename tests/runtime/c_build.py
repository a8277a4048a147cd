"""Programs in C and C++, each compiled once for all of pytest's processes, source by source on all cores."""

from __future__ import annotations

import fcntl
import os
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tvm_ffi
from wasat.runtime.c import HERE

SOURCES = sorted(HERE.glob("*.cc"))
PLACES = (f"-I{HERE}", "-isystem", str(Path(tvm_ffi.__file__).parent / "include"))
FLAGS = ("-O1", "-Wall", "-Wextra", "-Werror", *PLACES)
CHECKED = ("-O1", *PLACES, "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
SYSTEM = ("-ldl", "-pthread")


def shared(factory: pytest.TempPathFactory) -> Path:
    """A folder of this run of the tests, the same in all of its processes."""
    base = factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def program(out: Path, sources: Sequence[Path], flags: Sequence[str], last: Sequence[str]) -> Path:
    """The program ``out`` of C99 and C++17 sources, each compiled with ``flags``, linked with these and ``last``. Programs of a
    folder have the same flags, and share what is compiled; whoever comes while another compiles waits. Raises AssertionError
    with what the compiler says."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with (out.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not out.exists():
            objects = {out.parent / f"{s.name}.o": s for s in sources}
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(lambda o: _compiled(objects[o], o, flags), [o for o in objects if not o.exists()]))
            _run(["g++", *flags, *map(str, objects), *last, "-o", f"{out}.made"])
            Path(f"{out}.made").rename(out)  # it has its name when it is complete
    return out


def _compiled(source: Path, to: Path, flags: Sequence[str]) -> None:
    compiler = (
        ["gcc", "-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Werror"] if source.suffix == ".c" else ["g++", "-std=c++17"]
    )
    _run([*compiler, *flags, "-c", str(source), "-o", f"{to}.made"])
    Path(f"{to}.made").rename(to)


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
