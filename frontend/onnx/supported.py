"""What of a file cannot be imported, all of it at once: operators without a converter, what must be known before a run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from wasat.ir import DType, TensorType

from .errors import FromData
from .files import array
from .registry import CONVERTERS, converter, domain_of, schema_of
from .undecided import undecided

if TYPE_CHECKING:
    from .importer import Importer

FEW_NODES, MOST_GROWTH = 2**16, 16
"""Inlining functions makes no more nodes than the one, and the other for each in the file: they may double with every line."""


def check_supported(importer: Importer, graph: onnx.GraphProto, opsets: Mapping[str, int]) -> None:
    """Raises OnnxError naming every operator that has no converter, or FromData every node that needs numbers before a run."""
    missing: dict[str, list[str]] = {}
    for node, sets in _all_nodes(importer, graph.node, opsets, {}):
        domain = domain_of(node.domain)
        if (domain, node.op_type, node.overload) in importer.functions:
            continue
        schema = schema_of(node.op_type, sets.get(domain, 0), domain)
        version = schema.since_version if schema is not None else sets.get(domain, 1)
        inlined = schema is not None and (schema.has_function or schema.has_context_dependent_function)
        if converter(domain, node.op_type, version) is None and not inlined:
            key = f"{domain}.{node.op_type}" if domain else node.op_type
            if (domain, node.op_type) in CONVERTERS:
                key += f" of operator set {version}"
            missing.setdefault(key, []).append(_label(node))
    stored = sum(1 for _ in _all_nodes(importer, graph.node, opsets, {}))
    if _expanded(importer, graph.node, {}) > (most := FEW_NODES + MOST_GROWTH * stored):
        raise importer.fail(f"{stored} nodes are more than {most:,} once functions are inlined")
    waiting: dict[str, list[str]] = {}
    inputs: set[str] = set()
    for node, what, names in _undecided(importer, graph):
        inputs |= names
        waiting.setdefault(f"{what} depends on the numbers in {', '.join(sorted(names))}", []).append(_label(node))
    parts = []
    if missing:
        parts.append(f"these operators are not supported:\n{_counted(missing)}")
    if waiting:
        parts.append(f"these must be known before a run:\n{_counted(waiting)}")
    if missing:
        raise importer.fail("\n".join(parts))
    if waiting:
        raise FromData(f"{importer.source.name}: {parts[0]}", tuple(sorted(inputs)))


def _undecided(importer: Importer, graph: onnx.GraphProto) -> Iterator[tuple[onnx.NodeProto, str, frozenset[str]]]:
    scalars = {t.name: t for t in graph.initializer}
    for node in graph.node:
        key = (domain_of(node.domain), node.op_type, node.overload)
        if key[:2] == ("", "Constant") and key not in importer.functions:
            scalars.update((name, a.t) for a in node.attribute if a.name == "value" for name in node.output)
    constants: dict[str, Any] = {
        name: array(t, importer.source).item()
        for name, t in scalars.items()
        if t.data_type in (onnx.TensorProto.BOOL, onnx.TensorProto.INT64)
        and t.data_location != onnx.TensorProto.EXTERNAL
        and math.prod(t.dims) == 1
    }
    constants |= {k: np.asarray(x).item() for k, x in importer.constants.items() if np.size(x) == 1}
    given = {t.name for t in graph.initializer} | importer.constants.keys()
    data = {
        i.name: frozenset([i.name])
        for i in graph.input
        if i.name not in given
        and i.type.HasField("tensor_type")
        and isinstance(importer.types.get(i.name, TensorType(DType.F32, ())), TensorType)
    }
    return undecided(graph.node, data, constants, importer.functions)


def _expanded(importer: Importer, nodes: Sequence[onnx.NodeProto], known: dict[Any, int]) -> int:
    """How many nodes there are with functions inlined, none of which calls itself; ``known`` says it of functions."""
    total = len(nodes)
    for node in nodes:
        for a in node.attribute:
            for g in [a.g] if a.type == onnx.AttributeProto.GRAPH else a.graphs:
                total += _expanded(importer, g.node, known)
        key = (domain_of(node.domain), node.op_type, node.overload)
        if key in importer.functions:
            if key not in known:
                known[key] = _expanded(importer, importer.functions[key].node, known)
            total += known[key]
    return total


def _all_nodes(
    importer: Importer, nodes: Sequence[onnx.NodeProto], opsets: Mapping[str, int], seen: dict[Any, bool]
) -> Iterator[tuple[onnx.NodeProto, Mapping[str, int]]]:
    """Every node, those of subgraphs included, and those of each function that is called, once.

    ``seen`` says of a function whether its nodes are all visited; one that is reached again before calls itimporter.
    """
    for node in nodes:
        yield node, opsets
        for a in node.attribute:
            for g in [a.g] if a.type == onnx.AttributeProto.GRAPH else a.graphs:
                yield from _all_nodes(importer, g.node, opsets, seen)
        key = (domain_of(node.domain), node.op_type, node.overload)
        f = importer.functions.get(key)
        if f is not None and not seen.get(key, False):
            if key in seen:
                raise importer.fail(f"function {node.op_type} calls itself")
            seen[key] = False
            yield from _all_nodes(importer, f.node, importer.opsets(f.opset_import), seen)
            seen[key] = True


def _label(node: onnx.NodeProto) -> str:
    return node.name or (node.output[0] if node.output else "?")


def _counted(nodes: Mapping[str, list[str]]) -> str:
    """A line for each reason: how many nodes it has, and the first of their names."""
    return "\n".join(
        f"  {key}: {len(names)} ({', '.join(names[:4])}{', …' if len(names) > 4 else ''})"
        for key, names in sorted(nodes.items(), key=lambda kv: (-len(kv[1]), kv[0]))
    )
