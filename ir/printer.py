"""Graphs as text. The same graph prints the same bytes; :func:`wasat.ir.parse` reads them back to an equal graph."""

from __future__ import annotations

import base64
import dataclasses
import json
import math
import re
import zlib
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import numpy as np

from .dims import Dim
from .errors import Loc
from .interface import Interface
from .op import Body, Literal
from .types import DType

if TYPE_CHECKING:
    from .graph import Graph, Node, Value

_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_.\-]*\Z")
_WORD = re.compile(r"(?!(?:inf|nan)\Z)[A-Za-z_][A-Za-z0-9_]*\Z")  # what the parser reads as one word without a % before it
_INLINE = 64  # constants up to this many elements are written as numbers


def name_text(name: str) -> str:
    """A value name as written after ``%``; quoted where it is no plain word."""
    return name if _PLAIN.match(name) else json.dumps(name)


def number_text(x: Any) -> str:
    """A scalar as text that reads back to the same bits."""
    if isinstance(x, (bool, np.bool_)):
        return "true" if x else "false"
    if isinstance(x, (int, np.integer)):
        return str(int(x))
    if isinstance(x, np.floating) and x.dtype.itemsize < 8 and math.isfinite(x):
        short = str(x)  # shortest for its own width
        return short if "." in short or "e" in short else short + ".0"
    return repr(float(x))


def _element_text(dtype: DType, x: Any) -> str:
    return str(int(x)) if dtype.is_int else number_text(x)  # to NumPy, a 4-bit integer is none


def literal_text(value: Literal) -> str:
    """``0.5:f32`` for a scalar, ``dense<f32[2], 1.0 2.0>`` or base64 of compressed bytes for a tensor."""
    array = value.array
    if not value.shape:
        return f"{_element_text(value.dtype, array[()])}:{value.dtype}"
    kind = f"{value.dtype}[{', '.join(map(str, value.shape))}]"
    if array.size <= _INLINE:
        return f"dense<{kind}, {' '.join(_element_text(value.dtype, x) for x in array.ravel())}>"
    return f'dense<{kind}, "{base64.b64encode(zlib.compress(value.data, 9)).decode()}">'


def brief(graph: Graph) -> str:
    """A graph among the attributes by its name, for messages."""
    return f"@{graph.name}"


def _whole(graph: Graph) -> str:
    return graph_text(graph).rstrip("\n")


def attr_text(x: Any, nested: Callable[[Graph], str] = _whole) -> str:
    """One attribute value; ``nested`` writes a graph."""
    if x is None:
        return "none"
    if isinstance(x, (bool, int, float)):
        return number_text(x)
    if isinstance(x, str):
        return json.dumps(x)
    if isinstance(x, (DType, Dim)):
        return str(x)
    if isinstance(x, tuple):
        return "(" + ", ".join(attr_text(v, nested) for v in x) + ("," if len(x) == 1 else "") + ")"
    if isinstance(x, Literal):
        return literal_text(x)
    if isinstance(x, Body):
        return nested(x.graph)
    raise TypeError(f"attribute value {x!r} has no text form")


def attrs_text(attrs: Any, nested: Callable[[Graph], str] = _whole, skip: Collection[str] = ()) -> str:
    """``{axis=2, keepdims=true}``: the fields of a dataclass that differ from their defaults; empty if none."""
    parts = []
    for f in dataclasses.fields(attrs):
        if f.name in skip:
            continue
        value = getattr(attrs, f.name)
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        if not (type(value) is type(default) and value == default and str(value) == str(default)):  # -0.0 is not 0.0
            parts.append(f"{f.name}={attr_text(value, nested)}")
    return "{" + ", ".join(parts) + "}" if parts else ""


def _inline(v: Value) -> bool:
    return v.node is not None and v.node.op.name == "constant" and not v.shape


def operand_text(v: Value) -> str:
    """``%x``, or the number itself for a scalar constant."""
    const = v.const if _inline(v) else None
    return "%" + name_text(v.name) if const is None else literal_text(Literal.of(const))


def node_text(node: Node, nested: Callable[[Graph], str] = _whole) -> str:
    """One line: outputs with their types, operation, operands, attributes. A graph among these takes as many as it has."""
    outs = ", ".join(f"%{name_text(v.name)}: {v.type}" for v in node.outputs)
    attrs = attrs_text(node.attrs, nested)
    return f"{outs} = {node.op.name}({', '.join(map(operand_text, node.inputs))})" + (f" {attrs}" if attrs else "")


def _loc_note(loc: Loc | None) -> str:
    return f"  # {loc}" if loc is not None else ""


def graph_text(graph: Graph, locs: bool = False) -> str:
    """The whole graph; with ``locs``, each line ends in a comment naming where it was written."""

    def nested(body: Graph) -> str:
        return graph_text(body, locs).rstrip("\n").replace("\n", "\n  ")

    inputs = ", ".join(f"%{name_text(v.name)}: {v.type}" for v in graph.inputs)
    lines = [f"graph @{graph.name}({inputs}) {{"]
    for name, v in graph.params.items():
        alias = "" if name == v.name else f" = {json.dumps(name)}"
        lines.append(f"  param %{name_text(v.name)}: {v.type}{alias}")
    for node in graph.nodes:
        if not _inline(node.outputs[0]):
            lines.append("  " + node_text(node, nested) + (_loc_note(node.loc) if locs else ""))
    results = [
        operand_text(v) if v.name == n and not _inline(v) else f"{n if _WORD.match(n) else json.dumps(n)}={operand_text(v)}"
        for v, n in zip(graph.outputs, graph.output_names)
    ]
    lines.append("  return " + ", ".join(results) if results else "  return")
    return "\n".join([*lines, "}", ""])


def interface_text(interface: Interface) -> str:
    """One line for each section of an interface, in braces; nothing for one that says nothing."""
    media = interface.media
    sections: list[tuple[str, Any]] = [("model", interface)]
    sections += [("generation", interface.generation)] if interface.generation else []
    if media is not None:
        sections += [("media", media), *(("encoder", e) for e in media.encoders)]
    sections += [("embedder", interface.embedder)] if interface.embedder else []
    sections += [*(("head", h) for h in interface.heads), *(("state", s) for s in interface.states)]
    lines = [f"  {word} {attrs_text(x, skip=SUBSECTIONS) or '{}'}" for word, x in sections]
    return "" if lines == ["  model {}"] else "\n".join(["interface {", *lines, "}", ""])


SUBSECTIONS = ("generation", "media", "embedder", "heads", "states", "encoders")
"""Fields that are sections of their own."""
