"""The algebra that operations say of themselves, proved on numbers that would break it: -0, infinities, NaN, ends."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from wasat.ir import OPS, Builder, DType, Graph, Op, evaluate, type_of

BINARY = [n for n, op in OPS.items() if op.elementwise and all(len(s.inputs) == 2 for s in op.samples())]
NEUTRAL = [n for n in BINARY if any(OPS[n].neutral(d) is not None for d in (DType.F32, DType.I32, DType.BOOL))]
UNARY = [n for n, op in OPS.items() if op.involution]
ODD = np.array([-np.inf, -3.4e38, -1.5, -0.0, 0.0, 1e-40, 1, 7.25, np.inf, np.nan])


def operands(op: Op) -> Iterator[np.ndarray]:
    """First operands of every element type among the samples, and odd ones."""
    for dtype in {np.asarray(s.inputs[0]).dtype for s in op.samples()}:
        kind = DType.of(dtype)
        if kind.is_float:
            with np.errstate(over="ignore"):
                yield ODD.astype(dtype)
        elif kind.is_int:
            ends = np.iinfo(dtype)
            yield np.array([ends.min, ends.min + 1, 0, 1, 5, ends.max], dtype)
        else:
            yield np.array([False, True])


def run(op: Op, *xs: np.ndarray) -> np.ndarray:
    g = Graph("g")
    g.set_outputs([Builder(g).emit(op, *(g.add_input(f"x{i}", type_of(x)) for i, x in enumerate(xs)))])
    with np.errstate(all="ignore"):
        return np.asarray(evaluate(g, {f"x{i}": x for i, x in enumerate(xs)})[0])


def same(got: np.ndarray, want: np.ndarray) -> None:
    """To the bit; any NaN is one."""
    np.testing.assert_array_equal(got, want)
    if want.dtype.kind == "f":
        number = ~np.isnan(want)
        np.testing.assert_array_equal(np.signbit(got[number]), np.signbit(want[number]))


@pytest.mark.parametrize("name", NEUTRAL)
def test_a_neutral_operand_leaves_the_other_as_it_is(name: str) -> None:
    op, seen = OPS[name], 0
    for x in operands(op):
        if (n := op.neutral(DType.of(x.dtype))) is None:
            continue
        beside = np.full_like(x, n)
        same(run(op, x, beside), x)
        if op.commutative:
            same(run(op, beside, x), x)
        seen += 1
    assert seen


@pytest.mark.parametrize("name", [n for n in BINARY if OPS[n].commutative])
def test_operands_may_be_exchanged(name: str) -> None:
    for x in operands(OPS[name]):
        a, b = (g.ravel() for g in np.meshgrid(x, x))
        got, want = run(OPS[name], a, b), run(OPS[name], b, a)
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("name", [n for n in BINARY if OPS[n].idempotent])
def test_of_one_value_twice_it_is_the_value(name: str) -> None:
    for x in operands(OPS[name]):
        same(run(OPS[name], x, x), x)


@pytest.mark.parametrize("name", UNARY)
def test_twice_it_is_nothing(name: str) -> None:
    for x in operands(OPS[name]):
        same(run(OPS[name], run(OPS[name], x)), x)


@pytest.mark.parametrize("name", [n for n in BINARY if OPS[n].absorbing is not None])
def test_what_absorbs_is_the_result(name: str) -> None:
    for x in operands(OPS[name]):
        x = x[np.isfinite(x)] if x.dtype.kind == "f" else x
        a = np.full_like(x, OPS[name].absorbing)
        for got in (run(OPS[name], x, a), run(OPS[name], a, x)):
            np.testing.assert_array_equal(got, a)


def test_what_says_nothing_of_itself_is_none_of_these() -> None:
    """Of all operations of one or two operands, those that have such a property say so."""
    for name in BINARY:
        op = OPS[name]
        for x in operands(op):
            a, b = (g.ravel() for g in np.meshgrid(x, x))
            made = run(op, a, b)
            if made.dtype == x.dtype and np.array_equal(made, run(op, b, a), equal_nan=x.dtype.kind == "f"):
                assert op.commutative, f"{name} commutes for {x.dtype}"
            if made.dtype == x.dtype and np.array_equal(run(op, x, x), x, equal_nan=x.dtype.kind == "f"):
                assert op.idempotent, f"{name} is idempotent for {x.dtype}"
