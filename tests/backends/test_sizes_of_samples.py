"""Every operation on its own samples, one size of which is a symbol, at 0 and 1: compiled code gives what the interpreter does;
and each size a symbol of its own, at sizes that do not fit.

Many graphs are one library. Of each operation's some are run always, some more by the slow tests.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest

pytest.importorskip("tvm")

from wasat.backends.tvm.build import Runner
from wasat.backends.tvm.targets import cpu
from wasat.ir import OPS, Array, ArrayParam, Builder, DType, Graph, Op, Program, QArray, WasatError, evaluate, symbol, type_of

NEAR = {1: 0.0, 2: 1e-2, 4: 2e-5, 8: 1e-9}
"""By the bytes of a float."""


@dataclass
class Case:
    graph: Graph
    inputs: list[tuple[np.ndarray, tuple[int, ...]]]
    """And which axes of theirs are symbolic."""
    params: dict[str, ArrayParam]

    def feed(self, size: int) -> dict[str, np.ndarray]:
        cut = {
            v.name: x[tuple(slice(size) if a in axes else slice(None) for a in range(x.ndim))] if axes else x
            for v, (x, axes) in zip(self.graph.inputs, self.inputs)
        }
        return {name: np.ascontiguousarray(x).reshape(x.shape) for name, x in cut.items()}


def cases(op: Op) -> Iterator[Case]:
    """Each size that operands share, and each axis alone, as the symbol n, wherever the operation takes it."""
    seen = set()
    for i, sample in enumerate(op.samples()):
        arrays = [x if isinstance(x, QArray) else np.asarray(x) for x in sample.inputs]
        every = [(j, a, n) for j, x in enumerate(arrays) if not isinstance(x, QArray) for a, n in enumerate(x.shape) if n > 1]
        choices = [{(j, a) for j, a, n in every if n == size} for size in sorted({n for *_, n in every})]
        for chosen in [*choices, *({(j, a)} for j, a, _ in every)]:
            made = case(op, sample.attrs, arrays, chosen, f"{op.name}_{i}_{len(seen)}")
            if made is not None and (text := str(made.graph).partition("(")[2]) not in seen:
                seen.add(text)
                yield made


def case(
    op: Op, attrs: object, arrays: list[Array], symbolic: set[tuple[int, int]], name: str, symbols: str = "n"
) -> Case | None:
    """None where the operation refuses it. ``symbols``: the names of the sizes, by operand and axis."""
    g, values, inputs, params = Graph(name), [], [], {}
    for j, x in enumerate(arrays):
        if isinstance(x, QArray):
            params[f"{name}.{j}"] = ArrayParam(x, type_of(x))
            values.append(g.add_param(f"{name}.{j}", type_of(x)))
            continue
        axes = tuple(a for a in range(x.ndim) if (j, a) in symbolic)
        shape = (symbol(symbols.format(j, a)) if a in axes else d for a, d in enumerate(x.shape))
        values.append(g.add_input(f"x{j}", type_of(x).with_shape(*shape)))
        inputs.append((x, axes))
    try:
        out = Builder(g).emit(op, *values, **attrs)  # type: ignore[arg-type]
    except WasatError:
        return None
    g.set_outputs(list(out) if isinstance(out, tuple) else [out])
    return Case(g, inputs, params)


OF_KNOWN_SIZE = {"cache_update": 2, "cached_attention": 2, "quantize": 0}
"""From this axis on: caches are written in place, and weights are not quantized where programs run. The compiler says so."""
ALWAYS, MORE = 1, 1
"""Cases of an operation that are run, and that the slow tests run."""
DEAR = ("attention", "cached_attention", "linear_attention")
"""Operations whose kernels take seconds to compile: all cases are the slow tests'."""


def some(slow: bool) -> list[Case]:
    """Of each operation's cases so many, spread evenly over them."""
    chosen = []
    for name in sorted(OPS):
        found = [c for c in cases(OPS[name]) if all(a < OF_KNOWN_SIZE.get(name, 9) for _, axes in c.inputs for a in axes)]
        spread = [found[i] for i in dict.fromkeys(i * len(found) // (ALWAYS + MORE) for i in range(ALWAYS + MORE)) if found]
        always = 0 if name in DEAR else ALWAYS
        chosen += spread[always:] if slow else spread[:always]
    return chosen


def compiled(found: list[Case]) -> Runner:
    params = {name: p for c in found for name, p in c.params.items()}
    return Runner(Program({c.graph.name: c.graph for c in found}, dict(params)), cpu())


@pytest.mark.parametrize("slow", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore")
def test_equal_to_the_interpreter(slow: bool) -> None:
    found = some(slow)
    run, wrong = compiled(found), []
    for c in found:
        for size in (0, 1):
            if said := difference(c, c.feed(size), run):
                wrong.append(f"n = {size}: {said}\n{c.graph}")
    assert not wrong, "\n".join(wrong)


def apart(op: Op) -> Iterator[Case]:
    """The samples, as many sizes as the operation takes each a symbol of its own; one for each kind of checks."""
    seen = set()
    for i, sample in enumerate(op.samples()):
        arrays = [x if isinstance(x, QArray) else np.asarray(x) for x in sample.inputs]
        symbolic: set[tuple[int, int]] = set()
        made = None
        for j, a in [(j, a) for j, x in enumerate(arrays) if not isinstance(x, QArray) for a in range(x.ndim)]:
            if a < OF_KNOWN_SIZE.get(op.name, 9):
                more = case(op, sample.attrs, arrays, {*symbolic, (j, a)}, f"{op.name}_apart_{i}", "n{}_{}")
                made, symbolic = (made, symbolic) if more is None else (more, {*symbolic, (j, a)})
        checks = str([n.checks for n in made.graph.nodes] if made else ())
        if made is not None and checks not in seen:
            seen.add(checks)
            yield made


def resized(x: np.ndarray, axis: int, size: int) -> np.ndarray:
    """As many of its elements, the first ones again where there are more."""
    if x.shape[axis] == 0:
        return np.zeros((*x.shape[:axis], size, *x.shape[axis + 1 :]), x.dtype)
    return np.ascontiguousarray(np.take(x, np.arange(size) % x.shape[axis], axis=axis))


CHECKED = ("scan", "cond", "rope", "quantized_linear", "add", "glu", "embedding")
"""Operations whose checks are tried always, those of all others by make test-all."""


@pytest.mark.parametrize("slow", [False, pytest.param(True, marks=[pytest.mark.slow, pytest.mark.sweep])])
@pytest.mark.filterwarnings("ignore")
def test_sizes_that_do_not_fit(slow: bool) -> None:
    found = [c for name in sorted(OPS) if (name in CHECKED) != slow for c in list(apart(OPS[name]))[: 9 if slow else 3]]
    run, wrong = compiled(found), []
    for c in found:
        whole = {v.name: x for v, (x, _) in zip(c.graph.inputs, c.inputs)}
        for v, (x, axes) in zip(c.graph.inputs, c.inputs):
            sizes = {a: {0, 1, max(x.shape[a] - 1, 0), x.shape[a] + 1, 2 * x.shape[a]} for a in axes}
            for axis, size in ((a, size) for a in axes for size in sizes[a]):
                if said := difference(c, whole | {v.name: resized(x, axis, size)}, run):
                    wrong.append(f"%{v.name}, axis {axis} of {size}: {said}\n{c.graph}")
    assert not wrong, "\n".join(wrong)


def difference(c: Case, feed: dict[str, np.ndarray], run: Runner) -> str | None:
    """None: there is none. What one refuses, the other does."""
    try:
        with np.errstate(all="ignore"):
            want = evaluate(c.graph, feed, {name: p.load() for name, p in c.params.items()})
    except WasatError as e:
        try:
            run(c.graph.name, feed)
        except WasatError:
            return None
        return f"compiled it runs, the interpreter says: {e}"
    try:
        got = run(c.graph.name, feed)
    except WasatError as e:
        return f"compiled it says: {e}"
    for name, x in zip(c.graph.output_names, want):
        y = got[name]
        if isinstance(x, QArray):
            continue
        if (x.shape, x.dtype) != (y.shape, y.dtype):
            return f"%{name} is {type_of(y)}, not {type_of(x)}"
        near = NEAR[x.dtype.itemsize] if DType.of(x.dtype).is_float else None
        if near is None and not np.array_equal(x, y):
            return f"%{name} is {y.ravel()[:4]}, not {x.ravel()[:4]}"
        if near is not None and not np.allclose(y.astype(float), x.astype(float), near, near, equal_nan=True):
            return f"%{name} is {y.ravel()[:4]}, not {x.ravel()[:4]}"
    return None
