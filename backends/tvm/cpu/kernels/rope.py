"""Rotary position embedding, alone and fused with what surrounds it between the qkv projection and attention."""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx

from .cache import Cache, cache_params, flat_view
from .emit import Buffer, Expr, Kernel, cast, floor_div, floor_mod, load, sin_cos, splat, symbol
from .isa import Isa
from .norm import for_vectors, inverse_rms


@dataclass(frozen=True)
class Rotary:
    """How a head of ``head_dim`` is rotated: its first ``dims``, halves convention unless ``interleaved``.

    ``factor`` multiplies cos and sin. ``dims`` = 0 rotates nothing.
    """

    head_dim: int
    dims: int
    factor: float = 1.0
    interleaved: bool = False

    def __post_init__(self) -> None:
        if self.dims % 2 or not 0 <= self.dims <= self.head_dim:
            raise ValueError(f"rotary dims must be even and at most head_dim {self.head_dim}, not {self.dims}")


class _Rotation:
    """Emits the rotation of heads; cos and sin of one position are shared by all its heads."""

    def __init__(self, kernel: Kernel, isa: Isa, desc: Rotary, inv_freq: Buffer | None) -> None:
        self.kernel, self.isa, self.desc, self.inv_freq = kernel, isa, desc, inv_freq
        self.cos: Buffer = None
        self.sin: Buffer = None

    def position(self, position: Expr) -> None:
        """Compute cos and sin of the angles of a position."""
        half = self.desc.dims // 2
        if not half:
            return
        kernel = self.kernel
        self.cos, self.sin = kernel.scratch(half, "float32"), kernel.scratch(half, "float32")
        at = kernel.let(cast("float32", position))

        def angles(j: Expr, width: int) -> None:
            sine, cosine = sin_cos(kernel, kernel.let(splat(at, width) * load(self.inv_freq, j, width)))
            kernel.store(self.cos, j, cosine * splat(self.desc.factor, width))
            kernel.store(self.sin, j, sine * splat(self.desc.factor, width))

        for_vectors(kernel, half, self.isa.lanes, angles)

    def rotate(self, source: Buffer, start: Expr, target: Buffer, to: Expr,
               scale: tuple[Expr, Buffer] | None) -> None:
        """target[to..] = rotation of source[start..], first multiplied by (a scalar and a weight) if given."""
        kernel, desc, lanes = self.kernel, self.desc, self.isa.lanes
        half = desc.dims // 2

        def read(j: Expr, width: int) -> Expr:
            value = load(source, start + j, width)
            return kernel.let(value if scale is None else value * splat(scale[0], width) * load(scale[1], j, width))

        def pair(j: Expr, width: int) -> None:
            first, second = (j * 2, j * 2 + 1) if desc.interleaved else (j, half + j)
            x, y = read(first, width), read(second, width)
            c, s = kernel.let(load(self.cos, j, width)), kernel.let(load(self.sin, j, width))
            kernel.store(target, to + first, x * c - y * s)
            kernel.store(target, to + second, y * c + x * s)

        if half:
            if desc.interleaved:
                with kernel.loop(half) as j:
                    pair(j, 1)
            else:
                for_vectors(kernel, half, lanes, pair)
        for_vectors(kernel, desc.head_dim - desc.dims, lanes, lambda j, width: kernel.store(
            target, to + (desc.dims + j), read(desc.dims + j, width)))


@dataclass(frozen=True)
class Rope:
    """x f32[b, s, heads, d] rotated at positions i64[b, s]; ``norm``: each head is RMS-normalised first."""

    isa: Isa
    heads: int
    rotary: Rotary
    norm: bool = False
    eps: float = 1e-6
    threads: int = 1

    @property
    def name(self) -> str:
        return f"rope_{self.heads}x{self.rotary.head_dim}_{self.rotary.dims}{'_norm' if self.norm else ''}"


def rope(desc: Rope) -> tirx.PrimFunc:
    """PrimFunc(x f32[b, s, h, d], positions i64[b, s], inv_freq f32[dims / 2], [weight f32[d]], y f32[b, s, h, d])."""
    kernel = Kernel(desc.name)
    b, s, d = symbol("b"), symbol("s"), desc.rotary.head_dim
    x = kernel.param("x", (b, s, desc.heads, d), "float32")
    positions = kernel.param("positions", (b, s), "int64")
    inv_freq = kernel.param("inv_freq", (desc.rotary.dims // 2,), "float32")
    weight = kernel.param("weight", (d,), "float32") if desc.norm else None
    y = kernel.param("y", (b, s, desc.heads, d), "float32")
    x, y, positions = kernel.flat(x), kernel.flat(y), kernel.flat(positions)

    def row(at: Expr) -> None:
        rotation = _Rotation(kernel, desc.isa, desc.rotary, inv_freq)
        rotation.position(load(positions, at))
        with kernel.loop(desc.heads) as head:
            start = kernel.let((at * desc.heads + head) * d)
            _rotate_head(rotation, x, start, y, start, weight, desc.eps)

    kernel.rows(desc.threads, b * s, desc.heads * d, row)
    return kernel.build()


def _rotate_head(rotation: _Rotation, source: Buffer, start: Expr, target: Buffer, to: Expr, weight: Buffer | None,
                 eps: float) -> None:
    scale = None
    if weight is not None:
        d, lanes = rotation.desc.head_dim, rotation.isa.lanes
        scale = (inverse_rms(rotation.kernel, source, (), d, lanes, eps, start), weight)
    rotation.rotate(source, start, target, to, scale)


@dataclass(frozen=True)
class QkvToCache:
    """From the merged projection qkv f32[b, s, (h + g) * d + g * e] to q f32[b, s, h, d] and the caches.

    Heads of q and k are RMS-normalised with a weight each (``norm``), rotated at position past[b] + i, and k and v are
    written at that position. The decode-critical glue in one pass.
    """

    isa: Isa
    heads: int
    cache: Cache
    rotary: Rotary
    norm: bool = False
    eps: float = 1e-6
    threads: int = 1

    @property
    def name(self) -> str:
        return f"qkv_to_cache_{self.heads}h_{self.rotary.dims}{'_norm' if self.norm else ''}_{self.cache.name}"


def qkv_to_cache(desc: QkvToCache) -> tirx.PrimFunc:
    """PrimFunc(qkv, past i64[b], [inv_freq f32[dims / 2]], [q_weight f32[d]], [k_weight f32[d]], keys, values,
    q f32[b, s, h, d]): the caches are written in place, q is the output. inv_freq is absent if dims is 0."""
    cache, h, g = desc.cache, desc.heads, desc.cache.kv_heads
    d, e = cache.head_dim, cache.value_dim
    width = (h + g) * d + g * e
    kernel = Kernel(desc.name)
    b, s = symbol("b"), symbol("s")
    qkv = kernel.param("qkv", (b, s, width), "float32")
    past = kernel.param("past", (b,), "int64")
    inv_freq = kernel.param("inv_freq", (desc.rotary.dims // 2,), "float32") if desc.rotary.dims else None
    q_weight = kernel.param("q_weight", (d,), "float32") if desc.norm else None
    k_weight = kernel.param("k_weight", (d,), "float32") if desc.norm else None
    params = cache_params(kernel, desc.isa, cache, b)
    q = kernel.param("q", (b, s, h, d), "float32")
    view = flat_view(params)
    qkv, q = kernel.flat(qkv), kernel.flat(q)

    def row(at: Expr) -> None:
        batch = kernel.let(floor_div(at, s), "batch")
        position = kernel.let(load(past, batch) + floor_mod(at, s), "position")
        rotation = _Rotation(kernel, desc.isa, desc.rotary, inv_freq)
        rotation.position(position)
        key = kernel.scratch(d, "float32")
        base = kernel.let(at * width)
        with kernel.loop(h) as head:
            _rotate_head(rotation, qkv, kernel.let(base + head * d), q, kernel.let((at * h + head) * d), q_weight,
                         desc.eps)
        with kernel.loop(g) as head:
            _rotate_head(rotation, qkv, kernel.let(base + (h + head) * d), key, tirx.IntImm("int64", 0), k_weight,
                         desc.eps)
            view.write(batch, head, position, (key, tirx.IntImm("int64", 0)), (qkv, base + ((h + g) * d + head * e)))

    kernel.rows(desc.threads, b * s, width, row)
    return kernel.build()
