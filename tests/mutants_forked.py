"""A plugin of pytest for `mutants.py`: tries many mutants on tests that are collected once.

For each one it forks, gives the functions that the mutant changes their new code, and runs the tests. What a mutant changes in
other places (tables, defaults, what was made when a test was imported) stays as it is: that a test fails is certain, that none
does is not.
"""
from __future__ import annotations

import gc
import json
import os
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FunctionType

import pytest
from _pytest.main import pytest_runtestloop as run_tests


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for x in code.co_consts:
        if isinstance(x, CodeType):
            yield from _codes(x)


def _patch(path: str, old: str, new: str) -> None:
    before, after = (list(_codes(compile(text, path, "exec", dont_inherit=True))) for text in (old, new))
    if [c.co_qualname for c in before] != [c.co_qualname for c in after]:
        return
    made = {(a.co_qualname, a.co_firstlineno): b for a, b in zip(before, after)}
    for f in gc.get_objects():
        if isinstance(f, FunctionType) and f.__code__.co_filename == path:
            code = made.get((f.__code__.co_qualname, f.__code__.co_firstlineno))
            if code is not None and code.co_freevars == f.__code__.co_freevars:
                f.__code__ = code


def _forked(session: pytest.Session, path: str, old: str, new: str, limit: float) -> int:
    """The exit status of a process that runs the tests with a mutant: 1 if one fails."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    signal.alarm(30 * int(limit))
    resource.setrlimit(resource.RLIMIT_CPU, (int(limit) + 1, int(limit) + 1))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    status = 0
    try:
        _patch(path, old, new)
        run_tests(session)
        status = int(session.testsfailed > 0)
    except session.Failed:
        status = 1
    except BaseException:  # of the machinery, not of a test
        status = 2
    os._exit(status)


def pytest_runtestloop(session: pytest.Session) -> bool:
    given = json.loads(Path(os.environ["MUTANTS"]).read_text())
    path, old = given["path"], given["source"]
    modules = [m for m in list(sys.modules.values()) if getattr(m, "__file__", None) == path]
    sound = bool(modules) and _forked(session, path, old, old, given["limit"]) == 0
    killed = [sound and _forked(session, path, old, new, given["limit"]) == 1 for new in given["mutants"]]
    Path(os.environ["MUTANTS"]).write_text(json.dumps(killed))
    return True
