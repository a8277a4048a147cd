"""Appends operations to a graph. ``b.mul(x, 2.0)``, ``b.softmax(x, axis=-1)``: any registered operation is a method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Union

import numpy as np

from .dims import DimLike
from .errors import IRError, Loc, TypeMismatch
from .graph import Graph, Node, Value
from .op import Literal, Op, op_named
from .types import DType, TensorType, Type

Operand = Union[Value, int, float, bool, np.ndarray, np.generic]


class Builder:
    """Emits nodes at the end of ``graph``, or before the node ``before``; all get the location ``loc``."""

    def __init__(self, graph: Graph, before: Node | None = None, loc: Loc | None = None) -> None:
        self.graph = graph
        self.before = before
        self.loc = loc

    def emit(self, op: Op | str, *inputs: Operand, name: str | Sequence[str] | None = None, **attrs: Any) -> Any:
        """Applies ``op``; returns its output value, or the tuple of them where it has several.

        Python and NumPy operands become constants; a plain number takes the element type of the tensors beside it.
        """
        op = op_named(op) if isinstance(op, str) else op
        values = self._values(inputs)
        try:
            canonical = op.Attrs(**attrs).canonical(*(v.type for v in values))
        except TypeMismatch as e:
            raise TypeMismatch(f"{op.name}({', '.join(map(repr, values))}): {e.message}", e.loc or self.loc) from None
        except TypeError as e:
            raise IRError(f"{op.name}: {e}", self.loc) from None
        names = [name] if isinstance(name, str) else name
        node = self.graph.add_node(op, values, canonical, before=self.before, loc=self.loc, names=names)
        return node.outputs[0] if len(node.outputs) == 1 else node.outputs

    def constant(self, value: Any, dtype: DType | str | None = None, name: str | None = None) -> Value:
        """A constant tensor. Python floats are f32 and ints i64 unless ``dtype`` says otherwise."""
        if dtype is None and type(value) is float:  # not np.float64, which says what it is
            dtype = DType.F32
        return self.emit("constant", value=Literal.of(value, dtype), name=name)

    def _values(self, inputs: Sequence[Operand]) -> list[Value]:
        dtypes = [v.type.dtype for v in inputs if isinstance(v, Value) and isinstance(v.type, TensorType)]
        weak = next((d for d in dtypes if d is not DType.BOOL), dtypes[0] if dtypes else None)
        out = []
        for x in inputs:
            if isinstance(x, Value):
                out.append(x)
            elif isinstance(x, (np.ndarray, np.generic)):
                out.append(self.constant(x))
            elif isinstance(x, bool):
                out.append(self.constant(x, DType.BOOL))
            elif isinstance(x, (int, float)):
                if weak is not None and weak.is_int and isinstance(x, float):
                    raise TypeMismatch(f"the number {x} meets a tensor of {weak}; cast the tensor to a float first", self.loc)
                out.append(self.constant(x, weak if weak is not None and weak is not DType.BOOL else None))
            else:
                raise IRError(f"an operand is a Value, a number or an array, not {type(x).__name__}", self.loc)
        return out

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)
        op = op_named(name)
        return lambda *inputs, **attrs: self.emit(op, *inputs, **attrs)

    # -- what gradients and decompositions keep needing ----------------------------------------------------------------
    def countable(self, ids: Value) -> Value:
        """Integers in a type that every place of an axis fits: theirs, or i32."""
        return ids if ids.tensor.dtype.bits >= 32 else self.cast(ids, dtype=DType.I32)

    def sum_to(self, x: Value, shape: Sequence[DimLike]) -> Value:
        """Sums ``x`` over the axes along which ``shape`` was broadcast to ``x.shape``: the gradient of broadcasting."""
        shape = tuple(shape)
        if x.shape == shape:
            return x
        extra = len(x.shape) - len(shape)
        axes = tuple(range(extra)) + tuple(
            extra + i for i, d in enumerate(shape) if d == 1 and x.shape[extra + i] != 1
        )
        if axes:
            x = self.reduce_sum(x, axes=axes, keepdims=False)
        return x if x.shape == shape else self.reshape(x, shape=shape)

    def inline(self, graph: Graph, inputs: Sequence[Value]) -> list[Value]:
        """Copies the nodes of ``graph`` here, its inputs replaced by ``inputs``; returns its outputs' copies."""
        from .graph import copy_node

        env = dict(zip(graph.inputs, inputs))
        for name, p in graph.params.items():
            env[p] = self.graph.add_param(name, p.type)
        for node in graph.nodes:
            copy_node(self.graph, node, env, before=self.before)
        return [env[v] for v in graph.outputs]


def build(
    name: str, inputs: Sequence[tuple[str, Type]], body: Callable[..., Any], output_names: Sequence[str] | None = None
) -> Graph:
    """A graph from a Python function ``body(builder, *input_values)`` that returns one value or several."""
    g = Graph(name)
    values = [g.add_input(n, t) for n, t in inputs]
    out = body(Builder(g), *values)
    g.set_outputs([out] if isinstance(out, Value) else list(out), output_names)
    return g
