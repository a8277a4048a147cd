"""Recognizes gated linear units over one merged product."""

from __future__ import annotations

from wasat.ir import Builder, Node, Value
from wasat.ir.ops.nn import ACTIVATIONS

from ..pattern import Match, Mismatch, Pattern, Rewrite, Tracer, Var


def _projected(v: Value) -> bool:
    """Whether ``v`` is a product with a weight, or part of a value."""
    op = v.node.op if v.node is not None else None
    return v.made_by("slice") is not None or (op is not None and op.kind == "product" and op.weight is not None)


class FuseGlu(Rewrite):
    """act(y[.. :n]) * y[.. n:] -> glu(y); of a part of y where there is more.

    Runs after merge-linears, which puts the gate of each pair before its up projection.
    """

    name = "fuse-glu"
    landmark = ("silu", "gelu", "relu", "sigmoid")

    def is_landmark(self, node: Node) -> bool:
        """Of what is projected, times something projected: a gate on anything else is no such unit, and
        one number that weighs a whole token (a shared expert's) neither."""
        if not super().is_landmark(node) or not _projected(node.inputs[0]) or node.output.shape[-1:] == (1,):
            return False
        products = [u for u in node.output.users if u.is_a("mul")]
        return any(_projected(v) for n in products for v in n.inputs if v is not node.output)

    def pattern(self, p: Tracer, y: Var) -> Pattern:
        gate, up = p.named("gate", p.slice(y)), p.named("up", p.slice(y))
        acts = [p.named(k, getattr(p, op)(gate, **attrs)) for k, (op, attrs) in _ACTS.items()]
        return p.mul(p.either(*acts), up)

    def build(self, b: Builder, m: Match) -> Value:
        y, gate, up = m["y"], m["gate"].node.attrs, m["up"].node.attrs
        n = m["gate"].shape[-1]
        start, stop = gate.starts[-1], up.stops[-1]
        lead = [(0, d, 1) for d in y.shape[:-1]]
        for attrs in (gate, up):
            if list(zip(attrs.starts[:-1], attrs.stops[:-1], attrs.steps[:-1])) != lead or attrs.steps[-1] != 1:
                raise Mismatch("gate and up are not parts of the last axis")
        if (up.starts[-1], stop) != (gate.stops[-1], start + 2 * n):
            raise Mismatch(f"up, {up.starts[-1]}:{stop}, does not follow the gate, {start}:{gate.stops[-1]}")
        if (start, stop) != (0, y.shape[-1]):
            y = b.slice(y, starts=(*(0 for _ in lead), start), stops=(*y.shape[:-1], stop))
        return b.glu(y, activation=next(k for k in _ACTS if k in m))


_ACTS = {name: (op, {"approximate": "none", **attrs} if op == "gelu" else attrs) for name, (op, attrs) in ACTIVATIONS.items()}
"""``glu``'s activations: operation, and every attribute that tells it."""
