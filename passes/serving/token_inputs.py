"""What exporters leave beside tokens, derived from them: a padding mask, positions, a cache that is empty.

A forward pass as torch or optimum exports it takes ``attention_mask`` and ``position_ids`` as data, and perhaps keys and values
of the past. Sessions feed whole rows, with what is padding on the right, where no token looks: the mask is all ones, positions
count from 0, and a cache is derived, not taken over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from wasat.ir import Builder, DimLike, DType, Graph, IRError, Program, TensorType, Value, symbols_of

from ..core import Pass, PassError, Remark, Remarks

EXPORTED = ("input_ids", "decoder_input_ids")
"""What exporters call the tokens; where both are, the first are the encoder's."""
NAMED = ("tokens", "decoder_input_ids", "input_ids", "ids")
MASKS = ("attention_mask", "decoder_attention_mask")
POSITIONS = ("position_ids", "cache_position")
Meaning = Literal["tokens", "mask", "positions", "past"]


def is_exported(v: Value) -> bool:
    """Whether an input holds tokens under an exporter's name, or of a type that no session feeds (i32)."""
    if not isinstance(v.type, TensorType) or not v.type.dtype.is_int or v.type.rank != 2:
        return False
    return v.name in EXPORTED or (v.name == "tokens" and v.type.dtype is not DType.I64)


def token_inputs(graph: Graph) -> list[str]:
    """The inputs that could be a decoder's tokens, likeliest first, one for each length: integers [batch, sequence].

    Those named as tokens are, then those that pick rows of a table. Which of two that are equally long matters to nobody:
    each is fed its new part under its own name.
    """
    found = [
        v for v in graph.inputs
        if isinstance(v.type, TensorType) and v.type.dtype.is_int and v.type.rank == 2 and str(v.shape[1]).isidentifier()
    ]  # fmt: skip

    def rank(v: Value) -> int:
        if v.name in NAMED:
            return NAMED.index(v.name)
        if v.name in (*MASKS, *POSITIONS):
            return len(NAMED) + 2
        return len(NAMED) + (not _picks_rows(v))

    first: dict[str, str] = {}
    for v in sorted(found, key=rank):
        first.setdefault(str(v.shape[1]), v.name)
    return list(first.values())


def _picks_rows(v: Value) -> bool:
    """Whether ``v`` indexes a table as it is, or cast."""
    for n in v.users:
        if n.op.picks(n.attrs) is not None and n.inputs[1] is v and n.inputs[0].param is not None:
            return True
        if n.is_a("cast") and n.output.tensor.dtype.is_int and _picks_rows(n.output):
            return True
    return False


@dataclass(frozen=True)
class TokenInputs(Pass):
    """``graph`` over ``tokens`` i64[b, s] and what does not run along s.

    By name and type: tokens (integers [b, s] named input_ids or decoder_input_ids); masks (``attention_mask`` [b, n])
    become ones, positions (``position_ids``, ``cache_position``, [.., s]) 0 .. s-1; ``past*`` tensors, whose length is a symbol
    of their own, become empty, and the outputs ``present*`` that go with them are dropped. Beside decoder_input_ids, the
    encoder's input_ids and attention_mask stay inputs.

    ``required``: raises IRError where other inputs run along s, or there is not just one output; else that is a missed remark
    and the graph stays as it is.
    """

    name = "token-inputs"
    exact = False  # inputs go
    graph: str = "forward"
    required: bool = True

    def requires(self, program: Program) -> None:
        if self.graph not in program.graphs:
            raise PassError(f"there is no graph @{self.graph}; there are {', '.join('@' + n for n in program.graphs)}")

    def run(self, program: Program, remarks: Remarks) -> bool:
        old = program[self.graph]
        try:
            plan = _Plan.of(old)
            new = plan.build()
        except IRError as e:
            if self.required:
                raise
            remarks.items.append(Remark("missed", f"@{self.graph} cannot be fed tokens alone: {e.message}", self.graph, e.loc))
            return False
        program.graphs = {name: new if g is old else g for name, g in program.graphs.items()}
        for v, meaning in plan.meaning.items():
            if meaning != "tokens":
                remarks.applied(f"input %{v.name}: {_SAID[meaning]}", new)
        return True


_SAID = {"mask": "all ones", "positions": "0, 1, ..", "past": "empty: caches are derived, not taken over"}


@dataclass
class _Plan:
    """What each input that can be derived is."""

    graph: Graph
    tokens: Value
    meaning: dict[Value, Meaning] = field(default_factory=dict)
    sizes: dict[str, DimLike] = field(default_factory=dict)
    """What symbols become: the length of the past 0, that of masks s."""
    outputs: list[tuple[str, Value]] = field(default_factory=list)

    @staticmethod
    def of(graph: Graph) -> _Plan:
        inputs = {v.name: v for v in graph.inputs if isinstance(v.type, TensorType)}
        found = [v for v in inputs.values() if is_exported(v)]
        encoder = ("input_ids", "attention_mask") if len(found) == len(EXPORTED) else ()
        found = [v for v in found if v.name not in encoder]
        if len(found) != 1:
            raise IRError(f"it has {len(found)} integer inputs [b, s] named {' or '.join(EXPORTED)}; it needs one")
        plan = _Plan(graph, found[0], {found[0]: "tokens"})
        b, s = found[0].shape
        if not str(s).isidentifier():
            raise IRError(f"%{found[0].name} is {found[0].type}: the number of tokens is fixed")
        for name, v in inputs.items():
            t = v.tensor
            if name in encoder or (name in MASKS and t.rank == 2 and plan._hides_others(v)):
                if name in MASKS and t.rank == 2:  # exporters give its rows a name of their own
                    plan._equate(v, (inputs["input_ids"].shape[0] if encoder else b, v.shape[1]))
                continue
            if name in MASKS and t.rank == 2:
                plan.meaning[v] = "mask"
            elif name in POSITIONS and t.dtype.is_int and t.rank in (1, 2):
                plan.meaning[v] = "positions"
            elif name.startswith("past") and t.dtype.is_float:
                plan.meaning[v] = "past"
        past = {d for v, m in plan.meaning.items() if m == "past" for d in symbols_of(v.shape)} - {str(b), str(s)}
        if len(past) > 1:
            raise IRError(f"its caches have several lengths: {', '.join(sorted(past))}")
        plan.sizes |= dict.fromkeys(past, 0)
        for v, m in plan.meaning.items():
            if m in ("mask", "positions"):
                plan._equate(v, plan.tokens.shape)
        plan.outputs = [(n, v) for n, v in zip(graph.output_names, graph.outputs) if not (past and n.startswith("present"))]
        plan._check(str(s))
        return plan

    def _hides_others(self, mask: Value) -> bool:
        """Whether a mask is as long as an input that is not the tokens: that of a memory, made by an encoder."""
        length = mask.shape[1]
        others = (v for v in self.graph.inputs if v is not mask and v is not self.tokens and v.name not in (*MASKS, *POSITIONS))
        known = str(length).isidentifier() and length != self.tokens.shape[1]
        return known and any(length in v.type.shape and not v.name.startswith("past") for v in others)

    def _equate(self, v: Value, shape: Sequence[DimLike]) -> None:
        """Masks and positions have the sizes of the tokens; where these have names of their own, those go."""
        for own, d in zip(reversed(v.tensor.substitute(self.sizes).shape), reversed(shape)):
            if own in (d, 1):
                continue
            if not str(own).isidentifier():
                raise IRError(f"%{v.name} is {v.type}, beside %{self.tokens.name} of type {self.tokens.type}")
            self.sizes[str(own)] = d

    def _check(self, s: str) -> None:
        others = [v for v in self.graph.inputs if v not in self.meaning and s in symbols_of(v.shape)]
        if others:
            raise IRError(f"input {', '.join(f'%{v.name}: {v.type}' for v in others)} also has an element for each token")
        if len(self.outputs) != 1:
            names = ", ".join(n for n, _ in self.outputs)
            raise IRError(f"it has {len(self.outputs)} outputs ({names}); it needs one, the logits")

    def build(self) -> Graph:
        """The graph over the inputs that stay."""
        old, new = self.graph, Graph(self.graph.name)
        b = Builder(new)
        env: dict[Value, Value] = {}
        tokens = new.add_input("tokens", TensorType(DType.I64, self.tokens.tensor.substitute(self.sizes).shape))
        for v in old.inputs:
            if v not in self.meaning:
                env[v] = new.add_input(v.name, v.type.substitute(self.sizes))
        for name, v in old.params.items():
            env[v] = new.add_param(name, v.type)
            new.rename(env[v], v.name)
        for v in self.meaning:
            env[v] = self._derived(b, v, tokens)
        for node in old.nodes:
            made = new.add_node(
                node.op, [env[v] for v in node.inputs], node.attrs.bind(self.sizes), loc=node.loc,
                names=[v.name for v in node.outputs],
            )  # fmt: skip
            env.update(zip(node.outputs, made.outputs))
        new.set_outputs([env[v] for _, v in self.outputs], [n for n, _ in self.outputs])
        return new

    def _derived(self, b: Builder, v: Value, tokens: Value) -> Value:
        meaning, t = self.meaning[v], v.tensor.substitute(self.sizes)
        if meaning == "tokens":
            return tokens if t.dtype is DType.I64 else b.cast(tokens, dtype=t.dtype)
        if meaning == "positions":
            return b.broadcast_to(b.iota(size=t.shape[-1], dtype=t.dtype), shape=t.shape)
        number = b.constant(1 if meaning == "mask" else 0, t.dtype)
        return b.broadcast_to(number, shape=t.shape)
