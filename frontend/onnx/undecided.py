"""What the structure of a graph already says cannot be imported: a node that needs a number which only a run computes.

Only what is certain to be refused is found: nodes that every import executes, and values that every import makes depend on an
input. Whatever the structure leaves open, the converters decide.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Container, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import onnx

_REDUCTIONS = (
    "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd",
    "ReduceSum", "ReduceSumSquare",
)  # fmt: skip
NEEDED: dict[str, dict[int, str]] = {
    "Compress": {1: "the condition of Compress"}, "ConstantOfShape": {0: "the shape of ConstantOfShape"},
    "CumProd": {1: "the axis of a running product"}, "CumSum": {1: "the axis of a running sum"},
    "Expand": {1: "the shape of Expand"}, "Loop": {0: "how often Loop turns", 1: "whether Loop turns"},
    "NonZero": {0: "how many elements NonZero finds"}, "OneHot": {1: "the depth of OneHot"},
    "Pad": {1: "the amounts of Pad", 3: "the axes of Pad"}, "Range": dict.fromkeys(range(3), "a bound of Range"),
    "Reshape": {1: "the shape of Reshape"}, "SequenceAt": {1: "the position of SequenceAt"},
    "Slice": {1: "where a Slice starts", 2: "where a Slice ends", 3: "the axes of Slice", 4: "the steps of Slice"},
    "Split": {1: "the sizes of Split"}, "Squeeze": {1: "the axes of Squeeze"}, "Tile": {1: "the repeats of Tile"},
    "TopK": {1: "how many elements TopK takes"}, "Unsqueeze": {1: "the axes of Unsqueeze"},
    **{name: {1: "the axes of a reduction"} for name in _REDUCTIONS},
}  # fmt: skip
"""Operator -> the inputs whose numbers its converter must know, and what they decide."""

FOLLOWS = {
    "Abs", "Add", "And", "ArgMax", "ArgMin", "Cast", "Ceil", "Clip", "Concat", "CumSum", "Div", "Equal", "Erf", "Exp", "Expand",
    "Floor", "Gather", "Greater", "GreaterOrEqual", "Identity", "IsNaN", "Less", "LessOrEqual", "Log", "MatMul", "Max", "Min",
    "Mul", "Neg", "Not", "Or", "Pow", "Relu", "Reshape", "Round", "Sigmoid", "Sign", "Slice", "Softmax", "Sqrt", "Squeeze",
    "Sub", "Sum", "Tanh", "Transpose", "Unsqueeze", "Where", "Xor", *_REDUCTIONS,
}  # fmt: skip
"""Operators whose result depends on every input, whatever the sizes and attributes are."""

Data = MutableMapping[str, frozenset[str]]
"""Value -> the graph inputs that it depends on; empty where that is not certain."""


def undecided(
    nodes: Sequence[onnx.NodeProto], data: Data, constants: Mapping[str, Any], functions: Container[Any]
) -> Iterator[tuple[onnx.NodeProto, str, frozenset[str]]]:
    """Each node that needs a number from an input, what the number decides, and the inputs it comes from.

    ``data``: what is known to depend on inputs. ``constants``: known scalars by name (in a subgraph, where
    other values may have their names, none is). ``functions``: keys (domain, operator,
    overload) that the model defines itself.
    """
    for node in nodes:
        standard = node.domain in ("", "ai.onnx") and ("", node.op_type, node.overload) not in functions
        from_inputs = [data.get(name, frozenset()) for name in node.input]
        if standard:
            for i, what in NEEDED.get(node.op_type, {}).items():
                if i >= len(from_inputs) or not from_inputs[i]:
                    continue
                # a Slice from here to so many elements further on has a known size
                if not (node.op_type == "Slice" and i in (1, 2) and all(from_inputs[1:3])):
                    yield node, what, from_inputs[i]
            bodies = {a.name: a.g for a in node.attribute if a.type == onnx.AttributeProto.GRAPH}
            if node.op_type == "If" and from_inputs and from_inputs[0]:  # both branches are imported
                for branch in bodies.values():
                    yield from undecided(branch.node, _inside(branch, data, {}), {}, functions)
            elif node.op_type == "Loop" and "body" in bodies and _turns(node, constants):
                body = bodies["body"]
                within = _inside(body, data, dict(zip((i.name for i in body.input[2:]), from_inputs[2:])))
                yield from undecided(body.node, within, {}, functions)
                again = within.get(body.output[0].name) if body.output else None
                if again:
                    yield node, "whether Loop turns again", again
        follows = standard and node.op_type in FOLLOWS
        for i, name in enumerate(node.output):
            data[name] = frozenset().union(*from_inputs) if follows and i == 0 else frozenset()


def _inside(graph: onnx.GraphProto, data: Data, inputs: Mapping[str, frozenset[str]]) -> Data:
    """``data`` as a subgraph sees it: its inputs and initializers hide what has their name around it."""
    hidden = dict.fromkeys([*(i.name for i in graph.input), *(t.name for t in graph.initializer)], frozenset[str]())
    return ChainMap({**hidden, **inputs}, data)


def _turns(loop: onnx.NodeProto, constants: Mapping[str, Any]) -> bool:
    """Whether it is certain that a Loop turns at least once."""
    limit, going = (loop.input[i] if i < len(loop.input) else "" for i in (0, 1))
    return (not limit or constants.get(limit, 0) > 0) and (not going or bool(constants.get(going, False)))


def reads(graph: onnx.GraphProto) -> Iterator[str]:
    """The names that a subgraph reads, its own included."""
    for node in graph.node:
        yield from node.input
        for a in node.attribute:
            for g in [a.g] if a.type == onnx.AttributeProto.GRAPH else a.graphs:
                yield from reads(g)
    yield from (o.name for o in graph.output)


__all__ = ["FOLLOWS", "NEEDED", "reads", "undecided"]
