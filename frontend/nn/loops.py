"""Loops over an axis: recurrences whose number of turns is a size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from wasat.ir import DimLike

from wasat import ir

from .tensor import Tensor, _current, _values, current, emit, fail

Tensors = Tensor | Sequence[Tensor]


def scan(
    f: Callable[..., tuple[Any, Any]], carry: Tensors, xs: Tensors | None = None, *, length: DimLike | None = None,
    reverse: bool = False,
) -> tuple[Any, Any]:  # fmt: skip
    """``carry, y = f(carry, x)`` for each element x of ``xs`` along its first axis; the last carry and all y, stacked.

    ``carry``, ``xs`` and y are tensors or tuples of them; y may be None. Shapes and element types of the carry stay the same.
    Without ``xs``, ``f(carry)`` is called ``length`` times. ``reverse``: from the last element to the first. ``f`` is traced
    once; tensors and parameters around it may be used in it. (jax.lax.scan)

    Raises TypeMismatch at the user's line.
    """
    t = current("nn.scan")
    carried, sliced = _items("carry", carry), _items("xs", xs) if xs is not None else []
    starts = [_values(t, "scan", [x])[0] for x in carried]
    rows = [_values(t, "scan", [x])[0] for x in sliced]
    if any(not v.shape for v in rows):
        fail("scan: xs has a tensor without axes")
    inner = t.body(getattr(f, "__name__", "turn").strip("<>") or "turn")
    inside = [Tensor(inner, inner.graph.add_input(v.name, v.type, unique=True)) for v in starts]
    elements = [Tensor(inner, inner.graph.add_input(v.name, v.tensor.with_shape(*v.shape[1:]), unique=True)) for v in rows]
    token = _current.set(inner)
    try:
        made = f(_like(carry, inside), *([_like(xs, elements)] if xs is not None else []))
        if not isinstance(made, tuple) or len(made) != 2:
            fail(f"scan: the function returns (carry, y), not {made!r}")
        given = made[1]
        after, y = _items("the carry", made[0]), _items("y", given) if given is not None else []
        if len(after) != len(starts):
            fail(f"scan: the carry is {len(starts)} tensors before a turn and {len(after)} after it")
        outputs = [_values(inner, "scan", [x])[0] for x in (*after, *y)]
    finally:
        _current.reset(token)
    body = inner.graph
    others = list(inner.captured)
    for name, v in body.params.items():  # a body reads nothing but its inputs
        others.append(t.graph.add_param(name, v.type))
        v.param = None
        body.inputs.append(v)
    body.params = {}
    body.set_outputs(outputs, [f"{i}" for i in range(len(outputs))])
    operands = [Tensor(t, v) for v in (*starts, *rows, *others)]
    attrs: dict[str, Any] = {"carries": len(starts), "slices": len(rows), "length": length, "reverse": reverse}
    out = emit("scan", *operands, body=ir.Body(body), **attrs)
    results = [out] if isinstance(out, Tensor) else list(out)
    last, stacked = results[: len(starts)], results[len(starts) :]
    return _like(carry, last), None if given is None else _like(given, stacked)


def _items(what: str, x: Any) -> list[Tensor]:
    items = [x] if isinstance(x, Tensor) else list(x) if isinstance(x, (tuple, list)) else [x]
    for item in items:
        if not isinstance(item, Tensor):
            fail(f"scan: {what} is a tensor or a tuple of them, not {item!r}")
    return items


def _like(given: Any, tensors: list[Tensor]) -> Any:
    return tensors[0] if isinstance(given, Tensor) else tuple(tensors)
