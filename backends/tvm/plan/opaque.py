"""Differences and comparisons of floats, hidden from TVM's simplifier.

That computes with floats as with numbers of no end: to it x - x is 0 and x + y - y is x, whatever is rounded, infinite or NaN,
and not (x < y) is y <= x. So these stand as calls of functions that it knows nothing of, from before it first looks at a kernel
until after it last does.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import tvm
import tvm_ffi
from tvm import ir, tirx

_PURE = 1
"""Of TVM's CallEffectKind: neither reads nor writes anything."""
_NODES = ("Sub", "EQ", "NE", "LT", "LE", "GT", "GE")
_PREFIX = "wasat."


@cache
def _op(kind: str) -> Any:
    """The function that stands for a node of TensorIR, known to TVM as one of numbers."""
    name = _PREFIX + kind
    if name not in ir.Op.list_op_names():
        tvm_ffi.get_global_func("ir.RegisterOp")(name, f"{kind} of floats")
        for attr, value in (("TCallEffectKind", _PURE), ("TVectorizable", True)):
            ir.register_op_attr(name, attr, value)
    return ir.Op.get(name)


def kind_of(op: Any) -> str | None:
    """The class of :mod:`tvm.tirx` that a call's function stands for, if it is one of these."""
    name = str(getattr(op, "name", ""))
    return name.removeprefix(_PREFIX) if name.startswith(_PREFIX) else None


def hidden() -> Any:
    """The pass that puts calls in place of nodes."""

    def node(e: Any) -> Any:
        if "float" not in str(e.a.ty):
            return e
        return ir.Call(_op(type(e).__name__), [e.a, e.b], ret_ty=e.ty)

    classes = tuple(getattr(tirx, kind) for kind in _NODES)

    def through(f: tirx.PrimFunc, module: tvm.IRModule, context: Any) -> tirx.PrimFunc:
        return f.with_body(tvm_ffi.structural_map(f.body, [(classes, node)]))

    return tirx.transform.prim_func_pass(through, opt_level=0, name="HideFloats")


def shown() -> Any:
    """The pass that puts nodes in place of calls again."""

    def call(e: Any) -> Any:
        kind = kind_of(e.op)
        return e if kind is None else getattr(tirx, kind)(*e.args)

    def through(f: tirx.PrimFunc, module: tvm.IRModule, context: Any) -> tirx.PrimFunc:
        return f.with_body(tvm_ffi.structural_map(f.body, [(ir.Call, call)]))

    return tirx.transform.prim_func_pass(through, opt_level=0, name="ShowFloats")
