"""Keeps keys and values in fewer bits."""

from __future__ import annotations

from dataclasses import dataclass, replace

from wasat.ir import Builder, DType, Node, Program, State, Value
from wasat.ir.ops.rounding import ROW_SCHEMES, emit_stored_rows

from ..core import Pass, PassError, Remarks


@dataclass(frozen=True)
class QuantizeCaches(Pass):
    """Keys and values of ``cached_attention`` in ``int8`` or ``int4``: what is written is rounded to what so few bits hold, and
    the state says how it is ``stored``, from which a target chooses a layout.

    Each position of each head has one scale. Rows of ``int4`` are turned by a Hadamard matrix before they are rounded, and
    back after, so that a large feature does not take the levels of all others; a kernel turns queries and results instead.
    States that are no keys and values of attention stay as they are; so do, under ``int4``, keys of an odd width.
    """

    scheme: str = "int8"
    name = "quantize-caches"
    exact = False

    def requires(self, program: Program) -> None:
        if self.scheme not in ROW_SCHEMES:
            raise PassError(f"keys and values cannot be stored as {self.scheme!r}; they can as {', '.join(ROW_SCHEMES)}")

    def run(self, program: Program, remarks: Remarks) -> bool:
        states = {s.name: s for s in program.interface.states if not s.stored}
        writers: dict[str, list[tuple[Node, str, str]]] = {}
        reasons: dict[str, str] = {}
        at: dict[str, Value] = {}
        for g in program.graphs.values():
            for v in g.inputs:
                if v.name in states:
                    at.setdefault(v.name, v)
                    if reason := self._refused(states[v.name], v) or _uses(v):
                        reasons.setdefault(v.name, reason)
            for node in g.nodes:
                if (places := _writes(node)) is not None:
                    keys, values = (_state(node.inputs[places[1] + i]).name for i in range(2))
                    for name in dict.fromkeys(n for n in (keys, values) if n in states):
                        writers.setdefault(name, []).append((node, keys, values))
        for name in at:
            if name not in reasons and not writers.get(name):
                reasons[name] = "no attention writes it"
        left = -1
        while len(reasons) > left:  # both caches of an attention, or neither
            left = len(reasons)
            for name, found in writers.items():
                for _, keys, values in found:
                    other = values if name == keys else keys
                    if name not in reasons and (other in reasons or other not in states):
                        reasons[name] = f"{other}, which is read with it, stays"
        stored = [name for name in at if name not in reasons]
        for name, reason in reasons.items():
            remarks.missed(f"state {name} ({states[name].kind}) stays as it is: {reason}", at[name])
        done: set[Node] = set()
        for name in stored:
            for node, _, _ in writers[name]:
                if node not in done:
                    done.add(node)
                    self._round(node)
        program.declare(states=tuple(
            replace(s, stored=self.scheme) if s.name in stored else s for s in program.interface.states
        ))  # fmt: skip
        if stored:
            remarks.applied(f"{len(stored)} states of keys and values are stored as {self.scheme}", at[stored[0]])
        return bool(stored)

    def _refused(self, state: State, v: Value) -> str:
        """Why a state cannot be stored so."""
        if state.role not in ("k", "v"):
            return "it is not made of keys or values of attention"
        if v.tensor.rank != 4 or v.tensor.dtype is not DType.F32 or not all(isinstance(d, int) for d in v.shape[2:]):
            return f"it is {v.type}, not f32 of known heads and width"
        if self.scheme == "int4" and state.role == "k" and v.shape[3] % 2:
            return f"keys of {v.shape[3]} features do not come in pairs; int8 takes them"
        return ""

    def _round(self, node: Node) -> None:
        places = _writes(node)
        assert places is not None
        b, operands = Builder(node.graph, before=node, loc=node.loc), list(node.inputs)
        for i in (places[0], places[0] + 1):
            operands[i] = emit_stored_rows(b, operands[i], self.scheme)
        node.graph.set_inputs(node, operands)


def _state(v: Value) -> Value:
    """The input that ``v`` is, before what stands first was put into it."""
    start = v.made_by("cache_start")
    return start.inputs[2 + start.outputs.index(v)] if start is not None else v


def _uses(v: Value) -> str:
    """What else than attention, which takes it as its cache, reads the state ``v``."""
    for node, i in v.uses:
        places = _writes(node)
        if places is None or i - places[1] not in (0, 1):
            return f"{node.op.name} reads it"
        new = node.outputs[i - places[1] + places[2]]
        if node.is_a("cache_start"):
            if reason := _uses(new):
                return reason
        elif new.users:
            return f"{next(iter(new.users)).op.name} reads what is written"
    return ""


def _writes(node: Node) -> tuple[int, int, int] | None:
    """Of what writes to keys and values: where new keys stand, where the cache of keys, and the result that is it; values
    stand behind each."""
    return (1, 3, 1) if node.is_a("cached_attention") else (0, 2, 0) if node.is_a("cache_start") else None
