"""Element types that TVM computes wrongly or lacks, carried as bytes: floats of 8 and 4 bits, integers of 4 and 2.

A compiled program holds one code in each byte, as NumPy does with ml_dtypes, whose arrays therefore cross the boundary
unconverted. Bytes are moved as they are; a number becomes a code, and a code a number, in a cast alone. What numbers the codes
are, and the codes of what no code fits (too large, NaN), are read off ml_dtypes, which the reference uses.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
from tvm import tirx
from wasat.ir import DType

NARROW = frozenset({
    DType.F8E4M3, DType.F8E5M2, DType.F8E4M3FNUZ, DType.F8E5M2FNUZ, DType.F8E8M0, DType.F4E2M1,
    DType.I4, DType.I2, DType.U4, DType.U2,
})  # fmt: skip


def carried(x: np.ndarray) -> np.ndarray:
    """The array as a compiled program holds it: its codes (u8) if its type is a narrow one, else itself."""
    return x.view(np.uint8) if DType.of(x.dtype) in NARROW else x


def uncarried(x: np.ndarray, dtype: DType) -> np.ndarray:
    """The inverse of :func:`carried`."""
    return x.view(dtype.np) if dtype in NARROW else x


def numbers(dtype: DType) -> np.ndarray:
    """What the codes of a narrow float type are: f32[2**bits]."""
    return np.arange(2**dtype.bits, dtype=np.uint8).view(dtype.np).astype(np.float32)


def integer(dtype: DType, code: Any) -> Any:
    """The number (i32) that a code (u8) of a narrow integer type is, whatever the bits above are."""
    bits, wide = dtype.bits, tirx.Cast("int32", code)
    if dtype.value.startswith("u"):
        return tirx.bitwise_and(wide, tirx.const(2**bits - 1, "int32"))
    rest = tirx.const(32 - bits, "int32")
    return tirx.shift_right(tirx.shift_left(wide, rest), rest)


def integer_code(dtype: DType, value: Any) -> Any:
    """The code (u8) of an integer: its low bits."""
    return tirx.Cast("uint8", tirx.bitwise_and(value, tirx.const(2**dtype.bits - 1, value.ty.dtype)))


def float_code(dtype: DType) -> Callable[[Any], Any]:
    """The code (u8) of an f32 number in a narrow float type: rounded to nearest even, as the reference rounds."""
    return _exponent_code if dtype is DType.F8E8M0 else lambda v: _rounded_code(dtype, v)


def _i32(x: int) -> Any:
    return tirx.const(x, "int32")


def _magnitude(v: Any) -> tuple[Any, Any]:
    """The bits of ``abs(v)``, every NaN as the least one so that sums stay in i32, and whether the sign is set."""
    bits = tirx.reinterpret("int32", v)  # signed: TVM's analysis of comparisons fails on unsigned ones
    return tirx.min(tirx.bitwise_and(bits, _i32(0x7FFFFFFF)), _i32(0x7F800001)), bits < _i32(0)


def in_bf16(v: Any) -> Any:
    """An f32 number rounded to nearest even as bf16 holds it, still f32. A NaN keeps none of the bits that are cut: TVM rounds
    again, and would carry a GPU's NaN, whose bits are all set, into the sign."""
    bits = tirx.reinterpret("int32", v)
    even = tirx.bitwise_and(tirx.shift_right(bits, _i32(16)), _i32(1))
    rounded = tirx.bitwise_and(bits + _i32(0x7FFF) + even, _i32(-0x10000))
    nan = tirx.bitwise_and(bits, _i32(0x7FFFFFFF)) > _i32(0x7F800000)
    cut = tirx.bitwise_or(tirx.bitwise_and(bits, _i32(-0x10000)), _i32(0x400000))
    return tirx.reinterpret("float32", tirx.Select(nan, cut, rounded))


def _rounded_code(dtype: DType, v: Any) -> Any:
    info: Any = ml_dtypes.finfo(dtype.np)
    top, over, nan, negative_zero = (
        int(np.asarray(x, np.float32).astype(dtype.np).view(np.uint8)) for x in (info.max, np.inf, np.nan, -0.0)
    )
    least = float(info.smallest_normal)
    drop = 23 - info.nmant
    a, negative = _magnitude(v)
    below = tirx.nearbyint(tirx.abs(v) * tirx.const(2.0**info.nmant / least, "float32"))  # of steps between subnormals
    even = tirx.bitwise_and(tirx.shift_right(a, _i32(drop)), _i32(1))
    rounded = tirx.shift_right(a + _i32(2 ** (drop - 1) - 1) + even, _i32(drop))
    # f32's exponent of the least normal number is our exponent 1
    above = rounded - _i32((126 + int(math.log2(least))) << info.nmant)
    small = a < _i32(int(np.asarray(least, np.float32).view(np.int32)))
    code = tirx.Select(small, tirx.Cast("int32", tirx.Select(small, below, tirx.const(0.0, "float32"))), above)
    code = tirx.Select(tirx.all(tirx.Not(small), code > _i32(top)), _i32(over), code)
    code = tirx.Select(a > _i32(0x7F800000), _i32(nan), code)
    sign = 2 ** (dtype.bits - 1)
    if not negative_zero:  # the code of -0 stands for NaN, which has no sign then
        negative = tirx.all(negative, code != _i32(0), code != _i32(sign))
    return tirx.Cast("uint8", tirx.bitwise_xor(code, tirx.Select(negative, _i32(sign), _i32(0))))


def _exponent_code(v: Any) -> Any:
    """f8e8m0 is an exponent and no more: the nearest power of two, the greater of two equally near; NaN for 0 and less."""
    a, negative = _magnitude(v)
    subnormal = tirx.Select(a < _i32(0x600000), _i32(0), _i32(1))  # of f32; 1.5 * 2**-127 is in the middle of the least two
    code = tirx.Select(a < _i32(0x800000), subnormal, tirx.shift_right(a + _i32(0x400000), _i32(23)))
    code = tirx.Select(tirx.any(negative, a == _i32(0)), _i32(255), tirx.min(code, _i32(255)))
    return tirx.Cast("uint8", code)
