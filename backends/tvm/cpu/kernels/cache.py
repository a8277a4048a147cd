"""The physical form of key and value caches, and writing to them.

Keys are kept in groups of 16 positions, transposed: ``[b, g, c / 16, d, 16]`` under the shape ``[b, g, c, d]``, so that
scores of 16 positions are plain vector arithmetic. Values are row-major, ``[b, g, c, d rounded up to 16]``.
Position p is in slot p of a full cache and in slot p mod c of a ring. Nothing is read from slots never written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from tvm import tirx

from .emit import Buffer, Expr, Index, Kernel, f32_to_f16, floor_div, floor_mod, int64, load, symbol
from .isa import Isa
from .norm import for_vectors
from .pack import padded

GROUP = 16
CacheType = Literal["float32", "float16"]


def cache_shape(kind: Literal["k", "v"], batch: Index, kv_heads: int, capacity: Index,
                head_dim: int) -> tuple[Index, int, Index, int]:
    """Shape of a cache tensor; ``capacity`` in positions, a multiple of 16."""
    if isinstance(capacity, int) and capacity % GROUP:
        raise ValueError(f"the capacity of a cache must be a multiple of {GROUP}, not {capacity}")
    return batch, kv_heads, capacity, head_dim if kind == "k" else padded(head_dim, GROUP)


def pack_cache(kind: Literal["k", "v"], x: NDArray[np.float32], dtype: CacheType = "float32") -> NDArray[np.floating]:
    """A cache [b, c, g, d], c a multiple of 16, in its physical form."""
    b, c, g, d = x.shape
    heads = x.transpose(0, 2, 1, 3).astype(dtype)
    if kind == "k":
        return np.ascontiguousarray(heads.reshape(b, g, c // GROUP, GROUP, d).swapaxes(3, 4)).reshape(b, g, c, d)
    return np.pad(heads, ((0, 0), (0, 0), (0, 0), (0, padded(d, GROUP) - d)))


def unpack_cache(kind: Literal["k", "v"], x: NDArray[np.floating], head_dim: int) -> NDArray[np.floating]:
    """The cache [b, c, g, d] of which ``x`` is the physical form."""
    b, g, c, _ = x.shape
    if kind == "k":
        x = x.reshape(b, g, c // GROUP, head_dim, GROUP).swapaxes(3, 4).reshape(b, g, c, head_dim)
    return np.ascontiguousarray(x[..., :head_dim].transpose(0, 2, 1, 3))


@dataclass(frozen=True)
class Cache:
    """A pair of caches. ``capacity``: positions of a ring; None: a full cache of symbolic capacity."""

    kv_heads: int
    head_dim: int
    value_dim: int
    capacity: int | None = None
    dtype: CacheType = "float32"

    @property
    def ring(self) -> bool:
        return self.capacity is not None

    @property
    def name(self) -> str:
        kind = f"ring{self.capacity}" if self.ring else "full"
        return f"{kind}_{self.kv_heads}x{self.head_dim}x{self.value_dim}_{self.dtype}"


@dataclass(frozen=True)
class CacheView:
    """The two cache parameters of a kernel under construction, under one index each."""

    desc: Cache
    isa: Isa
    kernel: Kernel
    capacity: Expr
    keys: Buffer
    values: Buffer

    @property
    def value_width(self) -> int:
        return padded(self.desc.value_dim, GROUP)

    def slot(self, position: Expr) -> Expr:
        return floor_mod(position, self.capacity) if self.desc.ring else position

    def inside(self, past: Expr, s: Index) -> Expr:
        """``past``; where it or the ``s`` positions from it on are outside the cache, the caller's mistake, one where nothing
        else is read."""
        most = int64(1 << 30) if self.desc.ring else tirx.max(self.capacity - s, int64(0))
        return self.kernel.let(tirx.max(tirx.min(past, most), int64(0)), "past")

    def key_group(self, batch: Expr, head: Expr, group: Expr) -> Expr:
        """Where the 16 positions of ``group`` (position // 16) start."""
        groups = floor_div(self.capacity, GROUP)
        inside = floor_mod(group, groups) if self.desc.ring else tirx.min(group, groups - 1)
        return ((batch * self.desc.kv_heads + head) * groups + inside) * (GROUP * self.desc.head_dim)

    def value_row(self, batch: Expr, head: Expr, position: Expr) -> Expr:
        """Where the value of ``position`` starts."""
        row = (batch * self.desc.kv_heads + head) * self.capacity + self.slot(position)
        return row * self.value_width

    def _narrow(self, value: Expr) -> Expr:
        return f32_to_f16(value, self.isa.native_f16) if self.desc.dtype == "float16" else value

    def write(self, batch: Expr, head: Expr, position: Expr, key: tuple[Buffer, Expr],
              value: tuple[Buffer, Expr]) -> None:
        """Store one position; ``key`` and ``value`` are flat buffers and where to start in them."""
        kernel, d = self.kernel, self.desc.head_dim

        def store() -> None:
            slot = kernel.let(self.slot(position), "slot")
            base = kernel.let(((batch * self.desc.kv_heads + head) * self.capacity
                               + floor_div(slot, GROUP) * GROUP) * d + floor_mod(slot, GROUP))
            with kernel.loop(d) as e:
                kernel.store(self.keys, base + e * GROUP, self._narrow(load(key[0], key[1] + e)))
            row = kernel.let(self.value_row(batch, head, position))
            for_vectors(kernel, self.desc.value_dim, self.isa.lanes, lambda j, width: kernel.store(
                self.values, row + j, self._narrow(load(value[0], value[1] + j, width))))

        # a position outside the cache is the caller's mistake, but must not write elsewhere
        with kernel.when(position >= 0 if self.desc.ring else tirx.And(position >= 0, position < self.capacity)):
            store()


def cache_params(kernel: Kernel, isa: Isa, desc: Cache, batch: Expr) -> CacheView:
    """Declare the parameters keys and values, ``cache_shape`` each."""
    capacity = int64(desc.capacity) if desc.capacity is not None else symbol("c")
    keys = kernel.param("keys", cache_shape("k", batch, desc.kv_heads, capacity, desc.head_dim), desc.dtype)
    values = kernel.param("values", cache_shape("v", batch, desc.kv_heads, capacity, desc.value_dim), desc.dtype)
    if desc.capacity is not None and desc.capacity % GROUP:
        raise ValueError(f"the capacity of a ring must be a multiple of {GROUP}, not {desc.capacity}")
    return CacheView(desc, isa, kernel, capacity, keys, values)


def flat_view(view: CacheView) -> CacheView:
    """The view with flat buffers; to be called after the last parameter is declared."""
    return CacheView(view.desc, view.isa, view.kernel, view.capacity, view.kernel.flat(view.keys),
                     view.kernel.flat(view.values))


@dataclass(frozen=True)
class CacheWrite:
    """Write k f32[b, s, g, d] and v f32[b, s, g, e] at positions past[b] + 0..s-1.

    ``start``: only in rows where past[b] is 0; ``shared``: k and v are one row, for all.
    """

    isa: Isa
    cache: Cache
    threads: int = 1
    start: bool = False
    shared: bool = False

    @property
    def name(self) -> str:
        return f"cache_{('start_shared' if self.shared else 'start') if self.start else 'write'}_{self.cache.name}"


def cache_write(desc: CacheWrite) -> tirx.PrimFunc:
    """PrimFunc(k, v, past i64[b], keys, values): the caches are written in place."""
    cache = desc.cache
    kernel = Kernel(desc.name)
    b, s = symbol("b"), symbol("s")
    rows = 1 if desc.shared else b
    k = kernel.param("k", (rows, s, cache.kv_heads, cache.head_dim), "float32")
    v = kernel.param("v", (rows, s, cache.kv_heads, cache.value_dim), "float32")
    past = kernel.param("past", (b,), "int64")
    view = flat_view(cache_params(kernel, desc.isa, cache, b))
    k, v = kernel.flat(k), kernel.flat(v)

    def row(at: Expr) -> None:
        batch = kernel.let(floor_div(at, s), "batch")
        held = kernel.let(load(past, batch), "held")
        position = kernel.let(held + floor_mod(at, s), "position")
        source = floor_mod(at, s) if desc.shared else at

        def write() -> None:
            with kernel.loop(cache.kv_heads) as head:
                index = source * cache.kv_heads + head
                view.write(batch, head, position, (k, index * cache.head_dim), (v, index * cache.value_dim))

        if desc.start:
            with kernel.when(held == 0):
                write()
        else:
            write()

    kernel.rows(desc.threads, b * s, cache.kv_heads * (cache.head_dim + cache.value_dim), row)
    return kernel.build()
