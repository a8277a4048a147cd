"""Kernel selection for GPUs: which operations become calls of the kernels in :mod:`.kernels`.

Selected are ``linear``, ``quantized_linear`` and both of groups, where the weight is a parameter; ``embedding`` and
``quantized_embedding``; ``rms_norm`` and ``layer_norm``, of a sum too; ``softmax`` of the last axis, ``glu``, ``rope``,
``attention``, ``cached_attention`` and ``cache_start``; ``linear_attention`` and ``conv``. Whatever is not, TVM's own
schedules do; :class:`Left` says why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, cast

from wasat.ir import DType, Graph, IRError, Node, QTensorType, State, TensorType, Value, equal
from wasat.ir.ops.attention import mask_and_sink
from wasat.ir.ops.nn import NormAttrs

from ..lower import KernelCall, Left, Result
from ..selection import KernelSelection, Refused, Shape, need_elements, need_sizes, state_of
from .convolution import select_conv
from .kernels.attention import Attention, attention
from .kernels.elementwise import CacheWrite, Embedding, Glu, Rope, cache_write, embedding, glu, rope
from .kernels.formats import Format, format_of
from .kernels.linear import MOST_ROWS, Linear, linear
from .kernels.rows import Norm, RoundRows, Softmax, norm, round_rows, softmax
from .kernels.tensor_attention import tensor_attention
from .limits import Limits
from .recurrent import select_linear_attention
from .states import state_layout
from .weights import layout_of

_TVM = {DType.F32: "float32", DType.F16: "float16", DType.BF16: "bfloat16", DType.I64: "int64", DType.I32: "int32"}

_OF_TENSOR_CORES = (
    (Linear, "product of many rows", "products of many rows"),
    (Attention, "attention of many queries", "attentions of many queries"),
)


def selection(limits: Limits, states: Sequence[State] = (), cache: str = "float32") -> Callable[..., list[Left]]:
    """The function that puts the kernels into a graph, or into the body of a node, and says what it left. Inputs named in
    ``states`` are states; those of keys and values are stored as ``cache``."""
    by_name = {s.name: s for s in states}
    return lambda graph: Selection(graph, limits, by_name, cache).run()


class Selection(KernelSelection):
    """Replaces the operations of one graph: users before what they use, so that a norm takes the sum before it."""

    def __init__(self, graph: Graph, limits: Limits, states: Mapping[str, State], cache: str = "float32") -> None:
        super().__init__(graph, states)
        self.limits, self.cache = limits, cache
        self.rounded: dict[tuple[Value, int], Value] = {}
        """Rows as they are once quantized, in blocks of a size."""
        self.many: list[tuple[Linear | Attention, Node]] = []
        """Products of many rows, attention of many queries."""

    def run(self) -> list[Left]:
        takes: dict[str, Callable[[Node], None]] = {
            **dict.fromkeys(("linear", "quantized_linear"), self._linear),
            **dict.fromkeys(("grouped_linear", "quantized_grouped_linear"), self._grouped),
            **dict.fromkeys(("embedding", "quantized_embedding"), self._embedding),
            "rms_norm": self._norm, "layer_norm": self._norm, "softmax": self._softmax, "glu": self._glu, "rope": self._rope,
            "conv": partial(select_conv, self), "linear_attention": partial(select_linear_attention, self),
            "attention": self._attention, "cached_attention": self._cached_attention, "cache_start": self._cache_start,
        }  # fmt: skip
        left = []
        for node in self.graph.nodes_reversed:
            if node.op.name not in takes or self.erased(node):
                continue
            try:
                need_elements(node)
                takes[node.op.name](node)
            except Refused as e:
                left.append(Left(self.graph.name, f"{node.op.name} has no kernel here: {e}", node.loc))
        for node in self.graph.nodes_reversed:
            self.erased(node)
        for v in self.graph.inputs:
            self._check_state(v, left)
        return [*left[::-1], *self._tensor_cores()]

    def _tensor_cores(self) -> Iterator[Left]:
        """Where the device has such: what of many rows is theirs, and why the rest is not."""
        if not self.limits.tensor:
            return
        for kind, one, more in _OF_TENSOR_CORES:
            whys: dict[str, list[Node]] = {}
            for desc, node in reversed(self.many):
                if isinstance(desc, kind):
                    whys.setdefault(desc.slow or "", []).append(node)
            for why, nodes in whys.items():
                count = f"{len(nodes)} {more if len(nodes) > 1 else one}"
                if not why:
                    yield Left(self.graph.name, f"{count} on tensor cores", nodes[0].loc, "fast")
                else:
                    yield Left(self.graph.name, f"{count} without tensor cores: {why}", nodes[0].loc, "slow")

    # -- what kernels compute with ------------------------------------------------------------------------------------------
    def float_of(self, *values: Value | None) -> str:
        """The one element type of the values that there are."""
        found = {v.tensor.dtype for v in values if v is not None}
        if len(found) != 1:
            raise Refused(f"its operands are of {' and '.join(sorted(map(str, found)))}")
        [dtype] = found
        if not self.reads(dtype):
            raise Refused(f"it computes with {dtype}")
        return _TVM[dtype]

    def reads(self, dtype: DType) -> bool:
        """Whether kernels read arrays of such elements, and compute of them in f32."""
        return dtype in (DType.F32, DType.BF16) or (dtype is DType.F16 and self.limits.f16)

    @staticmethod
    def _index(v: Value) -> str:
        name = _TVM.get(v.tensor.dtype)
        if name not in ("int64", "int32"):
            raise Refused(f"its indices are of {v.tensor.dtype}")
        return name

    def _weight(self, w: Value) -> tuple[Value, Format]:
        """The parameter behind an operand, and how it is packed."""
        widened = w.made_by("cast")
        if widened is not None and widened.inputs[0].param is not None:  # a narrow parameter widened where it is used
            w = widened.inputs[0]
        if w.param is None:
            raise Refused("its weight is no parameter")
        need_sizes(*w.shape)
        f = format_of(w.type, self.limits.f16)
        if isinstance(f, str):
            raise Refused(f)
        return w, f

    # -- products -----------------------------------------------------------------------------------------------------------
    def _few(self, lead: Shape) -> int:
        """How many rows a workgroup multiplies at once: more than MOST_ROWS where there may be many."""
        if all(isinstance(d, int) for d in lead):
            m = 1
            for d in lead:
                m *= cast(int, d)
            return MOST_ROWS * 4 if m > MOST_ROWS else 1 if m < 2 else 2 if m < 3 else 4
        return 4 if all(d == 1 for d in lead[1:]) else MOST_ROWS * 4  # one position of each sequence of a batch

    def _linear(self, node: Node) -> None:
        x, w = node.inputs[:2]
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        dtype, out = self.float_of(x, bias), node.output
        w, f = self._weight(w)
        rows = self._rounded(node, x, w)
        n, k = w.shape
        desc = Linear(self.limits, n, k, f, self._few(x.shape[:-1]), bias is not None, dtype, of_f32=rows is not x)
        if desc.rows > MOST_ROWS:
            self.many.append((desc, node))
        m, _ = self.rows(x)
        operands = [rows, w, *([bias] if bias is not None else [])]
        [y] = self.call(node, desc, linear, operands, [Result(out.tensor, (m, n))], {0: (m, k)}, {1: layout_of(f)})
        self.graph.replace_uses(out, y)

    def _rounded(self, node: Node, x: Value, w: Value) -> Value:
        """The rows of ``x`` as the product with ``w`` wants them."""
        if getattr(node.attrs, "activation", None) != "int8":
            return x
        block = cast(QTensorType, w.type).row_block
        if (x, block) not in self.rounded:
            m, k = self.rows(x)
            desc = RoundRows(self.limits, k, block, self.float_of(x))
            first = x.node  # where the rows are made: any product of them may be the first
            at = self._after(first) if first is not None else next(iter(self.graph.nodes))
            result = Result(TensorType(DType.F32, x.shape), (m, k))
            [self.rounded[x, block]] = self.call(at, desc, round_rows, [x], [result], {0: (m, k)})
        return self.rounded[x, block]

    def _after(self, node: Node) -> Node:
        """The node behind ``node``."""
        nodes = iter(self.graph.nodes)
        next(n for n in nodes if n is node)
        return next(nodes)

    def _grouped(self, node: Node) -> None:
        x, w, groups = node.inputs[:3]
        bias = node.inputs[3] if len(node.inputs) > 3 else None
        dtype, out, b = self.float_of(x, bias), node.output, self.builder(node)
        w, f = self._weight(w)
        e, n, k = cast(tuple[int, int, int], w.shape)
        index = self._index(groups)
        rows, lead, per = self._rounded(node, x, w), out.shape[:-1], 1
        of_f32 = rows is not x
        if rows.shape[:-1] == (*lead[:-1], 1) and isinstance(lead[-1], int):
            per = lead[-1]
        elif rows.shape[:-1] != lead:
            rows = b.broadcast_to(rows, shape=(*lead, k))
        if groups.shape != lead:
            groups = b.broadcast_to(groups, shape=lead)
        m, _ = self.rows(out)
        desc = Linear(self.limits, n, k, f, 1, bias is not None, dtype, e, per, index, of_f32)
        operands = [rows, w, groups, *([bias] if bias is not None else [])]
        shapes: dict[int, Shape] = {0: self.rows(rows), 2: (m,)}
        [y] = self.call(node, desc, linear, operands, [Result(out.tensor, (m, n))], shapes, {1: layout_of(f)})
        self.graph.replace_uses(out, y)

    def _embedding(self, node: Node) -> None:
        w, ids, out = *node.inputs, node.output
        dtype, (w, f) = self.float_of(out), self._weight(w)
        n, k = cast(tuple[int, int], w.shape)
        m, _ = self.rows(out)
        scale, index = 1.0, self._index(ids)
        if len(out.uses) == 1 and not self.graph.is_output(out):
            [user] = out.users
            factor = next((v.const for v in user.inputs if v is not out), None)
            if user.op.name == "mul" and factor is not None and factor.ndim == 0:
                out, scale = user.output, float(factor)
        desc = Embedding(self.limits, n, k, f, scale, index, dtype)
        [y] = self.call(node, desc, embedding, [ids, w], [Result(out.tensor, (m, k))], {0: (m,)}, {1: layout_of(f)})
        self.graph.replace_uses(out, y)

    # -- rows ---------------------------------------------------------------------------------------------------------------
    def _norm(self, node: Node) -> None:
        x, *scales = node.inputs
        dtype, out = self.float_of(x, *scales), node.output
        m, n = self.rows(x)
        need_sizes(n)
        if n == 0:
            raise Refused("its rows have no elements")
        kind: Literal["rms", "layer"] = "rms" if node.op.name == "rms_norm" else "layer"
        total = x.made_by("add")
        if total is not None and not self.can_sum_at(total, node):
            total = None
        operands = [*(total.inputs if total is not None else [x]), *scales]
        first = len(operands) - len(scales)
        desc = Norm(self.limits, n, kind, NormAttrs.of(node).eps, bool(scales), len(scales) > 1, total is not None, dtype)
        results = [Result(x.tensor, (m, n))] * (2 if total is not None else 1)
        *sums, y = self.call(node, desc, norm, operands, results, {i: (m, n) for i in range(first)})
        if sums:
            self.graph.replace_uses(x, sums[0])
        self.graph.replace_uses(out, y)

    def _softmax(self, node: Node) -> None:
        x, out = node.inputs[0], node.output
        if cast(Any, node.attrs).axis != x.tensor.rank - 1:
            raise Refused("its axis is not the last one")
        dtype, (m, n) = self.float_of(x), self.rows(x)
        desc = Softmax(self.limits, n if isinstance(n, int) and n else None, dtype)
        [y] = self.call(node, desc, softmax, [x], [Result(out.tensor, (m, n))], {0: (m, n)})
        self.graph.replace_uses(out, y)

    def _glu(self, node: Node) -> None:
        x, out = node.inputs[0], node.output
        dtype, (m, n) = self.float_of(x), self.rows(out)
        need_sizes(n)
        if n == 0:
            raise Refused("its rows have no elements")
        desc = Glu(self.limits, n, cast(Any, node.attrs).activation, dtype)
        [y] = self.call(node, desc, glu, [x], [Result(out.tensor, (m, n))], {0: (m, 2 * n)})
        self.graph.replace_uses(out, y)

    # -- positions ----------------------------------------------------------------------------------------------------------
    def _rope(self, node: Node) -> None:
        x, positions, inv_freq = node.inputs
        dtype, a = self.float_of(x), cast(Any, node.attrs)
        _, s, h, d = x.shape
        need_sizes(h, d)
        if 0 in (h, d):
            raise Refused("its heads have no elements")
        rows = positions.tensor.rank == 2 and positions.shape[0] != 1
        desc = Rope(
            self.limits, h, d, 2 * inv_freq.shape[0], a.factor, a.interleaved, rows, self._index(positions), dtype
        )  # fmt: skip
        shapes: dict[int, Shape] = {} if rows else {1: (1, s)}
        [y] = self.call(node, desc, rope, [x, positions, inv_freq], [Result(node.output.tensor)], shapes)
        self.graph.replace_uses(node.output, y)

    def _attention(self, node: Node) -> None:
        q, k, v = node.inputs[:3]
        dtype, a = self.float_of(q, k, v), cast(Any, node.attrs)
        self._heads(q, k, v)
        operands, how, sink = self._more(node, node.inputs[3:], (q.shape[0], q.shape[2], q.shape[1], k.shape[1]))
        desc = Attention(
            self.limits, q.shape[2], k.shape[2], k.shape[3], v.shape[3], a.scale, a.softcap, a.window, a.causal, mask=how,
            dtype=dtype, stored=dtype, sink=sink,
        )  # fmt: skip
        [y] = self._attend(node, desc, [q, k, v, *operands])
        self.graph.replace_uses(node.output, y)

    def _attend(self, node: Node, desc: Attention, operands: Sequence[Value]) -> tuple[Value, ...]:
        if not desc.decode:
            self.many.append((desc, node))
        build = attention if desc.slow else tensor_attention
        return self.call(node, desc, build, operands, [Result(node.outputs[0].tensor)])

    @staticmethod
    def _heads(q: Value, k: Value, v: Value) -> None:
        sizes = (q.shape[2], *k.shape[2:], v.shape[3])
        need_sizes(*sizes)
        if 0 in sizes:
            raise Refused("its heads have no elements")
        if max(k.shape[3], v.shape[3]) > 1024:
            raise Refused(f"heads of {max(k.shape[3], v.shape[3])} features are too large for the registers of a thread")

    def _more(self, node: Node, more: Sequence[Value], full: Shape) -> tuple[list[Value], str, str]:
        """The mask as [1 | b, 1 | h, s, c] and the sink, where there are such; the mask's letters, and the sink's type."""
        mask, sink = mask_and_sink(cast(Any, node.attrs), more)
        sinks, of = ([], "") if sink is None else ([sink], self.float_of(sink))
        if mask is None:
            return sinks, "", of
        b, own = self.builder(node), (1,) * (4 - mask.tensor.rank) + tuple(mask.shape)
        how = ("b" if mask.tensor.dtype is DType.BOOL else "f") + "B" * (own[0] != 1) + "H" * (own[1] != 1)
        mask = mask if own == tuple(mask.shape) else b.reshape(mask, shape=own)
        shape = (*own[:2], *full[2:])
        return [mask if own == shape else b.broadcast_to(mask, shape=shape), *sinks], how, of

    def _cached_attention(self, node: Node) -> None:
        q, k, v, keys, values, past = node.inputs[:6]
        dtype, a, index = self.float_of(q, k, v, keys, values), cast(Any, node.attrs), self._index(past)
        self._heads(q, k, v)
        h, g, d, e, c = q.shape[2], k.shape[2], k.shape[3], v.shape[3], keys.shape[1]
        written = [Result(keys.tensor, alias=3), Result(values.tensor, alias=4)]
        stored = self._stored(node, dtype, keys, values)
        write = CacheWrite(self.limits, g, d, e, ring=a.ring, past=index, dtype=dtype, stored=stored)
        keys, values = self.call(node, write, cache_write, [k, v, past, keys, values], written)
        operands, how, sink = self._more(node, node.inputs[6:], (q.shape[0], h, q.shape[1], c))
        decode = equal(q.shape[1], 1) is True
        most = [n for n in (a.window, c) if isinstance(n, int)]
        desc = Attention(
            self.limits, h, g, d, e, a.scale, a.softcap, a.window, a.causal or decode, True, a.ring, decode, how,
            min(most) if most else None, index, dtype, stored, sink,
        )  # fmt: skip
        [y] = self._attend(node, desc, [q, past, keys, values, *operands])
        for old, new in zip(node.outputs, (y, keys, values)):
            self.graph.replace_uses(old, new)

    def _cache_start(self, node: Node) -> None:
        k, v, keys, values, past = node.inputs
        dtype, index = self.float_of(k, v, keys, values), self._index(past)
        g, d, e = keys.shape[2], k.shape[3], v.shape[3]
        need_sizes(g, d, e)
        shared = k.shape[0] == 1
        stored = self._stored(node, dtype, keys, values)
        desc = CacheWrite(self.limits, g, d, e, start=True, shared=shared, past=index, dtype=dtype, stored=stored)
        written = [Result(keys.tensor, alias=3), Result(values.tensor, alias=4)]
        for old, new in zip(node.outputs, self.call(node, desc, cache_write, [k, v, past, keys, values], written)):
            self.graph.replace_uses(old, new)

    # -- states -------------------------------------------------------------------------------------------------------------
    def _kept(self, v: Value) -> str | None:
        """The element type that a state lies in memory as, where that is not its own; None: its own, or ``v`` is no state."""
        state = self.states.get(v.name) if v.node is None and v.param is None else None
        if state is None:
            return None
        kept = state_layout(state, v.tensor, self.cache).type.dtype
        return None if kept is v.tensor.dtype else _TVM[kept]

    def _stored(self, node: Node, dtype: str, *caches: Value) -> str:
        """The element type that keys and values, which ``node`` has as ``dtype``, lie in memory as."""
        found = {self._kept(state_of(v)) or dtype for v in caches}
        if len(found) > 1:
            raise Refused(f"its keys and values are stored as {' and '.join(sorted(found))}")
        return found.pop()

    def _check_state(self, v: Value, left: Sequence[Left]) -> None:
        """What lies in memory as another type than the graph says means nothing to operations that are no kernels."""
        if self._kept(v) is None:
            return
        for user in v.users:
            if not isinstance(user.op, KernelCall):
                why = next((f" ({x.why})" for x in left if x.loc is not None and x.loc == user.loc), "")
                raise IRError(
                    f"{user!r}: the cache %{v.name} is stored as f16, which attention's kernels alone read{why}; compile with "
                    "cache=\"f32\"", user.loc,
                )  # fmt: skip
