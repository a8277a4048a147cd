"""The physical form of key and value caches, and writing to them.

Keys are kept in groups of 16 positions, transposed: ``[b, g, c / 16, d, 16]`` under the shape ``[b, g, c, d]``, so that
scores of 16 positions are plain vector arithmetic. Values are row-major, ``[b, g, c, d rounded up to 16]``.
Position p is in slot p of a full cache and in slot p mod c of a ring. Nothing is read from slots never written.

Quantized caches are bytes: a group of 16 positions is its codes, followed by 16 scales in bf16 (two bytes more per position in
the shape). Two codes of four bits share a byte, the first one low: features 2i and 2i + 1 of a key, elements j and
j + half of a value, whose width is rounded up to 32. Rows of ``int4`` are turned first
(:class:`wasat.ir.ops.rounding.Hadamard`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from tvm import tirx
from wasat.ir import DType, QTensorType
from wasat.ir.ops.quant import quantize_array
from wasat.ir.ops.rounding import hadamard, hadamard_block

from .emit import Buffer, Expr, Index, Kernel, f32_to_f16, floor_div, floor_mod, int64, load, symbol
from .isa import Isa
from .norm import for_vectors
from .pack import padded
from .rounding import quantized_row, store_scale, turn

GROUP = 16
CacheType = Literal["float32", "float16", "int8", "int4"]
_SCALE = 2
"""Bytes of a scale."""


def element(dtype: CacheType) -> str:
    """The element type of a cache tensor."""
    return "int8" if dtype == "int4" else dtype


def is_quantized(dtype: CacheType) -> bool:
    """Whether positions have codes and a scale."""
    return dtype in ("int8", "int4")


def cache_shape(kind: Literal["k", "v"], batch: Index, kv_heads: int, capacity: Index, head_dim: int,
                dtype: CacheType = "float32") -> tuple[Index, int, Index, int]:
    """Shape of a cache tensor; ``capacity`` in positions, a multiple of 16."""
    if isinstance(capacity, int) and capacity % GROUP:
        raise ValueError(f"the capacity of a cache must be a multiple of {GROUP}, not {capacity}")
    if dtype == "int4" and kind == "k" and head_dim % 2:
        raise ValueError(f"keys of {head_dim} features do not come in pairs")
    width = head_dim if kind == "k" else value_width(head_dim, dtype)
    return batch, kv_heads, capacity, _codes(width, dtype) + _SCALE if is_quantized(dtype) else width


def value_width(value_dim: int, dtype: CacheType) -> int:
    """Elements of a value's row, padding included."""
    return padded(value_dim, 2 * GROUP if dtype == "int4" else GROUP)


def _codes(width: int, dtype: CacheType) -> int:
    """Bytes of the codes of a row."""
    return width // 2 if dtype == "int4" else width


def pack_cache(kind: Literal["k", "v"], x: NDArray[np.float32], dtype: CacheType = "float32") -> NDArray[np.generic]:
    """A cache [b, c, g, d], c a multiple of 16, in its physical form."""
    b, c, g, d = x.shape
    heads = x.transpose(0, 2, 1, 3)
    if is_quantized(dtype):
        return _pack_codes(kind, heads, dtype)
    heads = heads.astype(dtype)
    if kind == "k":
        return np.ascontiguousarray(heads.reshape(b, g, c // GROUP, GROUP, d).swapaxes(3, 4)).reshape(b, g, c, d)
    return np.pad(heads, ((0, 0), (0, 0), (0, 0), (0, padded(d, GROUP) - d)))


def _pack_codes(kind: Literal["k", "v"], x: NDArray[np.float32], dtype: CacheType) -> NDArray[np.int8]:
    b, g, c, d = x.shape
    finite = np.asarray(np.isfinite(x).all(-1))
    x = np.where(finite[..., None], x, 0)
    if dtype == "int4":
        x = hadamard(x, hadamard_block(d))
    q = quantize_array(x, QTensorType(dtype, x.shape, d, DType.BF16))
    scales = np.where(finite, q.scales[..., 0].view(np.uint16), np.uint16(0x7FC0))
    width = d if kind == "k" else value_width(d, dtype)
    codes = np.zeros((b, g, c // GROUP, GROUP, width), np.int8)
    codes[..., :d] = q.values.reshape(b, g, c // GROUP, GROUP, d)
    if dtype == "int4":
        low, high = (codes[..., ::2], codes[..., 1::2]) if kind == "k" else np.split(codes, 2, axis=-1)
        codes = (low & 15) | (high << 4)
    codes = codes.swapaxes(3, 4) if kind == "k" else codes
    parts = codes.reshape(b, g, c // GROUP, -1), scales.reshape(b, g, c // GROUP, GROUP).view(np.int8)
    return np.concatenate(parts, axis=-1).reshape(b, g, c, -1)


def unpack_cache(kind: Literal["k", "v"], x: NDArray[np.generic], head_dim: int,
                 dtype: CacheType = "float32") -> NDArray[np.floating]:
    """The cache [b, c, g, d] of which ``x`` is the physical form."""
    b, g, c, _ = x.shape
    if is_quantized(dtype):
        x = _unpack_codes(kind, x.astype(np.int8, copy=False), head_dim, dtype)
    elif kind == "k":
        x = x.reshape(b, g, c // GROUP, head_dim, GROUP).swapaxes(3, 4).reshape(b, g, c, head_dim)
    return np.ascontiguousarray(x[..., :head_dim].transpose(0, 2, 1, 3))


def _unpack_codes(kind: Literal["k", "v"], x: NDArray[np.int8], d: int, dtype: CacheType) -> NDArray[np.float32]:
    b, g, c, _ = x.shape
    width = d if kind == "k" else value_width(d, dtype)
    groups = x.reshape(b, g, c // GROUP, -1)
    codes, raw = groups[..., : -GROUP * _SCALE], np.ascontiguousarray(groups[..., -GROUP * _SCALE :])
    scales = (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    rows = (_codes(width, dtype), GROUP) if kind == "k" else (GROUP, _codes(width, dtype))
    codes = codes.reshape(b, g, c // GROUP, *rows)
    codes = codes.swapaxes(3, 4) if kind == "k" else codes
    if dtype == "int4":
        low, high = (codes << 4) >> 4, codes >> 4
        codes = np.stack([low, high], -1).reshape(*low.shape[:-1], -1) if kind == "k" else np.concatenate([low, high], -1)
    y = codes.reshape(b, g, c, width)[..., :d].astype(np.float32) * scales.reshape(b, g, c, 1)
    return hadamard(y, hadamard_block(d)) if dtype == "int4" else y


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
    def quantized(self) -> bool:
        return is_quantized(self.dtype)

    @property
    def turned(self) -> tuple[int, int]:
        """The blocks in which keys and values are turned; of 1 they are not."""
        return (hadamard_block(self.head_dim), hadamard_block(self.value_dim)) if self.dtype == "int4" else (1, 1)

    @property
    def value_width(self) -> int:
        return value_width(self.value_dim, self.dtype)

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
        return self.desc.value_width

    def slot(self, position: Expr) -> Expr:
        return floor_mod(position, self.capacity) if self.desc.ring else position

    def inside(self, past: Expr, s: Index) -> Expr:
        """``past``; where it or the ``s`` positions from it on are outside the cache, the caller's mistake, one where nothing
        else is read."""
        most = int64(1 << 30) if self.desc.ring else tirx.max(self.capacity - s, int64(0))
        return self.kernel.let(tirx.max(tirx.min(past, most), int64(0)), "past")

    def _group(self, batch: Expr, head: Expr, group: Expr) -> Expr:
        """The number of ``group`` (position // 16) among the groups of all rows and heads."""
        groups = floor_div(self.capacity, GROUP)
        inside = floor_mod(group, groups) if self.desc.ring else tirx.min(group, groups - 1)
        return (batch * self.desc.kv_heads + head) * groups + inside

    @property
    def _key_codes(self) -> int:
        return _codes(self.desc.head_dim, self.desc.dtype)

    @property
    def _value_codes(self) -> int:
        return _codes(self.value_width, self.desc.dtype)

    @property
    def _scale(self) -> int:
        return _SCALE if self.desc.quantized else 0

    def key_group(self, batch: Expr, head: Expr, group: Expr) -> Expr:
        """Where the 16 positions of ``group`` (position // 16) start."""
        return self._group(batch, head, group) * (GROUP * (self._key_codes + self._scale))

    def value_row(self, batch: Expr, head: Expr, position: Expr) -> Expr:
        """Where the value of ``position`` starts."""
        slot, codes = self.slot(position), self._value_codes
        first = (batch * self.desc.kv_heads + head) * self.capacity
        if not self.desc.quantized:
            return (first + slot) * codes
        at = floor_div(first, GROUP) + floor_div(slot, GROUP)
        return at * (GROUP * (codes + self._scale)) + floor_mod(slot, GROUP) * codes

    def key_scales(self, batch: Expr, head: Expr, group: Expr) -> Expr:
        """Where the 16 scales of the keys of ``group`` start."""
        return self.key_group(batch, head, group) + GROUP * self._key_codes

    def value_scales(self, batch: Expr, head: Expr, group: Expr) -> Expr:
        """Where the 16 scales of the values of ``group`` start."""
        return self._group(batch, head, group) * (GROUP * (self._value_codes + self._scale)) + GROUP * self._value_codes

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
            if self.desc.quantized:
                self._write_codes(batch, head, position, key, value)
            else:
                store()

    def _write_codes(self, batch: Expr, head: Expr, position: Expr, key: tuple[Buffer, Expr],
                     value: tuple[Buffer, Expr]) -> None:
        kernel, cache = self.kernel, self.desc
        slot = kernel.let(self.slot(position), "slot")
        group, inside = kernel.let(floor_div(slot, GROUP)), kernel.let(floor_mod(slot, GROUP))
        pairs = cache.dtype == "int4"
        codes, scale = quantized_row(kernel, self.isa, cache.dtype, key, cache.head_dim, cache.head_dim, cache.turned[0])
        base = kernel.let(self.key_group(batch, head, group) + inside)
        with kernel.loop(self._key_codes) as e:
            code = self._pair(load(codes, 2 * e), load(codes, 2 * e + 1)) if pairs else load(codes, e)
            kernel.store(self.keys, base + e * GROUP, tirx.Cast("int8", code))
        store_scale(kernel, self.keys, self.key_scales(batch, head, group) + inside * _SCALE, scale)
        width = self.value_width
        codes, scale = quantized_row(kernel, self.isa, cache.dtype, value, cache.value_dim, width, cache.turned[1])
        base = kernel.let(self.value_row(batch, head, position))
        with kernel.loop(self._value_codes) as e:
            code = self._pair(load(codes, e), load(codes, e + width // 2)) if pairs else load(codes, e)
            kernel.store(self.values, base + e, tirx.Cast("int8", code))
        store_scale(kernel, self.values, self.value_scales(batch, head, group) + inside * _SCALE, scale)

    @staticmethod
    def _pair(low: Expr, high: Expr) -> Expr:
        return (low & tirx.IntImm("int32", 15)) | (high << tirx.IntImm("int32", 4))

    def turn_keys(self, buffer: Buffer, start: Expr) -> None:
        """Turns a query as keys are."""
        turn(self.kernel, self.isa.lanes, buffer, start, self.desc.head_dim, self.desc.turned[0])

    def turn_values(self, buffer: Buffer, start: Expr) -> None:
        """Turns weighted values back."""
        turn(self.kernel, self.isa.lanes, buffer, start, self.desc.value_dim, self.desc.turned[1])


def cache_params(kernel: Kernel, isa: Isa, desc: Cache, batch: Expr) -> CacheView:
    """Declare the parameters keys and values, ``cache_shape`` each."""
    capacity = int64(desc.capacity) if desc.capacity is not None else symbol("c")
    keys = kernel.param("keys", cache_shape("k", batch, desc.kv_heads, capacity, desc.head_dim, desc.dtype),
                        element(desc.dtype))
    values = kernel.param("values", cache_shape("v", batch, desc.kv_heads, capacity, desc.value_dim, desc.dtype),
                          element(desc.dtype))
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
