"""Compiled float operations where infinities, NaN, zeros of either sign and unlucky roundings decide, against the reference."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("tvm")

from wasat.backends.tvm.build import Runner
from wasat.backends.tvm.targets import cpu
from wasat.ir import evaluate, parse_program

FLOATS = ("f64", "f32", "f16", "bf16")
PAIRWISE = ("maximum", "minimum", "mod", "floor_div", "not_equal")
REDUCED = ("reduce_max", "reduce_min")
PLACES = ("arg_max", "arg_min")
SPECIAL = np.array([np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, -2.0, 0.1, 7.5])


def _graph(op: str, t: str) -> str:
    head = f"graph @{op}_{t}(%x: {t}[m, n], %y: {t}[m, n]) {{\n"
    if op in PAIRWISE:
        return f"{head}  %z: {'bool' if op == 'not_equal' else t}[m, n] = {op}(%x, %y)\n  return %z\n}}\n"
    attr = "axes=(1,)" if op in REDUCED else "axis=1"
    return f"{head}  %z: {t if op in REDUCED else 'i64'}[m] = {op}(%x) {{{attr}}}\n  return %z\n}}\n"


@pytest.fixture(scope="module")
def compiled() -> Runner:
    return Runner(parse_program("".join(_graph(op, t) for op in PAIRWISE + REDUCED + PLACES for t in FLOATS)), cpu())


@pytest.mark.parametrize("op", PAIRWISE + REDUCED + PLACES)
@pytest.mark.parametrize("t", FLOATS)
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_every_pair_of_special_numbers(op: str, t: str, compiled: Runner) -> None:
    g = compiled.program[f"{op}_{t}"]
    a, b = (v.ravel().astype(g.inputs[0].tensor.dtype.np) for v in np.meshgrid(SPECIAL, SPECIAL))
    feeds = {"x": np.stack([a, b], 1), "y": np.stack([b, a], 1)}
    (want,) = evaluate(g, feeds)
    assert isinstance(want, np.ndarray)
    got = compiled(g.name, feeds)["z"]
    np.testing.assert_array_equal(got.astype(np.float64), want.astype(np.float64))


def test_remainders_are_exact() -> None:
    """Also where x / y is too large for its floor to be told from its neighbours."""
    program = parse_program("".join(_graph(op, "f32") for op in ("mod", "floor_div")))
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((50, 40)) * 10.0 ** rng.integers(-3, 9, (50, 40))).astype(np.float32)
    y = rng.standard_normal((50, 40)).astype(np.float32)
    run = Runner(program, cpu())
    for name, g in program.graphs.items():
        (want,) = evaluate(g, {"x": x, "y": y})
        np.testing.assert_array_equal(run(name, {"x": x, "y": y})["z"], want)


def test_places_in_rows_of_the_worst_integer() -> None:
    program = parse_program("""graph @f(%x: i32[2, n], %y: i32[2, n]) {
  %most: i64[2] = arg_max(%x) {axis=1}
  %least: i64[2] = arg_min(%y) {axis=1}
  return %most, %least
}""")
    info = np.iinfo(np.int32)
    got = Runner(program, cpu())("f", {"x": np.full((2, 3), info.min, "i4"), "y": np.full((2, 3), info.max, "i4")})
    np.testing.assert_array_equal(got["most"], [0, 0])
    np.testing.assert_array_equal(got["least"], [0, 0])


def test_nan_is_true() -> None:
    program = parse_program("graph @f(%x: f32[n]) {\n  %y: bool[n] = cast(%x) {dtype=bool}\n  return %y\n}")
    got = Runner(program, cpu())("f", {"x": np.array([np.nan, 0.0, -0.0, 1e-45], np.float32)})["y"]
    np.testing.assert_array_equal(got, [True, False, False, True])


def test_the_maximum_of_a_masked_row_is_recognized() -> None:
    """It is -inf, not the least finite number: what exported attention tells a row by that is masked whole."""
    program = parse_program("""graph @f(%x: f32[2, n]) {
  %m: f32[2, 1] = reduce_max(%x) {axes=(1,), keepdims=true}
  %empty: bool[2, 1] = equal(%m, -inf:f32)
  return %m, %empty
}""")
    x = np.array([[-np.inf, -np.inf], [0.0, -np.inf]], np.float32)
    got = Runner(program, cpu())("f", {"x": x})
    np.testing.assert_array_equal(got["empty"], [[True], [False]])


def test_sizes_that_are_equal_at_run_time() -> None:
    """An operand [10] and one [n] broadcast: the graph checks that n is 10."""
    program = parse_program("""graph @f(%x: f32[10], %y: f32[n], %c: bool[2, m]) {
  %s: f32[10] = add(%x, %y)
  %p: f32[10] = pow(%y, %x)
  %q: f32[10] = maximum(%y, %x)
  %r: f32[2, 10] = select(%c, %x, %y)
  return %s, %p, %q, %r
}""")
    feeds = {"x": np.arange(10, dtype=np.float32) / 4, "y": np.ones(10, np.float32), "c": np.arange(20).reshape(2, 10) % 3 == 0}
    got = Runner(program, cpu())("f", feeds)
    for name, want in zip(program["f"].output_names, evaluate(program["f"], feeds)):
        np.testing.assert_allclose(got[name], want, rtol=1e-6)


@pytest.mark.parametrize("t", FLOATS)
def test_near_zero(t: str) -> None:
    """expm1 and log1p do not lose what exp and log of a sum with 1 would."""
    program = parse_program("".join(
        f"graph @{op}(%x: {t}[n]) {{\n  %y: {t}[n] = {op}(%x)\n  return %y\n}}\n" for op in ("expm1", "log1p")
    ))  # fmt: skip
    x = np.array([0.0, 1e-7, -1e-4, 0.3, 2.0]).astype(program["expm1"].inputs[0].tensor.dtype.np)
    run = Runner(program, cpu())
    for name, g in program.graphs.items():
        (want,) = evaluate(g, {"x": x})
        assert isinstance(want, np.ndarray)
        tol = {"f64": 1e-13, "f32": 1e-6, "f16": 2e-3, "bf16": 2e-2}[t]
        np.testing.assert_allclose(run(name, {"x": x})["y"].astype(float), want.astype(float), rtol=tol)
