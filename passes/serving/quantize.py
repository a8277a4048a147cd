"""Stores weights in fewer bits."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
from wasat.ir import Builder, DType, Graph, Node, ParamSource, Program, TensorType, Value, op_named

from ..cleanup.hoist_params import derive, param_only, size_in_bytes
from ..core import GraphPass, Pass, PassError, Remarks
from ..pattern import erase_dead

_INTEGERS = ("int8", "int4")
_FLOATS = {"f16": DType.F16, "bf16": DType.BF16}
SCHEMES = (*_INTEGERS, *_FLOATS, "f32")
_LARGE = 16384
"""Bytes of a parameter below which nobody asks why it stays."""
_F16 = np.finfo(np.float16)


@dataclass(frozen=True)
class Quantize(Pass):
    """Weights of ``linear`` and ``embedding`` in fewer bits; norms, biases, what loops read and everything else stay.

    ``int8``, ``int4``: ``quantized_linear`` and ``quantized_embedding`` of ``quantize(weight)``, in blocks of ``block`` along
    the last axis that share an f16 scale; a weight with a block whose scale f16 does not hold stays.
    ``activation="int8"``: products are of integers, x being quantized row by row.
    ``f16``, ``bf16``: the weight is cast, and widened as it is read. ``f32``: it is left as it is. ``overrides``: pairs of a
    glob over parameter names and the scheme of the weights that match; the first that matches decides.

    Raises PassError for an unknown scheme and for a glob that matches no parameter.
    """

    scheme: str = "int8"
    activation: str | None = "int8"
    overrides: tuple[tuple[str, str], ...] = ()
    block: int = 32
    name = "quantize"
    exact = False

    def requires(self, program: Program) -> None:
        for scheme in (self.scheme, *(s for _, s in self.overrides)):
            if scheme not in SCHEMES:
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
        changed = [_Run(self, g, program.params, remarks).run() for g in program.graphs.values()]
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
            for node in list(made.output.users):
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
    return isinstance(w.type, TensorType) and w.type.dtype in _FLOATS.values() and wide.tensor.dtype is DType.F32


def _replace_by_quantized(graph: Graph, node: Node, operands: tuple[Value, ...], activation: str | None) -> None:
    """The quantized form of ``node`` in its place."""
    op = op_named(node.op.quantized or "")
    options: dict[str, Any] = {"activation": activation, "dtype": node.output.tensor.dtype}
    new = Builder(graph, before=node, loc=node.loc).emit(op, *operands, **{f.name: options[f.name] for f in fields(op.Attrs)})
    graph.replace(node, [new])


class _Run:
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

    def run(self) -> bool:
        self._others()
        for node in self.graph.nodes:
            if node.op.quantized is not None and node.op.weight is not None:
                self._node(node, node.op.weight)
            for body in node.attrs.bodies:
                self._loop(node, body.graph)
        for scheme, n in self.count.items():
            sizes = f"{_size(self.before[scheme])} -> {_size(self.after[scheme])}"
            self.remarks.applied(f"{n} weight{'s' if n > 1 else ''} to {scheme}: {sizes}", self.graph)
        for w, small in self.small.items():
            for user in w.users:
                if user is not small.node:
                    self.remarks.missed(f"%{w.name} is also kept as {w.type}, because {user!r} reads it", user)
        return bool(self.small)

    def _others(self) -> None:
        """Names large parameters that no ``linear``, ``embedding`` or loop reads, and what is quantized already."""
        for v in self.graph.params.values():
            if not isinstance(v.type, TensorType):
                self.remarks.missed(f"%{v.name} stays {v.type}: it is quantized already", v)
                continue
            wide = v.tensor.dtype.is_float and v.tensor.dtype.bits > 8 and len(v.shape) > 1 and size_in_bytes(v.type) >= _LARGE
            readers = {u.op.name for u in v.users}
            if not wide or not readers or self.options.scheme_of([v.param or v.name]) == "f32":
                continue
            if not any(x.op.quantized or x.is_a("quantize") or x.attrs.bodies for x in _reached(v, self.only)):
                reads = ", ".join(sorted(readers))
                self.remarks.missed(f"%{v.name} stays {v.type}: {reads} reads it, and no linear or embedding", v)

    def _node(self, node: Node, at: int) -> None:
        w = node.inputs[at]
        if w not in self.small and not self._quantize(node, w):
            return
        operands = (*node.inputs[:at], self.small[w], *node.inputs[at + 1 :])
        if self.small[w].made_by("quantize") is None:
            self.graph.set_inputs(node, operands)
            return
        _replace_by_quantized(self.graph, node, operands, self.options.activation)

    def _loop(self, node: Node, body: Graph) -> None:
        for w, v in zip(node.inputs, body.inputs):
            if w in self.only and any(u.op.quantized is not None and u.inputs[u.op.weight or 0] is v for u in v.users):
                self.remarks.missed(f"%{w.name} stays {w.type}: the body of a loop reads it", node)

    def _quantize(self, node: Node, w: Value) -> bool:
        """Makes the small copy of ``w`` before its first reader, or says why not."""
        if w in self.left:
            return False
        names = _sources(w) if w in self.only else []
        scheme = self.options.scheme_of(names)
        reason = self._obstacle(w, scheme)
        if reason is not None or scheme == "f32" or (scheme in _FLOATS and w.tensor.dtype.bits <= 16):
            self.left.add(w)
            if reason is not None:
                self.remarks.missed(f"%{w.name} stays {w.type}: {reason}", node)
            return False
        b = Builder(self.graph, before=node, loc=node.loc)
        new = b.cast(w, dtype=_FLOATS[scheme]) if scheme in _FLOATS else b.quantize(w, scheme=scheme, block=self.options.block)
        self.small[w] = new
        self.count[scheme] += 1
        self.before[scheme] += round(size_in_bytes(w.type))
        self.after[scheme] += round(size_in_bytes(new.type))
        return True

    def _obstacle(self, w: Value, scheme: str) -> str | None:
        if w not in self.only:
            return "it is not computed from parameters alone"
        if scheme in _INTEGERS and w.shape[-1] < self.options.block:
            return f"its rows are shorter than a block of {self.options.block}"
        if scheme in _INTEGERS and all(getattr(self.params.get(name), "is_data", False) for name in _sources(w)):
            levels = 127 if scheme == "int8" else 8
            source = self.params[w.param] if w.param is not None else derive(w.name, w, self.params)
            if not _f16_holds_scales(np.asarray(source.load()), self.options.block, levels):
                names = ", ".join(_sources(w))
                return f"{names} has a block whose scale is outside f16 (about 1e-6 to 65504)"
        return None


def _reached(v: Value, only: set[Value]) -> list[Node]:
    """What reads ``v``, or what is computed from parameters alone and from it."""
    nodes = {u: None for u in v.users}
    for node in (todo := list(nodes)):
        for out in node.outputs:
            for u in out.users if out in only else ():
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


def _f16_holds_scales(w: np.ndarray, block: int, levels: int) -> bool:
    """Whether the scale of every block is 0 or an f16 that is right to 3%. Works through w in slabs: memory matters here."""
    rows = w.reshape(-1, w.shape[-1])
    step = max(1, (1 << 20) // rows.shape[1])
    for i in range(0, len(rows), step):
        part = np.abs(rows[i : i + step].astype(np.float32))
        scales = np.maximum.reduceat(part, np.arange(0, part.shape[1], block), axis=1) / np.float32(levels)
        if not ((scales == 0) | ((scales >= 2.0**-20) & (scales <= _F16.max))).all():
            return False
    return True


def _size(n: float) -> str:
    return f"{n / 1e6:.2f} MB" if n >= 1e6 else f"{n / 1e3:.2f} kB"
