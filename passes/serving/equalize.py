"""Features of one size, before weights are stored in fewer bits.

Blocks of 32 share a scale, of weights as of rows of activations: a feature that is fifty times its neighbours leaves these a
few levels. But what makes a feature can make it smaller, and the weights that read it can make up for that: a norm's gain over
s, and the next matrix's columns times s, mean the same (cross-layer equalization, arXiv:1906.04721; by the size of activations,
arXiv:2211.10438, 2306.00978). Of some s that are powers of r over powers of c, r being the size of a feature and c that of its
column, that one is taken with which rounding a part of weights and rows costs least; where features are even, none.
Nothing is added where the model runs, but for tables that are also heads: a product per row looked up.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from wasat.ir import (
    Array,
    ArrayParam,
    Builder,
    DerivedParam,
    DType,
    Graph,
    Node,
    ParamSource,
    Program,
    QArray,
    TensorType,
    Value,
    WasatError,
    run_nodes,
)
from wasat.ir.ops.quant import quantize_array, quantize_rows

from ..cleanup.hoist_params import param_only
from ..core import Pass, Remarks
from .quantize import Quantize, operations_on
from .recipes import ALL, FLOATS, Formats, Storage, role_of, storage
from .token_inputs import token_inputs

_MOST = 64.0
"""How many times the middle of all a feature is divided or multiplied by, at most."""
_POWERS = ((0.25, 0.25), (0.25, 0.5), (0.5, 0.0), (0.5, 0.25), (0.5, 0.5))
"""What is tried: s = r^a / c^b. The larger a, the more even are rows; the larger b, the less do large columns lose of it."""
_ENOUGH = 0.5, 0.8
"""What rounding costs with features of one size, as a part of what it costs without, over random tokens and over a text: where
it is more, features are left. Sizes are those of a few tokens, and random ones are no text."""
_ROWS = 128, 64
"""How many rows, of activations and of weights, are rounded for it."""
_NORMS = ("rms_norm", "layer_norm")
Sizes = NDArray[np.float32]


@dataclass(frozen=True)
class Equalize(Pass):
    """Scales features between what makes them and the ``linear`` that reads them, so that the numbers of a block are of one
    size, here and there; results stay the same up to rounding.

    What can be scaled: gain and bias of a norm; the weight of a ``linear`` whose result is a factor of an elementwise product
    (the up projection of a feed-forward network); the weight that makes an attention's values, alike for the heads that share
    them. A table that is looked up, too, is scaled, and what is looked up is scaled back.

    Sizes are root mean squares over ``tokens`` random tokens of the vocabulary, or over ``text``, ids of tokens; weights are
    read one at a time. A graph that takes anything but tokens i64[b, s] is left, with a remark.

    The other options are those of :class:`Quantize`, which comes after it: how weights and rows are going to be rounded.
    """

    tokens: int = 128
    text: tuple[int, ...] = ()
    scheme: str = "int8"
    activation: str | None = "int8"
    overrides: tuple[tuple[str, str], ...] = ()
    block: int = 32
    formats: Formats = ALL
    name = "equalize"

    def requires(self, program: Program) -> None:
        self._quantize.requires(program)

    @property
    def _quantize(self) -> Quantize:
        return Quantize(self.scheme, self.activation, self.overrides, self.block, self.formats)

    def run(self, program: Program, remarks: Remarks) -> bool:
        changed = False
        for graph in program.graphs.values():
            elsewhere = {n for g in program.graphs.values() if g is not graph for n in g.params}
            most = program.interface.context or max(self.tokens, len(self.text))
            inputs = _inputs(graph, min(self.tokens, most), self.text[:most])
            # of a graph that cannot be run, one remark is enough
            found = list(self._found(graph, elsewhere, Remarks() if inputs is None else remarks))
            if not found:
                continue
            if inputs is None:
                remarks.missed("features are not made one size: that takes a graph of tokens i64[b, s] and nothing else", graph)
                continue
            wanted = [v for f in found for v in (f.x, *f.weights)]
            if absent := [n for n in _read(graph, wanted) if not _is_data(program.params[n])]:
                remarks.missed(f"features are not made one size: the numbers of %{absent[0]} are not there", graph)
                continue
            try:
                seen = observed(graph, program.params, wanted, inputs)
            except WasatError as e:  # the graph takes other tokens than these
                remarks.missed(f"features are not made one size: {e}", graph)
                continue
            count = sum(f.scale(program, seen, self.activation, _ENOUGH[bool(self.text)]) for f in found)
            if count:
                rest = f"; those of {len(found) - count} are even" if count < len(found) else ""
                remarks.applied(f"features of {count} input{'s' * (count > 1)} of products are made one size{rest}", graph)
            changed |= bool(count)
        return changed

    def _found(self, graph: Graph, elsewhere: set[str], remarks: Remarks) -> Iterator[_Features]:
        only = param_only(graph)
        for x in graph.values():
            readers = [u for u in x.users if u.is_a("linear") and u.inputs[0] is x and u.inputs[1] in only]
            if not readers or x in only:
                continue
            found = self._features(x, readers, elsewhere, only)
            if isinstance(found, str):
                remarks.missed(f"features of %{x.name} are not made one size: {found}", x)
            else:
                yield found

    def _features(self, x: Value, readers: list[Node], elsewhere: set[str], only: set[Value]) -> _Features | str:
        """What of ``x`` [.., k] is scaled, or why nothing is."""
        others = [f"{u.op.name}" for u in x.users if u not in readers]
        if others or x.graph.is_output(x):
            return f"{', '.join(others) or 'the outside'} reads it, too"
        if x.tensor.dtype is not DType.F32:
            return f"it is {x.type}"
        maker = _maker(x, only)
        if isinstance(maker, str):
            return maker
        stores: dict[Value, Storage] = {}
        found = _Features(x, readers, stores, *maker)
        weights = list(dict.fromkeys(u.inputs[1] for u in readers))
        for w in (*weights, *found.gains):
            if w.tensor.dtype is not DType.F32 and not (w.tensor.dtype.is_float and w.tensor.dtype.bits == 16):
                return f"%{w.name} is {w.type}"
        for w in weights:
            if w.param is None:
                return f"%{w.name} is computed"
            if w.param in elsewhere:
                return f"another graph reads %{w.name}, too"
            for u in w.users:
                if u not in readers and (u.op.picks(u.attrs) != 0 or u.output.tensor.dtype is not DType.F32):
                    return f"{u.op.name} reads %{w.name}, too"
                if u not in readers and x.graph.is_output(u.output):
                    return f"%{u.output.name}, looked up in %{w.name}, is an output"
            stored = self._storage(w, only)
            if isinstance(stored, str):
                return f"%{w.name} stays {w.type}: {stored}"
            stores[w] = stored
        for w in found.gains:
            if w not in only:
                return f"%{w.name} is no parameter"
            if len(w.uses) > 1:
                return f"%{w.name} is read {len(w.uses)} times"
        return found

    def _storage(self, w: Value, only: set[Value]) -> Storage | str:
        """How ``Quantize`` will store a weight, or why not in fewer bits."""
        scheme = self._quantize.scheme_of([w.param or w.name])
        if scheme in (*FLOATS, "f32"):
            return f"it is to be {scheme}"
        return storage(scheme, role_of(w, only), int(w.shape[-1]), self.block, self.formats, operations_on(w))


@dataclass(frozen=True)
class _Features:
    """x [.., k], read by ``readers`` alone. It is scaled as the operands of ``maker`` after the first are: vectors [k], or
    rows of a matrix [k, n]. Of values, whose heads are shared, ``heads`` (key heads, query heads of each, size)."""

    x: Value
    readers: list[Node]
    stores: dict[Value, Storage]
    """The weights of the readers, before anything is scaled, and how they will be stored."""
    maker: Node
    heads: tuple[int, int, int] | None = None

    @property
    def weights(self) -> list[Value]:
        return list(self.stores)

    @property
    def gains(self) -> tuple[Value, ...]:
        return self.maker.inputs[1:]

    def scale(self, program: Program, seen: Mapping[Value, Seen], activation: str | None, enough: float) -> bool:
        """Rewrites makers and readers, if rounding then costs ``enough`` less."""
        graph = self.x.graph
        s = self._factors(seen, activation, enough)
        if s is None:
            return False
        own = s if self.heads is None else self._of_queries(s)
        for gain in self.gains:
            b = Builder(graph, before=self.maker, loc=self.maker.loc)
            by = b.constant(np.reshape(1 / s, (-1, *(1,) * (len(gain.shape) - 1))))
            self._exchange([self.maker], gain, b.mul(_wide(b, gain), by))
        order = {node: i for i, node in enumerate(graph.nodes)}
        for w in dict.fromkeys(u.inputs[1] for u in self.readers):
            users = w.users
            b = Builder(graph, before=min(users, key=order.__getitem__), loc=users[0].loc)
            self._exchange(users, w, b.mul(_wide(b, w), b.constant(own)))
            for u in users:
                looked_up, rest = u.output, u.output.users
                if u not in self.readers and rest:
                    b = Builder(graph, before=min(rest, key=order.__getitem__), loc=u.loc)
                    back = b.mul(looked_up, _param(program, graph, f"{self.weights[0].param}|scaled back", 1 / own))
                    self._exchange(rest, looked_up, back)
        return True

    def _factors(self, seen: Mapping[Value, Seen], activation: str | None, enough: float) -> Sizes | None:
        """What features are divided by; None where nothing is won, or a size is not finite."""
        rows, columns = seen[self.x].sizes, np.sqrt(sum(_relative(seen[w].sizes) for w in self.weights))
        if not (np.isfinite(rows).all() and np.isfinite(columns).all() and rows.any() and columns.any()):
            return None
        if self.heads is not None:
            rows, columns = (self._of_values(a) for a in (rows, columns))
        rows, columns = (np.maximum(a, a.max() / 4096) for a in (rows, columns))
        least, best = enough * self._cost(np.ones_like(rows), seen, activation), None
        for a, b in _POWERS:
            s = rows**a / columns**b
            s = np.clip(s / np.exp(np.log(s).mean()), 1 / _MOST, _MOST).astype(np.float32)
            if (cost := self._cost(s, seen, activation)) < least:
                least, best = cost, s
        return best

    def _cost(self, s: Sizes, seen: Mapping[Value, Seen], activation: str | None) -> float:
        """What rounding adds to the results of the readers if features are divided by ``s``: the squared error, of each reader
        relative to its results, were features and columns independent of each other."""
        s = s if self.heads is None else self._of_queries(s)
        x, of_rows = seen[self.x], dict[int, NDArray[np.float64]]()
        square, scaled, total = x.sizes.astype(np.float64) ** 2, x.rows / s, 0.0
        for w, stored in self.stores.items():
            assert not isinstance(stored.type, DType)
            t, columns = stored.type.with_shape(*seen[w].rows.shape), seen[w].sizes.astype(np.float64) ** 2
            wide = seen[w].rows * s
            of_weight = _mean_square((quantize_array(wide, t, stored.search).dense() - wide) / s)
            if t.row_block not in of_rows:
                rounded = scaled
                if activation is not None:
                    q, d = quantize_rows(scaled, t.row_block)
                    rounded = (q * d[..., None]).reshape(len(q), -1)[:, : len(s)]
                of_rows[t.row_block] = _mean_square((rounded - scaled) * s)
            total += float(of_weight @ square + of_rows[t.row_block] @ columns) / float(square @ columns)
            if any(u not in self.readers for u in w.users):  # what is looked up, and scaled back
                total += float(of_weight.sum() / columns.sum())
        return total

    def _exchange(self, users: Iterable[Node], old: Value, new: Value) -> None:
        for u in users:
            self.x.graph.set_inputs(u, [new if v is old else v for v in u.inputs])

    def _of_values(self, a: Sizes) -> Sizes:
        """Sizes of the features of all query heads -> of the key heads' values that these share."""
        assert self.heads is not None
        g, n, e = self.heads
        return np.sqrt((a.reshape(g, n, e) ** 2).mean(1)).reshape(-1)

    def _of_queries(self, a: Sizes) -> Sizes:
        assert self.heads is not None
        g, n, e = self.heads
        return np.repeat(a.reshape(g, 1, e), n, 1).reshape(-1)


def _relative(sizes: Sizes) -> NDArray[np.float64]:
    """Squares, 1 on average."""
    square = sizes.astype(np.float64) ** 2
    return square / (square.mean() or 1.0)


def _wide(b: Builder, w: Value) -> Value:
    return w if w.tensor.dtype is DType.F32 else b.cast(w, dtype=DType.F32)


def _param(program: Program, graph: Graph, name: str, x: np.ndarray) -> Value:
    i, free = 1, name
    while free in program.params:
        i, free = i + 1, f"{name}_{i}"
    t = TensorType(DType.F32, x.shape)
    program.params[free] = ArrayParam(x.astype(np.float32), t)
    return graph.add_param(free, t)


def _maker(x: Value, only: set[Value]) -> tuple[Node, tuple[int, int, int] | None] | str:
    """The node whose operands [k] or [k, n] scale the features of x; or why there is none."""
    node = x.node
    if node is None:
        return "it comes from outside"
    if node.is_a(*_NORMS):
        gains = node.inputs[1:]
        if not gains or any(tuple(v.shape) != (x.shape[-1],) for v in gains):
            return f"{node.op.name} has no gain"
        return node, None
    if node.is_a("mul"):
        for v in node.inputs:
            linear = v.made_by("linear")
            if linear is not None and v.shape == x.shape and _alone(v) and linear.inputs[1] in only:
                return linear, None
        return "no factor of it is made by a linear alone"
    if node.is_a("reshape") and (attention := node.inputs[0].made_by("attention")) is not None:
        v = attention.inputs[2]
        made = v.made_by("reshape")
        linear = made.inputs[0].made_by("linear") if made is not None else None
        (h, e), g = attention.output.shape[2:], v.shape[2]
        alone = made is not None and all(map(_alone, (v, node.inputs[0], made.inputs[0])))
        whole = len(x.shape) == 3 and x.shape[-1] == h * e and linear is not None and linear.inputs[1].shape[0] == g * e
        if linear is None or not alone or not whole or not all(isinstance(d, int) for d in (h, e, g)):
            return "its values are not made by a linear alone"
        return linear, (int(g), int(h) // int(g), int(e))
    return f"{node.op.name} makes it"


def _alone(v: Value) -> bool:
    """Whether one operand reads it, and nobody outside."""
    return len(v.uses) == 1 and not v.graph.is_output(v)


def _inputs(graph: Graph, count: int, text: Sequence[int]) -> dict[str, np.ndarray] | None:
    """A text, or random tokens, for a graph that takes these and nothing else."""
    if len(graph.inputs) != 1 or not token_inputs(graph):
        return None
    [v] = graph.inputs
    tables = [u.inputs[0] for u in v.users if u.op.picks(u.attrs) == 0 and u.inputs[1] is v]
    sizes = [t.shape[0] for t in tables if isinstance(t.shape[0], int)]
    if not sizes:
        return None
    rows, length = (d if isinstance(d, int) else None for d in v.shape)
    ids = np.asarray(text, np.int64) if text else np.random.default_rng(0).integers(0, min(sizes), count)
    ids = np.resize(ids, (rows or 1, length or len(ids)))
    return {v.name: ids.astype(v.tensor.dtype.np)}


def _needed(graph: Graph, wanted: Sequence[Value]) -> set[Value]:
    """What these values are computed from, they themselves among it."""
    needed: set[Value] = set(wanted)
    for node in graph.nodes_reversed:
        if any(v in needed for v in node.outputs):
            needed.update(node.inputs)
    return needed


def _read(graph: Graph, wanted: Sequence[Value]) -> list[str]:
    """The parameters that these values are computed from."""
    needed = _needed(graph, wanted)
    return [name for name, v in graph.params.items() if v in needed]


def _is_data(p: ParamSource) -> bool:
    return all(map(_is_data, p.sources.values())) if isinstance(p, DerivedParam) else getattr(p, "is_data", False)


@dataclass(frozen=True)
class Seen:
    """Of a value [.., k]: the root mean square of each feature, [k], and some of its rows, [m, k]."""

    sizes: Sizes
    rows: NDArray[np.float32]


def observed(
    graph: Graph, params: Mapping[str, ParamSource], wanted: Sequence[Value], inputs: Mapping[str, np.ndarray]
) -> dict[Value, Seen]:  # fmt: skip
    """Of each value its sizes and some rows. Parameters are read when they are needed, and dropped."""
    needed = _needed(graph, wanted)
    nodes = [n for n in graph.nodes if any(v in needed for v in n.outputs)]
    [v] = graph.inputs
    dims = dict(zip((str(d) for d in v.shape), inputs[v.name].shape))
    asked, found = set(wanted), dict[Value, Seen]()

    def see(x: Value, array: Array) -> None:
        if x in asked and x not in found and not isinstance(array, QArray):
            rows = array.reshape(-1, array.shape[-1]).astype(np.float32, copy=False)
            part = rows[:: -(-len(rows) // _ROWS[x.param is not None])]
            found[x] = Seen(np.sqrt(_mean_square(rows)).astype(np.float32), part.copy())

    env: dict[Value, Array] = {v: inputs[v.name]}
    for node, arrays, results in run_nodes(nodes, env, lambda name: params[name].load(), dims):
        for x, array in zip((*node.inputs, *node.outputs), (*arrays, *results)):
            see(x, array)
    for x in wanted:  # of heads, which are not run
        if x not in found and x.param is not None:
            see(x, params[x.param].load())
    return found


def _mean_square(rows: np.ndarray) -> NDArray[np.float64]:
    """[m, k] -> [k]."""
    return np.einsum("nk,nk->k", rows, rows, dtype=np.float64) / len(rows)
