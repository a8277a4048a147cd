"""What emissions write with: ONNX nodes whose element types are checked against the operators' own schemas.

An operator that lacks an element type is computed in a wider one, between casts, as the IR's references do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import defs, helper, numpy_helper
from wasat.ir import Dim, DimLike, DType, Graph, Literal, Node, QTensorType, TensorType, Type, Value, less_equal

from .errors import Unsupported

_T = onnx.TensorProto
CODE = {
    DType.F32: _T.FLOAT, DType.U8: _T.UINT8, DType.I8: _T.INT8, DType.U16: _T.UINT16, DType.I16: _T.INT16,
    DType.I32: _T.INT32, DType.I64: _T.INT64, DType.BOOL: _T.BOOL, DType.F16: _T.FLOAT16, DType.F64: _T.DOUBLE,
    DType.U32: _T.UINT32, DType.U64: _T.UINT64, DType.BF16: _T.BFLOAT16, DType.F8E4M3: _T.FLOAT8E4M3FN,
    DType.F8E5M2: _T.FLOAT8E5M2, DType.F8E4M3FNUZ: _T.FLOAT8E4M3FNUZ, DType.F8E5M2FNUZ: _T.FLOAT8E5M2FNUZ,
    DType.F8E8M0: _T.FLOAT8E8M0, DType.F4E2M1: _T.FLOAT4E2M1, DType.U4: _T.UINT4, DType.I4: _T.INT4, DType.U2: _T.UINT2,
    DType.I2: _T.INT2,
}  # fmt: skip
"""ONNX's number of each element type."""
TEXT = {d: f"tensor({_T.DataType.Name(code).lower()})" for d, code in CODE.items()}
"""How schemas spell an element type."""
_FROM_TEXT = {text: d for d, text in TEXT.items()}
_SIGNED = (DType.I32, DType.I64)


def _wider(d: DType) -> tuple[DType, ...]:
    """Types that hold every value of ``d``, nearest first: where an operator lacks ``d`` it is computed in one of them."""
    if d.is_float:
        return tuple(w for w in (DType.F32, DType.F64) if w.bits > d.bits)
    if d is DType.BOOL:
        return (DType.U8, *_SIGNED)
    return tuple(w for w in (*_SIGNED, DType.U64) if w.bits > d.bits and (w.value[0] == "i" or d.value[0] == "u"))


@cache
def _schema(kind: str, opset: int, domain: str) -> defs.OpSchema | None:
    try:
        return defs.get_schema(kind, opset, domain)
    except defs.SchemaError:
        return None


@dataclass(frozen=True)
class Options:
    """What the caller chose."""

    opset: int
    matmul_nbits: bool = False


@dataclass(frozen=True)
class Weight:
    """An initializer: what its file bytes are, made when they are written."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    load: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return (int(np.prod(self.shape, dtype=np.int64)) * self.dtype.bits + 7) // 8


@dataclass
class Emitter:
    """Collects the nodes of one graph. Values are named by strings; ``dtype`` knows the element type of each."""

    graph: Graph
    options: Options
    constants: list[onnx.NodeProto] = field(default_factory=list)
    sizes: list[onnx.NodeProto] = field(default_factory=list)
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    dtype: dict[str, DType] = field(default_factory=dict)
    names: dict[Value, str] = field(default_factory=dict)
    origins: dict[Value, Value] = field(default_factory=dict)
    """What inputs of bodies stand for."""
    scale_names: dict[Value, str] = field(default_factory=dict)
    """The scales of quantized values that nodes make."""
    zero_names: dict[Value, str] = field(default_factory=dict)
    """The zero points of such values, where their blocks have any."""
    offset_names: dict[Value, str] = field(default_factory=dict)
    """The offsets of such values, where their blocks have any."""
    weights: dict[str, Weight] = field(default_factory=dict)
    domains: set[str] = field(default_factory=set)
    load: Callable[[str], Any] = lambda name: None

    def __post_init__(self) -> None:
        self._taken: set[str] = set()
        self._node_names: set[str] = set()
        self._dims: dict[DimLike, str] = {}
        self._literals: dict[Literal, str] = {}
        self._hint, self._node_hint, self._doc = "", "", ""
        self._solutions: dict[str, tuple[Value, int, DimLike]] | None = None

    @property
    def opset(self) -> int:
        return self.options.opset

    # -- names -------------------------------------------------------------------------------------------------------
    def reserve(self, name: str) -> None:
        """No other value may have this name."""
        self._taken.add(name)

    def fresh(self, hint: str) -> str:
        return _unique(hint, self._taken)

    def at(self, node: Node) -> None:
        """What follows belongs to ``node``: names and doc strings come from it."""
        loc = node.loc
        self._hint = node.outputs[0].name
        self._node_hint = loc.scope if loc is not None and loc.line is None and loc.scope else self._hint
        # the file's name, not its path: the model may go where the exporting machine's folders are nobody's business
        self._doc = str(replace(loc, file=Path(loc.file).name)) if loc is not None else ""

    # -- nodes -------------------------------------------------------------------------------------------------------
    def op(
        self, kind: str, *inputs: str, outputs: int = 1, dtype: DType | None = None, domain: str = "", **attrs: Any
    ) -> Any:
        """Appends a node; returns the name of its output, or the tuple of them.

        ``""`` leaves an optional input out; ``dtype`` is the output's element type where no operand shows it.
        Raises Unsupported where the operator set lacks the operator, or any element type that could carry the operands.
        """
        schema = _schema(kind, self.opset, domain) if not domain else None
        if not domain and schema is None:
            raise Unsupported(f"operator set {self.opset} has no {kind}")
        args, own, work = list(inputs), {}, {}
        if schema is not None:
            for i, x in enumerate(args):
                if not x:
                    continue
                formal = schema.inputs[min(i, len(schema.inputs) - 1)]
                d = self.dtype[x]
                wide = d if TEXT[d] in formal.types else next((w for w in _wider(d) if TEXT[w] in formal.types), None)
                if wide is None:
                    raise Unsupported(f"{kind} of operator set {self.opset} takes no {d}")
                own[formal.type_str], work[formal.type_str] = d, wide
                if wide is not d:
                    args[i] = self.cast(x, wide)
        names = [self.fresh(f"{self._hint}/{kind}") for _ in range(outputs)]
        while args and not args[-1]:
            args.pop()
        given = {k: v for k, v in attrs.items() if v is not None}
        self.nodes.append(helper.make_node(
            kind, args, names, name=self.node_name(self._node_hint or kind), doc_string=self._doc or None,
            domain=domain, **given,
        ))  # fmt: skip
        if domain:
            self.domains.add(domain)
        results = []
        for j, name in enumerate(names):
            var, only = "", dtype
            if schema is not None:
                formal = schema.outputs[min(j, len(schema.outputs) - 1)]
                var = formal.type_str
                only = _FROM_TEXT[next(iter(formal.types))] if len(formal.types) == 1 else dtype
            made = work.get(var) or only
            assert made is not None, f"the element type of {kind} output {j}"
            self.dtype[name] = made
            results.append(self.cast(name, own[var]) if var in own and own[var] is not work[var] else name)
        return results[0] if outputs == 1 else tuple(results)

    def cast(self, x: str, dtype: DType, **attrs: Any) -> str:
        """x in another element type, by ONNX's own rules."""
        if self.dtype[x] is dtype:
            return x
        schema = _schema("Cast", self.opset, "")
        assert schema is not None
        for d in (self.dtype[x], dtype):
            if TEXT[d] not in schema.inputs[0].types:
                raise Unsupported(f"operator set {self.opset} has no element type {d}")
        return str(self.op("Cast", x, dtype=dtype, to=CODE[dtype], **attrs))

    def node_name(self, hint: str) -> str:
        """A name that no node has: onnxruntime refuses two of one name."""
        return _unique(hint, self._node_names)

    def const(self, value: Any, dtype: DType | str | None = None) -> str:
        """A constant; the same one is made once."""
        literal = Literal.of(value, dtype)
        if literal not in self._literals:
            schema = _schema("Constant", self.opset, "")
            assert schema is not None
            if TEXT[literal.dtype] not in schema.outputs[0].types:
                raise Unsupported(f"operator set {self.opset} has no element type {literal.dtype}")
            name = self._literals[literal] = self.fresh("constant")
            tensor = numpy_helper.from_array(np.array(literal.array), name)
            self.constants.append(helper.make_node("Constant", [], [name], name=self.node_name(name), value=tensor))
            self.dtype[name] = literal.dtype
        return self._literals[literal]

    def like(self, value: float, x: str) -> str:
        """A scalar of the element type of x."""
        return self.const(value, self.dtype[x])

    # -- sizes -------------------------------------------------------------------------------------------------------
    def dim(self, d: DimLike) -> str:
        """A dimension as i64[1], computed from the shapes of the graph's inputs. Raises Unsupported if they do not tell."""
        if not isinstance(d, Dim):
            return self.const([d], DType.I64)
        if d not in self._dims:
            keep, self.nodes = self.nodes, self.sizes
            hint, self._hint = self._hint, str(d).replace(" ", "")
            node_hint, self._node_hint = self._node_hint, self._hint
            doc, self._doc = self._doc, ""
            try:
                self._dims[d] = self._polynomial(d)
            finally:
                self.nodes, self._hint, self._node_hint, self._doc = keep, hint, node_hint, doc
        return self._dims[d]

    def _polynomial(self, d: Dim) -> str:
        total: str | None = None
        for monomial, c in d.terms:
            factors = [self._symbol(a) if isinstance(a, str) else self._function(a) for a in monomial]
            if c != 1 or not factors:
                factors.append(self.const([c], DType.I64))
            term = factors[0]
            for f in factors[1:]:
                term = self.op("Mul", term, f)
            total = term if total is None else self.op("Add", total, term)
        assert total is not None
        return total

    def _function(self, f: Any) -> str:
        x, y = self.dim(f.lhs), self.dim(f.rhs)
        if f.name in ("max", "min"):
            return str(self.op(f.name.capitalize(), x, y))
        if f.name == "floordiv" and less_equal(0, f.lhs) and less_equal(0, f.rhs):
            return str(self.op("Div", x, y))  # toward zero, which is down
        rest = self.op("Mod", x, y)  # of the divisor's sign: what floor division leaves
        return str(rest if f.name == "mod" else self.op("Div", self.op("Sub", x, rest), y))

    def _symbol(self, name: str) -> str:
        if self._solutions is None:
            self._solutions = _solve([*self.graph.inputs, *self.graph.params.values()])
        if name not in self._solutions:
            raise Unsupported(f"no shape of an input tells the size {name}")
        value, axis, d = self._solutions[name]
        size = self.op("Shape", self.names[value], start=axis, end=axis + 1)
        assert isinstance(d, Dim)
        (c,) = [c for m, c in d.terms if m == (name,)]
        rest = d - c * _symbol_dim(name)
        size = size if rest == 0 else self.op("Sub", size, self.dim(rest))
        return str(size if c == 1 else self.op("Div", size, self.const([c], DType.I64)))

    def shape(self, dims: Sequence[DimLike]) -> str:
        """Sizes as one i64 vector."""
        if all(isinstance(d, int) for d in dims):
            return self.const(np.array(dims, np.int64))
        return str(self.op("Concat", *(self.dim(d) for d in dims), axis=0))

    def reshape(self, x: str, dims: Sequence[DimLike]) -> str:
        """x under another shape; one unknown size is left to the runtime."""
        unknown = [i for i, d in enumerate(dims) if isinstance(d, Dim)]
        if len(unknown) == 1 and 0 not in dims:
            return str(self.op("Reshape", x, self.const(np.array([-1 if i in unknown else d for i, d in enumerate(dims)]))))
        return str(self.op("Reshape", x, self.shape(dims), allowzero=1))

    def scalar(self, d: DimLike) -> str:
        """A dimension as i64[]."""
        return self.const(d, DType.I64) if isinstance(d, int) else str(self.op("Reshape", self.dim(d), self.shape(())))

    # -- parameters --------------------------------------------------------------------------------------------------
    def weight(self, name: str, dtype: DType, shape: Sequence[DimLike], load: Callable[[], np.ndarray]) -> str:
        """Declares an initializer; its numbers are asked for when the file is written."""
        if name not in self.weights:
            schema = _schema("Constant", self.opset, "")
            assert schema is not None
            if TEXT[dtype] not in schema.outputs[0].types:
                raise Unsupported(f"operator set {self.opset} has no element type {dtype} (parameter {name})")
            sizes = [d for d in shape if isinstance(d, int)]
            if len(sizes) != len(shape):
                raise Unsupported(f"parameter {name} has the symbolic shape {list(shape)}")
            self.reserve(name)
            self.dtype[name] = dtype
            self.weights[name] = Weight(name, dtype, tuple(sizes), load)
        return name

    def operand(self, v: Value) -> str:
        """The name of an operand; a parameter is declared when it is first read."""
        if v not in self.names:
            assert v.param is not None, v
            name, t = v.param, v.type
            if isinstance(t, QTensorType):
                self.names[v] = self.weight(name, self.integer(t), t.shape, lambda: self.load(name).values)
            else:
                self.names[v] = self.weight(name, t.dtype, t.shape, lambda: np.asarray(self.load(name)))
        return self.names[v]

    def integer(self, t: QTensorType) -> DType:
        """The element type of quantized values: 4-bit integers take a byte each before operator set 21, which has them."""
        return DType.I4 if t.scheme == "int4" and self.opset >= 21 else DType.I8

    def scales(self, v: Value, dtype: DType) -> str:
        """The scales of a quantized value, [.., blocks]: as they are if they are ``dtype``, else in f32, which holds them all.

        Those of a parameter are stored so: a DequantizeLinear of initializers is what readers recognise as a weight.
        """
        t = v.type
        assert isinstance(t, QTensorType)
        own = t.scale if t.scale is dtype else DType.F32
        if v in self.scale_names:
            return self.cast(self.scale_names[v], own)
        name = self._stored(v)
        stored = f"{name}.scales" if own is t.scale else f"{name}.scales.{own}"
        return self.weight(stored, own, (*t.shape[:-1], t.blocks), lambda: self.load(name).scales.astype(own.np))

    def offsets(self, v: Value) -> str:
        """What is added to the blocks of a quantized value, f32 [.., blocks]."""
        t = v.type
        assert isinstance(t, QTensorType)
        if v in self.offset_names:
            return self.offset_names[v]
        name = self._stored(v)
        return self.weight(f"{name}.offsets", DType.F32, (*t.shape[:-1], t.blocks), lambda: np.asarray(self.load(name).offsets))

    def zeros(self, v: Value) -> str:
        """The zero points of a quantized value, i8 [.., blocks]; "" where it has none."""
        t = v.type
        assert isinstance(t, QTensorType)
        if not t.zeros:
            return ""
        if v in self.zero_names:
            return self.zero_names[v]
        name = self._stored(v)
        return self.weight(f"{name}.zeros", DType.I8, (*t.shape[:-1], t.blocks), lambda: np.asarray(self.load(name).zeros))

    def _stored(self, v: Value) -> str:
        name = self.origins.get(v, v).param
        if name is None:
            raise Unsupported(f"of %{v.name}, which is no parameter, the scales have no form")
        return name

    def stand_for(self, inner: Value, outer: Value, name: str) -> None:
        """The input ``inner`` of a body is ``outer``, which has that name around it."""
        self.names[inner], self.origins[inner] = name, self.origins.get(outer, outer)
        for names in (self.scale_names, self.offset_names, self.zero_names):
            if outer in names:
                names[inner] = names[outer]

    # -- results -----------------------------------------------------------------------------------------------------
    def bind(self, node: Node, results: Sequence[str], since: int, wanted: Sequence[str]) -> None:
        """Gives what ``node`` made (nodes from ``since`` on) the names ``wanted``."""
        made = {name for n in self.nodes[since:] for name in n.output}
        renamed: dict[str, str] = {}
        for v, name, want in zip(node.outputs, results, wanted):
            if name in made and name not in renamed:
                renamed[name] = want
                self.dtype[want] = self.dtype[name]
                self.names[v] = want
            else:
                self.names[v] = name
        for n in self.nodes[since:]:
            for names in (n.input, n.output):
                for i, name in enumerate(names):
                    if name in renamed:
                        names[i] = renamed[name]


def _unique(hint: str, taken: set[str]) -> str:
    name, n = hint, 0
    while name in taken:
        n += 1
        name = f"{hint}_{n}"
    taken.add(name)
    return name


def _symbol_dim(name: str) -> DimLike:
    from wasat.ir import symbol

    return symbol(name)


def _solve(values: Sequence[Value]) -> dict[str, tuple[Value, int, DimLike]]:
    """For each symbol an axis whose size determines it (linear in it, all others in it determined before)."""
    axes = [(v, i, d) for v in values if isinstance(v.type, TensorType) for i, d in enumerate(v.shape) if isinstance(d, Dim)]
    axes.sort(key=lambda a: len(a[2].terms))  # a bare symbol is the simplest
    found: dict[str, tuple[Value, int, DimLike]] = {}
    more = True
    while more:
        more = False
        for v, i, d in axes:
            unknown = [s for s in d.symbols if s not in found]
            if len(unknown) == 1 and [m for m, _ in d.terms if unknown[0] in _names(m)] == [(unknown[0],)]:
                found[unknown[0]] = (v, i, d)
                more = True
    return found


def _names(monomial: Any) -> set[str]:
    return {s for a in monomial for s in ([a] if isinstance(a, str) else [*_of(a.lhs), *_of(a.rhs)])}


def _of(d: DimLike) -> tuple[str, ...]:
    return d.symbols if isinstance(d, Dim) else ()


def value_info(name: str, t: Type) -> onnx.ValueInfoProto:
    """A declared type; symbolic sizes by name, composed ones as the expression."""
    if not isinstance(t, TensorType):
        raise Unsupported(f"{name} is quantized ({t}); only parameters can be")
    return helper.make_tensor_value_info(name, CODE[t.dtype], [d if isinstance(d, int) else str(d) for d in t.shape])


__all__ = ["CODE", "Emitter", "Options", "Weight", "value_info"]
