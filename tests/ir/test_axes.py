"""Axis rules, proved on every operation's samples: what an element of an operand reaches, what may be cut, what adds up."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose
from wasat.ir import OPS, Array, BlockArray, Builder, DType, Graph, IRError, Op, QArray, Sample, evaluate, type_of
from wasat.ir.axes import Axes, AxisRule, Factor, regrouped
from wasat.ir.dim_text import parse_dim

NAMES = sorted(OPS)


@dataclasses.dataclass
class Case:
    """An operation on a sample."""

    op: Op
    arrays: list[Array]
    attrs: Any
    rule: AxisRule
    results: list[Array]


def run(op: Op, arrays: Sequence[Array], attrs: Any) -> list[Array]:
    g = Graph("g")
    values = [g.add_input(f"x{i}", type_of(x)) for i, x in enumerate(arrays)]
    g.set_outputs(g.add_node(op, values, attrs).outputs)
    return evaluate(g, {f"x{i}": x for i, x in enumerate(arrays)})


def cases(name: str) -> Iterator[Case]:
    op = OPS[name]
    samples: list[Sample] = [*op.samples(), *MORE.get(name, ())]
    for sample in samples:
        arrays = [x if isinstance(x, QArray) else np.asarray(x) for x in sample.inputs]
        g = Graph("g")
        Builder(g).emit(op, *(g.add_input(f"x{i}", type_of(x)) for i, x in enumerate(arrays)), **sample.attrs)
        attrs = next(g.nodes).attrs
        yield Case(op, arrays, attrs, op.axes(attrs, *map(type_of, arrays)), run(op, arrays, attrs))


MORE = {
    "reshape": [
        Sample([np.arange(48.0).reshape(6, 8)], {"shape": (2, 3, 4, 2)}),
        Sample([np.arange(24.0).reshape(2, 3, 4)], {"shape": (6, 1, 2, 2)}),
        Sample([np.arange(24.0).reshape(4, 6)], {"shape": (6, 4)}),
    ],
    "slice": [Sample([np.arange(20.0).reshape(4, 5)], {"starts": (0, 1), "stops": (4, 4)})],
    "scatter": [Sample([np.zeros((2, 3, 2)), np.array([1, 0]), np.ones((2, 2, 2))], {"axis": 1, "reduce": "add"})],
    "scatter_along": [Sample([np.zeros((2, 3)), np.array([[2, 2], [0, 1]]), np.ones((2, 2))], {"axis": 1, "reduce": "add"})],
}


def coordinates(axes: Axes, shape: Sequence[int]) -> dict[Factor, np.ndarray]:
    """For each factor, the index along it of every element of a tensor."""
    found = {}
    for axis, (factors, index) in enumerate(zip(axes, np.indices(tuple(shape)))):
        sizes = [int(f.size) for f in factors] if len(factors) > 1 else [shape[axis]] * len(factors)  # type: ignore[arg-type]
        for k, f in enumerate(factors):
            found[f] = index // math.prod(sizes[k + 1 :]) % sizes[k]
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_rule_names_every_axis(name: str) -> None:
    op = OPS[name]
    assert type(op).axes is not Op.axes or op.kind in ("elementwise", "source", "random")
    for case in cases(name):
        alone: dict[Factor, set[int]] = {}
        for given, axes in ((case.arrays, case.rule.operands), (case.results, case.rule.results)):
            assert len(given) == len(axes)
            for x, own in zip(given, axes):
                assert len(own) == len(x.shape)
                flat = [f for axis in own for f in axis]
                assert len(set(flat)) == len(flat)  # a factor stands once
                for d, factors in zip(x.shape, own):
                    if len(factors) > 1:
                        assert math.prod(int(f.size) for f in factors) == d  # type: ignore[arg-type]
                    elif factors:
                        alone.setdefault(factors[0], set()).add(d)
                    assert factors or d == 1
        for f, sizes in alone.items():  # windows are fewer than what they are of; of what is whole nothing is said
            assert f.role == "whole" or (f.size in sizes if f.role == "window" else {f.size} == sizes), (f, sizes)


def moved(x: Array, at: tuple[int, ...]) -> Array | None:
    """``x`` with another element at ``at``, one that it could have."""
    if isinstance(x, BlockArray):  # another code of the block
        data = x.data.copy()
        data[(*at[:-1], at[-1] // x.scheme.block, x.scheme.size // 2)] ^= 0x11
        return BlockArray(x.type, data)
    if isinstance(x, QArray):
        values = x.values.copy()
        values[at] = values[at] // 2 + 3
        return dataclasses.replace(x, values=values)
    y = x.copy()
    if x.dtype == np.bool_:
        y[at] = not x[at]
    elif x.dtype.kind in "iu":
        others = [v for v in np.unique(x) if v != x[at]]
        if not others:
            return None
        y[at] = others[hash(at) % len(others)]
    else:
        y[at] = x.dtype.type(0.3) if np.isnan(x[at].astype(np.float64)) else x[at] + x.dtype.type(0.625)
    return y


def differs(a: Array, b: Array) -> np.ndarray:
    if isinstance(a, QArray) and isinstance(b, QArray):
        a, b = a.dense(DType.F32), b.dense(DType.F32)
    assert isinstance(a, np.ndarray)
    assert isinstance(b, np.ndarray)
    if a.dtype.kind in "fV":
        a, b = a.astype(np.float64), b.astype(np.float64)
        return np.asarray((a != b) & ~(np.isnan(a) & np.isnan(b)))
    return np.asarray(a != b)


@pytest.mark.parametrize("name", NAMES)
def test_an_element_reaches_only_what_the_rule_says(name: str) -> None:
    """And what is said to be normalized, ordered or a window is not free, on some sample."""
    rng, crossed, said = np.random.default_rng(0), set(), set()
    for case in cases(name):
        shared = {f for axes in case.rule.results for axis in axes for f in axis}
        for i, x in enumerate(case.arrays):
            places = list(np.ndindex(*x.shape))
            said |= {f.role for axis in case.rule.operands[i] for f in axis if f in shared and f.size != 1}
            own = coordinates(case.rule.operands[i], x.shape)
            for k in rng.permutation(len(places))[:12]:
                at = places[k]
                changed = moved(x, at)
                if changed is None:
                    continue
                try:
                    results = run(case.op, [changed if j == i else y for j, y in enumerate(case.arrays)], case.attrs)
                except (IRError, ZeroDivisionError):
                    continue  # an index outside, say
                for old, new, axes in zip(case.results, results, case.rule.results):
                    there = differs(old, new)
                    for f, index in coordinates(axes, old.shape).items():
                        if f not in own:
                            continue
                        here, reached = int(own[f][at]), index[there]
                        if (reached != here).any():
                            crossed.add(f.role)
                        assert allowed(f, here, reached), (case.attrs, i, at, f, sorted(set(reached.tolist())))
    assert said - crossed <= {"free", "whole", "indexed", "repeated"}, "the rule says less than what is so"


def allowed(f: Factor, here: int, reached: np.ndarray) -> bool:
    if f.role == "free":
        return bool((reached == here).all())
    if f.role == "ordered":
        return bool((reached >= here).all() if f.how == "forward" else (reached <= here).all())
    if f.role == "window":
        assert f.window is not None
        before, after, stride = (int(n) for n in f.window)  # type: ignore[arg-type]
        return bool(((reached * stride - before <= here) & (here <= reached * stride + after)).all())
    return f.role != "reduced"


# -- cutting ---------------------------------------------------------------------------------------------------------------
def cut(x: Array, axes: Axes, f: Factor, lo: int, hi: int) -> Array:
    """The elements from lo to hi along a factor, the outermost of its axis."""
    for axis, factors in enumerate(axes):
        if factors[:1] == (f,):
            n = x.shape[axis]
            inner = n // int(f.size) if len(factors) > 1 else 1  # type: ignore[arg-type]
            at = (slice(None),) * axis + (slice(lo * inner, hi * inner),)
            if isinstance(x, QArray):
                return x.rows(at)
            x = x[at]
    return x


def cuttable(case: Case, role: str) -> Iterator[tuple[Factor, int]]:
    """Factors of a role, outermost wherever they stand, and where to cut them."""
    every = [axis for axes in (*case.rule.operands, *case.rule.results) for axis in axes]
    for f in dict.fromkeys(f for axes in case.rule.operands for axis in axes for f in axis):
        outermost = all(f not in axis[1:] for axis in every)
        if f.role == role and f.size not in (0, 1) and outermost and getattr(case.attrs, "groups", 1) == 1:
            yield f, (int(f.size) + 1) // 2  # type: ignore[call-overload]


def fitting(case: Case, f: Factor, n: int) -> Any:
    """Attributes for the sizes of a part."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(case.attrs):
        if field.name in ("shape", "stops"):
            sizes = list(getattr(case.attrs, field.name))
            for axis, factors in enumerate(case.rule.results[0]):
                if factors[:1] == (f,):
                    sizes[axis] = sizes[axis] // f.size * n if len(factors) > 1 else n
            changes[field.name] = tuple(sizes)
    return dataclasses.replace(case.attrs, **changes) if changes else case.attrs


def part(case: Case, f: Factor, lo: int, hi: int) -> list[Array]:
    arrays = [cut(x, axes, f, lo, hi) for x, axes in zip(case.arrays, case.rule.operands)]
    return run(case.op, arrays, fitting(case, f, hi - lo))


def same(got: Array, want: Array) -> None:
    if isinstance(got, QArray) and isinstance(want, QArray):
        np.testing.assert_array_equal(got.values, want.values)
        np.testing.assert_array_equal(got.scales, want.scales)
        return
    assert isinstance(got, np.ndarray)
    assert isinstance(want, np.ndarray)
    narrow = want.dtype.itemsize <= 2 and want.dtype.kind not in "iub"
    if want.dtype.kind in "iub":
        np.testing.assert_array_equal(got, want)
    else:
        tolerance = 2e-3 if narrow else 1e-5
        assert_allclose(got.astype(np.float64), want.astype(np.float64), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_pieces_along_a_free_factor_make_the_whole(name: str) -> None:
    for case in cases(name):
        for f, at in cuttable(case, "free"):
            for lo, hi in ((0, at), (at, int(f.size))):  # type: ignore[arg-type]
                for got, want, axes in zip(part(case, f, lo, hi), case.results, case.rule.results):
                    same(got, cut(want, axes, f, lo, hi))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_ordered_begins_as_its_beginning(name: str) -> None:
    """Of the first elements (backward: of the last) comes the first part of the result."""
    for case in cases(name):
        for f, at in cuttable(case, "ordered"):
            size = int(f.size)  # type: ignore[arg-type]
            lo, hi = (0, at) if f.how == "forward" else (at, size)
            if lo == hi or (name == "attention" and len(case.arrays) > 3):  # a mask over keys would have to be cut twice
                continue
            for got, want, axes in zip(part(case, f, lo, hi), case.results, case.rule.results):
                if any(f in axis for axis in axes):
                    same(got, cut(want, axes, f, lo, hi))


COMBINE = {
    "sum": np.add, "prod": np.multiply, "max": np.maximum, "min": np.minimum, "any": np.logical_or, "all": np.logical_and,
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_partial_results_are_put_together_as_the_rule_says(name: str) -> None:
    hows = set()
    for case in cases(name):
        for f, at in cuttable(case, "reduced"):
            hows.add(f.how)
            if not f.how:
                continue
            parts = [part(case, f, lo, hi) for lo, hi in ((0, at), (at, int(f.size)))]  # type: ignore[arg-type]
            for a, b, want in zip(*parts, case.results):
                assert isinstance(want, np.ndarray)
                same(np.asarray(COMBINE[f.how](a, b)).astype(want.dtype), want)
    if name in ("matmul", "linear", "conv") or name in {f"reduce_{how}" for how in COMBINE}:
        assert hows - {""}


@pytest.mark.parametrize("name", NAMES)
def test_what_is_repeated_is_the_same_everywhere(name: str) -> None:
    for case in cases(name):
        for x, axes in zip(case.results, case.rule.results):
            for axis, factors in enumerate(axes):
                if factors and all(f.role == "repeated" for f in factors):
                    assert isinstance(x, np.ndarray)
                    assert (x == np.take(x, [0], axis)).all()


# -- reshapes --------------------------------------------------------------------------------------------------------------
def text(axes: Axes) -> str:
    return " ".join("*".join(f"{f.size}{'?' if f.role == 'whole' else ''}" for f in axis) or "1" for axis in axes)


@pytest.mark.parametrize(
    "old, new, factors",
    [
        ("b s 8", "b s 2 4", "b s 2*4 -> b s 2 4"),
        ("b*s 8", "b s 8", "b*s 8 -> b s 8"),
        ("b s 2 4", "b*s 8", "b s 2 4 -> b*s 2*4"),
        ("2 b 2 s", "4*b s", "2 b 2 s -> 2*b*2 s"),
        ("1 s 4", "s 1 4", "1 s 4 -> s 1 4"),
        ("4 b s", "b 4 s", "4? b? s -> b? 4? s"),
        ("s 16", "16 s", "s? 16? -> 16? s?"),
        ("p q s", "r s", "p? q? s -> r? s"),
        ("6 b", "2 3*b", "2*3 b -> 2 3*b"),
        ("b s", "b*s", "b s -> b*s"),
        ("b s d", "s b d", "b? s? d -> s? b? d"),
        ("2 3", "3 2", "2? 3? -> 3? 2?"),
    ],
)
def test_regrouped(old: str, new: str, factors: str) -> None:
    sizes = [tuple(parse_dim(d) for d in t.split()) for t in (old, new)]
    rule = regrouped(*sizes)
    assert f"{text(rule.operands[0])} -> {text(rule.results[0])}" == factors

