"""What is settled before the entries of an incremental program are written: which caches there are, and where rows lie."""

from __future__ import annotations

from dataclasses import dataclass, field

from wasat.ir import DimLike, Graph, Node, State, TensorType, Value, symbol
from wasat.ir.ops.attention import AttentionAttrs, mask_and_sink

from ..analyses.axis import sees_ahead
from ..analyses.mask import ends
from ..analyses.rows import Place
from ..analyses.sequence import Label
from .kept import Kept
from .lead import Led


def capacity_name(forward: Graph) -> str:
    """The symbol for the positions of full caches: ``c``, unless the graph has one of that name."""
    name = "c"
    while name in forward.symbols:
        name += "_"
    return name


@dataclass
class Cache:
    """The keys and values of one attention."""

    index: int
    keys: TensorType
    values: TensorType
    window: int | None
    capacity: int | None
    """Positions of a ring; None for a full cache."""
    sinks: int = 0
    """How many of the first positions are kept beside a ring."""

    def names(self) -> tuple[str, str]:
        return f"cache.{self.index}.k", f"cache.{self.index}.v"

    def types(self, batch: DimLike, capacity: DimLike) -> tuple[TensorType, TensorType]:
        c = capacity if self.capacity is None else self.capacity
        return self.keys.with_shape(batch, c, *self.keys.shape[2:]), self.values.with_shape(batch, c, *self.values.shape[2:])

    def firsts(self) -> list[tuple[str, TensorType]]:
        """Names of what holds the first positions, and types of what is in it."""
        return [(f"{n}.first", t) for n, t in zip(self.names(), (self.keys, self.values)) if self.sinks]

    def states(self) -> list[State]:
        if self.capacity is None or self.window is None:
            return [State.full(n, role, self.window) for n, role in zip(self.names(), "kv")]
        if self.sinks:
            first = [State(n, "first", positions=1, capacity=self.sinks, cut="anywhere") for n, _ in self.firsts()]
            return [*(State.ring(n, self.capacity, self.window) for n in self.names()), *first]
        return [State.ring(n, self.capacity, self.window, role) for n, role in zip(self.names(), "kv")]

    def describe(self) -> str:
        if self.capacity is None:
            return "full cache" + (f", window {self.window}" if self.window is not None else "")
        beside = f", beside the first {self.sinks}" if self.sinks else ""
        return f"ring cache of {self.capacity} positions, window {self.window}{beside}"


@dataclass
class Plan:
    """What all derived graphs share."""

    forward: Graph
    tokens: Value
    seq: str
    labels: dict[Value, Label]
    of: dict[Node, Cache] = field(default_factory=dict)
    memory: dict[Value, str] = field(default_factory=dict)
    """Fixed values that depend on inputs, read by what runs along the sequence."""
    places: dict[Value, Place] = field(default_factory=dict)
    """Where values keep the rows of the batch."""
    kept: dict[Value, Kept] = field(default_factory=dict)
    """What else an incremental run keeps, by the value it is of."""
    led: Led | None = None
    """What stands before the tokens."""
    cut: str = ""
    """The output that says of each row whether a token of its past sees a new one; empty where none can."""
    capacity: DimLike = 0
    last_mixing: Node | None = None

    @staticmethod
    def make(
        forward: Graph, tokens: Value, seq: str, labels: dict[Value, Label], chunk: int, granule: int, context: int | None,
        led: Led | None = None,
    ) -> Plan:  # fmt: skip
        plan = Plan(forward, tokens, seq, labels, led=led)
        plan.capacity = symbol(capacity_name(forward))
        if led is not None:  # a session counts tokens: there is room for what stands before them
            plan.capacity = plan.capacity + (led.lead + granule - 1) // granule * granule
        dependent = _on_inputs(plan)
        for node in forward.nodes:
            for v in node.inputs:
                if v in dependent and v.node is not None and any(labels[o].served for o in node.outputs):
                    plan.memory.setdefault(v, f"memory.{len(plan.memory)}")
            if any(labels[o].mixes for o in node.outputs):
                plan.last_mixing = node
                if isinstance(node.attrs, AttentionAttrs):
                    plan._cache(node, chunk, granule, context)
        first = [v for pair in led.first.values() for v in pair] if led is not None else []
        for v in (*first, *forward.outputs):
            if v in dependent and v.node is not None:
                plan.memory.setdefault(v, f"memory.{len(plan.memory)}")
        return plan

    def leads(self, node: Node) -> bool:
        """Whether something stands first in the cache of an attention."""
        return self.led is not None and node in self.led.first

    def _cache(self, node: Node, chunk: int, granule: int, context: int | None) -> None:
        _, k, v, *more = node.inputs
        window, sinks = AttentionAttrs.of(node).window, 0
        mask, _ = mask_and_sink(AttentionAttrs.of(node), more)
        if window is None and mask is not None and self.labels[mask].kind == "pair":
            sinks, window = ends(mask) or (0, None)
        capacity = None if window is None or self.leads(node) else -(-(window + chunk - 1) // granule) * granule
        if capacity is not None and context is not None and context <= capacity + sinks:
            capacity = None
        if sees_ahead(node, self.labels):
            capacity, self.cut = None, "cut"
            while self.cut in self.forward.output_names:
                self.cut += "_"
        if mask is not None and self.labels[mask].kind in ("token", "scores"):
            capacity = None  # what a mask is made of is kept for all positions
        # one for each, also of the same keys and values: in place, a cache is written by one
        if capacity is None:
            window, sinks = AttentionAttrs.of(node).window, 0
        self.of[node] = Cache(len(self.of), k.tensor, v.tensor, window, capacity, sinks)


def _on_inputs(plan: Plan) -> set[Value]:
    """Fixed values that depend on an input."""
    found = {v for v in plan.forward.inputs if plan.labels[v].kind == "fixed"}
    for node in plan.forward.nodes:
        if plan.labels[node.outputs[0]].kind == "fixed" and any(v in found for v in node.inputs):
            found.update(node.outputs)
    return found
