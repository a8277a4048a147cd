"""Stores weights in fewer bits."""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
from wasat.ir import Builder, DType, Graph, Node, ParamSource, Program, QTensorType, TensorType, Value, op_named

from ..analyses.halves import float_holds, range_of_rows
from ..cleanup.hoist_params import derive, param_only, size_in_bytes
from ..core import GraphPass, Pass, PassError, Remarks
from ..pattern import erase_dead
from .recipes import ALL, FLOATS, SCHEMES, Formats, Storage, is_scheme, role_of, storage

_LARGE = 16384
"""Bytes of a parameter below which nobody asks why it stays."""
_F16 = np.finfo(np.float16)


@dataclass(frozen=True)
class Quantize(Pass):
    """Weights of ``linear`` and ``embedding`` in fewer bits, those in bodies of loops and branches too; norms, biases and
    everything else stay.

    ``int4`` is a recipe (:mod:`.recipes`): it chooses a scheme for each weight. Schemes: ``int8`` and ``int4-plain`` have
    symmetric blocks of ``block`` along the last axis that share an f16 scale; ``s4`` to ``s7`` searched ones with
    factors (:func:`wasat.ir.schemes.scheme_named`); a type as text, ``int4zb64f16`` or ``q4_k``, is searched, too. Such weights
    become ``quantized_linear`` and ``quantized_embedding`` of ``quantize(weight)``; one with a block whose scale f16 does not
    hold stays. ``activation="int8"``: products are of integers, x being quantized row by row.
    ``f16``, ``bf16``: the weight is cast, and widened as it is read. ``f32``: it is left as it is. ``overrides``: pairs of a
    glob over parameter names and the scheme of the weights that match; the first that matches decides. ``formats``: pairs
    of globs, operations and the types of weights that the target has kernels of them for; recipes choose among these.

    Raises PassError for an unknown scheme and for a glob that matches no parameter.
    """

    scheme: str = "int8"
    activation: str | None = "int8"
    overrides: tuple[tuple[str, str], ...] = ()
    block: int = 32
    formats: Formats = ALL
    name = "quantize"
    exact = False

    def requires(self, program: Program) -> None:
        for scheme in (self.scheme, *(s for _, s in self.overrides)):
            if not is_scheme(scheme):
                raise PassError(f"there is no quantization scheme {scheme!r}; there are {', '.join(SCHEMES)}")
        if self.activation not in (None, "int8"):
            raise PassError(f"activations can be int8 or None, not {self.activation!r}")
        names = list(dict.fromkeys(name for g in program.graphs.values() for name in g.params))
        for glob, _ in self.overrides:
            if not any(fnmatchcase(name, glob) for name in names):
                near = difflib.get_close_matches(glob, names, 3, cutoff=0.4)
                raise PassError(
                    f"override {glob!r} matches no parameter" + (f"; near it are {', '.join(near)}" if near else "")
                )

    def run(self, program: Program, remarks: Remarks) -> bool:
        changed = [QuantizedGraph(self, g, program.params, remarks).run() for g in program.graphs.values()]
        return any(changed)

    def scheme_of(self, names: list[str]) -> str:
        """The scheme for a weight computed from the parameters ``names``: of the first override that matches one of them."""
        return next((s for glob, s in self.overrides if any(fnmatchcase(n, glob) for n in names)), self.scheme)


@dataclass(frozen=True)
class KeepQuantized(GraphPass):
    """``linear`` and ``embedding`` of a weight that is stored in fewer bits read it as it is: ``linear(x, dequantize(w))`` ->
    ``quantized_linear(x, w)``, and ``linear(x, cast(w))`` of a narrow float -> ``linear(x, w)``, which widens it as it reads.
    ``activation="int8"``: products with quantized weights are of integers, x being quantized row by row.
    """

    activation: str | None = "int8"
    name = "keep-quantized"
    exact = False

    def run_graph(self, graph: Graph, remarks: Remarks) -> bool:
        count: Counter[str] = Counter()
        for made in graph.nodes:
            w = made.inputs[0] if made.inputs else None
            narrow = made.is_a("cast") and w is not None and w.param is not None and _widened(w, made.output)
            if w is None or not (narrow or made.is_a("dequantize")):
                continue
            for node in [_feed(graph, n, made.output, w, self.activation, count) for n in made.output.users]:
                if made.output not in node.inputs:
                    continue
                if node.op.quantized is None or node.op.weight is None or made.output is not node.inputs[node.op.weight]:
                    if narrow:
                        continue
                    remarks.missed(f"%{w.name} {w.type} is dequantized as it is read: {node.op.name} reads it", node)
                    continue
                operands = (*node.inputs[: node.op.weight], w, *node.inputs[node.op.weight + 1 :])
                if narrow:
                    graph.set_inputs(node, operands)
                else:
                    _replace_by_quantized(graph, node, operands, self.activation)
                count[str(w.type).partition("[")[0]] += 1
            erase_dead(graph, made)
        for scheme, n in count.items():
            remarks.applied(f"{n} operation{'s' * (n > 1)} on weights that stay {scheme}", graph)
        return bool(count)


def _widened(w: Value, wide: Value) -> bool:
    """Whether ``wide`` is all that ``w``, of 16 bits, holds."""
    return isinstance(w.type, TensorType) and w.type.dtype in FLOATS.values() and wide.tensor.dtype is DType.F32


def _read_small(graph: Graph, node: Node, small: Value, activation: str | None) -> None:
    """The node reads ``small`` as its weight."""
    at = node.op.weight or 0
    operands = (*node.inputs[:at], small, *node.inputs[at + 1 :])
    if isinstance(small.type, TensorType):
        graph.set_inputs(node, operands)
    else:
        _replace_by_quantized(graph, node, operands, activation)


def _inner(node: Node, v: Value) -> list[Value]:
    """What stands for the operand ``v`` in the bodies of ``node``, which get it as it is."""
    bodies = [body.graph for body in node.attrs.bodies]
    shift = len(node.inputs) - len(bodies[0].inputs) if bodies else 0
    found = [i for i, x in enumerate(node.inputs) if x is v and i >= node.attrs.shared]
    return [body.inputs[i - shift] for body in bodies for i in found]


def _readers(w: Value) -> list[Node]:
    """The nodes that would read a small copy of ``w``, in bodies too."""
    found = [u for u in w.users if _reads_as_weight(u, w)]
    return found + [u for node in w.users for v in _inner(node, w) for u in _readers(v)]


def operations_on(w: Value) -> list[str]:
    """Names of the operations that would read a small copy of ``w``."""
    return list(dict.fromkeys(u.op.name for u in _readers(w)))


def _feed(graph: Graph, node: Node, w: Value, small: Value, activation: str | None, count: Counter[str] | None = None) -> Node:
    """The node, or one in its place whose bodies read ``small`` where they read ``w`` as a weight; ``w`` is an operand only if
    something else reads it there."""
    if not any(_readers(v) for v in _inner(node, w)):
        return node
    shift = len(node.inputs) - len(node.attrs.bodies[0].graph.inputs)
    places = [i for i, x in enumerate(node.inputs) if x is w and i >= node.attrs.shared]

    def change(body: Graph) -> bool:
        own = body.add_input(small.name, small.type, unique=True)
        for v in [body.inputs[i - shift] for i in places]:
            for u in v.users:
                u = _feed(body, u, v, own, activation)
                if _reads_as_weight(u, v):
                    _read_small(body, u, own, activation)
        return True

    attrs = node.attrs.with_bodies(change)
    bodies = [body.graph for body in attrs.bodies]
    unread = [i for i in places if not any(b.inputs[i - shift].uses or b.is_output(b.inputs[i - shift]) for b in bodies)]

    def drop(body: Graph) -> bool:
        for v in [body.inputs[i - shift] for i in unread]:
            body.remove_input(v)
        return True

    operands = [v for i, v in enumerate((*node.inputs, small)) if i not in unread]
    new = graph.add_node(node.op, operands, attrs.with_bodies(drop), before=node, loc=node.loc)
    graph.replace(node, new.outputs)
    if count is not None:
        count[str(small.type).partition("[")[0]] += 1
    return new


def _replace_by_quantized(graph: Graph, node: Node, operands: tuple[Value, ...], activation: str | None) -> None:
    """The quantized form of ``node`` in its place."""
    op = op_named(node.op.quantized or "")
    options: dict[str, Any] = {"activation": activation, "dtype": node.output.tensor.dtype}
    new = Builder(graph, before=node, loc=node.loc).emit(op, *operands, **{f.name: options[f.name] for f in fields(op.Attrs)})
    graph.replace(node, [new])


class QuantizedGraph:
    """Quantization of one graph."""

    def __init__(self, options: Quantize, graph: Graph, params: Mapping[str, ParamSource], remarks: Remarks) -> None:
        self.options, self.graph, self.params, self.remarks = options, graph, params, remarks
        self.only = param_only(graph)
        self.small: dict[Value, Value] = {}
        """Weights and what stands for them: one copy, however many operations read it."""
        self.left: set[Value] = set()
        self.count: Counter[str] = Counter()
        self.before: Counter[str] = Counter()
        self.after: Counter[str] = Counter()
        self.elements: Counter[str] = Counter()

    def run(self) -> bool:
        self._others()
        self.exchange()
        self._tell()
        return bool(self.small)

    def exchange(self) -> None:
        """Whatever reads a weight as one reads what stands for it."""
        for node in self.graph.nodes:
            if node.op.quantized is not None and node.op.weight is not None:
                self._node(node, node.op.weight)
            for w in dict.fromkeys(node.inputs):
                if any(_readers(v) for v in _inner(node, w)) and (w in self.small or self._quantize(node, w)):
                    node = _feed(self.graph, node, w, self.small[w], self.options.activation)

    def _tell(self) -> None:
        for scheme, n in self.count.items():
            sizes = f"{_size(self.before[scheme])} -> {_size(self.after[scheme])}"
            self.remarks.applied(f"{n} weight{'s' if n > 1 else ''} to {scheme}: {sizes}", self.graph)
        if len(self.count) > 1:
            each = 8 * self.after.total() / self.elements.total()
            parts = ", ".join(f"{s} {8 * self.after[s] / n:.2f}" for s, n in self.elements.items())
            sizes = f"{_size(self.before.total())} -> {_size(self.after.total())}"
            total = f"{self.count.total()} weights in all: {sizes}, {each:.2f} bits a weight ({parts})"
            self.remarks.applied(total, self.graph)
        for w, small in self.small.items():
            for user in w.users:
                if user is not small.node:
                    self.remarks.missed(f"%{w.name} is also kept as {w.type}, because {user!r} reads it", user)

    def _others(self) -> None:
        """Names large parameters that no ``linear`` or ``embedding`` reads, and what is quantized already."""
        for v in self.graph.params.values():
            if not isinstance(v.type, TensorType):
                self.remarks.missed(f"%{v.name} stays {v.type}: it is quantized already", v)
                continue
            wide = v.tensor.dtype.is_float and v.tensor.dtype.bits > 8 and len(v.shape) > 1 and size_in_bytes(v.type) >= _LARGE
            readers = {u.op.name for u in v.users}
            if not wide or not readers or self.options.scheme_of([v.param or v.name]) == "f32":
                continue
            if not any(x.op.quantized or x.is_a("quantize") for x in _reached(v, self.only)):
                reads = ", ".join(sorted(readers))
                self.remarks.missed(f"%{v.name} stays {v.type}: {reads} reads it, and no linear or embedding", v)

    def _node(self, node: Node, at: int) -> None:
        w = node.inputs[at]
        if w not in self.small and not self._quantize(node, w):
            return
        _read_small(self.graph, node, self.small[w], self.options.activation)

    def _quantize(self, node: Node, w: Value) -> bool:
        """Makes the small copy of ``w`` before its first reader, or says why not."""
        if w in self.left:
            return False
        names = _sources(w) if w in self.only else []
        scheme = self.options.scheme_of(names)
        found: Storage | str | None = None
        if w not in self.only:
            found = "it is not computed from parameters alone"
        elif scheme != "f32":
            o, readers = self.options, operations_on(w)
            found = storage(scheme, role_of(w, self.only), int(w.shape[-1]), o.block, o.formats, readers)
            if isinstance(found, Storage):
                found = self.obstacle(w, found) or found
        if not isinstance(found, Storage) or (isinstance(found.type, DType) and w.tensor.dtype.bits <= 16):
            self.left.add(w)
            if isinstance(found, str):
                self.remarks.missed(f"%{w.name} stays {w.type}: {found}", node)
            return False
        new = self.small[w] = self.made(Builder(self.graph, before=node, loc=node.loc), w, found)
        self.count[found.name] += 1
        self.before[found.name] += round(size_in_bytes(w.type))
        self.after[found.name] += round(size_in_bytes(new.type))
        self.elements[found.name] += math.prod(int(d) for d in w.shape)
        return True

    def made(self, b: Builder, w: Value, found: Storage) -> Value:
        """What stands for ``w``."""
        return b.cast(w, dtype=found.type) if isinstance(found.type, DType) else b.quantize(w, **found.options)

    def obstacle(self, w: Value, found: Storage) -> str | None:
        """Why the numbers of ``w`` cannot be stored so."""
        t = found.type
        is_narrow = isinstance(t, DType) and w.tensor.dtype.bits <= 16
        if is_narrow or not all(getattr(self.params.get(name), "is_data", False) for name in _sources(w)):
            return None
        source = self.params[w.param] if w.param is not None else derive(w.name, w, self.params)
        array, names = np.asarray(source.load()), ", ".join(_sources(w))
        if isinstance(t, DType):
            least, most = range_of_rows(t)
            return None if float_holds(array, t) else f"{names} has a row outside {t} (largest from {least:.0e} to {most:.5g})"
        if f16_holds_scales(array, t):
            return None
        return f"{names} has a block whose scale is outside f16 (about 1e-6 to 65504)"


def _reads_as_weight(node: Node, w: Value) -> bool:
    """Whether the node would read the small copy."""
    return node.op.quantized is not None and node.inputs[node.op.weight or 0] is w


def _reached(v: Value, only: set[Value]) -> list[Node]:
    """What reads ``v``, or what is computed from parameters alone and from it; in bodies, as a weight."""
    nodes = dict.fromkeys([*v.users, *_readers(v)])
    for node in (todo := list(nodes)):
        for out in node.outputs:
            for u in (*out.users, *_readers(out)) if out in only else ():
                if u not in nodes:
                    nodes[u] = None
                    todo.append(u)
    return list(nodes)


def _sources(w: Value) -> list[str]:
    """Names of the parameters that ``w`` is computed from."""
    seen = {w: None}
    for v in (todo := [w]):
        for x in v.node.inputs if v.node is not None else ():
            if x not in seen:
                seen[x] = None
                todo.append(x)
    return [v.param for v in seen if v.param is not None]


def f16_holds_scales(w: np.ndarray, type: QTensorType) -> bool:
    """Whether the scale of every block is 0 or an f16 that is right to 3%, and its offset one, too; integer factors make up for
    what one of a super-block is rounded by. Works through w in slabs: memory matters here."""
    block, least = type.block, 2.0**-20
    levels, most = 127 if type.scheme == "int8" else 8, float(_F16.max)
    if type.stored is not None:
        levels, factor = max(type.stored.high, -type.stored.low), 1
        if type.stored.factors:
            factor = max(map(abs, type.stored.factors))
            block, levels, least = type.stored.block, levels * factor, 2.0**-23
        most *= factor / levels if type.stored.offset else 1  # an offset is as large as the elements
    if not w.size:
        return True
    rows = w.reshape(-1, w.shape[-1])
    step = max(1, (1 << 20) // rows.shape[1])
    for i in range(0, len(rows), step):
        part = np.abs(rows[i : i + step].astype(np.float32))
        scales = np.maximum.reduceat(part, np.arange(0, part.shape[1], block), axis=1) / np.float32(levels)
        if not ((scales == 0) | ((scales >= least) & (scales <= most))).all():
            return False
    return True


def _size(n: float) -> str:
    return f"{n / 1e6:.2f} MB" if n >= 1e6 else f"{n / 1e3:.2f} kB"
