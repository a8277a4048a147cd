"""Linears that read the same value become one: q, k and v, or gate and up."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from wasat.ir import Attrs, Builder, Graph, Node, Op, TensorType, Value, copy_node
from wasat.ir.ops.nn import ACTIVATIONS

from ..cleanup.hoist_params import param_only
from ..core import GraphPass, Remarks
from ..pattern import replace

_STORED = ("quantize", "cast")
"""How a weight may be stored; both work row by row, so the rows of several weights can be joined before."""


def _bias(node: Node) -> Value | None:
    """The operand behind x, a weight [n, k] or [e, n, k], and the groups that the latter has."""
    return node.inputs[at] if len(node.inputs) > (at := node.inputs[1].type.rank) else None


class _Part(NamedTuple):
    """A linear, and its weight as it was before it was stored in fewer bits."""

    node: Node
    weight: Value
    stored: tuple[Op, Attrs] | None

    @property
    def key(self) -> Hashable:
        """What linears must have in common to become one."""
        t = self.weight.type
        kind = t.dtype if isinstance(t, TensorType) else t.kind
        return self.node.op.name, self.node.attrs, kind, self.stored, self.groups

    @property
    def kind(self) -> str:
        """The same as text."""
        storage = self.node.inputs[1].type
        return f"{storage.scheme if not isinstance(storage, TensorType) else storage.dtype}"

    @property
    def groups(self) -> tuple[Value, ...]:
        """Of weights [e, n, k]: which matrix each row takes."""
        return self.node.inputs[2 : self.weight.type.rank]

    @property
    def bias(self) -> Value | None:
        return _bias(self.node)


@dataclass(frozen=True)
class MergeLinears(GraphPass):
    """``linear`` nodes (quantized or grouped ones, too) that read one x -> one over ``concat`` of weights, and slices of it.

    Weights (and biases) must be computed from parameters, read by nothing else, and of one type and storage; a missing bias
    becomes zeros. Parts keep the graph's order, except that up follows its gate, as ``glu`` wants them.
    """

    name = "merge-linears"

    def run_graph(self, graph: Graph, remarks: Remarks) -> bool:
        only = param_only(graph)
        readers: dict[Value, list[_Part | tuple[Node, str]]] = {}
        for node in graph.nodes:
            if node.op.kind == "product" and node.op.weight is not None:
                readers.setdefault(node.inputs[0], []).append(self._part(graph, node, only))
        merged = [_merge_readers(graph, found, remarks) for found in readers.values() if len(found) > 1]
        return any(merged)

    def _part(self, graph: Graph, node: Node, only: set[Value]) -> _Part | tuple[Node, str]:
        """``node`` as a part of a merged linear, or with why it cannot be one."""
        stored, how = node.inputs[1], None
        weight = stored
        if (made := stored.made_by(*_STORED)) is not None:
            weight, how = made.inputs[0], (made.op, made.attrs)
        if weight not in only:
            return node, f"its weight %{weight.name} is not computed from parameters alone"
        if any(len(v.uses) > 1 or graph.is_output(v) for v in (stored, weight)):
            return node, f"its weight %{weight.name} is also used elsewhere"
        if (bias := _bias(node)) is not None and bias not in only:
            return node, f"its bias %{bias.name} is not computed from parameters alone"
        return _Part(node, weight, how)


def _merge_readers(graph: Graph, found: list[_Part | tuple[Node, str]], remarks: Remarks) -> bool:
    """Merges those of the linears that read one value which can be."""
    groups: dict[Hashable, list[_Part]] = {}
    for part in found:
        if isinstance(part, _Part):
            groups.setdefault(part.key, []).append(part)
        else:
            node, reason = part
            remarks.missed(f"%{node.output.name} is not merged with others that read %{node.inputs[0].name}: {reason}", node)
    plain = [g for g in groups.values() if not g[0].groups]
    if len(plain) > 1:
        kinds = "; ".join(", ".join(f"%{p.node.output.name}" for p in g) + f" {g[0].kind}" for g in plain)
        node = plain[0][0].node
        remarks.missed(f"linears that read %{node.inputs[0].name} are not of one kind: {kinds}", node)
    several = [g for g in groups.values() if len(g) > 1]
    for group in several:
        new = _merge(graph, group[0].node, _gates_first(group))
        remarks.applied(f"%{new.name} = {len(group)} linears of one value", new)
    return bool(several)


def _gates_first(parts: list[_Part]) -> list[_Part]:
    """The parts in order, except that each one that an activated other part multiplies comes right after that."""
    of = {p.node.output: p for p in parts}
    up_of: dict[Value, Value] = {}
    for gate in of:
        user = gate.users[0] if len(gate.uses) == 1 else None
        if user is None or not user.is_a(*(op for op, _ in ACTIVATIONS.values())) or len(user.output.uses) != 1:
            continue
        product = user.output.users[0]
        if product.is_a("mul"):
            (other,) = (v for v in product.inputs if v is not user.output)
            if other in of and other not in up_of.values():  # two gates may share one up: it stands once
                up_of[gate] = other
    ups = set(up_of.values())
    ordered = []
    for v in of:
        if v not in ups:
            ordered += [v, up_of[v]] if v in up_of else [v]
    return [of[v] for v in ordered]


def _merge(graph: Graph, first: Node, parts: Sequence[_Part]) -> Value:
    """Puts one linear where the ``first`` of them is, and takes its result apart where each was."""
    b = Builder(graph, before=first, loc=first.loc)
    env: dict[Value, Value] = {}
    weight = b.concat(*(_moved(graph, p.weight, first, env) for p in parts), axis=-2)
    if parts[0].stored is not None:
        op, attrs = parts[0].stored
        weight = graph.add_node(op, [weight], attrs, before=first, loc=first.loc).output
    x = first.inputs[0]
    operands = [x, weight, *parts[0].groups]
    if any(p.bias is not None for p in parts):
        zeros = [b.constant(np.zeros([int(d) for d in p.weight.shape[:-1]]), x.tensor.dtype) for p in parts if p.bias is None]
        biases = [_moved(graph, p.bias, first, env) if p.bias is not None else zeros.pop(0) for p in parts]
        operands.append(b.concat(*biases, axis=-1))
    name = "_".join(p.node.output.name for p in parts)
    merged = graph.add_node(first.op, operands, first.attrs, before=first, loc=first.loc, names=[name]).output
    at, lead = 0, merged.shape[:-1]
    for p in parts:
        node, stop = p.node, at + p.weight.shape[-2]
        rows = Builder(graph, before=node, loc=node.loc)
        part = rows.slice(merged, starts=(*(0 for _ in lead), at), stops=(*lead, stop))
        replace(graph, node.output, part)
        at = stop
    return merged


def _moved(graph: Graph, v: Value, before: Node, env: dict[Value, Value]) -> Value:
    """``v``, computed from parameters, computed once more before a node that may stand before its own."""
    if v.node is not None and v not in env:
        for x in v.node.inputs:
            env[x] = _moved(graph, x, before, env)
        copy_node(graph, v.node, env, before=before)
    return env.get(v, v)
