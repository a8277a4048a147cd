"""RNN, GRU and LSTM: unrolled over a few steps, else a scan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from wasat.ir import Body, DType, Graph, TensorType

from ..emit import Emitter, Operand
from ..registry import NodeView, op

FEW = 16
"""So many steps are written out."""
_GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
_STATES = {"RNN": 1, "GRU": 1, "LSTM": 2}
_DEFAULT = {"RNN": ["Tanh"], "GRU": ["Sigmoid", "Tanh"], "LSTM": ["Sigmoid", "Tanh", "Tanh"]}


def _activation(c: Emitter, n: NodeView, name: str, x: Any) -> Any:
    match name:
        case "Tanh" | "Sigmoid" | "Relu" | "Softplus":
            return getattr(c, name.lower())(x)
        case "Softsign":
            return c.div(x, c.add(c.abs(x), 1.0))
        case "HardSigmoid":
            return c.maximum(c.minimum(c.add(c.mul(x, 0.2), 0.5), 1.0), 0.0)
    raise n.fail(f"the activation {name} is not supported")


@op("RNN", "GRU", "LSTM", since=7)
def recurrent(
    c: Emitter, n: NodeView, x: Operand, w: Operand, r: Operand, bias: Operand | None = None, lengths: Operand | None = None,
    h: Operand | None = None, cell: Operand | None = None, peepholes: Operand | None = None,
) -> Any:  # fmt: skip
    """x [s, b, i] (layout 0) or [b, s, i] (1); all states and results of a direction are [b, hidden]."""
    states = _STATES[n.op]
    if n.get("activation_alpha") or n.get("activation_beta"):
        raise n.fail("activation_alpha and activation_beta are not supported")
    batch_first = bool(n.get("layout", 0))
    if batch_first:
        x = c.permute(x, (1, 0, 2))
        h, cell = (c.permute(v, (1, 0, 2)) if v is not None else None for v in (h, cell))
    steps, batch, _ = c.shape(x)
    hidden, both = n["hidden_size"], n["direction"] == "bidirectional"
    # files give the batches of these names of their own: they are one size, which is checked
    h, cell = (None if v is None else c.view(v, 1 + both, batch, hidden) for v in (h, cell))
    lengths = None if lengths is None else c.view(c.to(lengths, DType.I64), batch, 1)
    names = n.get("activations") or _DEFAULT[n.op] * (2 if both else 1)
    every, finals = [], []
    for d in range(2 if both else 1):
        backward = n["direction"] == "reverse" or d == 1

        def own(v: Any, d: int = d) -> Any:
            return None if v is None else c.drop_axes(c.cut(v, 0, d, d + 1), 0)

        zero = c.full((batch, hidden), 0, c.dtype(x))
        state = [zero if v is None else own(v) for v in (h, cell)][:states]
        weights = _weights(c, n, own(w), own(r), own(bias), own(peepholes), hidden)
        terms = c.linear(x, weights.w) if weights.of_x is None else c.linear(x, weights.w, weights.of_x)  # of all steps at once
        own_names = names[d * len(_DEFAULT[n.op]) :]
        if not isinstance(steps, int) or steps > FEW:
            state, outputs = _scanned(c, n, own_names, weights, hidden, terms, state, lengths, backward)
            every.append(c.add_axes(outputs, 1))
            finals.append([c.add_axes(v, 0) for v in state])
            continue
        cellf = _Cell(c, n, own_names, weights, hidden)
        rows: list[Any] = [None] * steps
        for t in reversed(range(steps)) if backward else range(steps):
            new = cellf.step(c.drop_axes(c.cut(terms, 0, t, t + 1), 0), state)
            if lengths is not None:  # past the end of a row its state stands still, and its output is 0
                live = c.greater(lengths, t)
                state = [c.select(live, a, b) for a, b in zip(new, state)]
                rows[t] = c.select(live, new[0], zero)
            else:
                state, rows[t] = new, new[0]
        every.append(c.add_axes(_joined(c, [c.add_axes(v, 0) for v in rows]), 1))
        finals.append([c.add_axes(v, 0) for v in state])
    y = every[0] if not both else c.concat(*every, axis=1)
    last = [_joined(c, [f[i] for f in finals]) for i in range(states)]
    if batch_first:
        y = c.permute(y, (2, 0, 1, 3))
        last = [c.permute(v, (1, 0, 2)) for v in last]
    return (y, *last)


@dataclass
class _Weights:
    """One direction's, as every step reads them: cut before the steps, so that a step multiplies by whole matrices."""

    w: Any
    """[gates*hidden, i]"""
    of_x: Any | None
    """The bias beside it, [gates*hidden]."""
    r: list[Any]
    """[gates*hidden, hidden]; of a GRU that resets its state before the product, the two gates' and the candidate's apart."""
    of_h: list[Any]
    """The biases beside them; none, or one of each."""
    peepholes: list[Any]
    """[hidden] each, of the gates i, o, f; none, or all three."""

    def of_states(self) -> list[Any]:
        return [*self.r, *self.of_h, *self.peepholes]

    def inside(self, values: list[Any]) -> _Weights:
        """The same of a body that is given :meth:`of_states`."""
        n, m = len(self.r), len(self.of_h)
        return _Weights(None, None, values[:n], values[n : n + m], values[n + m :])


def _weights(c: Emitter, n: NodeView, w: Any, r: Any, bias: Any, peepholes: Any, hidden: int) -> _Weights:
    """w [gates*hidden, i], r [gates*hidden, hidden], bias [2*gates*hidden], peepholes [3*hidden]."""
    gates = _GATES[n.op] * hidden
    parts = [(0, 2 * hidden), (2 * hidden, gates)] if n.op == "GRU" and not n["linear_before_reset"] else [(0, gates)]
    of_h = [] if bias is None else [c.cut(bias, 0, gates + i, gates + j) for i, j in parts]
    return _Weights(
        w, None if bias is None else c.cut(bias, 0, 0, gates),
        [r] if len(parts) == 1 else [c.cut(r, 0, i, j) for i, j in parts], of_h,
        [] if peepholes is None else [c.cut(peepholes, 0, i * hidden, (i + 1) * hidden) for i in range(3)],
    )  # fmt: skip


def _scanned(
    c: Emitter, n: NodeView, names: list[str], weights: _Weights, hidden: int, terms: Operand, state: list[Any],
    lengths: Operand | None, backward: bool,
) -> tuple[list[Any], Any]:  # fmt: skip
    """One direction as a scan over the steps: its last states, and the outputs of all steps. ``terms`` [s, b, gates*hidden]:
    what x adds to the gates."""
    slices = [terms] if lengths is None else [terms, c.iota(size=c.shape(terms)[0], dtype=DType.I64)]
    if backward:
        slices = [c.reverse(v, axes=(0,)) for v in slices]
    sliced, carried = [c.value(v) for v in slices], [c.value(v) for v in state]
    around = [c.value(v) for v in (*weights.of_states(), lengths) if v is not None]
    body = Graph("step")
    before = [body.add_input(f"state_{i}", v.type) for i, v in enumerate(carried)]
    parts = [body.add_input(f"at_{i}", TensorType(v.tensor.dtype, v.shape[1:])) for i, v in enumerate(sliced)]
    inside: list[Any] = [body.add_input(f"around_{i}", v.type) for i, v in enumerate(around)]
    e = Emitter(body, {})
    e.b.loc = c.b.loc
    own = weights.inside(inside if lengths is None else inside[:-1])
    after = _Cell(e, n, names, own, hidden).step(parts[0], list(before))
    result = after[0]
    if lengths is not None:  # past the end of a row its state stands still, and its output is 0
        live = e.greater(inside[-1], parts[1])
        after = [e.select(live, a, b) for a, b in zip(after, before)]
        result = e.select(live, result, np.zeros((), e.dtype(result).np))
    outputs = [*after, result]
    body.set_outputs([e.value(v) for v in outputs], [f"{i}" for i in range(len(outputs))])
    made = c.scan(*carried, *sliced, *around, body=Body(body), carries=len(carried), slices=len(sliced))
    *last, y = made
    return last, c.reverse(y, axes=(0,)) if backward else y


def _joined(c: Emitter, parts: list[Any]) -> Any:
    return parts[0] if len(parts) == 1 else c.concat(*parts, axis=0)


class _Cell:
    """One direction's step."""

    def __init__(self, c: Emitter, n: NodeView, names: list[str], weights: _Weights, hidden: int) -> None:
        self.c, self.n, self.names, self.hidden, self.weights = c, n, names, hidden, weights

    def of_state(self, h: Any, i: int = 0) -> Any:
        """h [b, hidden] by a matrix of the weights, with its bias."""
        x, of_h = self.c.linear(h, self.weights.r[i]), self.weights.of_h
        return self.c.add(x, of_h[i]) if of_h else x

    def gate(self, v: Any, i: int) -> Any:
        return self.c.cut(v, 1, i * self.hidden, (i + 1) * self.hidden)

    def f(self, i: int, v: Any) -> Any:
        limit = self.n.get("clip")
        if limit:
            v = self.c.maximum(self.c.minimum(v, float(limit)), -float(limit))
        return _activation(self.c, self.n, self.names[i], v)

    def step(self, a: Any, state: list[Any]) -> list[Any]:
        """The states after it; ``a`` [b, gates*hidden] is what x adds to the gates."""
        c, b = self.c, self.of_state(state[0])
        if self.n.op == "RNN":
            return [self.f(0, c.add(a, b))]
        if self.n.op == "GRU":
            z = self.f(0, c.add(self.gate(a, 0), self.gate(b, 0)))
            reset = self.f(0, c.add(self.gate(a, 1), self.gate(b, 1)))
            if self.n["linear_before_reset"]:
                inner = c.mul(reset, self.gate(b, 2))
            else:
                inner = self.of_state(c.mul(reset, state[0]), 1)
            new = self.f(1, c.add(self.gate(a, 2), inner))
            return [c.add(c.mul(c.sub(1.0, z), new), c.mul(z, state[0]))]
        total, (_, cell) = c.add(a, b), state

        def gate(i: int, peephole: int, seen: Any) -> Any:
            v = self.gate(total, i)
            return c.add(v, c.mul(self.weights.peepholes[peephole], seen)) if self.weights.peepholes else v

        enter = self.f(0, gate(0, 0, cell))
        keep = c.sub(1.0, enter) if self.n.get("input_forget") else self.f(0, gate(2, 2, cell))
        new = c.add(c.mul(keep, cell), c.mul(enter, self.f(1, self.gate(total, 3))))
        return [c.mul(self.f(0, gate(1, 1, new)), self.f(2, new)), new]
