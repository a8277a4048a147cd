"""One more axis in front: many operands at once give what each gives, for every operation that says it can."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from test_axes import Case, cases, run, same
from wasat.ir import OPS, Array, IRError, QArray, parse_type, symbol, type_of
from wasat.ir.lift import lift
from wasat.ir.types import TensorType

NAMES = sorted(OPS)


def others(case: Case) -> Iterator[tuple[tuple[bool, ...], list[list[Array]]]]:
    """Which operands vary, and the operands of three calls."""
    dense = [i for i, x in enumerate(case.arrays) if isinstance(x, np.ndarray)]
    for n in range(1, len(dense) + 1):
        for chosen in itertools.combinations(dense, n):
            calls = [case.arrays]
            for k in (1, 2):
                calls.append([np.roll(x, k) if i in chosen else x for i, x in enumerate(case.arrays)])  # type: ignore[arg-type]
            yield tuple(i in chosen for i in range(len(case.arrays))), calls


def lifts(case: Case, which: tuple[bool, ...], calls: list[list[Array]]) -> bool:
    attrs = lift(case.op, case.attrs, [type_of(x) for x in case.arrays], which, 3)
    if attrs is None:
        return False
    try:
        each = [run(case.op, arrays, case.attrs) for arrays in calls]
    except IRError:
        return False  # rolled indices of another axis
    stacked = [np.stack(xs) if up else xs[0] for up, xs in zip(which, zip(*calls))]  # type: ignore[call-overload]
    for got, want in zip(run(case.op, stacked, attrs), zip(*each)):
        if isinstance(got, QArray):
            assert all(isinstance(w, QArray) for w in want)
            for i, w in enumerate(want):
                np.testing.assert_array_equal(got.values[i], w.values)
        else:
            same(got, np.stack(want))
    return True


@pytest.mark.parametrize("name", NAMES)
def test_many_at_once_give_what_each_gives(name: str) -> None:
    few = [case for case in cases(name) if len(case.arrays) < 5]
    done = {which for case in few for which, calls in others(case) if lifts(case, which, calls)}
    first = {which[0] for which in done if which}
    op = OPS[name]
    able = {
        "reshape", "transpose", "slice", "pad", "reverse", "gather", "take_along", "concat", "softmax", "log_softmax", "sort",
        "cumsum", "top_k", "rms_norm", "layer_norm", "glu", "linear", "matmul", "one_hot", "dft",
    }  # fmt: skip
    if name in able or op.kind == "reduction" or (op.elementwise and len(next(iter(op.samples())).inputs) == 1):
        assert True in first


@pytest.mark.parametrize(
    "name, types, attrs, which",
    [
        ("softmax", ["f32[3]"], {"axis": 0}, (True,)),
        ("gather", ["f32[8, 9]", "i64[s]"], {"axis": 1}, (False, True)),  # the new axis would stand behind
        ("embedding", ["f32[9, 4]", "i64[s]"], {}, (True, True)),
        ("rope", ["f32[b, s, 2, 4]", "i64[s]", "f32[2]"], {}, (True, False, False)),
        ("conv", ["f32[2, 3, 9]", "f32[4, 3, 3]"], {"strides": (1,), "low": (0,), "high": (0,)}, (True, False)),
        ("dropout", ["f32[3]", "u32[2]"], {"rate": 0.5}, (True, False)),
    ],
)
def test_what_takes_an_axis_in_front(name: str, types: list[str], attrs: dict[str, object], which: tuple[bool, ...]) -> None:
    op, given = OPS[name], [parse_type(t) for t in types]
    made = lift(op, op.Attrs(**attrs).canonical(*given), given, which, 5)
    assert (made is not None) == (name == "softmax")


def test_the_axis_in_front_is_the_first_of_the_results() -> None:
    """A factor of rows, aligned at the end: only where it stands on their axis."""
    op = OPS["matmul"]
    for x, stands in (("f32[b, s, 1, 4]", True), ("f32[b, h, s, 1, 4]", False), ("f32[h, s, 1, 4]", False)):
        given = [parse_type(t) for t in (x, "f32[s, 4, 5]")]
        attrs = op.Attrs()
        assert (lift(op, attrs, given, (False, True), symbol("b"), own=False) == attrs) == stands


def test_positions_of_rows_may_differ() -> None:
    """Of a rotation: positions get the axis in front that x has."""
    op, given = OPS["rope"], [parse_type(t) for t in ("f32[b, s, 2, 4]", "i64[s]", "f32[2]")]
    assert all(isinstance(t, TensorType) for t in given)
    attrs = op.Attrs()
    assert lift(op, attrs, given, (False, True, False), given[0].shape[0], own=False) == attrs
    assert lift(op, attrs, given, (False, True, False), given[0].shape[0], own=True) is None
    assert lift(op, attrs, given, (False, False, True), given[0].shape[0], own=False) is None
