"""One sweep over every operation: reference, decomposition, inferred types, text, refusals, gradients."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from wasat.ir import (
    OPS,
    Array,
    Body,
    Builder,
    DimError,
    DType,
    Graph,
    IRError,
    NotDifferentiable,
    Op,
    QArray,
    QTensorType,
    Sample,
    TensorType,
    Type,
    Value,
    evaluate,
    op_named,
    parse,
    parse_type,
    symbol,
    symbols_of,
    type_of,
    verify,
)
from wasat.ir.decompose import decompose
from wasat.ir.graph import infer
from wasat.ir.op import Kind
from wasat.ir.vjp import backward

NAMES = sorted(OPS)
DIFFERENTIABLE = [n for n in NAMES if OPS[n].differentiable and not OPS[n].straight_through]


def arrays_of(sample: Sample) -> list[Array]:
    return [x if isinstance(x, QArray) else np.asarray(x) for x in sample.inputs]


def graph_of(op: Op, arrays: Sequence[Array], attrs: Any) -> tuple[Graph, dict[str, Array]]:
    """A graph of one node, and what to feed it."""
    g = Graph("g")
    values = [g.add_input(f"x{i}", type_of(x)) for i, x in enumerate(arrays)]
    out = Builder(g).emit(op, *values, **attrs)
    g.set_outputs(list(out) if isinstance(out, tuple) else [out])
    return g, {f"x{i}": x for i, x in enumerate(arrays)}


def is_float(t: Type) -> bool:
    return isinstance(t, TensorType) and t.dtype.is_float


def assert_same(got: Array, want: Array, rtol: float = 0.0, atol: float = 0.0) -> None:
    if isinstance(want, QArray):
        assert isinstance(got, QArray)
        assert got.type == want.type
        assert_array_equal(got.values, want.values)
        assert_array_equal(got.scales, want.scales)
        return
    assert isinstance(got, np.ndarray)
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    if DType.of(want.dtype).is_float:
        assert_allclose(got.astype(np.float64), want.astype(np.float64), rtol=rtol, atol=atol)
    else:
        assert_array_equal(got, want)


@pytest.mark.parametrize("name", NAMES)
def test_is_documented_and_sampled(name: str) -> None:
    op = OPS[name]
    assert op.__doc__
    assert list(op.samples())


@pytest.mark.parametrize("name", NAMES)
def test_reference_makes_what_infer_says(name: str) -> None:
    for sample in OPS[name].samples():
        g, feed = graph_of(OPS[name], arrays_of(sample), sample.attrs)
        verify(g)
        before = [x.values.copy() if isinstance(x, QArray) else x.copy() for x in feed.values()]
        for v, x in zip(g.outputs, evaluate(g, feed)):
            assert type_of(x) == v.type
        for x, old in zip(feed.values(), before):  # operands are read only
            assert_array_equal(x.values if isinstance(x, QArray) else x, old)


NEEDS_KNOWN_SIZES = {
    "rope": "a vector of known length",
    "dft": "dft takes x",
    "attention": "do not divide among",
    "cached_attention": "do not divide among",
    "linear_attention": "do not divide among",
    **dict.fromkeys(("random_bits", "random_uniform", "random_normal", "dropout"), "the key must be u32[2]"),
}
"""Operations that refuse some symbolic sizes, and how they say so."""


@pytest.mark.parametrize("name", NAMES)
def test_infer_over_symbols_agrees_with_the_reference(name: str) -> None:
    """Each size among the operands in turn becomes a symbol; the inferred types, bound again, are what the reference made."""
    op = OPS[name]
    for sample in op.samples():
        arrays = arrays_of(sample)
        g, feed = graph_of(op, arrays, sample.attrs)
        results = evaluate(g, feed)
        attrs = next(g.nodes).attrs
        for size in sorted({d for x in arrays for d in x.shape if d > 1}):
            env = {"n": size}
            types = [_generalized(type_of(x), size) for x in arrays]
            values = [Value(g, t, f"v{i}") for i, t in enumerate(types)]
            try:
                inferred, checks = infer(op, attrs, values, None)
            except IRError as e:
                if NEEDS_KNOWN_SIZES.get(name, "(nothing)") not in str(e):
                    raise
                continue
            for t, x in zip(inferred, results):
                assert t.substitute(env) == type_of(x)
            for a, b in checks:
                assert symbols_of([a, b]) == ("n",)


def _generalized(t: Type, size: int) -> Type:
    shape = tuple(symbol("n") if d == size else d for d in t.shape)
    return t.with_shape(*shape) if isinstance(t, TensorType) else type(t)(t.scheme, shape, t.block, t.scale)


@pytest.mark.parametrize("name", [n for n in NAMES if OPS[n].is_composite])
def test_decomposition_equals_reference(name: str) -> None:
    for sample in OPS[name].samples():
        g, feed = graph_of(OPS[name], arrays_of(sample), sample.attrs)
        want = evaluate(g, feed)
        names = [v.name for v in g.outputs]
        once = g.clone()
        decompose(once, lambda node: node.op.name != name)
        decompose(g, lambda node: False)  # down to primitives
        for h in (once, g):
            verify(h)
            assert [v.name for v in h.outputs if v.node] == [n for n, v in zip(names, h.outputs) if v.node]
            assert not h.count(name)
            for got, w in zip(evaluate(h, feed), want):
                narrow = isinstance(w, np.ndarray) and w.dtype.itemsize <= 2 and DType.of(w.dtype).is_float
                assert_same(got, w, max(sample.rtol, 2e-3) if narrow else sample.rtol, sample.atol)
        assert not any(node.op.is_composite for node in g.nodes)


@pytest.mark.parametrize("name", NAMES)
def test_indices_are_taken_just_within_their_bounds(name: str) -> None:
    """What compiled programs are checked by is what the reference refuses."""
    for sample in OPS[name].samples():
        g, feed = graph_of(OPS[name], arrays_of(sample), sample.attrs)
        node = g.outputs[0].node
        assert node is not None
        types = [v.type for v in node.inputs]
        bounds = node.op.bounds(node.attrs, *types)
        assert bounds or all(f.role != "indexed" for x in node.op.axes(node.attrs, *types).operands for axis in x for f in axis)
        for i, (low, high) in bounds.items():
            x = feed[f"x{i}"]
            assert isinstance(x, np.ndarray)
            for index in (low, high - 1):
                evaluate(g, {**feed, f"x{i}": np.full_like(x, index)})
            for index in (low - 1, *([high] if high < 2**32 else [])):  # a ring is never full
                with pytest.raises(IRError, match=r"is outside|cannot hold -1|positions outside"):
                    evaluate(g, {**feed, f"x{i}": np.full_like(x, index)})


@pytest.mark.parametrize("name", NAMES)
def test_text_round_trip(name: str) -> None:
    for sample in OPS[name].samples():
        g, feed = graph_of(OPS[name], arrays_of(sample), sample.attrs)
        again = parse(str(g))
        verify(again)
        assert str(again) == str(g)
        assert [n.attrs for n in again.nodes] == [n.attrs for n in g.nodes]
        for got, want in zip(evaluate(again, feed), evaluate(g, feed)):
            assert_same(got, want)


WITHOUT_ERRORS = {"cast", "constant", "dim_size", "stop_gradient"}
"""Operations that take whatever they are given."""


@pytest.mark.parametrize("name", NAMES)
def test_errors_are_refused_with_their_message(name: str) -> None:
    errors = list(OPS[name].errors())
    assert bool(errors) != (name in WITHOUT_ERRORS)
    for error in errors:
        g = Graph("g")
        values = [g.add_input(f"x{i}", parse_type(t)) for i, t in enumerate(error.types)]
        with pytest.raises(IRError, match=re.escape(error.match)):
            Builder(g).emit(OPS[name], *values, **error.attrs)
        assert len(g) == 0  # a refused node leaves nothing behind
        assert not any(v.uses for v in values)


def wide(sample: Sample, op: Op) -> tuple[list[Array], dict[str, Any]]:
    """The sample in f64, attributes included."""
    arrays = [x.astype(np.float64) if is_float(type_of(x)) else x for x in arrays_of(sample)]  # type: ignore[union-attr]
    attrs = dict(sample.attrs)
    dtype = getattr(op.Attrs(**attrs), "dtype", None)
    if isinstance(dtype, DType) and dtype.is_float:
        attrs["dtype"] = "f64"
    return arrays, attrs


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradient_equals_finite_differences(name: str) -> None:
    op, checked = OPS[name], 0
    for sample in op.samples():
        arrays, attrs = wide(sample, op)
        floats = [i for i, x in enumerate(arrays) if is_float(type_of(x))]
        wrt = floats if sample.grad is None else list(sample.grad)
        g, feed = graph_of(op, arrays, attrs)
        outputs = [v for v in g.outputs if is_float(v.type)]
        if not wrt or not outputs:
            continue
        rng = np.random.default_rng(0)
        forward = g.clone()
        forward.set_outputs([v for v in forward.outputs if is_float(v.type)])
        seeds = [rng.standard_normal(v.tensor.concrete({})) for v in outputs]
        b = Builder(g)
        grads = backward(b, outputs, [b.constant(s) for s in seeds], [g.inputs[i] for i in wrt])
        g.set_outputs([v if v is not None else b.constant(0.0) for v in grads], [f"d{i}" for i in wrt])
        verify(g)
        for i, got in zip(wrt, evaluate(g, feed)):
            want = numeric(forward, feed, f"x{i}", seeds)
            assert_allclose(np.broadcast_to(got, want.shape), want, rtol=1e-5, atol=1e-7, err_msg=f"{forward}d/dx{i}")
            checked += want.size
    assert checked, f"{name} says that it is differentiable, and no sample checks it"


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_second_derivative_equals_a_difference_of_gradients(name: str) -> None:
    """Along one random direction: the gradient of <gradient, v>, times u, is how <gradient, v> changes along u."""
    op, rng, h = OPS[name], np.random.default_rng(1), 1e-5
    for sample in op.samples():
        arrays, attrs = wide(sample, op)
        g, feed = graph_of(op, arrays, attrs)
        floats = [i for i, x in enumerate(arrays) if is_float(type_of(x))]
        wrt = [g.inputs[i] for i in (floats if sample.grad is None else sample.grad)]
        outputs = [v for v in g.outputs if is_float(v.type)]
        b = Builder(g)
        seeds = [b.constant(rng.standard_normal(v.tensor.concrete({}))) for v in outputs]
        first = [v for v in backward(b, outputs, seeds, wrt) if v is not None] if outputs and wrt else []
        if not first:
            continue
        along = [rng.standard_normal(v.tensor.concrete({})) for v in wrt]
        weights = [rng.standard_normal(v.tensor.concrete({})) for v in first]
        second = [
            (dx, u) for dx, u in zip(backward(b, first, [b.constant(w) for w in weights], wrt), along) if dx is not None
        ]  # fmt: skip
        outputs = [*first, *(dx for dx, _ in second)]
        g.set_outputs(outputs, [f"o{i}" for i in range(len(outputs))])
        verify(g)
        ends = []
        for step in (h, -h):
            moved = {v.name: feed[v.name] + step * u for v, u in zip(wrt, along)}  # type: ignore[operator]
            ends.append(sum(float((x * w).sum()) for x, w in zip(evaluate(g, {**feed, **moved}), weights)))
        terms = [dx * u for dx, (_, u) in zip(evaluate(g, feed)[len(first) :], second)]  # type: ignore[operator]
        got, scale = (sum(float(f(x).sum()) for x in terms) for f in (np.asarray, np.abs))
        assert_allclose(got, (ends[0] - ends[1]) / (2 * h), rtol=1e-6, atol=1e-6 * scale + 1e-8, err_msg=str(sample.attrs))


@pytest.mark.parametrize("name", [n for n in NAMES if not OPS[n].differentiable])
def test_what_has_no_gradient_says_so(name: str) -> None:
    """Where floats become floats: a gradient that is none, or an error that names the operation."""
    for sample in OPS[name].samples():
        g, _ = graph_of(OPS[name], arrays_of(sample), sample.attrs)
        wrt, outputs = ([v for v in values if is_float(v.type)] for values in (g.inputs, g.outputs))
        b = Builder(g)
        seeds = [b.broadcast_to(b.constant(1.0, v.tensor.dtype), shape=v.shape) for v in outputs]
        if OPS[name].has_vjp or not wrt or not outputs:
            assert backward(b, outputs, seeds, wrt) == [None] * len(wrt)
        else:
            with pytest.raises(NotDifferentiable, match=rf"{name} has no gradient"):
                backward(b, outputs, seeds, wrt)


@pytest.mark.parametrize("name", [n for n in NAMES if OPS[n].straight_through])
def test_gradients_go_straight_through(name: str) -> None:
    assert OPS[name].differentiable
    for sample in OPS[name].samples():
        g, _ = graph_of(OPS[name], arrays_of(sample), sample.attrs)
        b = Builder(g)
        seed = b.constant(np.ones(g.outputs[0].tensor.concrete({})), g.outputs[0].tensor.dtype)
        assert backward(b, g.outputs, [seed], g.inputs) == [seed, *[None] * (len(g.inputs) - 1)]


def numeric(g: Graph, feed: dict[str, Array], name: str, seeds: Sequence[np.ndarray], h: float = 1e-5) -> np.ndarray:
    """Central differences of sum(outputs * seeds) by each element of input ``name``."""
    x = feed[name]
    assert isinstance(x, np.ndarray)
    out = np.zeros_like(x)
    for at in np.ndindex(x.shape):
        ends = []
        for step in (h, -h):
            moved = x.copy()
            moved[at] += step
            results = evaluate(g, {**feed, name: moved})
            ends.append(sum(float((r * s).sum()) for r, s in zip(results, seeds)))
        out[at] = (ends[0] - ends[1]) / (2 * h)
    return out


def test_dimension_errors_become_type_errors() -> None:
    g = Graph("g")
    x = g.add_input("x", parse_type("f32[n, 3]"))
    with pytest.raises(IRError, match=r"add\(%x: f32\[n, 3\], %x_1: f32\[n, 4\]\)") as e:
        Builder(g).add(x, g.add_input("x_1", parse_type("f32[n, 4]")))
    assert not isinstance(e.value, DimError)


# -- facts -----------------------------------------------------------------------------------------------------------------
KINDS = get_args(Kind)


@pytest.mark.parametrize("name", NAMES)
def test_says_of_what_kind_it_is(name: str) -> None:
    op = OPS[name]
    assert op.kind in KINDS
    assert op.precision in ("any", "half", "wide")
    assert op.weight is None or op.kind in ("product", "gather")
    assert op.precision != "half" or op.kind == "product"


COMPUTES_ALL_GROUPS = {"grouped_linear", "grouped_outer", "quantized_grouped_linear"}
"""Operations whose decomposition multiplies what they leave out."""
BY_BLOCKS = {"linear_attention"}
"""Those whose decomposition also multiplies the tokens of a block by each other."""


@pytest.mark.parametrize("name", NAMES)
def test_multiply_adds_are_those_of_the_decomposition(name: str) -> None:
    """None but products have any; what is cheap holds nothing that is not."""
    op = OPS[name]
    for sample in op.samples():
        g, _ = graph_of(op, arrays_of(sample), sample.attrs)
        (own,) = g.nodes
        count = own.multiply_adds
        assert op.kind in ("product", "control") or count == 0
        if op.is_composite:
            decompose(g, lambda node: False)
            made = sum(node.multiply_adds for node in g.nodes)
            assert made > count if name in COMPUTES_ALL_GROUPS else made >= count if name in BY_BLOCKS else made == count
            assert not op.cheap or all(node.op.cheap for node in g.nodes)


def test_multiply_adds_of_primitives() -> None:
    def count(op: str, *types: str, **attrs: Any) -> object:
        g = Graph("g")
        Builder(g).emit(op_named(op), *(g.add_input(f"x{i}", parse_type(t)) for i, t in enumerate(types)), **attrs)
        return next(g.nodes).multiply_adds

    assert str(count("matmul", "f32[b, 3, 4]", "f32[4, 5]")) == "60*b"
    assert count("conv", "f32[2, 4, 9]", "f32[6, 2, 3]", strides=(2,), low=(0,), high=(0,), groups=2) == 2 * 6 * 4 * (2 * 3)
    body = Body(parse("graph @b(%h: f32[2, 2]) {\n  %n: f32[2, 2] = matmul(%h, %h)\n  return %n\n}"))
    assert count("scan", "f32[2, 2]", body=body, carries=1, slices=0, length=5) == 5 * 8


@pytest.mark.parametrize("name", [n for n in NAMES if OPS[n].carries])
def test_what_carries_holds_elements_of_its_operands(name: str) -> None:
    """Where every element of the operands is another, each of the result is one of them (or what it is padded with)."""
    op = OPS[name]
    for sample in op.samples():
        arrays, start = [], 100
        for x in arrays_of(sample):
            assert isinstance(x, np.ndarray)
            dtype = np.float32 if x.dtype == np.bool_ else x.dtype
            arrays.append(np.arange(start, start + x.size).astype(dtype).reshape(x.shape))
            start += x.size
        g, feed = graph_of(op, arrays, sample.attrs)
        known = {v for x in arrays for v in x.ravel().tolist()} | {getattr(next(g.nodes).attrs, "value", None)}
        for out in evaluate(g, feed):
            dtype = np.asarray(out).dtype
            assert set(np.asarray(out).ravel().tolist()) <= {np.asarray(x).astype(dtype).item() for x in known if x is not None}


def test_views_and_casts_carry() -> None:
    assert {n for n in NAMES if OPS[n].carries} == {"cast", *(n for n in NAMES if OPS[n].kind == "view")}


@pytest.mark.parametrize("name", [n for n in NAMES if OPS[n].kind == "gather"])
def test_what_picks_slices_says_along_which_axis(name: str) -> None:
    """``numpy.take`` of operand 0 at operand 1; where it says None, it is not that."""
    op = OPS[name]
    for sample in op.samples():
        arrays = arrays_of(sample)
        axis = op.picks(op.Attrs(**sample.attrs).canonical(*map(type_of, arrays)))
        g, feed = graph_of(op, arrays, sample.attrs)
        (got,) = evaluate(g, feed)
        table, *more = (x.dense() if isinstance(x, QArray) else x for x in arrays)
        if axis is None:
            taken = np.take(table, more[0], 0, mode="wrap") if more else None
            assert taken is None or taken.shape != np.shape(got) or not np.array_equal(taken, got)
        else:
            assert_same(got, np.take(table, more[0], axis).astype(np.asarray(got).dtype))


def test_only_gathers_pick() -> None:
    for name in NAMES:
        sample = next(iter(OPS[name].samples()))
        attrs = OPS[name].Attrs(**sample.attrs)
        assert OPS[name].picks(attrs) is None or OPS[name].kind == "gather"


@pytest.mark.parametrize("name", [n for n in NAMES if OPS[n].idle is not None])
def test_what_is_idle_at_inference_is_its_operand_in_the_mean(name: str) -> None:
    op = OPS[name]
    sample = next(iter(op.samples()))
    assert op.idle is not None
    assert len(sample.inputs) == 2
    arrays = arrays_of(sample)
    x, key = np.asarray(arrays[op.idle]), 1 - op.idle
    draws = []
    for i in range(500):
        arrays[key] = np.array([i, 7], np.uint32)
        g, feed = graph_of(op, arrays, sample.attrs)
        draws.append(np.asarray(evaluate(g, feed)[0]))
    spread = np.std(draws, 0) / np.sqrt(len(draws))
    assert (np.abs(np.mean(draws, 0) - x) <= 5 * spread + 1e-6).all()


@pytest.mark.parametrize("name", [n for n in NAMES if OPS[n].alias is not None])
def test_the_memory_of_an_alias_is_that_of_its_operand(name: str) -> None:
    op = OPS[name]
    assert op.alias is not None
    for sample in op.samples():
        arrays = arrays_of(sample)
        g, _ = graph_of(op, arrays, sample.attrs)
        x = np.ascontiguousarray(arrays[op.alias])
        out = op.reference(next(g.nodes).attrs, *arrays[: op.alias], x, *arrays[op.alias + 1 :])
        assert isinstance(out, np.ndarray)
        assert out.size == x.size
        assert not x.size or np.shares_memory(out, x)


@pytest.mark.parametrize("name", [n for n in NAMES if OPS[n].elementwise])
def test_elementwise_is_one_element_of_each_operand(name: str) -> None:
    """One element of the result, computed of what stands at its place, is the same."""
    op = OPS[name]
    for sample in op.samples():
        arrays = arrays_of(sample)
        g, feed = graph_of(op, arrays, sample.attrs)
        (whole,) = evaluate(g, feed)
        assert isinstance(whole, np.ndarray)
        spread = [np.broadcast_to(x, whole.shape) for x in arrays]  # type: ignore[arg-type]
        at = tuple(n // 2 for n in whole.shape)
        one, feed = graph_of(op, [np.array(x[at]) for x in spread], sample.attrs)
        assert_same(evaluate(one, feed)[0], np.asarray(whole[at]))


@pytest.mark.parametrize("name", [n for n in NAMES if OPS[n].precision == "half"])
def test_half_precision_accumulates_in_single(name: str) -> None:
    op, checked = OPS[name], 0
    for sample in op.samples():
        arrays = arrays_of(sample)
        floats = [i for i, x in enumerate(arrays) if is_float(type_of(x))]
        if {type_of(arrays[i]).dtype for i in floats} != {DType.F32}:  # type: ignore[union-attr]
            continue

        def stored(dtype: type, arrays: list[Array], floats: list[int] = floats) -> list[Array]:
            return [x.astype(dtype) if i in floats else x for i, x in enumerate(arrays)]  # type: ignore[union-attr]

        g, feed = graph_of(op, stored(np.float16, arrays), sample.attrs)
        wide_, wide_feed = graph_of(op, stored(np.float32, stored(np.float16, arrays)), sample.attrs)
        (got,), (want,) = evaluate(g, feed), evaluate(wide_, wide_feed)
        assert isinstance(want, np.ndarray)
        assert_same(got, want.astype(np.float16))
        checked += 1
    assert checked


@pytest.mark.parametrize("name", [n for n in NAMES if OPS[n].weight is not None])
def test_the_weight_may_be_stored_otherwise(name: str) -> None:
    op = OPS[name]
    assert op.weight is not None
    for sample in op.samples():
        types = [type_of(x) for x in arrays_of(sample)]
        attrs = op.Attrs(**sample.attrs)
        want, w = op.infer(attrs, *types), types[op.weight]
        if isinstance(w, TensorType):
            assert op.infer(attrs, *types[: op.weight], w.with_dtype(DType.BF16), *types[op.weight + 1 :]) == want
        if op.quantized is not None:
            small = OPS[op.quantized]
            types[op.weight] = QTensorType("int8", w.shape, 4)
            assert small.weight == op.weight
            assert small.infer(small.Attrs(), *types) == want
