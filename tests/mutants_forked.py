"""A plugin of pytest for `mutants.py`: tries many mutants on tests that are collected once.

First each test runs alone in a fork that notes its seconds and which lines of the file it reaches. Then for each mutant it
forks, gives the functions that the mutant changes their new code, and runs the tests that reach the changed statement, the
shortest first, until one fails or they have taken long enough. What a mutant changes in other places (tables, defaults, what
was made when a test was imported) stays as it is: `mutants.py` tries again what changes more than the inside of functions.
"""
from __future__ import annotations

import ast
import gc
import itertools
import json
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import NamedTuple

import pytest


class Reached(NamedTuple):
    """What one test is without a mutant: its seconds of the processor, and the lines of the file that it runs."""
    seconds: float
    lines: frozenset[int]


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for x in code.co_consts:
        if isinstance(x, CodeType):
            yield from _codes(x)


def _patch(functions: Sequence[FunctionType], path: str, old: str, new: str) -> bool:
    """Gives functions the code that they have in another text; False where it defines others, or those read other variables."""
    before, after = (list(_codes(compile(text, path, "exec", dont_inherit=True))) for text in (old, new))
    told = [[(c.co_qualname, c.co_freevars) for c in codes] for codes in (before, after)]
    if told[0] != told[1]:
        return False
    made = {(a.co_qualname, a.co_firstlineno): b for a, b in zip(before, after)}
    for f in functions:
        code = made.get((f.__code__.co_qualname, f.__code__.co_firstlineno))
        if code is not None:
            f.__code__ = code
    return True


def statement(source: str, mutant: str) -> set[int]:
    """The lines of the statement that a mutant changes; of a compound one its head."""
    old, new = source.splitlines(), mutant.splitlines()
    line = next((i for i, (a, b) in enumerate(zip(old, new), 1) if a != b), 1)
    within = [x for x in ast.walk(ast.parse(source)) if isinstance(x, ast.stmt) and x.lineno <= line <= (x.end_lineno or 0)]
    if not within:
        return {line}
    last = max(within, key=lambda x: x.lineno)
    body = getattr(last, "body", None)
    end = max(body[0].lineno, last.lineno + 1) if body else (last.end_lineno or 0) + 1
    return set(range(last.lineno, end))


def _forked(limit: float, work: Callable[[], int]) -> int:
    """The exit status of a process that does the work, with a limit in seconds of the processor."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    signal.alarm(30 * int(limit + 1))
    resource.setrlimit(resource.RLIMIT_CPU, (int(limit) + 1, int(limit) + 1))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    try:
        os._exit(work())
    except BaseException:  # of the machinery, not of a test
        os._exit(2)


def _tried(session: pytest.Session, items: Sequence[pytest.Item]) -> int:
    """1 if a test fails, else 0."""
    for item, following in zip(items, [*items[1:], None]):
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        if session.testsfailed:
            return 1
    return 0


def _reached(session: pytest.Session, item: pytest.Item, path: str, noted: Path, limit: float) -> Reached | None:
    """What a test reaches when it runs alone; None if it fails so."""
    def work() -> int:
        lines: set[int] = set()

        def inside(frame: FrameType, event: str, arg: object) -> object:
            lines.add(frame.f_lineno)
            return inside

        def called(frame: FrameType, event: str, arg: object) -> object:
            return inside(frame, event, arg) if frame.f_code.co_filename == path else None

        before = time.process_time()
        threading.settrace(called)  # type: ignore[arg-type]
        sys.settrace(called)  # type: ignore[arg-type]
        status = _tried(session, [item])
        sys.settrace(None)
        noted.write_text(json.dumps([time.process_time() - before, sorted(lines)]))
        return status

    if _forked(limit, work):
        return None
    seconds, lines = json.loads(noted.read_text())
    return Reached(seconds, frozenset(lines))


def pytest_runtestloop(session: pytest.Session) -> bool:
    """Writes for each mutant whether a test failed (None if that was not tried), and the tests that reach its statement."""
    told = Path(os.environ["MUTANTS"])
    given = json.loads(told.read_text())
    path, old, limit = given["path"], given["source"], given["limit"]
    functions = [f for f in gc.get_objects() if isinstance(f, FunctionType) and f.__code__.co_filename == path]
    alone = [_reached(session, item, path, told.with_suffix(".noted"), limit) for item in session.items]
    answers = []
    for new in given["mutants"]:
        lines = statement(old, new)
        reaching = sorted((r.seconds, i) for i, r in enumerate(alone) if r and r.lines & lines)
        until = itertools.accumulate(s for s, _ in reaching)
        reaching = [x for x, total in zip(reaching, until) if total <= given["within"]]
        items = [session.items[i] for _, i in reaching]

        def work(new: str = new, items: Sequence[pytest.Item] = items) -> int:
            return _tried(session, items) if _patch(functions, path, old, new) else 2

        allowed = min(limit, 10 + 3 * sum(s for s, _ in reaching))
        status = _forked(allowed, work) if items else 2
        killed = None if status == 2 else status != 0
        answers.append({"killed": killed, "tests": [x.nodeid for x in items]})
    told.write_text(json.dumps({"failing": [x.nodeid for x, r in zip(session.items, alone) if r is None], "answers": answers}))
    return True
