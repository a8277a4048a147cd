"""Linear attention: a state of each head that every token decays, writes to and reads, instead of keys that are all kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from .. import op as _op
from ..axes import Axes, AxisRule, Factor
from ..checks import require_equal
from ..dims import DimLike, equal
from ..errors import TypeMismatch
from ..op import Body, ErrorSample, Op, Sample, floating, register
from ..types import DType, TensorType
from .attention import rank4, wave
from .elementwise import wide
from .linear_blocks import by_blocks

if TYPE_CHECKING:
    from ..builder import Builder
    from ..graph import Value

RULES = ("linear", "gated", "delta", "gated_delta")
"""How a token changes the state, as ONNX's LinearAttention calls it."""


@dataclass(frozen=True)
class LinearAttentionAttrs(_op.Attrs):
    """``scale`` multiplies what is read. ``log``: decays are given by their logarithms, else as they are.
    ``before``: a token reads the state as it was before its own decay and write."""

    rule: str
    scale: float = 1.0
    log: bool = True
    before: bool = False

    @property
    def gated(self) -> bool:
        return self.rule in ("gated", "gated_delta")

    @property
    def delta(self) -> bool:
        return self.rule in ("delta", "gated_delta")


def decay_and_beta(attrs: LinearAttentionAttrs, more: Sequence[Any]) -> tuple[Any, Any]:
    """The operands that not every rule has; None where it has none."""
    return more[0] if attrs.gated else None, more[-1] if attrs.delta else None


@register
class LinearAttention(Op):
    """A recurrence over tokens with a matrix per head as its state (arXiv:2006.16236, 2307.08621, 2312.06635, 2412.06464).

    q [b, s, h, d], k [b, s, g, d], v [b, s, g, e], state [b, g, d, e], decay?, beta? -> y [b, s, h, e], state'; query head i
    reads the state of head i // (h/g). Token after token, with a = exp(decay), or the decay itself if not ``log``:

        linear       S = S + k v^T                       gated        S = a S + k v^T
        delta        S = S + beta k (v - S^T k)^T        gated_delta  S = a S, then as delta
        y = scale * S^T q

    decay [b, s, g], or [b, s, g, d] for each feature of the keys; beta [b, s, g]. The state is computed in f32 or wider, and
    keeps its own type; decay and beta have that of q or f32.
    """

    name = "linear_attention"
    kind = "product"
    precision = "wide"
    factors = 4
    Attrs = LinearAttentionAttrs
    recurrence: ClassVar[Mapping[int, int]] = {1: 3}

    def infer(
        self, attrs: LinearAttentionAttrs, q: TensorType, k: TensorType, v: TensorType, state: TensorType, *more: TensorType
    ) -> tuple[TensorType, TensorType]:
        if attrs.rule not in RULES:
            raise TypeMismatch(f"rule={attrs.rule!r} is not one of {', '.join(RULES)}")
        wanted = attrs.gated + attrs.delta
        if len(more) != wanted:
            names = ["decay"] * attrs.gated + ["beta"] * attrs.delta
            named = " and ".join(names) or "no operand"
            raise TypeMismatch(f"rule {attrs.rule} has {named} after the state, not {len(more)} more")
        for t, what in ((q, "q"), (k, "k"), (v, "v")):
            rank4(t, what)
            if t.dtype is not q.dtype:
                raise TypeMismatch(f"q is {q} and {what} is {t}; cast one of them")
        if floating(state, "the state").rank != 4:
            raise TypeMismatch(f"the state must be [batch, head, key feature, value feature], not {state}")
        b, s, g, d = k.shape
        for t, what in ((q, "q"), (v, "v")):
            require_equal(b, t.shape[0], f"batch of k and {what}")
            require_equal(s, t.shape[1], f"positions of k and {what}")
        require_equal(g, v.shape[2], "heads of k and v")
        require_equal(q.shape[3], d, "features of q and k")
        if g == 0 or equal(q.shape[2] % g, 0) is not True:
            raise TypeMismatch(f"{q.shape[2]} query heads do not divide among {g} key heads")
        for x, y, what in zip(state.shape, (b, g, d, v.shape[3]), ("batch", "heads", "key features", "value features")):
            require_equal(x, y, f"{what} of the state and of k and v")
        decay, beta = decay_and_beta(attrs, more)
        for t, what, ranks in ((decay, "decay", (3, 4)), (beta, "beta", (3,))):
            if t is None:
                continue
            if floating(t, what).rank not in ranks:
                per = " or [batch, position, head, key feature]" if 4 in ranks else ""
                raise TypeMismatch(f"{what} must be [batch, position, head]{per}, not {t}")
            if t.dtype not in (q.dtype, DType.F32):
                raise TypeMismatch(f"{what} must be {q.dtype} or f32, not {t}")
            for x, y, where in zip(t.shape, k.shape, ("batch", "positions", "heads", "key features")):
                require_equal(x, y, f"{where} of {what} and k")
        return q.with_shape(*q.shape[:3], v.shape[3]), state

    def axes(
        self, attrs: LinearAttentionAttrs, q: TensorType, k: TensorType, v: TensorType, state: TensorType, *more: TensorType
    ) -> AxisRule:
        n, s = (Factor(q.shape[0]),), (Factor(q.shape[1], "ordered", "forward"),)
        heads, group = Factor(k.shape[2]), Factor(q.shape[2] // k.shape[2])
        d, e = (Factor(k.shape[3], "whole"),), (Factor(v.shape[3]),)
        own: Axes = (n, (heads,), d, e)
        new: tuple[Axes, ...] = (n, s, (heads, group), d), (n, s, (heads,), d), (n, s, (heads,), e)
        return AxisRule(
            (*new, own, *((n, s, (heads,), d)[: t.rank] for t in more)), ((n, s, (heads, group), e), own)
        )  # fmt: skip

    def reference(
        self, attrs: LinearAttentionAttrs, q: np.ndarray, k: np.ndarray, v: np.ndarray, state: np.ndarray, *more: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        b, s, h, d = q.shape
        g, e = v.shape[2:]
        decay, beta = decay_and_beta(attrs, more)
        x = wide(state).astype(np.result_type(wide(state), wide(q)))
        y = np.empty((b, s, g, h // g, e), x.dtype)
        scale = np.asarray(attrs.scale, x.dtype)

        def read(t: int) -> None:
            y[:, t] = (q[:, t].astype(x.dtype).reshape(b, g, h // g, d) @ x) * scale

        for t in range(s):
            key, value = k[:, t].astype(x.dtype), v[:, t].astype(x.dtype)
            if attrs.before:
                read(t)
            if decay is not None:
                a = decay[:, t].astype(x.dtype)
                a = np.exp(a) if attrs.log else a
                x = x * a.reshape(b, g, d if a.ndim == 3 else 1, 1)
            if beta is not None:
                value = (value - (key[:, :, None] @ x)[:, :, 0]) * beta[:, t].astype(x.dtype)[..., None]
            x = x + key[..., None] * value[:, :, None]
            if not attrs.before:
                read(t)
        return y.reshape(b, s, h, e).astype(q.dtype), x.astype(state.dtype)

    def multiply_adds(
        self, attrs: LinearAttentionAttrs, q: TensorType, k: TensorType, v: TensorType, state: TensorType, *more: TensorType
    ) -> DimLike:
        """Reading, and what the delta rule reads before it writes."""
        n, s, h, d = q.shape
        return n * s * d * v.shape[3] * (h + k.shape[2] * attrs.delta)

    def pause(self, b: Builder, attrs: LinearAttentionAttrs, operands: Sequence[Value], real: Value) -> list[Value]:
        """Tokens that are not there write nothing and decay nothing."""
        kept = list(operands)
        column = b.reshape(real, shape=(*real.shape, 1))

        def clear(i: int, number: float) -> None:
            x = kept[i]
            kept[i] = b.select(real if len(x.shape) == 3 else column, x, b.constant(number, x.tensor.dtype))

        clear(1, 0.0)
        clear(2, 0.0)
        if attrs.gated:
            clear(4, 0.0 if attrs.log else 1.0)
        if attrs.delta:
            clear(len(kept) - 1, 0.0)
        return kept

    def decompose(
        self, b: Builder, attrs: LinearAttentionAttrs, q: Value, k: Value, v: Value, state: Value, *more: Value
    ) -> tuple[Value, Value]:
        """A scan over blocks of tokens; of decays for each feature over tokens, and of one token its turn."""
        return _wide(b, attrs, (q, k, v, state, *more), blocks=not attrs.gated or len(more[0].shape) == 3)

    def turns(
        self, b: Builder, attrs: LinearAttentionAttrs, q: Value, k: Value, v: Value, state: Value, *more: Value
    ) -> tuple[Value, Value]:
        """The same as a scan over the tokens, as it is defined."""
        return _wide(b, attrs, (q, k, v, state, *more), blocks=False)

    def samples(self) -> Iterable[Sample]:
        q, k, v, state = wave(2, 5, 4, 3), wave(2, 5, 2, 3, step=0.7), wave(2, 5, 2, 6, step=0.9), wave(2, 2, 3, 6, step=1.3)
        decay, each, beta = -np.abs(wave(2, 5, 2, step=0.5)), -np.abs(wave(2, 5, 2, 3, step=0.5)), np.abs(wave(2, 5, 2))
        yield Sample([q, k, v, state], {"rule": "linear", "scale": 0.5})
        yield Sample([q, k, v, state, decay], {"rule": "gated"})
        yield Sample([q, k, v, state, each], {"rule": "gated", "before": True})
        yield Sample([q, k, v, state, -each], {"rule": "gated", "log": False})
        yield Sample([q, k, v, state, beta], {"rule": "delta"})
        yield Sample([q[:, :1], k[:, :1], v[:, :1], state, decay[:, :1], beta[:, :1]], {"rule": "gated_delta"})
        yield Sample([q, k, v, state, each, beta], {"rule": "gated_delta", "scale": 0.5})
        yield Sample([q[:, :0], k[:, :0], v[:, :0], state], {"rule": "linear"}, grad=(3,))
        yield Sample([q[:0], k[:0], v[:0], state[:0], each[:0]], {"rule": "gated"}, grad=())

    def errors(self) -> Iterable[ErrorSample]:
        ok = ["f32[b, s, 4, 8]", "f32[b, s, 2, 8]", "f32[b, s, 2, 6]", "f32[b, 2, 8, 6]"]
        linear = {"rule": "linear"}
        yield ErrorSample(ok, {"rule": "gate"}, "rule='gate' is not one of linear")
        yield ErrorSample(ok, {"rule": "gated_delta"}, "has decay and beta after the state, not 0 more")
        yield ErrorSample([*ok, "f32[b, s, 2]"], linear, "has no operand after the state, not 1 more")
        yield ErrorSample(["f32[b, s, 3, 8]", *ok[1:]], linear, "3 query heads do not divide among 2")
        yield ErrorSample([*["f32[b, s, 0, 8]"] * 3, "f32[b, 0, 8, 8]"], linear, "0 query heads do not divide among 0")
        yield ErrorSample(["f16[b, s, 4, 8]", *ok[1:]], linear, "cast one of them")
        yield ErrorSample(["f32[b, 4, 8]", *ok[1:]], linear, "must be [batch, position")
        yield ErrorSample([*ok[:3], "f32[b, 8, 6]"], linear, "the state must be")
        yield ErrorSample([*ok[:3], "f32[b, 2, 6, 8]"], linear, "key features of the state")
        yield ErrorSample([*ok[:2], "f32[b, s, 4, 6]", ok[3]], linear, "heads of k and v")
        yield ErrorSample(["f32[b, s, 4, 6]", *ok[1:]], linear, "features of q and k")
        yield ErrorSample(["f32[b, 3, 4, 8]", "f32[b, 4, 2, 8]", "f32[b, 4, 2, 6]", ok[3]], linear, "positions of k and q")
        yield ErrorSample([*ok, "f32[b, s]"], {"rule": "gated"}, "decay must be [batch, position, head] or")
        yield ErrorSample([*ok, "f32[b, s, 2, 6]"], {"rule": "gated"}, "key features of decay and k")
        yield ErrorSample([*ok, "f32[b, s, 2, 8]"], {"rule": "delta"}, "beta must be [batch, position, head], not")
        yield ErrorSample([*ok, "f16[b, s, 2]"], {"rule": "delta"}, "beta must be f32 or f32")


def _wide(b: Builder, attrs: LinearAttentionAttrs, operands: Sequence[Value], blocks: bool) -> tuple[Value, Value]:
    """Computed in f32 or wider: by blocks of tokens, or token by token."""
    q, k, v, state, *more = operands
    n, s, h, d = q.shape
    g, e = v.shape[2:]
    wanted = max((x.tensor.dtype for x in (q, state)), key=lambda t: t.bits)
    dtype = wanted if wanted.bits >= 32 else DType.F32
    given = [x if x.tensor.dtype is dtype else b.cast(x, dtype=dtype) for x in (q, k, v, *more)]
    start = state if state.tensor.dtype is dtype else b.cast(state, dtype=dtype)
    single = equal(s, 1) is True
    if blocks and not single:
        decay, beta = decay_and_beta(attrs, given[3:])
        last, y = by_blocks(b, attrs, start, given[0], given[1], given[2], decay, beta)
    else:
        shapes: list[tuple[DimLike, ...]] = [(n, g, h // g, d), (n, g, d, 1), (n, g, 1, e)]
        shapes += [(n, g, 1, 1) if len(x.shape) == 3 else (n, g, d, 1) for x in more]
        body = _turn(attrs, TensorType(dtype, (n, g, d, e)), [TensorType(dtype, shape) for shape in shapes])
        if single:
            last, row = b.inline(body, [start, *(b.reshape(x, shape=shape) for x, shape in zip(given, shapes))])
            y = b.reshape(row, shape=(n, s, h, e))
        else:
            turns = [
                b.reshape(b.transpose(x, perm=(1, 0, *range(2, len(x.shape)))), shape=(s, *shape))
                for x, shape in zip(given, shapes)
            ]
            last, rows = b.scan(start, *turns, body=Body(body), carries=1, slices=len(turns))
            y = b.transpose(b.reshape(rows, shape=(s, n, h, e)), perm=(1, 0, 2, 3))
    y = y if q.tensor.dtype is dtype else b.cast(y, dtype=q.tensor.dtype)
    return y, last if state.tensor.dtype is dtype else b.cast(last, dtype=state.tensor.dtype)


def _turn(attrs: LinearAttentionAttrs, state: TensorType, given: Sequence[TensorType]) -> Any:
    """What one token does: of the state [b, g, d, e], q [b, g, h/g, d], k [b, g, d, 1], v [b, g, 1, e], decay [b, g, 1 | d, 1]
    and beta [b, g, 1, 1], to the state and y [b, g, h/g, e]."""
    from ..builder import Builder
    from ..graph import Graph

    graph = Graph("turn")
    b = Builder(graph)
    x = graph.add_input("state", state)
    names = ["q", "k", "v", *["decay"] * attrs.gated, *["beta"] * attrs.delta]
    q, k, v, *more = (graph.add_input(name, t) for name, t in zip(names, given))
    decay, beta = decay_and_beta(attrs, more)

    def read() -> Value:
        y = b.matmul(q, x)
        return y if attrs.scale == 1 else b.mul(y, attrs.scale)

    y = read() if attrs.before else None
    if decay is not None:
        x = b.mul(x, b.exp(decay) if attrs.log else decay)
    if beta is not None:
        v = b.mul(b.sub(v, b.matmul(b.transpose(k, perm=(0, 1, 3, 2)), x)), beta)
    x = b.add(x, b.mul(k, v))
    y = read() if y is None else y
    graph.set_outputs([x, y], ["state", "y"])
    return graph


__all__ = ["RULES", "LinearAttention", "LinearAttentionAttrs", "decay_and_beta"]
