"""What is given to the compiler by mistake: an error of Wasat's, which says what is wanted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from wasat.ir import WasatError, parse_program

import wasat as ws
from wasat import driver

PROGRAM = parse_program("graph @forward(%x: f32[n]) {\n  %y: f32[n] = exp(%x)\n  return %y\n}\n")
GIVEN: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a program to optimize": (driver.optimize, "a program is what from_pretrained"),
    "a program to run": (ws.run, "a program is what from_pretrained"),
    "a backend": (lambda x: ws.run(PROGRAM, x=[1.0], backend=x), "a target is a name such as cpu"),
    "a pipeline": (lambda x: driver.optimize(PROGRAM, passes=x), "a pipeline is a text, a pass or a list"),
    "overrides": (lambda x: driver.optimize(PROGRAM, overrides=x), "overrides are schemes by name"),
    "a folder": (ws.from_pretrained, "named by text or a Path"), "a file": (ws.load_program, "named by text or a Path"),
    "progress": (lambda x: driver.optimize(PROGRAM, progress=x), "progress is a function of a stage"),
    "progress of compiling": (lambda x: driver.compile(PROGRAM, "x", progress=x), "progress is a function of a stage"),
    "a dump": (lambda x: driver.optimize(PROGRAM, dump=x), "dump is a function of a pass's name"),
    "a place": (lambda x: driver.compile(PROGRAM, x), "named by text or a Path"),
}  # fmt: skip


@pytest.mark.parametrize("what", GIVEN)
def test_what_is_given_by_mistake(what: str) -> None:
    call, message = GIVEN[what]
    for x in (3, 1.5, True, object()):
        with pytest.raises(WasatError, match=message):
            call(x)


def test_progress_may_be_told_to_nobody() -> None:
    assert len(driver.optimize(PROGRAM, progress=None)[0].graphs) == 1


@pytest.mark.parametrize("backend", ["interpreter", "cpu"])
def test_lists_are_arrays_on_both_backends(backend: str) -> None:
    pytest.importorskip("tvm")
    assert ws.run(PROGRAM, x=[0, 0.0], backend=backend)["y"].tolist() == [1, 1]
    with pytest.raises(WasatError, match=r"input x is no f32\[n\]: it holds <U1"):
        ws.run(PROGRAM, x=["1"], backend=backend)
