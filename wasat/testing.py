"""For tests of graphs and passes: random graphs, inputs for any graph, and what a pass must and must not do to a text.

    check_pass(FuseSilu(), BEFORE, AFTER, dims=[{"b": 1}, {"b": 3}])      # this text becomes that one and means the same
    check_untouched(FuseSilu(), NEAR_MISS, "%y and %x are not the same")  # stays as it is, and the remarks say why
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from wasat.ir import (
    Array,
    ArrayParam,
    BlockArray,
    Builder,
    DimLike,
    DType,
    Graph,
    Program,
    QArray,
    QTensorType,
    TensorType,
    Value,
    evaluate,
    parse_program,
    symbol,
)
from wasat.ir.ops.quant import quantize_array, random_zeros
from wasat.passes.core import Pass, PassError, PassManager, Remark

__all__ = ["InterpreterCheck", "check_pass", "check_untouched", "feed", "random_graph", "random_program"]


def feed(graph: Graph, dims: Mapping[str, int], seed: int = 0) -> dict[str, Array]:
    """Random inputs for ``graph`` at a binding of its symbols, parameters not included.

    Floats are standard normal, booleans even, integers 0..3 (so that they can index any axis of four or more), but u32 and
    u64, which are keys or bits, take every value. Raises DimError for a symbol that ``dims`` leaves out.
    """
    rng = np.random.default_rng(seed)
    return {v.name: _random_array(rng, v.type.substitute(dims)) for v in graph.inputs}


def _random_array(rng: np.random.Generator, t: TensorType | QTensorType) -> Array:
    if isinstance(t, QTensorType):
        dense = TensorType(DType.F32, t.shape)
        if t.stored is not None:
            return BlockArray(t, t.stored.random(rng, dense.concrete({})))
        if t.zeros:
            return random_zeros(t, int(rng.integers(1 << 31)))
        return quantize_array(rng.standard_normal(dense.concrete({}), np.float32), t)
    shape = t.concrete({})
    if t.dtype is DType.BOOL:
        return rng.random(shape) < 0.5
    if t.dtype.is_float:
        return np.asarray(rng.standard_normal(shape)).astype(t.dtype.np)
    high = 2**t.dtype.bits if t.dtype in (DType.U32, DType.U64) else 4
    return np.asarray(rng.integers(0, high, shape, np.uint64)).astype(t.dtype.np)


def random_program(text: str | Graph, seed: int = 0) -> Program:
    """The program written in ``text`` (or of one graph), with random parameters; their shapes must hold no symbols."""
    program = Program({text.name: text}) if isinstance(text, Graph) else parse_program(text)
    rng = np.random.default_rng(seed)
    for g in program.graphs.values():
        for name, v in g.params.items():
            if name not in program.params:
                program.params[name] = ArrayParam(_random_array(rng, v.type), v.type)
    return program


class InterpreterCheck:
    """Runs every graph on random inputs at the bindings ``dims``, before and after a pass: a ``check`` for PassManager.

    Graphs are compared whose name, inputs and outputs are what they were; the others are what the pass was for. Where
    ``forward`` became ``prefill`` and ``decode``, these are fed rows of different lengths, piece by piece, and must give its
    results.
    """

    def __init__(self, dims: Sequence[Mapping[str, int]], *, rtol: float = 1e-5, atol: float = 1e-5, seed: int = 0) -> None:
        self.dims, self.rtol, self.atol, self.seed = dims, rtol, atol, seed
        self._before: dict[str, tuple[Any, list[list[Array]]]] = {}
        self._forward: Graph | None = None

    def baseline(self, program: Program) -> None:
        """Remembers what every graph computes now."""
        self._before = {g.name: (_signature(g), self._results(program, g)) for g in program.graphs.values()}
        self._forward = program.graphs["forward"].clone() if "forward" in program.graphs else None

    def compare(self, program: Program, name: str) -> None:
        """Raises PassError, naming pass, graph, output and binding, if a graph computes something else than at the baseline."""
        for g in program.graphs.values():
            signature, before = self._before.get(g.name, (None, []))
            if signature != _signature(g):
                continue
            for dims, old, new in zip(self.dims, before, self._results(program, g)):
                for output, a, b in zip(g.output_names, old, new):
                    self._equal(a, b, f"pass {name} changes output {output} of @{g.name} at {dict(dims)}")
        if self._forward is not None and "decode" in program.graphs and "decode" not in self._before:
            self._step_by_step(program, self._forward, name)

    def _step_by_step(self, program: Program, forward: Graph, name: str) -> None:
        """Holds ``prefill`` and ``decode`` against ``forward``: three rows, each at a place of its own."""
        entries, chunk = (program["prefill"], program["decode"]), program.interface.chunk or 1
        given = {v.name: v for v in forward.inputs}
        [tokens] = [v.name for v in entries[1].inputs if v.name in given and v.tensor.rank == 2 and v.shape[1] == 1]
        batch, seq = given[tokens].shape
        sizes = {**self.dims[0], str(seq): 10, **({} if isinstance(batch, int) else {str(batch): 3})}
        inputs = feed(forward, sizes, self.seed)
        params = {k: p.load() for k, p in program.params.items() if any(k in g.params for g in (*entries, forward))}
        texts = np.asarray(inputs[tokens])
        rows = len(texts)
        past, step = np.zeros(rows, np.int64), itertools.cycle([[4, 2, 3], [1, 3, 1], [1, 1, 1], [2, 1, 1]])
        known: dict[str, Any] = {k: x for k, x in inputs.items() if k != tokens}
        if "encode" in program.graphs:
            known |= self._named(program["encode"], known, params, sizes)
        states = set(program.interface.state_names)
        capacity = {s: 16 for v in entries[1].inputs for s in v.type.symbols if v.name in states and s not in sizes}
        begin = {s.name: program.load(s.empty) if isinstance(s.empty, str) else s.empty or 0 for s in program.interface.states}
        for v in entries[1].inputs:
            if v.name in states:
                known[v.name] = np.full(v.tensor.concrete({**sizes, **capacity}), begin[v.name], v.tensor.dtype.np)
        want = self._named(forward, inputs, {k: params[k] for k in forward.params}, sizes)
        while (count := np.minimum(np.array(next(step)[:rows]), chunk)).size and (past + count).max() <= 10:
            new = np.zeros((rows, count.max()), texts.dtype)
            for r, n in enumerate(count):
                new[r, :n] = texts[r, past[r] : past[r] + n]
            g = entries[new.shape[1] == 1]
            out = self._named(g, {**known, tokens: new, "past": past, "last": count - 1}, params, {**sizes, **capacity})
            known |= {k: out[k] for k in states}
            past = past + count
            for output, v in zip(forward.output_names, forward.outputs):
                if seq in v.shape and output in out:
                    axis = v.shape.index(seq)
                    rest = np.moveaxis(np.asarray(want[output]), (0, axis) if axis else (1, 0), (0, 1))
                    what = f"pass {name} makes entries that give another {output} than @forward after {past.tolist()} tokens"
                    self._equal(rest[np.arange(rows), past - 1], out[output], what)

    def _named(
        self, g: Graph, inputs: Mapping[str, Any], params: Mapping[str, Array], sizes: Mapping[str, int]
    ) -> dict[str, Array]:
        symbols = {k: n for k, n in sizes.items() if k not in g.symbols}
        results = evaluate(g, {v.name: inputs[v.name] for v in g.inputs}, {k: params[k] for k in g.params}, symbols=symbols)
        return dict(zip(g.output_names, results))

    def _results(self, program: Program, g: Graph) -> list[list[Array]]:
        params = {k: program.params[k].load() for k in g.params}
        return [evaluate(g, feed(g, dims, self.seed), params, symbols=dims) for dims in self.dims]

    def _equal(self, a: Array, b: Array, what: str) -> None:
        x, y = (np.asarray(v.dense() if isinstance(v, QArray) else v) for v in (a, b))
        if x.dtype.kind not in "biu":
            x, y = x.astype(np.float64), y.astype(np.float64)
        try:
            np.testing.assert_allclose(y, x, self.rtol, self.atol)
        except AssertionError as e:
            raise PassError(f"{what}: {e}") from None


def _signature(g: Graph) -> Any:
    return [(v.name, v.type) for v in g.inputs], [(n, v.type) for n, v in zip(g.output_names, g.outputs)]


def check_pass(
    pass_: Pass, before: str, after: str, dims: Sequence[Mapping[str, int]] = ({},), *, rtol: float = 1e-5, atol: float = 1e-5
) -> list[Remark]:
    """Asserts that ``pass_`` turns the text ``before`` into ``after`` and nothing more when it runs again, and (for a pass that
    is ``exact``) that the results stay the same at each of the bindings ``dims``. Returns the remarks of the first run.
    """
    program = random_program(before)
    check = InterpreterCheck(dims, rtol=rtol, atol=atol)
    report = PassManager([pass_], check=check).run(program)
    _assert_text(program, after, f"{pass_.name} makes another text")
    assert report.steps[0].modified, f"{pass_.name} says that it changed nothing"
    again = PassManager([pass_]).run(program)
    _assert_text(program, after, f"{pass_.name} is not done after one run")
    assert not again.steps[0].modified, f"{pass_.name} says that it changed something when it ran again"
    return report.remarks()


def _assert_text(program: Program, want: str, what: str) -> None:
    """Asserts that ``program`` is the one written in ``want``; shows the lines that differ."""
    got, expected = str(program), str(parse_program(want))
    if got != expected:
        lines = difflib.unified_diff(expected.splitlines(), got.splitlines(), "expected", "got", lineterm="")
        raise AssertionError(f"{what}:\n" + "\n".join(lines))


def check_untouched(pass_: Pass, text: str, reason: str | None = None) -> None:
    """Asserts that ``pass_`` leaves ``text`` as it is and (``reason``) that one of its remarks says why."""
    program = random_program(text)
    report = PassManager([pass_]).run(program)
    _assert_text(program, text, f"{pass_.name} changes the text")
    assert not report.steps[0].modified, f"{pass_.name} says that it changed something"
    missed = [r.message for r in report.remarks("missed")]
    assert reason is None or any(reason in m for m in missed), f"none of the remarks says {reason!r}: {missed}"


def random_graph(rng: np.random.Generator, nodes: int = 20, name: str = "random") -> Graph:
    """A graph of about ``nodes`` steps over symbols ``b`` and ``s``, valid for every binding of at least 1.

    It has float, integer and boolean inputs, parameters, constants, operations of every family, values used many times and
    values not used at all. Floats stay moderate, and only integers are compared, so that a rewrite which rounds
    differently changes results slightly and never by a jump.
    """
    return _Growth(rng, name).grow(nodes)


class _Growth:
    """A random graph in the making: each step applies something to values that exist."""

    def __init__(self, rng: np.random.Generator, name: str) -> None:
        self.rng, self.graph = rng, Graph(name)
        self.b = Builder(self.graph)
        b, s = symbol("b"), symbol("s")
        add = self.graph.add_input
        self.floats = [add("x", TensorType(DType.F32, (b, s, 4))), add("y", TensorType(DType.F32, (s, 4)))]
        self.floats.append(self.graph.add_param("layer.bias", TensorType(DType.F32, (4,))))
        self.ints = [add("ids", TensorType(DType.I64, (b, s)))]
        self.masks = [add("keep mask", TensorType(DType.BOOL, (b, s, 1)))]  # a name that has to be quoted

    def grow(self, nodes: int) -> Graph:
        steps: list[Callable[[], None]] = [
            self.unary, self.unary, self.binary, self.binary, self.scalar, self.normalize, self.reduce, self.transpose,
            self.reshape, self.part, self.join, self.product, self.linear, self.look_up, self.integers, self.choose, self.top,
            self.again,
        ]  # fmt: skip
        for _ in range(nodes):
            steps[self.below(len(steps))]()
        every = [*self.floats, *self.ints, *self.masks]
        outputs = [self.floats[-1], *(self.pick(every) for _ in range(self.below(3)))]
        self.graph.set_outputs(outputs, [f"out{i}" for i in range(len(outputs))])
        return self.graph

    # -- choices -----------------------------------------------------------------------------------------------------------
    def below(self, n: int) -> int:
        return int(self.rng.integers(n))

    def pick(self, values: list[Value]) -> Value:
        return values[self.below(len(values))]

    def float(self, rank: int = 0) -> Value:
        """Any float value of at least ``rank`` axes."""
        return self.pick([v for v in self.floats if len(v.shape) >= rank])

    def axis(self, x: Value) -> int:
        return self.below(len(x.shape))

    # -- steps -------------------------------------------------------------------------------------------------------------
    def unary(self) -> None:
        names = ["neg", "abs", "tanh", "sin", "cos", "sigmoid", "silu", "relu", "softplus", "gelu", "erf", "stop_gradient"]
        self.floats.append(self.b.emit(names[self.below(len(names))], self.float()))

    def binary(self) -> None:
        x = self.float()
        y = self.pick([v for v in self.floats if v.shape in (x.shape, x.shape[1:], x.shape[-1:])])
        name = ["add", "sub", "mul", "maximum", "minimum"][self.below(5)]
        if name == "mul":
            y = self.b.tanh(y)  # products of products would overflow
        self.floats.append(self.b.emit(name, *((x, y) if self.below(2) else (y, x))))

    def scalar(self) -> None:
        name = ["add", "sub", "mul", "div"][self.below(4)]
        number = [1.0, 0.5, 2.0, -1.0][self.below(4)] if name in ("mul", "div") else [0.0, 1.0, -0.25][self.below(3)]
        self.floats.append(self.b.emit(name, self.float(), number))

    def normalize(self) -> None:
        x = self.float(1)
        match self.below(3):
            case 0:
                y = self.b.softmax(x, axis=self.axis(x))
            case 1:
                y = self.b.rms_norm(x, eps=0.1)
            case _:
                y = self.b.layer_norm(x, eps=0.1)
        self.floats.append(y)

    def reduce(self) -> None:
        x = self.float(2)
        name = ["reduce_sum", "reduce_mean", "reduce_max", "logsumexp"][self.below(4)]
        y = self.b.emit(name, x, axes=(self.axis(x),), keepdims=bool(self.below(2)))
        self.floats.append(self.b.tanh(y))

    def transpose(self) -> None:
        x = self.float(2)
        self.floats.append(self.b.transpose(x, perm=tuple(int(i) for i in self.rng.permutation(len(x.shape)))))

    def reshape(self) -> None:
        x = self.float(1)
        at = self.axis(x)
        if self.below(2) or at == 0:
            shape: tuple[DimLike, ...] = (*x.shape[:at], 1, *x.shape[at:]) if len(x.shape) < 4 else x.shape
        else:
            shape = (*x.shape[: at - 1], x.shape[at - 1] * x.shape[at], *x.shape[at + 1 :])
        self.floats.append(self.b.reshape(x, shape=shape))

    def part(self) -> None:
        x = self.float(1)
        at, zeros = self.axis(x), (0,) * len(x.shape)
        step = 1 + self.below(2)
        if self.below(2):
            low = tuple(int(i == at) for i in range(len(x.shape)))
            y = self.b.pad(x, low=low, high=zeros, value=0.5)
            x = self.b.slice(y, starts=zeros, stops=x.shape)
        steps = tuple(step if i == at else 1 for i in range(len(x.shape)))
        y = self.b.slice(x, starts=zeros, stops=x.shape, steps=steps)
        self.floats.append(self.b.reverse(y, axes=(at,)) if self.below(2) else y)

    def join(self) -> None:
        x = self.float(1)
        y = self.pick([v for v in self.floats if v.shape == x.shape])
        self.floats.append(self.b.concat(x, y, axis=self.axis(x)))

    def product(self) -> None:
        x = self.b.tanh(self.float(2))
        rank = len(x.shape)
        y = self.b.transpose(x, perm=(*range(rank - 2), rank - 1, rank - 2))
        self.floats.append(self.b.tanh(self.b.matmul(x, y)))

    def linear(self) -> None:
        x = self.float(1)
        k = x.shape[-1]
        if isinstance(k, int):
            w = self.graph.add_param(f"layers.{self.below(3)}.w{k}", TensorType(DType.F32, (4, k)))
            self.floats.append(self.b.linear(x, w))

    def look_up(self) -> None:
        table = self.graph.add_param("table", TensorType(DType.F32, (4, 4)))
        ids = self.b.mod(self.pick(self.ints), 4)
        self.floats.append(self.b.embedding(table, ids) if self.below(2) else self.b.gather(table, ids, axis=0))

    def integers(self) -> None:
        b, x = self.b, self.pick(self.ints)
        match self.below(4):
            case 0:
                self.ints.append(b.add(x, self.below(3)))
            case 1:
                self.ints.append(b.sub(b.floor_div(x, 2), b.dim_size(size=symbol("s"))))
            case 2:
                self.floats.append(b.tanh(b.cast(x, dtype="f32")))
            case _:
                self.ints.append(b.minimum(x, b.constant(np.array([3]))))

    def choose(self) -> None:
        """A causal or windowed mask over positions, or the given one, between two values."""
        b, x = self.b, self.float(2)
        rows, columns = x.shape[-2:]
        row, column = b.reshape(b.iota(size=rows), shape=(rows, 1)), b.iota(size=columns)
        mask = b.less_equal(column, row)
        if self.below(2):
            mask = b.logical_and(mask, b.less(b.sub(row, column), 2))
        self.masks.append(mask)
        if self.below(2) and len(x.shape) == 3 and x.shape[:2] == self.masks[0].shape[:2]:
            mask = b.logical_or(mask, self.masks[0])
        other = self.pick([v for v in self.floats if v.shape == x.shape])
        self.floats.append(b.select(mask, x, other if self.below(2) else -1.0))

    def top(self) -> None:
        x = self.float(1)
        if isinstance(x.shape[-1], int) and x.shape[-1] > 1:
            self.floats.append(self.b.top_k(x, k=2)[0])

    def again(self) -> None:
        """A node once more, for common subexpressions."""
        made = [n for n in self.graph.nodes if len(n.outputs) == 1 and n.output in self.floats]
        if made:
            n = made[self.below(len(made))]
            self.floats.append(self.graph.add_node(n.op, n.inputs, n.attrs).output)
