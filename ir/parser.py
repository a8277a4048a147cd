"""Reads the text form of graphs."""

from __future__ import annotations

import base64
import binascii
import bisect
import dataclasses
import math
import re
import zlib
from typing import Any

import numpy as np

from .dims import Dim, DimLike, floordiv, maximum, minimum, mod, symbol
from .errors import IRError, Loc, ParseError
from .graph import Graph, Value
from .interface import Embedder, Encoder, Generation, Head, Interface, Media, State
from .op import Body, Literal, op_named
from .printer import SUBSECTIONS
from .program import Program
from .schemes import scheme_named
from .tokens import Tokens
from .types import DType, QTensorType, TensorType, Type

_QTYPE = re.compile(r"(int8|int4)(z?)b(\d+)(b?f\w+)\Z")
_DTYPES = {d.value: d for d in DType}


class _Parser(Tokens):
    def __init__(self, text: str, file: str) -> None:
        super().__init__(text, file)
        self.unnamed: dict[str, Value] = {}
        """Constants written as operands of the graph at hand, by the names they were given: the text may use those later."""

    # -- dimensions and types ------------------------------------------------------------------------------------------
    def dim(self) -> DimLike:
        with self.placed(self.tokens[self.i][2]), self.nested():
            return self.dim_sum()

    def dim_sum(self) -> DimLike:
        total = self.dim_term()
        while self.word in ("+", "-") or (self.kind == "number" and self.word.startswith("-")):
            if self.kind == "number" or self.next() == "+":  # "a -1" tokenized as a negative number
                total = total + self.dim_term()
            else:
                total = total - self.dim_term()
        return total

    def dim_term(self) -> DimLike:
        x = self.dim_atom()
        while self.word in ("*", "//", "%"):
            sign, y = self.next(), self.dim_atom()
            x = x * y if sign == "*" else floordiv(x, y) if sign == "//" else mod(x, y)
        return x

    def dim_atom(self) -> DimLike:
        if self.accept("-"):
            with self.nested():
                return -1 * self.dim_atom()
        if self.accept("("):
            x = self.dim()
            self.expect(")")
            return x
        if self.kind == "number":
            if not self.word.lstrip("-").isdigit():
                self.fail(f"a dimension is an integer, not {self.word}")
            return self.integer()
        name = self.take("word", "a dimension")
        if name in ("max", "min") and self.accept("("):
            x = self.dim()
            self.expect(",")
            y = self.dim()
            self.expect(")")
            return maximum(x, y) if name == "max" else minimum(x, y)
        if name in _DTYPES:
            self.i -= 1
            self.fail(f"{name} is an element type and cannot name a dimension")
        return symbol(name)

    def type(self) -> Type:
        at = self.tokens[self.i][2]
        word = self.take("word", "a type such as f32[2, n]")
        q = _QTYPE.match(word)
        stored = scheme_named(word) is not None
        if not stored and (q[4] if q else word) not in _DTYPES:
            self.fail(f"{word!r} is no element type", at)
        self.expect("[")
        dims: list[DimLike] = []
        while not self.accept("]"):
            dims.append(self.dim())
            if self.word != "]":
                self.expect(",")
        with self.placed(at):
            if stored:
                return QTensorType(word, tuple(dims))
            if q:
                return QTensorType(q[1], tuple(dims), int(q[3][:19]), DType.of(q[4]), q[2] == "z")
            return TensorType(_DTYPES[word], tuple(dims))

    def integer(self) -> int:
        """The integer at this place, of digits alone."""
        if len(self.word) > 20:
            self.fail(f"{self.word[:20]}… does not fit into 64 bits")
        return int(self.next())

    # -- attributes ----------------------------------------------------------------------------------------------------
    def scalar(self, dtype: DType) -> np.generic:
        """The number at this place as an element of ``dtype``, which must hold it."""
        word = self.word
        if dtype is DType.BOOL or self.kind == "word":
            if word not in ("true", "false") or dtype is not DType.BOOL:
                self.fail(f"{word!r} is no {dtype}")
            return np.bool_(self.next() == "true")
        if self.kind != "number":
            self.fail(f"expected a number, found {word!r}")
        if dtype.is_int:
            if not word.lstrip("-").isdigit():
                self.fail(f"{word} is no integer, as {dtype} needs")
            low, high = dtype.range
            if len(word) > 20 or not low <= int(word) <= high:
                self.fail(f"{word[:21]} is outside {dtype}, which goes from {low} to {high}")
            return dtype.np.type(int(self.next()))
        with np.errstate(all="ignore"):
            x = np.float64(float(self.next())).astype(dtype.np)
        y, finite = float(x), word[-1] not in "fn"
        if (finite and not math.isfinite(y)) or (not finite and str(y) != word) or (y and not float(word)):
            self.i -= 1
            self.fail(f"{word} is outside {dtype}")
        return x

    def scalar_literal(self) -> Literal | None:
        """``0.5:f32`` or ``true:bool`` at this place, or None."""
        colon, dtype = self.tokens[self.i + 1][1], self.tokens[self.i + 2][1]
        if colon != ":" or dtype not in _DTYPES or (self.kind != "number" and self.word not in ("true", "false")):
            return None
        x = self.scalar(_DTYPES[dtype])
        self.i += 2
        return Literal.of(x, dtype)

    def dense(self) -> Literal:
        self.expect("dense")
        self.expect("<")
        at = self.tokens[self.i][2]
        t = self.type()
        self.expect(",")
        if not isinstance(t, TensorType) or not all(isinstance(d, int) for d in t.shape):
            self.fail(f"a constant has a dense type without symbols, not {t}", at)
        shape = t.concrete({})
        if self.kind == "string":
            array = self.unpacked(t.dtype, math.prod(shape))
        else:
            numbers = []
            while self.word != ">":
                numbers.append(self.scalar(t.dtype))
            array = np.array(numbers, t.dtype.np)
        if array.size != math.prod(shape):
            self.fail(f"{array.size} elements for {t}")
        self.expect(">")
        return Literal.of(array.reshape(shape), t.dtype)

    def unpacked(self, dtype: DType, size: int) -> np.ndarray:
        """So many elements from the string at this place: compressed, in base64."""
        at, want = self.tokens[self.i][2], size * dtype.np.itemsize
        inflate = zlib.decompressobj()
        try:
            data = inflate.decompress(base64.b64decode(self.string(), validate=True), want + 1)
        except (binascii.Error, zlib.error) as e:
            self.fail(f"these are no compressed elements: {e}", at)
        if len(data) != want or not inflate.eof or inflate.unused_data:
            self.fail(f"these are not the {want} bytes that {size} elements of {dtype} take", at)
        bits = np.frombuffer(data, np.uint8)
        if dtype is DType.BOOL or dtype.bits < 8:  # stored one to a byte, which holds more
            signed = dtype.value.startswith("i")
            half = 1 << (1 if dtype is DType.BOOL else dtype.bits) - signed
            if not np.isin(bits.view(np.int8), np.arange(-half if signed else 0, half)).all():
                self.fail(f"an element is outside {dtype}", at)
        return np.frombuffer(data, dtype.np)

    def attr(self) -> Any:
        if self.kind == "string":
            return self.string()
        if self.word in ("true", "false", "none"):
            return {"true": True, "false": False, "none": None}[self.next()]
        if self.word == "dense":
            return self.dense()
        if self.word == "graph" and self.tokens[self.i + 1][0] == "graph":
            with self.nested():
                return self.body()
        literal = self.scalar_literal()
        if literal is not None:
            return literal
        if self.kind == "number" and not self.word.lstrip("-").isdigit():
            return float(self.next())
        if self.kind == "word" and self.word in _DTYPES:
            return _DTYPES[self.next()]
        if self.word == "(":
            with self.nested():
                return self.tuple_or_dim()
        return self.dim()

    def fields(self) -> dict[str, Any]:
        """``axis=2, keepdims=true}``"""
        found: dict[str, Any] = {}
        while not self.accept("}"):
            at = self.tokens[self.i][2]
            key = self.take("word", "an attribute name")
            if key in found:
                self.fail(f"{key} is given twice", at)
            self.expect("=")
            found[key] = self.attr()
            if self.word != "}":
                self.expect(",")
        return found

    def body(self) -> Body:
        outer = self.unnamed
        body = Body(self.graph())
        self.unnamed = outer
        return body

    def tuple_or_dim(self) -> Any:
        start = self.i
        self.expect("(")
        items, comma = [], False
        while not self.accept(")"):
            items.append(self.attr())
            if self.word != ")":
                self.expect(",")
                comma = True
        if len(items) == 1 and not comma:  # a parenthesised dimension
            self.i = start
            return self.dim()
        return tuple(items)

    # -- graphs --------------------------------------------------------------------------------------------------------
    def graph(self) -> Graph:
        self.expect("graph")
        g = Graph(self.take("graph", "a graph name (@name)")[1:])
        env: dict[str, Value] = {}
        self.unnamed = {}
        self.expect("(")
        while not self.accept(")"):
            at = self.tokens[self.i][2]
            name = self.value_name()
            self.expect(":")
            with self.placed(at):
                env[name] = g.add_input(name, self.type())
            if self.word != ")":
                self.expect(",")
        self.expect("{")
        while self.accept("param"):
            at = self.tokens[self.i][2]
            name = self.value_name()
            self.expect(":")
            t = self.type()
            key = self.string("the parameter's name") if self.accept("=") else name
            if name in env:
                self.fail(f"%{name} is defined twice", at)
            if key in g.params:
                self.fail(f"parameter {key} is declared twice", at)
            env[name] = g.add_param(key, t)
            g.rename(env[name], name)
        while not self.accept("return"):
            self.node(g, env)
        outputs, names = [], []
        while not self.accept("}"):
            given, at = None, self.tokens[self.i][2]
            if self.kind in ("word", "string") and self.tokens[self.i + 1][1] == "=":
                given = self.string() if self.kind == "string" else self.next()
                self.expect("=")
            v = self.operand(g, env)
            outputs.append(v)
            names.append(v.name if given is None else given)
            if names[-1] in names[:-1]:
                self.fail(f"there are two outputs named {names[-1]}", at)
            if self.word != "}":
                self.expect(",")
        g.set_outputs(outputs, names)
        return g

    def operand(self, g: Graph, env: dict[str, Value]) -> Value:
        at = self.tokens[self.i][2]
        literal = self.scalar_literal()
        if literal is not None:
            op = op_named("constant")
            v = g.add_node(op, (), op.Attrs(value=literal)).output  # type: ignore[call-arg]
            self.unnamed[v.name] = v
            return v
        name = self.value_name()
        if name not in env:
            self.fail(f"%{name} is not defined before this use", at)
        return env[name]

    def node(self, g: Graph, env: dict[str, Value]) -> None:
        start = self.tokens[self.i][2]
        outs: list[tuple[str, Type, int]] = []
        while True:
            at = self.tokens[self.i][2]
            name = self.value_name()
            self.expect(":")
            outs.append((name, self.type(), at))
            if not self.accept(","):
                break
        self.expect("=")
        at = self.tokens[self.i][2]
        op_name = self.take("word", "an operation")
        try:
            op = op_named(op_name)
        except IRError as e:
            self.fail(e.message, at)
        inputs = []
        self.expect("(")
        while not self.accept(")"):
            inputs.append(self.operand(g, env))
            if self.word != ")":
                self.expect(",")
        attrs = self.fields() if self.accept("{") else {}
        for name, _, _ in outs:
            if name in self.unnamed:
                v = self.unnamed.pop(name)
                g.rename(v, f"{name}.0")
                self.unnamed[v.name] = v
        loc = Loc(self.file, bisect.bisect_left(self.newlines, start) + 1)
        try:
            with self.placed(at):
                canonical = op.Attrs(**attrs).canonical(*(v.type for v in inputs))
                node = g.add_node(op, inputs, canonical, loc=loc, names=[n for n, _, _ in outs])
        except ParseError:
            raise
        except Exception as e:  # whatever an operation makes of attributes of other kinds than its own
            self.fail(f"{op_name}: {e}", at)
        if len(node.outputs) != len(outs):
            self.fail(f"{op_name} has {len(node.outputs)} outputs, {len(outs)} are named", start)
        for v, (name, t, at) in zip(node.outputs, outs):
            if name in env:
                self.fail(f"%{name} is defined twice", at)
            if v.type != t:
                self.fail(f"{op_name} makes {v.type}, but %{name} is declared {t}", at)
            env[name] = v


    # -- the interface -------------------------------------------------------------------------------------------------
    def interface(self) -> Interface:
        """What :func:`.printer.interface_text` wrote."""
        start = self.tokens[self.i][2]
        self.expect("interface")
        self.expect("{")
        found: dict[str, list[Any]] = {}
        while not self.accept("}"):
            at = self.tokens[self.i][2]
            word = self.take("word", "a section")
            if word not in _SECTIONS:
                self.fail(f"an interface has no section {word}; there are {', '.join(_SECTIONS)}", at)
            self.expect("{")
            fields, kind = self.fields(), _SECTIONS[word]
            if word in found and word in _ONCE:
                self.fail(f"{word} is there twice", at)
            known = [f.name for f in dataclasses.fields(kind) if f.name not in SUBSECTIONS]
            if unknown := [k for k in fields if k not in known]:
                self.fail(f"{word} has no field {unknown[0]}; it has {', '.join(known)}", at)
            lacking = [f.name for f in dataclasses.fields(kind) if f.default is f.default_factory and f.name not in fields]
            if lacking:
                self.fail(f"{word} lacks the field {lacking[0]}", at)
            with self.placed(at):
                found.setdefault(word, []).append(kind(**fields))
        media, encoders = found.get("media", [None])[0], tuple(found.get("encoder", ()))
        if encoders and media is None:
            self.fail("there are encoders and no media", start)
        return dataclasses.replace(
            found.get("model", [Interface()])[0], generation=found.get("generation", [None])[0],
            media=dataclasses.replace(media, encoders=encoders) if media else None,
            embedder=found.get("embedder", [None])[0], heads=tuple(found.get("head", ())), states=tuple(found.get("state", ())),
        )  # fmt: skip


_SECTIONS: dict[str, type[Any]] = {
    "model": Interface, "generation": Generation, "media": Media, "encoder": Encoder,
    "embedder": Embedder, "head": Head, "state": State,
}  # fmt: skip
_ONCE = ("model", "generation", "media", "embedder")


def parse(text: str, file: str = "<text>") -> Graph:
    """Reads one graph. Raises ParseError with file, line and caret; the graph's types are checked while reading."""
    p = _Parser(text, file)
    g = p.graph()
    if p.kind != "end":
        p.fail(f"expected the end of the text, found {p.word!r}")
    return g


def parse_program(text: str, file: str = "<text>") -> Program:
    """Reads any number of graphs, before them perhaps an interface."""
    p = _Parser(text, file)
    interface = p.interface() if p.word == "interface" else Interface()
    graphs: dict[str, Graph] = {}
    while p.kind != "end":
        g = p.graph()
        if g.name in graphs:
            p.fail(f"graph @{g.name} is defined twice")
        graphs[g.name] = g
    return Program(graphs, interface=interface)


def parse_type(text: str) -> Type:
    """Reads a type such as ``f32[b, p + s, 64]``."""
    p = _Parser(text, "<type>")
    t = p.type()
    if p.kind != "end":
        p.fail(f"expected the end of the type, found {p.word!r}")
    return t


__all__ = ["Dim", "parse", "parse_program", "parse_type"]
