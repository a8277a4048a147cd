"""Functions of positions piece by piece: on random index arithmetic, what the analysis says is what is computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from wasat.ir import Builder, DimLike, DType, Graph, TensorType, Value, evaluate, symbol
from wasat.ir.dims import evaluate_dim
from wasat.passes.analyses.affine import Affine, Piece, empty, implies, limits, number, of_array
from wasat.passes.analyses.indexing import Indexing

S = symbol("s")


class Growth:
    """Random values [s, s] or narrower, of positions alone."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.g = Graph("f")
        self.g.add_input("x", TensorType(DType.F32, (S,)))
        self.b = Builder(self.g)

    def pick(self, *xs: Any) -> Any:
        return xs[int(self.rng.integers(len(xs)))]

    def integer(self, depth: int) -> Value:
        b, at = self.b, self.b.iota(size=S)
        if depth == 0:
            return self.pick(at, b.reshape(at, shape=(S, 1)), b.constant(int(self.rng.integers(-3, 5)), "i64"))
        x = self.integer(depth - 1)
        steps = "add sub mul maximum minimum neg abs sign relu select cumsum reverse concat floor_div"
        step = self.pick(*steps.split())
        if step in ("add", "sub", "maximum", "minimum"):
            return b.emit(step, x, self.integer(depth - 1))
        if step == "mul":
            return b.mul(x, int(self.rng.integers(-2, 3)))
        if step in ("neg", "abs", "sign"):
            return b.emit(step, x)
        if step == "relu":
            return b.cast(b.relu(b.cast(x, dtype="f32")), dtype="i64")
        if step == "select":
            return b.select(self.boolean(depth - 1), x, self.integer(depth - 1))
        if step == "floor_div":
            return b.floor_div(b.mul(x, 4), 2)
        axes = [i for i, d in enumerate(x.shape) if d == S]
        if not axes:
            return x
        axis = self.pick(*axes)
        if step == "reverse":
            return b.reverse(x, axes=(axis,))
        if step == "concat":  # one more in front, and the last one gone
            zero = [0] * len(x.shape)
            low = [int(i == axis) for i in range(len(x.shape))]
            y = b.pad(x, low=tuple(low), high=tuple(zero), value=float(self.rng.integers(-2, 3)))
            return b.slice(y, starts=tuple(zero), stops=x.shape)
        one = b.broadcast_to(b.constant(int(self.rng.integers(1, 3)), "i64"), shape=(S,))
        return b.cumsum(one, axis=0, exclusive=bool(self.pick(0, 1)), reverse=bool(self.pick(0, 1)))

    def boolean(self, depth: int) -> Value:
        b = self.b
        if depth <= 0:
            table = self.pick(np.tri(40, dtype=bool), ~np.tri(40, k=1, dtype=bool), np.tri(40, k=2) - np.tri(40, k=-3) > 0)
            start = int(self.rng.integers(0, 3))
            return b.slice(b.constant(table), starts=(start, 0), stops=(S + start, S))
        step = self.pick("compare", "compare", "logical_and", "logical_or", "logical_not", "select", "cast", "transpose")
        if step == "compare":
            op = self.pick("less", "less_equal", "greater", "greater_equal", "equal", "not_equal")
            return b.emit(op, self.integer(depth - 1), self.integer(depth - 1))
        x = self.boolean(depth - 1)
        if step in ("logical_and", "logical_or"):
            return b.emit(step, x, self.boolean(depth - 1))
        if step == "logical_not":
            return b.logical_not(x)
        if step == "select":
            return b.select(self.boolean(depth - 1), x, self.boolean(depth - 1))
        if step == "cast":
            return b.not_equal(b.cast(x, dtype="f32"), 0.0)
        return b.transpose(x, perm=tuple(reversed(range(len(x.shape)))))


def _value(x: Affine, index: tuple[int, ...], env: dict[str, int]) -> int:
    return evaluate_dim(x.const, env) + sum(evaluate_dim(t, env) * i for t, i in zip(x.terms, index))


def holds(pieces: tuple[Piece, ...], array: np.ndarray, env: dict[str, int]) -> None:
    """Every element lies in one piece, and is what the piece says."""
    for index in np.ndindex(array.shape):
        own = [p for p in pieces if all(_value(c, index, env) >= 0 for c in p.where)]
        assert len(own) == 1, (index, own)
        value = own[0].value
        if value is not None:
            assert array[index] == (_value(value, index, env) if isinstance(value, Affine) else value), (index, own)


def quotient(rng: np.random.Generator, b: Builder, at: Value) -> Value:
    """Positions divided, the rest dropped; moved and spread before and after."""
    x = b.add(b.mul(at, int(rng.integers(1, 3))), int(rng.integers(-3, 4)))
    x = b.floor_div(x, b.constant(rng.integers(2, 5, (1,) * int(rng.integers(0, 3)))))
    x = b.mul(x, int(rng.integers(1, 4))) if rng.integers(2) else x
    return b.sub(x, int(rng.integers(-2, 3))) if rng.integers(2) else b.reshape(x, shape=(1, *x.shape))


@pytest.mark.parametrize("seed", range(30))
def test_compared_quotients(seed: int) -> None:
    """Of the pieces that an element lies in, one says what it is; none is unknown."""
    rng, g = np.random.default_rng(seed), Graph("f")
    b = Builder(g)
    key = b.iota(size=S)
    query = b.reshape(key, shape=(S, 1))
    y = key if rng.integers(4) == 0 else quotient(rng, b, key)
    op = ("less", "less_equal", "greater", "greater_equal", "equal", "not_equal")[seed % 6]
    v = b.emit(op, quotient(rng, b, query), y)
    g.set_outputs([v])
    pieces = Indexing([S]).pieces(v)
    assert all(isinstance(p.value, Affine) for p in pieces)
    for s in (1, 2, 5, 11):
        array = np.asarray(evaluate(g, {}, symbols={"s": s})[0])
        for index in np.ndindex(array.shape):
            own = [p.value for p in pieces if all(_value(c, index, {"s": s - 1}) >= 0 for c in p.where)]
            assert array[index] in [x.const for x in own if isinstance(x, Affine)], (index, pieces)


@pytest.mark.parametrize("by, dtype", [(-2, "i64"), (0.5, "f32"), (2, "u8"), (2, "i16")])
def test_quotients_that_are_not_compared(by: float, dtype: str) -> None:
    """By a negative number, of numbers that are no integers or that may wrap."""
    b = Builder(Graph("f"))
    x = b.cast(b.iota(size=S), dtype=dtype)
    v = b.less(b.floor_div(b.reshape(x, shape=(S, 1)), by), b.floor_div(x, by))
    assert [p.value for p in Indexing([S]).pieces(v)] == [None]


def swept(kind: str, seeds: range) -> int:
    known = 0
    for seed in seeds:
        growth = Growth(seed)
        v = getattr(growth, kind)(int(growth.rng.integers(1, 4)))
        growth.g.set_outputs([v])
        pieces = Indexing([S]).pieces(v)
        known += all(p.value is not None for p in pieces)
        for s in (1, 2, 5, 7):
            (array,) = evaluate(growth.g, {"x": np.zeros(s, np.float32)})
            holds(pieces, np.asarray(array), {"s": s - 1})  # sizes in symbols that count from 0
    return known


@pytest.mark.parametrize("kind", ["integer", "boolean"])
def test_random_arithmetic_is_what_is_computed(kind: str) -> None:
    assert swept(kind, range(60)) > 30


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["integer", "boolean"])
def test_much_random_arithmetic_is_what_is_computed(kind: str) -> None:
    assert swept(kind, range(1000, 4000)) > 1500


@pytest.mark.parametrize(
    "make",
    [
        lambda i, j: i >= j, lambda i, j: i > j + 2, lambda i, j: (i >= j) & (i - j < 3), lambda i, j: (i >= j) | (j < 3),
        lambda i, j: j < 4, lambda i, j: (j < 2) & (i > 3), lambda i, j: i == j, lambda i, j: i != j, lambda i, j: i == 2,
        lambda i, j: (i >= j) & (j != 0), lambda i, j: abs(i - j) <= 1,
    ],
)  # fmt: skip
def test_tables(make: Callable[[Any, Any], Any]) -> None:
    i, j = np.indices((7, 9))
    table = make(i, j)
    for array in (table, ~table, np.where(table, 0, -np.inf).astype(DType.BF16.np), table.astype(np.int8)[None]):
        pieces = of_array(array)
        assert pieces is not None
        holds(pieces, array, {})


@pytest.mark.parametrize(
    "make", [lambda i, j: (i + j) % 2 == 0, lambda i, j: (i >= j) ^ ((i == 3) & (j == 1)) & (j > 0), lambda i, j: i * j < 9]
)
def test_other_tables_are_not_read(make: Callable[[Any, Any], Any]) -> None:
    i, j = np.indices((7, 9))
    assert of_array(make(i, j)) is None
    assert of_array(np.full((3, 3), np.nan)) is None
    assert of_array(np.zeros((0, 3))) is None


def test_tables_beyond_what_is_looked_at_first_and_beyond_what_f64_holds() -> None:
    table = np.zeros((80, 80), np.float32)
    table[79, 3] = np.nan
    assert of_array(table) is None
    for first in (2**53, 2**53 - 1, -(2**53) - 1, -(2**53)):
        array = np.array([first, first + 1])
        found = of_array(array)
        assert found is not None
        holds(found, array, {})
    assert of_array(np.array([0, 2**53, 2**53 + 1, 4, 5])) is None
    assert of_array(np.array([2**53 - 2, 2**53 - 1])) == (Piece((), Affine((1,), 2**53 - 2)),)
    assert of_array(np.array([[3], [5]])) == (Piece((), Affine((2, 0), 3)),)
    assert of_array(3 - 2 * np.arange(40)) == (Piece((), Affine((-2,), 3)),)
    assert of_array(np.where(np.arange(40) < 39, np.arange(40), 0)) is None


@pytest.mark.parametrize("dtype", list(DType))
def test_integers_that_a_type_holds(dtype: DType) -> None:
    """All of them between the limits, at both ends; of floats not the next one, and integers end there."""
    low, high = limits(dtype)
    for x in (low, low + 1, high - 1, high):
        assert int(np.array(x).astype(dtype.np)) == x
        assert number(x, 0, dtype) == Affine((), x)
    if dtype.is_float:
        assert int(np.array(high + 1, np.float64).astype(dtype.np)) != high + 1
    elif dtype is not DType.BOOL:
        assert (low, high) == ((0, 2**dtype.bits - 1) if dtype.value[0] == "u" else (-(2 ** (dtype.bits - 1)), -low - 1))


@pytest.mark.parametrize("dtype, known", [("f8e4m3", False), ("i4", False), ("u8", True), ("f16", True)])
def test_positions_in_narrow_types(dtype: str, known: bool) -> None:
    b = Builder(Graph("f"))
    v = b.cast(b.cast(b.iota(size=40), dtype=dtype), dtype="i64")
    assert Indexing([]).pieces(v) == (Piece((), Affine((1,), 0) if known else None),)


def test_a_table_has_few_values_and_few_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    bands = np.repeat([3, 1, 7, 0, 20], 2)  # none a multiple of the others
    four, five = bands[:8], bands
    found = of_array(four)
    assert found is not None
    holds(found, four, {})
    assert of_array(five) is None
    assert of_array(np.concatenate([np.resize(four[:2], 4096), five])) is None
    box = np.pad(np.ones((2, 2), bool), 2)
    assert len(of_array(box) or ()) == 5
    monkeypatch.setattr("wasat.passes.analyses.affine.MOST_PIECES", 5)
    assert len(of_array(box) or ()) == 5
    monkeypatch.setattr("wasat.passes.analyses.affine.MOST_PIECES", 4)
    assert of_array(box) is None


@pytest.mark.parametrize("count, known", [(24, True), (25, False)])
def test_functions_of_many_pieces_are_not_followed(count: int, known: bool) -> None:
    b = Builder(Graph("f"))
    v = b.concat(*(b.constant(np.full(2, k * k)) for k in range(count)), axis=0)
    found = Indexing([]).pieces(v)
    assert len(found) == (count if known else 1)
    assert (found[0].value is not None) is known


def test_signs_that_are_known_and_that_are_not() -> None:
    def f(slope: DimLike, const: DimLike) -> Affine:
        return Affine((slope,), const)

    assert empty([f(S, -1), f(-1, 0)], (4,))  # s*i >= 1, i <= 0
    assert empty([f(-S, -1)], (4,))
    assert empty([f(1, -S)], (S,))
    assert not empty([f(1, 1 - S)], (S,))
    assert empty([f(-S - 1, 0), f(1, -1)], (4,))
    assert not empty([f(S - 1, -S), f(-1, 1)], (4,))  # s = i = 0
    assert not empty([f(1 - S, S - 2), f(1, -1)], (4,))  # s = 0, i = 2
    assert not empty([f(S, -3)], (4,))  # s = i = 2
    for above, below, known in ((16, 4, True), (13, 5, False)):  # 64 pairs are tried, with the two of the bounds, and no more
        lows, highs = [f(1, -k - 1) for k in range(above - 1)], [f(-1, -k) for k in range(below - 1)]
        assert empty([*lows, *highs], (99,)) is known


@pytest.mark.parametrize("seed", range(20))
def test_what_is_called_empty_has_no_element(seed: int) -> None:
    """Regions of random constraints on [s, s, 4]: an answer of yes is right at every size."""
    rng = np.random.default_rng(seed)
    answers = 0
    for _ in range(40):
        terms = rng.integers(-2, 3, (int(rng.integers(1, 5)), 3)).tolist()
        where = [Affine(tuple(t), int(rng.integers(-3, 4)) + int(rng.integers(-1, 2)) * S) for t in terms]
        if not empty(where, (S + 1, S + 1, 4)):
            continue
        answers += 1
        for s in range(5):
            for index in np.ndindex(s + 1, s + 1, 4):
                assert any(_value(c, index, {"s": s}) < 0 for c in where), (where, s, index)
    assert answers


def test_implication() -> None:
    i, j = Affine((1, 0), 0), Affine((0, 1), 0)
    half = i.minus(j.scaled(2))  # 2j <= i
    assert implies([half], i.minus(j), (S, S))
    assert implies([half.plus(Affine((), 1))], i.minus(j), (S, S))
    assert not implies([half.plus(Affine((), 2))], i.minus(j), (S, S))  # j is 1, i is 0
    assert not implies([], i.minus(j), (S, S))


def test_long_chains_are_followed() -> None:
    b = Builder(Graph("f"))
    v = b.iota(size=S)
    for _ in range(3000):
        v = b.add(v, 1)
    found = Indexing([S]).of(v)
    assert found is not None
    assert (found.terms, found.const) == ((1,), 3000)
