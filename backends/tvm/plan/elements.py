"""Kernels in the element types that a device has: others lie in its memory, and are computed with, as something wider.

Integers of 8 and 16 bits, where a device lacks them, are computed with in 32 and wrapped at their width after each step; those
of 64 are carried in 32. Truth values lie in memory as integers.
"""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
from tvm import ir, tirx
from wasat.ir import IRError

from .device import Device
from .opaque import kind_of
from .wgsl import BITS, HALF, INFINITY, NAMES, NAN

_BINARY = (
    "Add", "Sub", "Mul", "Div", "Mod", "FloorDiv", "FloorMod", "Min", "Max", "EQ", "NE", "LT", "LE", "GT", "GE", "And", "Or",
    "BitwiseAnd", "BitwiseOr", "BitwiseXor", "LShift", "RShift",
)  # fmt: skip
_WRAPS = ("Add", "Sub", "Mul", "LShift")
_SHIFTS = ("LShift", "RShift")
_NARROW = ("int8", "int16", "uint8", "uint16")
_KEEPS = ("tirx.if_then_else", "tirx.reinterpret", "tirx.call_pure_extern")
"""Calls that are no functions of numbers."""
_FLOORED = {"FloorDiv": "Div", "FloorMod": "Mod"}
"""What rounds down, and what is the same of numbers that are not negative, and shorter."""


def as_stored(f: tirx.PrimFunc, device: Device) -> tirx.PrimFunc:
    """A kernel whose arrays lie in memory as the device has them. Raises IRError for element types that it lacks."""
    return _Kernel(device).function(f)


def exact_name(value: float, dtype: str) -> str | None:
    """A name for a number that the seven digits of TVM's literals are too few for; :func:`with_literals` replaces it."""
    bits = {"float32": np.uint32, "float64": np.uint64}.get(dtype)
    if bits is None:
        return None
    with np.errstate(over="ignore"):
        x = np.dtype(dtype).type(value)
    digits = np.dtype(dtype).itemsize * 2
    return f"wasat_f{digits * 4}_{x.view(bits):0{digits}x}" if np.isfinite(x) and x.dtype.type(f"{x:e}") != x else None


def with_literals(source: str) -> str:
    """The source with all digits of its numbers: C's hexadecimal form, which WGSL has too."""

    def literal(found: re.Match[str]) -> str:
        if found[1] == "64":
            return f"({float(np.uint64(int(found[2], 16)).view(np.float64)).hex()})"
        return f"({float(np.uint32(int(found[2], 16)).view(np.float32)).hex()}f)"

    return re.sub(r"wasat_f(32|64)_([0-9a-f]+)\(\)", literal, source)


class _Kernel:
    def __init__(self, device: Device) -> None:
        self.device = device
        self.vars: dict[Any, Any] = {}
        self.buffers: dict[Any, Any] = {}
        self.counts: set[Any] = set()
        """Variables, of the kernel as it was, that are not negative."""

    # -- types -----------------------------------------------------------------------------------------------------------
    def scalar(self, dtype: str) -> str:
        """The type that a number of ``dtype`` is computed with."""
        base, _, lanes = dtype.partition("x")
        if base in self.device.lacks and base != "uint64":
            raise IRError(f"this target has no {base}: cast to {'f32' if base.startswith('f') else 'i32'}")
        if base == "float16" and not self.device.f16:
            base = "float32"
        if self.device.integers == 32 and base.startswith(("int", "uint")):
            base = "uint32" if base.startswith("u") else "int32"
        return f"{base}x{lanes}" if lanes else base

    def element(self, dtype: str) -> str:
        """The type that a number of ``dtype`` lies in memory as."""
        base, _, lanes = dtype.partition("x")
        if base in self.device.lacks:
            raise IRError(f"this target has no {base}: cast to {'f32' if base.startswith('f') else 'i32'}")
        base = self.device.stored(base)
        return f"{base}x{lanes}" if lanes else base

    # -- functions and statements ----------------------------------------------------------------------------------------
    def function(self, f: tirx.PrimFunc) -> tirx.PrimFunc:
        params = []
        for p in f.params:
            if isinstance(p.ty, ir.PointerType):
                ty: Any = ir.PointerType(ir.PrimType(self.element(str(p.ty.element_type))), p.ty.storage_scope)
            else:
                ty = ir.PrimType(self.scalar(str(p.ty)))
                self.counts.add(p)  # a host gives kernels sizes
            self.vars[p] = tirx.Var(p.name, ty)
            params.append(self.vars[p])
        return tirx.PrimFunc(params, self.stmt(f.body), f.ret_type).with_attrs(dict(f.attrs))

    def buffer(self, b: Any, data: Any = None) -> Any:
        """The array for ``b``, made where it is declared."""
        if b not in self.buffers:
            self.buffers[b] = tirx.decl_buffer(
                [self.expr(d) for d in b.shape], self.element(str(b.dtype)), b.name, data=data, scope=b.scope(), layout=None
            )
        return self.buffers[b]

    def stmt(self, s: Any) -> Any:
        kind = type(s).__name__
        match kind:
            case "SeqStmt":
                return tirx.SeqStmt([self.stmt(x) for x in s.seq])
            case "Bind":
                value = self.expr(s.value)
                self.vars[s.var] = tirx.Var(s.var.name, value.ty)
                if self.counted(s.value):
                    self.counts.add(s.var)
                return tirx.Bind(self.vars[s.var], value)
            case "For":
                low, extent = self.expr(s.min), self.expr(s.extent)
                self.vars[s.loop_var] = tirx.Var(s.loop_var.name, extent.ty)
                if self.counted(s.min):
                    self.counts.add(s.loop_var)
                step = None if s.step is None else self.expr(s.step)
                body = self.stmt(s.body)
                return tirx.For(self.vars[s.loop_var], low, extent, s.kind, body, None, s.annotations, step)
            case "While":
                return tirx.While(self.expr(s.condition), self.stmt(s.body))
            case "IfThenElse":
                return tirx.IfThenElse(self.expr(s.condition), self.stmt(s.then_case), s.else_case and self.stmt(s.else_case))
            case "Evaluate":
                return tirx.Evaluate(self.expr(s.value))
            case "BufferStore":
                b = self.buffers[s.buffer]
                value, base = self.expr(s.value), str(s.buffer.dtype).partition("x")[0]
                stored = str(b.dtype).partition("x")[0]
                if base == "float16" and stored != base:
                    value = tirx.Cast(str(b.dtype), self.half_bits(value))
                elif base == "bool":
                    value = tirx.Select(value, tirx.const(1, stored), tirx.const(0, stored))
                elif stored != str(value.ty).partition("x")[0]:
                    value = tirx.Cast(str(b.dtype), value)
                return tirx.BufferStore(b, value, [self.expr(i) for i in s.indices])
            case "AllocBuffer":
                return tirx.AllocBuffer(self.buffer(s.buffer), dict(s.annotations or {}))
            case "DeclBuffer":
                data = self.expr(s.data)
                return tirx.DeclBuffer(self.buffer(s.buffer, data), data=data)
            case "AttrStmt" if s.attr_key == "thread_extent":
                extent, v = self.expr(s.value), s.node.var
                if v not in self.vars:
                    self.vars[v] = tirx.Var(v.name, extent.ty)
                    self.counts.add(v)
                dom = ir.Range(tirx.const(0, extent.ty), extent)
                node = tirx.IterVar(dom, self.vars[v], s.node.iter_type, s.node.thread_tag)
                return tirx.AttrStmt(node, s.attr_key, extent, self.stmt(s.body))
            case "AttrStmt":
                return tirx.AttrStmt(s.node, s.attr_key, self.expr(s.value), self.stmt(s.body))
        raise IRError(f"a kernel for this target holds {kind}, which has no form there")

    # -- expressions -----------------------------------------------------------------------------------------------------
    def expr(self, e: Any) -> Any:
        kind = type(e).__name__
        if kind == "Var":
            if e in self.vars:
                return self.vars[e]
            if e in self.buffers:
                return self.buffers[e]
            self.vars[e] = tirx.Var(e.name, self.scalar(str(e.ty)))  # a size that nothing reads
            return self.vars[e]
        if kind == "IntImm":
            return self.integer(int(e.value), str(e.ty))
        if kind == "StringImm":
            return e
        if kind == "FloatImm":
            value = float(np.float16(e.value)) if str(e.ty) == "float16" else float(e.value)
            return self.number(value, self.scalar(str(e.ty)))
        if kind in _BINARY:
            a, b, dtype = self.expr(e.a), self.expr(e.b), str(e.ty)
            if kind in _SHIFTS and self.scalar(dtype) != dtype and isinstance(b, tirx.IntImm) and b.value >= 32:
                if kind == "LShift" or dtype.startswith("u"):  # further than 32 bits are
                    return tirx.const(0, self.scalar(dtype))
                b = tirx.IntImm(str(b.ty), 31)
            if kind in _FLOORED and self.counted(e.a) and self.counted(e.b):
                kind = _FLOORED[kind]
            if kind == "BitwiseXor" and dtype == "bool":
                kind = "NE"  # WGSL has the operator for integers alone
            if self.device.language == "opencl" and dtype in _NARROW:  # C widens them, and then knows no select() of both
                a, b = (tirx.Cast("int32", x) for x in (a, b))
                return tirx.Cast(dtype, getattr(tirx, kind)(a, b))
            made = getattr(tirx, kind)(a, b)
            return self.wrapped(made, dtype) if kind in _WRAPS or dtype == "float16" else made
        if kind == "BitwiseNot":
            return self.wrapped(tirx.BitwiseNot(self.expr(e.a)), str(e.ty))
        if kind == "Not":
            return tirx.Not(self.expr(e.a))
        if kind == "Select":
            return tirx.Select(self.expr(e.condition), self.expr(e.true_value), self.expr(e.false_value))
        if kind == "Cast":
            return self.cast(self.expr(e.value), str(e.ty))
        if kind == "Let":
            value = self.expr(e.value)
            self.vars[e.var] = tirx.Var(e.var.name, value.ty)
            return tirx.Let(self.vars[e.var], value, self.expr(e.body))
        if kind == "Broadcast":
            return tirx.Broadcast(self.expr(e.value), e.lanes)
        if kind == "Ramp":
            return tirx.Ramp(self.expr(e.base), self.expr(e.stride), e.lanes)
        if kind == "TensorLoad":
            return self.load(e)
        if kind == "Call":
            return self.call(e)
        raise IRError(f"a kernel for this target holds {kind}, which has no form there")

    def integer(self, value: int, dtype: str) -> Any:
        to = self.scalar(dtype)
        if to == dtype:
            return tirx.IntImm(dtype, value)
        if dtype == "uint64":
            value %= 2**32
        elif dtype == "int64":  # the ends of what 64 bits hold are those of 32
            value = max(-(2**31), min(value, 2**31 - 1))
        return tirx.IntImm(to, value)

    def number(self, value: float, dtype: str) -> Any:
        if (exact := exact_name(value, dtype)) is not None:
            return tirx.call_pure_extern(dtype, exact)
        if math.isfinite(value) or self.device.language != "wgsl":
            return tirx.FloatImm(dtype, value)
        made = tirx.call_pure_extern("float32", NAN if math.isnan(value) else INFINITY)
        made = made if dtype == "float32" else tirx.Cast(dtype, made)
        return tirx.const(0.0, dtype) - made if value < 0 else made

    def half_bits(self, x: Any) -> Any:
        """The 16 bits, in a word, of the f16 that is nearest to an f32."""
        return tirx.call_pure_extern("uint32", BITS, x)

    def half(self, bits: Any) -> Any:
        """The f32 that 16 bits are."""
        return tirx.call_pure_extern("float32", HALF, bits if str(bits.ty) == "uint32" else tirx.Cast("uint32", bits))

    def function_named(self, name: str) -> str:
        """What a function of the C library is called here."""
        if self.device.language == "wgsl":
            return NAMES.get(name, name)
        return name.removesuffix("f") if name.endswith("f") and name not in ("erf", "wasat_f") else name

    def counted(self, e: Any) -> bool:
        """Whether it is plain that an integer is not negative."""
        match type(e).__name__:
            case "IntImm":
                return int(e.value) >= 0
            case "Var":
                return e in self.counts
            case "Add" | "Mul" | "FloorDiv" | "FloorMod" | "Div" | "Mod" | "Min" | "BitwiseOr" | "RShift":
                return self.counted(e.a) and self.counted(e.b)
            case "Max" | "BitwiseAnd":
                return self.counted(e.a) or self.counted(e.b)
            case "Cast":
                return str(e.value.ty).startswith(("int", "uint")) and self.counted(e.value)
        return False

    def load(self, e: Any) -> Any:
        b = self.buffers[e.source]
        value = tirx.BufferLoad(b, [self.expr(i) for i in e.indices])
        base = str(e.source.dtype).partition("x")[0]
        if base == "bool":
            return tirx.NE(value, tirx.const(0, str(value.ty)))
        want = self.scalar(str(e.ty))
        if base == "float16" and want != base:
            return self.half(value)
        return value if str(value.ty) == want else tirx.Cast(want, value)

    def cast(self, x: Any, dtype: str) -> Any:
        to = self.scalar(dtype)
        return self.wrapped(x if str(x.ty) == to else tirx.Cast(to, x), dtype)

    def wrapped(self, x: Any, dtype: str) -> Any:
        """A number that 8 or 16 bits hold: what 32 bits hold of it, cut to its width."""
        base, _, lanes = dtype.partition("x")
        to = self.scalar(dtype)
        if base == "float16" and to != dtype:
            if lanes:
                raise IRError(f"this target has no {dtype}")
            return self.half(self.half_bits(x))
        if to == dtype or base not in _NARROW:
            return x
        bits = int(base.lstrip("uint"))

        def const(n: int) -> Any:
            c = tirx.const(n, to.partition("x")[0])
            return tirx.Broadcast(c, int(lanes)) if lanes else c

        if base.startswith("u"):
            return tirx.BitwiseAnd(x, const(2**bits - 1))
        by = const(32 - bits)
        return tirx.RShift(tirx.LShift(x, by), by)

    def call(self, e: Any) -> Any:
        name = getattr(e.op, "name", "")
        dtype = str(e.ty)
        if name == "tirx.buffer_data":
            return self.buffers[e.args[0]].data
        args = [self.expr(a) for a in e.args]
        if (kind := kind_of(e.op)) is not None:
            made = ir.Call(e.op, args, ret_ty=ir.PrimType(self.scalar(dtype)))
            if kind == "NE" and str(args[0].ty) == "float32" and self.device.language == "wgsl":
                made = tirx.Or(made, tirx.Or(_is_nan(args[0]), _is_nan(args[1])))
            return self.wrapped(made, dtype) if kind == "Sub" else made
        if name == "tirx.tan" and self.device.language == "opencl":  # TVM would write C's tanf
            return tirx.call_pure_extern(self.scalar(dtype), "tan", *args)
        if name == "tirx.call_pure_extern":
            args[0] = ir.StringImm(self.function_named(str(e.args[0].value)))
        if name == "tirx.isnan" and self.device.language == "wgsl" and str(args[0].ty) == "float32":
            return _is_nan(args[0])
        if isinstance(e.ty, ir.PointerType):
            return ir.Call(e.op, args, e.attrs, e.ty_args, ret_ty=e.ty)
        to = self.scalar(dtype) if dtype not in ("void", "handle") else dtype
        if name == "tirx.reinterpret":
            return self.reinterpreted(args[0], str(e.args[0].ty), dtype)
        halves = dtype == "float16" and all(str(a.ty) == dtype for a in args)
        if halves and self.device.language == "cuda" and name not in _KEEPS:  # CUDA lacks some, and rounds others twice
            wide = [tirx.Cast("float32", a) for a in args]
            return tirx.Cast(dtype, ir.Call(e.op, wide, e.attrs, e.ty_args, ret_ty=ir.PrimType("float32")))
        made = ir.Call(e.op, args, e.attrs, e.ty_args, ret_ty=ir.PrimType(to) if to not in ("void", "handle") else e.ty)
        return made if name == "tirx.if_then_else" else self.wrapped(made, dtype)

    def reinterpreted(self, x: Any, source: str, dtype: str) -> Any:
        to = self.scalar(dtype)
        if self.scalar(source) == source and to == dtype:
            return tirx.reinterpret(dtype, x)
        if source == "float16" or dtype == "float16":
            bits = self.half_bits(tirx.Cast("float32", x)) if source == "float16" else tirx.Cast("uint32", x)
            if dtype != "float16":
                return self.cast(bits, dtype)
            made = self.half(tirx.BitwiseAnd(bits, tirx.const(0xFFFF, "uint32")))
            return made if to == "float32" else tirx.Cast(to, made)
        return self.cast(x if str(x.ty) == to else tirx.Cast(to, x), dtype)


def _is_nan(x: Any) -> Any:
    """By the bits of an f32: compilers of WGSL may take for granted that there are no NaN."""
    bits = tirx.BitwiseAnd(tirx.reinterpret("int32", x), tirx.const(0x7FFFFFFF, "int32"))
    return tirx.GT(bits, tirx.const(0x7F800000, "int32"))
