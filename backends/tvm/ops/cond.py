"""Cond as Relax functions: one for each branch, and one that calls that of them which is taken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import relax
from tvm.ir import StringImm
from wasat.ir import DimLike, Graph, Node, TensorType, check_text, symbols_of
from wasat.ir.ops.cond import CondAttrs

from ..lower import Context, Lowering, Table, called_functions, emit_nodes, weights_of
from .indices import place

EQUAL = "wasat.equal"
"""What compiled code calls where a branch that is taken needs two sizes to be equal: with the place in the graph, what it
needs, and both sizes."""


def hold_equal(where: str, needs: str, left: int, right: int) -> None:
    """Raises IndexError where they are not: the function that :data:`EQUAL` names."""
    if left != right:
        raise IndexError(f"{where}: needs {needs}, and these are {left} and {right}")


def _functions(bb: relax.BlockBuilder, node: Node, table: Table, kernels: dict[Any, Any]) -> Any:
    attrs = CondAttrs.of(node)
    symbols, weights = _symbols(node), weights_of(node, table)

    def function(graph: Graph, condition: bool, build: Callable[[Context, Any, list[Any]], Any]) -> Any:
        """Adds one of the values of symbols, the operands and the branches' weights; ``condition``: the first operand is it."""
        ctx = Context(bb, graph, kernels)
        sizes = relax.Var("sizes", relax.ShapeType([ctx.symbol(s) for s in symbols]))
        operands = [relax.Var(f"x{i}", ctx.type(v.type)) for i, v in enumerate(node.inputs) if condition or i]
        operands += ctx.declare_weights(weights)
        name = bb.get_unique_name(f"cond.{graph.name}")  # no graph's function has a dot in its name
        with bb.function(name, [sizes, *operands], {"relax.force_pure": True}, private=True):
            return bb.emit_func_output(build(ctx, sizes, operands))

    def branch(graph: Graph) -> Any:
        inner = called_functions(bb, graph, table, kernels)

        def build(ctx: Context, sizes: Any, operands: list[Any]) -> Any:
            for check in {(a, b): (n, (a, b)) for n in graph.nodes for a, b in n.checks}.values():
                _hold(ctx, *check)
            with bb.dataflow():
                ctx.functions = inner
                given = [v if isinstance(v.type, TensorType) else None for v in node.inputs[1:]]
                fitted = [x if v is None else ctx.view(x, v.shape, w.shape) for x, v, w in zip(operands, given, graph.inputs)]
                ctx.env.update(zip(graph.inputs, [*fitted, *operands[len(fitted) :]]))
                emit_nodes(ctx, graph, table)
                return bb.emit_output(relax.Tuple([ctx.env[v] for v in graph.outputs]))

        return function(graph, False, build)

    both = [branch(attrs.then.graph), branch(attrs.otherwise.graph)]

    def choice(ctx: Context, sizes: Any, operands: list[Any]) -> Any:
        return ctx.emit(relax.If(operands[0], *(relax.Call(f, [sizes, *operands[1:]]) for f in both)))

    return function(attrs.then.graph, True, choice)


def _hold(ctx: Context, node: Node, check: tuple[DimLike, DimLike]) -> None:
    """An error where two sizes differ, before anything of the branch runs."""
    words = [StringImm(x) for x in (place(node), check_text(check))]
    sizes = [relax.prim_value(ctx.dim(d)) for d in check]
    ctx.emit(relax.Call(relax.ExternFunc(EQUAL), [*words, *sizes], ty_args=[relax.TupleType([])]))


def _symbols(node: Node) -> tuple[str, ...]:
    shapes = [d for v in (*node.inputs, *node.outputs) for d in v.shape]
    return tuple(dict.fromkeys([*symbols_of(shapes), *node.attrs.symbols]))


def _lower(ctx: Context, node: Node, *operands: Any) -> list[Any]:
    sizes = relax.ShapeExpr([ctx.symbol(s) for s in _symbols(node)])
    return ctx.run(node, [sizes, *operands])


COND = Lowering(_lower, functions=_functions)
