"""The formats of quantized checkpoints: GPTQ, AWQ, compressed-tensors, FP8 and gpt-oss's MXFP4.

Sources: the packers and kernels of GPTQModel 7.7 (and AutoGPTQ before it), AutoAWQ 0.2.9, compressed-tensors 0.20,
DeepSeek's conversion of FP8, and ``convert_moe_packed_tensors`` of transformers 5.23; an element is (code - zero point) * scale
in all but the last, which is OCP Microscaling's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from wasat.ir import BlockArray, CheckpointError, DType, QArray, QTensorType, TensorType

from ..models import Fields
from ..models.layout import Laid
from .packed import FLOATS8, Dense, Integers, Tensors, blocks, order_of, scaled_blocks, signed, unpack, unpack_padded
from .safetensors import STORED, Stored

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight columns each nibble of a word holds."""


@dataclass(frozen=True)
class Found:
    """A module's weight: its source, and the order of the steps of k that it has them in (None: their own)."""

    source: Integers | Dense
    order: np.ndarray | None = None
    why: str | None = None
    """Why it is dense."""


class Method:
    """A format, as its configuration describes it."""

    marks: ClassVar[tuple[str, ...]]
    """Last parts of names that tell a quantized module from another."""

    def __init__(self, f: Fields) -> None:
        raise NotImplementedError

    def read(self, t: Tensors) -> Found:
        """The weight of the module whose tensors ``t`` has. Raises CheckpointError for what does not fit."""
        raise NotImplementedError

    def read_parts(
        self, laid: Mapping[str, Laid], wanted: Mapping[str, TensorType], found: Mapping[str, Stored]
    ) -> tuple[dict[str, Integers], set[str], list[str]]:
        """Parameters that are parts of tensors, which tensors were read for them, and what does not fit."""
        return {}, set(), []


def _finite(t: Tensors, scales: Stored) -> np.ndarray:
    """Scales, which a file that holds NaN or infinities has damaged."""
    x = scales.load()
    if not np.isfinite(x.astype(np.float32)).all():
        part = scales.name.rpartition(".")[2]
        raise t.fail(f"{part} holds NaN or infinities: the file is damaged, or was made of weights that were")
    return x


def _integers(
    t: Tensors, bits: int, group: int, scales: Stored, zeros: Callable[[], np.ndarray] | None, values: Callable[[], np.ndarray],
    scales_of: Callable[[np.ndarray], np.ndarray], order: np.ndarray | None = None,
) -> Integers:  # fmt: skip
    """A weight of ``values`` i8 [n, k], their steps put into ``order``, and ``zeros`` i8 [n, blocks]."""
    type = QTensorType("int4" if bits <= 4 else "int8", t.shape, group, scales.dtype, zeros is not None)

    def read() -> QArray:
        x = values()
        if order is not None:
            x = x[:, order]
        s = np.ascontiguousarray(np.broadcast_to(scales_of(_finite(t, scales)), (t.shape[0], blocks(t.shape[1], group))))
        return QArray(type, np.ascontiguousarray(x), s, None if zeros is None else np.ascontiguousarray(zeros()))

    return Integers(type, read)


def _irregular(t: Tensors, weight: Integers, g: np.ndarray) -> Found:
    """A weight whose groups are of different sizes, which no block is: in f32. Its ``order`` was not applied."""

    def read() -> np.ndarray:
        q = weight.load()
        x = q.values.astype(np.float32) - (0 if q.zeros is None else q.zeros.astype(np.float32)[:, g])
        scaled: np.ndarray = x * q.scales.astype(np.float32)[:, g]
        return scaled

    return Found(Dense(TensorType(DType.F32, t.shape), read), None, "its groups are of different sizes")


def _ordered(t: Tensors, part: str, groups: int, group: int, make: Callable[[np.ndarray | None], Integers]) -> Found:
    """``make(order)``, the order being read from ``part`` where that is there."""
    if not t.has(part):
        return Found(make(None))
    order, regular = order_of(t, part, groups, group)
    if regular:
        return Found(make(order), order)
    return _irregular(t, make(None), t.found[part].load().astype(np.int64))


# -- GPTQ ---------------------------------------------------------------------------------------------------------------------
class Gptq(Method):
    """qweight i32 [k * bits / 32, n] packed along k, qzeros i32 [groups, n * bits / 32] along n, scales [groups, n], g_idx [k].

    Zero points of format ``gptq`` are stored less one; one is added to the fields before they are taken apart, with what that
    carries, as GPTQModel does.
    """

    marks = ("qweight",)

    def __init__(self, f: Fields) -> None:
        self.bits, self.group = f.take("bits", int), f.take("group_size", int, -1)
        self.symmetric = f.flag("sym", True)
        form = f.take("checkpoint_format", str, None) or f.take("format", str, None) or "gptq"
        if form not in ("gptq", "gptq_v2"):
            raise f.fail(f"checkpoint_format {form!r} is not read; gptq and gptq_v2 are")
        self.less_one = form == "gptq"
        f.refuse("is_marlin_format", False, "weights in the order of a kernel are not read; save the model as gptq")
        f.refuse("pack_dtype", "int32", "only words of 32 bits are read")
        f.refuse("rotation", None, "rotated weights are not read")
        f.refuse("adapter", None, "adapters are not read; merge it into the model")
        self.dynamic: dict[str, Any] = f.take("dynamic", dict, None) or {}
        for pattern, change in self.dynamic.items():
            try:
                re.compile(pattern[2:] if pattern[:2] in ("+:", "-:") else pattern)
            except re.error as e:
                raise f.fail(f"dynamic has {pattern!r}, which is no pattern: {e}") from None
            if not isinstance(change, dict):
                raise f.fail(f"dynamic.{pattern} is {change!r}; expected options of the modules that it matches")
        self._check(f.fail, self.bits, self.group)

    @staticmethod
    def _check(fail: Callable[[str], Exception], bits: object, group: object) -> None:
        if type(bits) is not int or bits not in (2, 3, 4, 8):
            raise fail(f"bits is {bits!r}; 2, 3, 4 and 8 are read")
        if type(group) is not int or not (group == -1 or group > 0):
            raise fail(f"group_size is {group!r}; expected -1 or a positive number")

    def _options(self, t: Tensors) -> tuple[int, int, bool]:
        found: Mapping[str, Any] = {}
        for pattern, change in self.dynamic.items():
            if not pattern.startswith("-:") and re.match(pattern.removeprefix("+:"), t.module):
                found = change
                break
        bits, group = found.get("bits", self.bits), found.get("group_size", self.group)
        self._check(t.fail, bits, group)
        return bits, min(group, t.shape[1]) if group != -1 else t.shape[1], found.get("sym", self.symmetric) is True

    def read(self, t: Tensors) -> Found:
        n, k = t.shape
        bits, group, symmetric = self._options(t)
        if k * bits % 32:
            raise t.fail(f"{k} weights of {bits} bits a row do not fill words of 32 bits")
        groups = blocks(k, group)
        q = t.take("qweight", (DType.I32,), (k * bits // 32, n))
        z = t.take("qzeros", (DType.I32,), (groups, blocks(n * bits, 32)))
        scales = t.take("scales", STORED, (groups, n))

        def zeros() -> np.ndarray:
            words = np.asarray(z.load())
            if self.less_one and 32 % bits == 0:
                words = (words.view(np.uint32) + np.uint32(sum(1 << i for i in range(0, 32, bits)))).view(np.int32)
            found = unpack(words, bits, n)
            if self.less_one and 32 % bits:
                found = (found + 1) & ((1 << bits) - 1)
            return signed(found, bits).T

        own = zeros if not symmetric or zeros().any() else None

        def values() -> np.ndarray:
            return signed(unpack(q.load().T, bits, k), bits)

        def make(order: np.ndarray | None) -> Integers:
            return _integers(t, bits, group, scales, own, values, np.transpose, order)

        return _ordered(t, "g_idx", groups, group, make)


# -- AWQ ----------------------------------------------------------------------------------------------------------------------
class Awq(Method):
    """qweight i32 [k, n / 8], qzeros i32 [groups, n / 8], scales [groups, n]: nibbles along n, in an order of their own."""

    marks = ("qweight",)

    def __init__(self, f: Fields) -> None:
        self.group = f.take("group_size", int, 128)
        bits = f.take("bits", int, None) or f.take("w_bit", int, 4)
        version = (f.take("version", str, None) or f.take("format", str, None) or "gemm").lower()
        if bits != 4 or version != "gemm":
            raise f.fail(f"AWQ of {bits} bits in the order {version!r} is not read; 4 bits in the order 'gemm' are")
        if not (self.group == -1 or self.group > 0):
            raise f.fail(f"group_size is {self.group}; expected -1 or a positive number")
        f.refuse("backend", "autoawq", "only files that autoawq packed are read")
        self.zeros = f.flag("zero_point", True)

    def read(self, t: Tensors) -> Found:
        n, k = t.shape
        group = min(self.group, k) if self.group != -1 else k
        if n % 8:
            raise t.fail(f"{n} rows do not fill words of 8")
        q = t.take("qweight", (DType.I32,), (k, n // 8))
        scales = t.take("scales", STORED, (blocks(k, group), n))
        z = t.take("qzeros", (DType.I32,), (blocks(k, group), n // 8)) if t.has("qzeros") or self.zeros else None

        def columns(words: np.ndarray) -> np.ndarray:
            codes = unpack(words, 4, n).reshape(len(words), n // 8, 8)
            out = np.empty_like(codes)
            out[..., _AWQ_ORDER] = codes
            return signed(out.reshape(len(words), n), 4).T

        zeros = None if z is None else lambda: columns(z.load())
        return Found(_integers(t, 4, group, scales, zeros, lambda: columns(q.load()), np.transpose))


# -- compressed-tensors -------------------------------------------------------------------------------------------------------
_READ = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "dense", "mixed-precision")
_UNUSED = ("input_scale", "input_zero_point", "output_scale", "output_zero_point", "input_global_scale")
"""What rounds activations: rows are quantized as they come instead (or not at all)."""


@dataclass(frozen=True)
class _Group:
    """What a group of the configuration says of weights."""

    targets: tuple[str, ...]
    bits: int
    kind: str
    strategy: str
    group: int
    structure: tuple[int, int] | None

    def matches(self, module: str) -> int:
        """How closely a target names a module: by its name (3), a pattern (2), its kind (1), not at all (0)."""
        kind = "Embedding" if module.endswith("embed_tokens") else "Linear"
        found = [0]
        for x in self.targets:
            if x.startswith("re:"):
                found.append(2 if re.match(x[3:], module) else 0)
            else:
                found.append(3 if x == module else x == kind)
        return max(found)


class CompressedTensors(Method):
    """``weight_packed`` i32 [n, k * bits / 32] packed along k, or ``weight`` of i8 or f8; ``weight_scale`` of a tensor, of rows
    [n, 1], of groups [n, k / group] or of blocks; ``weight_zero_point``, packed along n where weights are; ``weight_g_idx``."""

    marks = ("weight_packed", "weight_scale")

    def __init__(self, f: Fields) -> None:
        form = f.take("format", str, "pack-quantized")
        self._check(f, form)
        f.refuse("transform_config", {}, "transforms of activations are not implemented")
        sparsity = f.take("sparsity_config", dict, None) or {}
        if sparsity.get("format", "dense") != "dense":
            raise f.fail(f"sparsity_config.format {sparsity['format']!r} is not read; save the model dense")
        groups = f.take("config_groups", dict)
        self.groups = [self._group(f, f"config_groups.{name}", g) for name, g in groups.items()]

    @staticmethod
    def _check(f: Fields, form: object) -> None:
        if form not in _READ:
            raise f.fail(f"format {form!r} of compressed-tensors is not read; {', '.join(_READ)} are")

    def _group(self, f: Fields, name: str, given: object) -> _Group:
        if not isinstance(given, dict):
            raise f.fail(f"{name} is {given!r}; expected an object")
        g = Fields(given, f"{f.where}: {name}")
        self._check(g, g.take("format", str, None) or "dense")
        targets = g.take("targets", list)
        if not all(isinstance(x, str) for x in targets):
            raise g.fail("targets are names")
        for x in targets:
            try:
                re.compile(x.removeprefix("re:"))
            except re.error as e:
                raise g.fail(f"target {x!r} is no pattern: {e}") from None
        w = Fields(g.take("weights", dict), f"{g.where}.weights")
        bits, kind = w.take("num_bits", int, 8), w.take("type", str, "int")
        size, structure = w.take("group_size", int, None), w.take("block_structure", list, None)
        strategy = w.take("strategy", str, None) or ("tensor" if size is None else "group" if size > 0 else "channel")
        if kind not in ("int", "float") or not 1 <= bits <= 8 or (kind == "float" and bits != 8):
            raise w.fail(f"weights of type {kind} and {bits} bits are not read; integers of 1 to 8 bits and floats of 8 are")
        if strategy not in ("tensor", "channel", "group", "block"):
            raise w.fail(f"strategy {strategy!r} is not read; tensor, channel, group and block are")
        if strategy == "group" and (size is None or size < 1):
            raise w.fail(f"group_size is {size}; expected a positive number")
        if strategy == "block" and not (
            structure is not None and len(structure) == 2 and all(type(x) is int and x > 0 for x in structure)
        ):
            raise w.fail(f"block_structure is {structure}; expected two positive numbers")
        pair = (structure[0], structure[1]) if strategy == "block" and structure is not None else None
        return _Group(tuple(targets), bits, kind, strategy, size or 0, pair)

    def read(self, t: Tensors) -> Found:
        g = max(self.groups, key=lambda g: g.matches(t.module), default=None)
        if g is None or not g.matches(t.module):
            raise t.fail("it is quantized, and no group of config_groups has it among its targets")
        n, k = t.shape
        group = {"group": g.group, "block": g.structure[1] if g.structure else k}.get(g.strategy, k)
        rows = min(n, {"tensor": n, "block": g.structure[0] if g.structure else 1}.get(g.strategy, 1))
        group = min(group, k)
        lead = (blocks(n, rows), blocks(k, group))
        shapes = [lead, *([(1,), ()] if lead == (1, 1) else []), *([(n,)] if lead == (n, 1) else [])]
        scales = t.take("weight_scale", STORED, *shapes)
        t.drop(*_UNUSED)

        def spread(x: np.ndarray) -> np.ndarray:
            return np.repeat(x.reshape(lead), rows, 0)[:n]

        packed = t.has("weight_packed")
        if g.kind == "float":
            if packed:
                raise t.fail("weight_packed is there, and the configuration says floats")
            w = t.take("weight", FLOATS8, (n, k))
            if t.has("weight_zero_point"):
                zero = t.take("weight_zero_point", (*FLOATS8, *STORED, DType.I8))
                if np.asarray(zero.load()).astype(np.float32).any():
                    raise t.fail("weight_zero_point of floats is not 0")
            return _floats(t, w, scales, lead, rows, group)
        if packed:
            words = (blocks(k * g.bits, 32), blocks(k, 32 // g.bits))
            w = t.take("weight_packed", (DType.I32,), (n, words[0]), (n, words[1]))
            if t.has("weight_shape"):
                shape = tuple(int(x) for x in t.take("weight_shape", (DType.I64, DType.I32), (2,)).load())
                if shape != (n, k):
                    raise t.fail(f"weight_shape says {list(shape)}, the configuration asks for {[n, k]}")
            fields = unpack if w.shape[1] == words[0] else unpack_padded

            def values() -> np.ndarray:
                return signed(fields(w.load(), g.bits, k), g.bits)
        else:
            w, fields = t.take("weight", (DType.I8,), (n, k)), None

            def values() -> np.ndarray:
                x = np.asarray(w.load())
                if g.bits <= 4 and x.size and (x.min() < -8 or x.max() > 7):
                    raise t.fail(f"weight holds {x.min()} to {x.max()}, which are no integers of {g.bits} bits")
                return x

        zeros = self._zeros(t, g, lead, fields, spread)
        return _ordered(
            t, "weight_g_idx", lead[1], group,
            lambda order: _integers(t, g.bits, group, scales, zeros, values, spread, order),
        )  # fmt: skip

    @staticmethod
    def _zeros(
        t: Tensors, g: _Group, lead: tuple[int, int], fields: Callable[[np.ndarray, int, int], np.ndarray] | None,
        spread: Callable[[np.ndarray], np.ndarray],
    ) -> Callable[[], np.ndarray] | None:  # fmt: skip
        """Zero points i8 [n, blocks], where any is not 0; ``fields`` takes words apart, if weights are packed."""
        if not t.has("weight_zero_point"):
            return None
        short = [(1,), ()] if lead == (1, 1) else [(lead[0],)] if lead[1] == 1 else []
        words = blocks(lead[0] * g.bits, 32) if fields is unpack else blocks(lead[0], 32 // g.bits)
        apart = fields if t.found["weight_zero_point"].dtype is DType.I32 else None
        z = t.take(
            "weight_zero_point", (DType.I8,) if fields is None else (DType.I8, DType.I32),
            *([(words, lead[1])] if apart is not None else [lead, *short]),
        )  # fmt: skip

        def read() -> np.ndarray:
            if apart is None:
                return spread(np.asarray(z.load()))
            return spread(signed(apart(np.asarray(z.load()).T, g.bits, lead[0]), g.bits).T)

        return read if read().any() else None


def _floats(t: Tensors, w: Stored, scales: Stored, lead: tuple[int, int], rows: int, width: int) -> Found:
    """Floats of 8 bits, ``rows`` by ``width`` of them times a scale."""

    def read() -> np.ndarray:
        return scaled_blocks(w.load(), _finite(t, scales).reshape(lead), rows, width)

    return Found(Dense(TensorType(DType.F32, t.shape), read), None, _FP8)


# -- FP8 ----------------------------------------------------------------------------------------------------------------------
_FP8 = "it is stored in f8, of which there are no products: it becomes f32; --quantize stores it in fewer bits"


class Fp8(Method):
    """``weight`` f8 [n, k] times ``weight_scale_inv`` (or ``weight_scale``) of a tensor, of rows, or of blocks."""

    marks = ("weight_scale_inv", "weight_scale")

    def __init__(self, f: Fields) -> None:
        size = f.take("weight_block_size", list, None)
        if size is not None and not (len(size) == 2 and all(type(x) is int and x > 0 for x in size)):
            raise f.fail(f"weight_block_size is {size}; expected two positive numbers")
        self.size = None if size is None else (size[0], size[1])

    def read(self, t: Tensors) -> Found:
        n, k = t.shape
        rows, width = self.size or ((1, k) if any(t.has(p) and n in t.found[p].shape[:1] for p in self.marks) else (n, k))
        rows, width = min(rows, n), min(width, k)
        lead = (blocks(n, rows), blocks(k, width))
        shapes = [lead, *([(1,), ()] if lead == (1, 1) else []), *([(n,)] if lead == (n, 1) else [])]
        w = t.take("weight", FLOATS8, (n, k))
        scales = t.take(self.marks[0] if t.has(self.marks[0]) else self.marks[1], STORED, *shapes)
        t.drop("input_scale", "activation_scale", "input_scale_ub")
        return _floats(t, w, scales, lead, rows, width)


# -- MXFP4 --------------------------------------------------------------------------------------------------------------------
class Mxfp4(Method):
    """gpt-oss's experts: ``NAME_blocks`` u8 [e, n, k / 32, 16], of each byte the lower half before the upper, and
    ``NAME_scales`` u8 [e, n, k / 32], powers of two. Ours (GGUF's) has the first 16 of 32 numbers in the lower halves."""

    marks = ()

    def __init__(self, f: Fields) -> None:
        """Which modules are quantized, their tensors say."""

    def read_parts(
        self, laid: Mapping[str, Laid], wanted: Mapping[str, TensorType], found: Mapping[str, Stored]
    ) -> tuple[dict[str, Integers], set[str], list[str]]:
        sources: dict[str, Integers] = {}
        used, problems = set[str](), []
        for name, to in laid.items():
            outer, _, last = to.name.rpartition(".")
            tensors = {part: found[f"{to.name}_{part}"] for part in ("blocks", "scales") if f"{to.name}_{part}" in found}
            if not tensors:
                continue
            e, n, k = wanted[name].concrete({})
            t = Tensors(f"{outer}.{last}", tensors, (n, k))
            try:
                if k % 32:
                    raise t.fail(f"{k} weights a row do not fill blocks of 32")
                blocks = t.take("blocks", (DType.U8,), (e, n * to.step, k // 32, 16))
                scales = t.take("scales", (DType.U8,), (e, n * to.step, k // 32))
            except CheckpointError as why:
                if str(why) not in problems:
                    problems.append(str(why))
                continue
            used |= {f"{to.name}_{part}" for part in t.used}
            sources[name] = _powers(QTensorType("mxfp4", (e, n, k)), blocks, scales, slice(to.start, None, to.step))
        return sources, used, problems


def _powers(type: QTensorType, blocks: Stored, scales: Stored, rows: slice) -> Integers:
    def load() -> QArray:
        given, powers = blocks.load()[:, rows], scales.load()[:, rows]
        codes = np.stack([given & 15, given >> 4], -1).reshape(*given.shape[:-1], 32)
        return BlockArray(type, np.concatenate([powers[..., None], codes[..., :16] | codes[..., 16:] << 4], -1))

    return Integers(type, load)


METHODS: dict[str, type[Method]] = {
    "gptq": Gptq, "awq": Awq, "compressed-tensors": CompressedTensors, "fp8": Fp8, "fbgemm_fp8": Fp8, "mxfp4": Mxfp4,
}  # fmt: skip
