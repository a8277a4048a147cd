"""Attention over caches, prefill and decode: NaN stays where the interpreter has it, and what sees nothing is 0."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from wasat.backends.tvm.build import Runner
from wasat.backends.tvm.targets import cpu
from wasat.ir import IRError, State, evaluate, parse_program

STATES = tuple(State.full(f"{r}c", r) for r in "kv")
SIZES = (1, 3)


def text(s: int, mask: str) -> str:
    step, cache = f"[b, {s}, 2, 16]", "f32[b, 32, 2, 16]"
    return (
        f"graph @{mask}{s}(%q: f32[b, {s}, 4, 16], %k: f32{step}, %v: f32{step}, %kc: {cache}, %vc: {cache}, %past: i64[b], "
        f"%m: {mask}[b, 1, {s}, 32]) {{\n  %y: f32[b, {s}, 4, 16], %k2: {cache}, %v2: {cache} = "
        "cached_attention(%q, %k, %v, %kc, %vc, %past, %m) {scale=0.3}\n  return %y, kc=%k2, vc=%v2\n}\n"
    )


@pytest.fixture(scope="module")
def compiled() -> Runner:
    program = parse_program("".join(text(s, m) for s in SIZES for m in ("bool", "f32")))
    program.declare(states=STATES)
    return Runner(program, cpu())


def inputs(s: int, mask: str) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    shapes = {"q": (2, s, 4, 16), "k": (2, s, 2, 16), "v": (2, s, 2, 16), "kc": (2, 32, 2, 16), "vc": (2, 32, 2, 16)}
    seen = np.ones((2, 1, s, 32), bool)
    made: dict[str, Any] = {k: rng.standard_normal(shape).astype(np.float32) for k, shape in shapes.items()}
    return made | {"past": np.array([5, 7]), "m": seen if mask == "bool" else np.zeros(seen.shape, np.float32)}


def agree(compiled: Runner, name: str, given: dict[str, Any]) -> np.ndarray:
    want = np.asarray(evaluate(compiled.program[name], given)[0])
    got = compiled(name, given)["y"]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    return want


@pytest.mark.parametrize("s", SIZES)
@pytest.mark.parametrize("operand, place", [
    ("q", (0, 0, 1, 3)), ("k", (1, 0, 1, 0)), ("v", (0, 0, 0, 15)), ("kc", (1, 2, 0, 5)), ("vc", (0, 4, 1, 7)),
])  # fmt: skip
def test_nan_stays(compiled: Runner, operand: str, place: tuple[int, ...], s: int) -> None:
    given = inputs(s, "bool")
    given[operand][place] = np.nan
    want = agree(compiled, f"bool{s}", given)
    assert np.isnan(want).any()
    assert np.isfinite(want).any()


@pytest.mark.parametrize("s", SIZES)
@pytest.mark.parametrize("mask", ["bool", "f32"])
def test_a_row_that_sees_nothing_is_0(compiled: Runner, mask: str, s: int) -> None:
    given = inputs(s, mask)
    given["m"][0] = False if mask == "bool" else -np.inf
    want = agree(compiled, f"{mask}{s}", given)
    assert not want[0].any()
    assert want[1].any()


@pytest.mark.parametrize("s", SIZES)
@pytest.mark.parametrize("past", [-1, 32, 1 << 40])
def test_a_past_outside_the_cache_is_refused_before_the_call(compiled: Runner, s: int, past: int) -> None:
    given = inputs(s, "bool") | {"past": np.array([5, past])}
    with pytest.raises(IRError, match=f"index {past} of past is outside 0 .. {32 - s}"):
        compiled(f"bool{s}", given)
    with pytest.raises((IRError, IndexError)):
        evaluate(compiled.program[f"bool{s}"], given)


def test_a_ring_of_nothing_is_refused() -> None:
    """Positions are counted modulo the capacity: of 0, the process died."""
    g = (
        "graph @f(%c: f32[b, n, 4], %x: f32[b, s, 4], %past: i64[b]) {\n"
        "  %y: f32[b, n, 4] = cache_update(%c, %x, %past) {ring=true}\n  return %y\n}\n"
    )
    program = parse_program(g)
    given = {"c": np.zeros((2, 0, 4), np.float32), "x": np.ones((2, 1, 4), np.float32), "past": np.zeros(2, np.int64)}
    for run in (lambda: evaluate(program["f"], given), lambda: Runner(program, cpu())("f", given)):
        with pytest.raises(IRError, match="1 <= n"):
            run()
