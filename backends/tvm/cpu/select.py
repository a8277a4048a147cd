"""Kernel selection for CPUs: which operations, alone or together, become calls of the kernels in :mod:`.kernels`.

Selected are ``linear``, ``quantized_linear`` and both of groups, ``embedding``, ``quantized_embedding``, ``rms_norm``,
``layer_norm``, ``glu``, ``rope``, ``attention``, ``cached_attention`` and ``linear_attention``, in f32, sizes known but for
batch and positions; and ``linear`` and ``matmul`` of any operands, and ``conv``, at any sizes. Together go

- ``a + b`` (``b`` perhaps an ``rms_norm``), the norm of the sum, and its quantization for the integer linears;
- ``glu`` and that quantization; ``embedding`` and a scale; ``rms_norm`` and ``rope``;
- ``matmul`` and what only moves elements before and after it;
- slices of a merged projection, reshapes, ``rms_norm``, ``rope`` at positions ``past + iota`` and the cache update.

Whatever is not selected is left as it is, to be decomposed, and said.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, cast

import tvm
from wasat.ir import (
    DimLike,
    DType,
    Graph,
    IRError,
    Node,
    QTensorType,
    State,
    TensorType,
    Value,
    equal,
)
from wasat.ir.ops.attention import AttentionAttrs, CachedAttrs, mask_and_sink
from wasat.ir.ops.nn import NormAttrs

from ..lower import KernelCall, Left, Result
from ..selection import KernelSelection, Refused, Shape, need_elements, need_f32, need_sizes
from ..selection import is_f32 as _f32
from .grouped import readers, same_rows, select_grouped
from .kernels.attention import Attention, CachedAttention, MaskShape, attention, cached_attention
from .kernels.blocks import fits_blocks
from .kernels.cache import Cache, CacheType, CacheWrite, cache_write
from .kernels.flash import Scores
from .kernels.glu import Glu, glu
from .kernels.isa import Isa, isa_of
from .kernels.norm import Norm, norm
from .kernels.pack import BLOCK, padded
from .kernels.quantize import WORDS, QuantizeRows, quantize_rows
from .kernels.rope import QkvToCache, Rope, Rotary, qkv_to_cache, rope
from .matrices import of_integers, select_conv, select_embedding, select_linear, select_matmul, select_quantized_linear
from .operands import is_past_plus_iota, part_of, rotary_of, state_of, stored_as, unrounded
from .optimizer_steps import fuse_square_sums, fuse_updates
from .panels import PaddedBias, Panels, ints
from .recurrent import select_linear_attention
from .states import CacheLayout, state_layout


# -- selection --------------------------------------------------------------------------------------------------------------
def selection(
    target: tvm.target.Target, threads: int, cache: CacheType, states: Sequence[State]
) -> Callable[[Graph], list[Left]]:
    """Puts the kernels for ``target`` into a graph whose inputs named in ``states`` are states, and says what it left."""
    isa = isa_of(target)
    by_name = {s.name: s for s in states}
    donated = [s.name for s in states if s.donated]

    def select(graph: Graph) -> list[Left]:
        left = Selection(graph, isa, threads, cache, by_name).run()
        fuse_square_sums(graph, isa.lanes, threads)
        fuse_updates(graph, donated, threads)
        return left

    return select


class Selection(KernelSelection):
    """Replaces the operations of one graph by kernel calls.

    Users come before what they use, so that a kernel takes up what precedes it before that is selected by itself; matrices come
    last, when it is settled who quantizes their rows.
    """

    def __init__(self, graph: Graph, isa: Isa, threads: int, cache: CacheType, states: Mapping[str, State]) -> None:
        super().__init__(graph, states)
        self.isa, self.threads, self.cache = isa, threads, cache
        self.quantized: dict[Value, Value] = {}
        """Rows of a value quantized for the integer linears, where some kernel has made them."""
        self.sorted: dict[tuple[Value, Shape, int], tuple[Value, Value]] = {}
        """Rows sorted by group, for grouped products."""
        self.bias_layout = PaddedBias(isa)

    def run(self) -> list[Left]:
        rows: dict[str, Callable[[Node], None]] = {
            "rms_norm": self._rms_norm, "layer_norm": self._layer_norm, "glu": self._glu, "rope": self._rope,
            "attention": self._attention, "cached_attention": self._cached_attention,
            "cache_start": self._cache_start,
            "linear_attention": partial(select_linear_attention, self),
        }  # fmt: skip
        matrices: dict[str, Callable[[Node], None]] = {
            "linear": partial(select_linear, self), "matmul": partial(select_matmul, self), "conv": partial(select_conv, self),
            "quantized_linear": partial(select_quantized_linear, self),
            **dict.fromkeys(("embedding", "quantized_embedding"), partial(select_embedding, self)),
            **dict.fromkeys(("grouped_linear", "quantized_grouped_linear"), self._grouped),
        }  # fmt: skip
        left: list[Left] = []

        def take(node: Node, how: Callable[[Node], None]) -> None:
            try:
                need_elements(node)
                how(node)
            except Refused as e:
                left.append(Left(self.graph.name, f"{node.op.name} has no kernel here: {e}", node.loc))

        for node in self.graph.nodes_reversed:
            if not self.erased(node) and node.op.name in rows:
                take(node, rows[node.op.name])
        left.reverse()
        for node in self.graph.nodes:
            if node.op.name in matrices:
                take(node, matrices[node.op.name])
        for node in self.graph.nodes_reversed:
            self.erased(node)
        for v in self.graph.inputs:
            self._check_state(v)
        return left

    # -- matrices -----------------------------------------------------------------------------------------------------------
    def weight(self, w: Value) -> tuple[Value, Panels]:
        """The parameter behind a matrix operand and the layout that reads it. Raises Refused if no kernel does."""
        cast_ = w.made_by("cast")
        if cast_ is not None and _f32(w):  # a narrow parameter widened where it is used
            w = cast_.inputs[0]
        if w.param is None:
            raise Refused(f"its weight %{w.name} is no parameter")
        need_sizes(*w.shape)
        if isinstance(w.type, QTensorType):
            t = w.type
            if t.stored is None and t.block == BLOCK and t.scale is DType.F16 and not t.zeros:
                return w, Panels(self.isa, t.scheme)
            if not fits_blocks(t):
                raise Refused(f"its weight %{w.name} is {t}, and blocks are a multiple of 32 that divides a row")
            return w, Panels(self.isa, t.how)
        storage = {DType.F32: "float32", DType.F16: "float16", DType.BF16: "bfloat16"}.get(w.type.dtype)
        if storage is None:
            raise Refused(f"its weight %{w.name} is {w.type}")
        return w, Panels(self.isa, storage)

    def packs(self, w: Value) -> bool:
        """Whether kernels read ``w`` as a weight."""
        try:
            self.weight(w)
        except Refused:
            return False
        return True

    def _grouped(self, node: Node) -> None:
        select_grouped(self, node, of_integers(node))

    def quantized_rows(self, node: Node, x: Value) -> Value:
        """The rows of ``x`` quantized, for ``node``, if no kernel before it has done that."""
        if x not in self.quantized:
            m, k = self.rows(x)
            need_sizes(k)
            desc = QuantizeRows(self.isa, k, self.threads)
            [self.quantized[x]] = self.call(node, desc, quantize_rows, [x], [self._quantized_rows(x)], {0: (m, k)})
        return self.quantized[x]

    def _quantized_rows(self, x: Value) -> Result:
        m, k = self.rows(x)
        return Result(TensorType(DType.I32, (m, padded(k, BLOCK) // BLOCK, WORDS)))

    def _wants(self, x: Value) -> Literal["no", "yes", "both"]:
        """Whether x is read quantized: by integer linears alone (yes), by them among others (both), or not."""
        found = readers(x)
        count = sum(i == 0 and of_integers(node) and self.packs(node.inputs[1]) for node, i in found)
        kept = any(self.graph.is_output(v) for v in same_rows(x))
        return "no" if not count else "yes" if count == len(found) and not kept else "both"

    # -- rows ---------------------------------------------------------------------------------------------------------------
    def _rms_norm(self, node: Node) -> None:
        self._norm(node, "rms")

    def _layer_norm(self, node: Node) -> None:
        self._norm(node, "layer")

    def _norm(self, node: Node, kind: Literal["rms", "layer"]) -> None:
        x, *scales = node.inputs
        need_f32(x, *scales)
        need_sizes(x.shape[-1])
        out, eps = node.output, NormAttrs.of(node).eps
        operands, branch_weight = [x], None
        total = x.made_by("add")
        if total is not None and _f32(*total.inputs) and self.can_sum_at(total, node):
            a, b = total.inputs
            for stem, other in ((a, b), (b, a)):
                inner = other.made_by("rms_norm")
                if kind == "rms" and inner is not None and len(inner.inputs) == 2 and NormAttrs.of(inner).eps == eps:
                    a, b, branch_weight = stem, inner.inputs[0], inner.inputs[1]
                    break
            operands = [a, b]
        else:
            total = None
        quantize = self._wants(out)
        rows = self.rows(x)
        operands += [v for v in (branch_weight, *scales) if v is not None]
        desc = Norm(
            self.isa, rows[1], kind, eps, weight=bool(scales), bias=len(scales) > 1, residual=total is not None,
            pre_norm=branch_weight is not None, quantize=quantize, threads=self.threads,
        )  # fmt: skip
        results = [Result(x.tensor, rows)] if total is not None else []
        results += [Result(x.tensor, rows)] if quantize != "yes" else []
        results += [self._quantized_rows(x)] if quantize != "no" else []
        made = list(self.call(node, desc, norm, operands, results, {i: rows for i in range(2 if total is not None else 1)}))
        if total is not None:
            self.graph.replace_uses(x, made.pop(0))
        if quantize != "yes":
            self.graph.replace_uses(out, made[0])
            out = made[0]
        if quantize != "no":
            self.quantized[out] = made[-1]

    def _glu(self, node: Node) -> None:
        x, out = node.inputs[0], node.output
        need_f32(x)
        need_sizes(x.shape[-1])
        quantize = self._wants(out) == "yes"
        m, n = self.rows(out)
        desc = Glu(self.isa, n, cast(Any, node.attrs).activation, quantize, self.threads)
        result = self._quantized_rows(out) if quantize else Result(out.tensor, (m, n))
        [y] = self.call(node, desc, glu, [x], [result], {0: (m, 2 * n)})
        if quantize:
            self.quantized[out] = y
        else:
            self.graph.replace_uses(out, y)

    # -- positions ----------------------------------------------------------------------------------------------------------
    def _head_norm(self, x: Value) -> tuple[Value, Value | None, float]:
        """x as it was before an RMS norm of its heads, that norm's weight, and its eps."""
        inner = x.made_by("rms_norm")
        if inner is None or len(inner.inputs) != 2 or not _f32(*inner.inputs):
            return x, None, 0.0
        return inner.inputs[0], inner.inputs[1], NormAttrs.of(inner).eps

    def _rope(self, node: Node) -> None:
        x, positions, inv_freq = node.inputs
        b, s, h, d = x.shape
        need_f32(x)
        need_sizes(h, d)
        builder = self.builder(node)
        if positions.shape != (b, s):
            positions = builder.broadcast_to(positions, shape=(b, s))
        if positions.tensor.dtype is not DType.I64:
            positions = builder.cast(positions, dtype=DType.I64)
        x, weight, eps = self._head_norm(x)
        rotary = rotary_of(node, d)
        desc = Rope(self.isa, h, rotary, weight is not None, eps, self.threads)
        operands = [x, positions, inv_freq, *([weight] if weight is not None else [])]
        [y] = self.call(node, desc, rope, operands, [Result(node.output.tensor)])
        self.graph.replace_uses(node.output, y)

    def _attention(self, node: Node) -> None:
        (q, k, v, *more), a = node.inputs, AttentionAttrs.of(node)
        (n, s, h, d), (t, g, e) = q.shape, v.shape[1:]
        need_f32(q, k, v)
        need_sizes(h, d, g, e)
        operands, kind = self._more(node, a, more, (n, h, s, t))
        operands = [q, k, v, *operands]
        scores = Scores(a.scale, a.softcap, a.window, a.causal)
        desc = Attention(self.isa, h, g, d, e, scores, kind, self.threads, a.sink)
        [y] = self.call(node, desc, attention, operands, [Result(node.output.tensor)])
        self.graph.replace_uses(node.output, y)

    def _more(
        self, node: Node, attrs: AttentionAttrs | CachedAttrs, more: Sequence[Value], full: tuple[DimLike, ...]
    ) -> tuple[list[Value], MaskShape]:
        """A mask of attention, in f32 [1 | b, 1 | h, s, t], and which it is; and its sink."""
        (mask, sink), b, (n, h, s, t) = mask_and_sink(attrs, more), self.builder(node), full
        sinks = [] if sink is None else [sink]
        if mask is None:
            return sinks, "no"
        if mask.tensor.dtype is DType.BOOL:
            mask = b.select(mask, 0.0, float("-inf"))
        own = (1,) * (4 - len(mask.shape)) + tuple(mask.shape)
        per_batch, per_head = own[0] != 1, own[1] != 1
        shape = (n if per_batch else 1, h if per_head else 1, s, t)
        if own != tuple(mask.shape):
            mask = b.reshape(mask, shape=own)
        kind = ("b" if per_batch else "1") + ("h" if per_head else "1")
        return [mask if own == shape else b.broadcast_to(mask, shape=shape), *sinks], cast(MaskShape, kind)

    def _cached_attention(self, node: Node) -> None:
        (q, k, v, keys, values, past, *more), a = node.inputs, CachedAttrs.of(node)
        s, h = q.shape[1:3]
        need_f32(q, k, v)
        need_sizes(h)
        self._need_caches(keys, values)
        capacity, g, d = keys.shape[1:]
        for state in (self.states[state_of(v).name] for v in (keys, values)):
            if state.grows == a.ring:
                raise IRError(f"{node!r}: %{state.name} is declared {state.kind}", node.loc)
        cache = Cache(g, d, v.shape[3], capacity if a.ring else None, stored_as(node, self.states, self.cache))
        k, v = (unrounded(node, x, cache) for x in (k, v))
        if past.tensor.dtype is not DType.I64:
            past = self.builder(node).cast(past, dtype=DType.I64)
        fused = self._qkv(node, cache, past, k, v)
        if fused is not None:
            q, keys, values = fused
        else:
            written = [Result(keys.tensor, alias=3), Result(values.tensor, alias=4)]
            keys, values = self.call(node, CacheWrite(self.isa, cache, self.threads), cache_write,
                                     [k, v, past, keys, values], written)  # fmt: skip
        addend, kind = self._more(node, a, more, (q.shape[0], h, s, capacity))
        decode = equal(s, 1) is True
        scores = Scores(a.scale, a.softcap, a.window, a.causal or decode)
        desc = CachedAttention(self.isa, h, cache, scores, decode, kind, self.threads, a.sink)
        [y] = self.call(node, desc, cached_attention, [q, past, keys, values, *addend], [Result(node.outputs[0].tensor)])
        for old, new in zip(node.outputs, (y, keys, values)):
            self.graph.replace_uses(old, new)

    def _cache_start(self, node: Node) -> None:
        k, v, keys, values, past = node.inputs
        need_f32(k, v)
        self._need_caches(keys, values)
        heads, width, value = ints((keys.shape[2], k.shape[3], v.shape[3]))
        cache = Cache(heads, width, value, None, stored_as(node, self.states, self.cache))
        k, v = (unrounded(node, x, cache) for x in (k, v))
        if past.tensor.dtype is not DType.I64:
            past = self.builder(node).cast(past, dtype=DType.I64)
        desc = CacheWrite(self.isa, cache, self.threads, start=True, shared=k.shape[0] == 1)
        written = [Result(keys.tensor, alias=3), Result(values.tensor, alias=4)]
        for old, new in zip(node.outputs, self.call(node, desc, cache_write, [k, v, past, keys, values], written)):
            self.graph.replace_uses(old, new)

    def _is_cache(self, v: Value) -> bool:
        v = state_of(v)
        state = self.states.get(v.name) if v.node is None and v.param is None else None
        return state is not None and isinstance(state_layout(state, v.tensor, self.cache), CacheLayout)

    def _need_caches(self, *caches: Value) -> None:
        for v in caches:
            if not self._is_cache(v):
                raise Refused(f"%{v.name} is no state in the kernels' layout")

    def _check_state(self, v: Value) -> None:
        """A cache in the kernels' layout means nothing to any other operation."""
        if self._is_cache(v):
            for user in v.users:
                if not isinstance(user.op, KernelCall):
                    raise IRError(f"{user!r}: the state %{v.name} can only be read by cached_attention", user.loc)

    def _qkv(self, node: Node, cache: Cache, past: Value, k: Value, v: Value) -> tuple[Value, Value, Value] | None:
        """From a merged projection to the queries and both caches in one call, where that is what stands before ``node``."""
        q, (keys, values) = node.inputs[0], node.inputs[3:5]
        b, s, h, d = q.shape
        rotary, inv_freq = Rotary(d, 0), None
        first, second = q.made_by("rope"), k.made_by("rope")
        if first is not None and second is not None:
            if first.inputs[1:] != second.inputs[1:] or first.attrs != second.attrs:
                return None
            if not is_past_plus_iota(first.inputs[1], past):
                return None
            q, k, inv_freq, rotary = first.inputs[0], second.inputs[0], first.inputs[2], rotary_of(first, d)
        elif first is not None or second is not None:
            return None
        (q, q_weight, q_eps), (k, k_weight, k_eps) = self._head_norm(q), self._head_norm(k)
        if (q_weight is None) != (k_weight is None) or q_eps != k_eps:
            return None
        parts = [part_of(x) for x in (q, k, v)]
        if None in parts:
            return None
        (qkv, q_at), (k_source, k_at), (v_source, v_at) = cast(Any, parts)
        width = (h + cache.kv_heads) * d + cache.kv_heads * cache.value_dim
        if not qkv is k_source is v_source or (q_at, k_at, v_at) != (0, h * d, (h + cache.kv_heads) * d):
            return None
        if qkv.shape != (b, s, width):
            return None
        operands = [x for x in (qkv, past, inv_freq, q_weight, k_weight) if x is not None]
        at = len(operands)
        desc = QkvToCache(self.isa, h, cache, rotary, q_weight is not None, q_eps, self.threads)
        results = [
            Result(keys.tensor, alias=at), Result(values.tensor, alias=at + 1), Result(TensorType(DType.F32, (b, s, h, d))),
        ]  # fmt: skip
        new_keys, new_values, new_q = self.call(node, desc, qkv_to_cache, [*operands, keys, values], results)
        return new_q, new_keys, new_values
