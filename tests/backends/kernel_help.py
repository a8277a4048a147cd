"""Compile a PrimFunc for one instruction set and run it on NumPy arrays."""

from __future__ import annotations

import ctypes
import mmap
import os

os.environ.setdefault("TVM_NUM_THREADS", "2")
os.environ.setdefault("TVM_BIND_THREADS", "0")

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import tvm
from numpy.typing import NDArray
from soft import SOFT
from wasat.backends.tvm.cpu import tir_pipeline
from wasat.backends.tvm.cpu.arch import listed_features
from wasat.backends.tvm.cpu.kernels.isa import (
    AVX2,
    AVX512_VNNI,
    AVX_VNNI,
    GENERIC,
    ISAS,
    NEON,
    NEON_DOTPROD,
    NEON_I8MM,
    Isa,
)
from wasat.backends.tvm.cpu.kernels.quantize import quantize_rows_reference
from wasat.ir import Graph, evaluate

# no more than the kernels ask for: code for a named processor may use instructions that this one lacks (AVX512-FP16)
CPU = {
    AVX512_VNNI: {"mcpu": "x86-64-v4", "mattr": ["+avx512vnni"]},
    AVX_VNNI: {"mcpu": "x86-64-v3", "mattr": ["+avxvnni"]},
    AVX2: {"mcpu": "x86-64-v3"},
    GENERIC: {"mcpu": "x86-64"},
    NEON: {"mtriple": "aarch64-linux-gnu"},
    NEON_DOTPROD: {"mtriple": "aarch64-linux-gnu", "mattr": ["+dotprod"]},
    NEON_I8MM: {"mtriple": "aarch64-linux-gnu", "mattr": ["+dotprod", "+i8mm"]},
}
_AVX2 = ("avx2", "f16c", "fma")
NEEDS = {  # in the words of /proc/cpuinfo
    AVX512_VNNI: ("avx512_vnni", "avx512bw", "avx512vl", "avx512dq", "avx512cd"), AVX_VNNI: ("avx_vnni", *_AVX2), AVX2: _AVX2,
    GENERIC: ("sse2",), NEON: ("asimd",), NEON_DOTPROD: ("asimd", "asimddp"), NEON_I8MM: ("asimd", "asimddp", "i8mm"),
}  # fmt: skip


def lacks(isa: Isa) -> list[str]:
    """What this processor would need for the set."""
    listed = listed_features()
    return [flag for flag in NEEDS[isa] if listed is None or flag not in listed]


def softened(isa: Isa) -> Isa:
    """The set's shapes with its instructions as arithmetic, for any processor."""
    return replace(isa, name=f"soft-{isa.name}", native_f16=False, instructions=SOFT)


def _param(isa: Isa, reason: str) -> Any:
    return pytest.param(isa, id=isa.name, marks=[pytest.mark.skip(reason=reason)] if reason else [])


def each_isa(integers: bool = False) -> pytest.MarkDecorator:
    """Every instruction set, and the soft form of each that this processor lacks; for kernels of integer products, those too
    that differ in these alone."""
    sets = []
    for isa in ISAS.values():
        if isa in (NEON_DOTPROD, NEON_I8MM) and not integers:
            continue
        missing = ", ".join(lacks(isa))
        sets.append(_param(isa, missing and f"this CPU has no {missing}"))
        if isa is not NEON_I8MM:  # in soft form, it is the one before
            sets.append(_param(softened(isa), "" if missing else f"this CPU has {isa.name} itself"))
    return pytest.mark.parametrize("isa", sets)


def target_of(isa: Isa) -> tvm.target.Target:
    return tvm.target.Target({"kind": "llvm", **CPU.get(isa, {})})  # a soft one: what any processor of this kind can do


def build(func: tvm.tirx.PrimFunc, isa: Isa) -> Any:
    module = tvm.IRModule({"main": func})
    return tvm.tirx.build(module, target=target_of(isa), pipeline=tir_pipeline.register())["main"]


def tensor(x: NDArray[Any]) -> Any:
    return tvm.runtime.tensor(np.ascontiguousarray(x))


def guarded(x: NDArray[Any]) -> Any:
    """A copy as a tensor behind whose last byte no memory may be read: what reads beyond it ends the process.

    The copy begins as aligned as allocated memory; so its bytes must be whole multiples of 64.
    """
    if x.nbytes % 64:
        raise ValueError(f"{x.nbytes} bytes are not a multiple of 64")
    pages = -(-x.nbytes // mmap.PAGESIZE)
    held = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    whole = np.frombuffer(held, np.uint8)
    end = pages * mmap.PAGESIZE
    if ctypes.CDLL(None).mprotect(ctypes.c_void_p(whole.ctypes.data + end), ctypes.c_size_t(mmap.PAGESIZE), 0):
        raise OSError("a page cannot be protected")
    inside = whole[end - x.nbytes : end].view(x.dtype).reshape(x.shape)
    inside[...] = x
    return tvm.runtime.from_dlpack(inside)


def run(compiled: Any, inputs: list[Any], *outputs: tuple[tuple[int, ...], str]) -> list[NDArray[Any]]:
    """Call with inputs (arrays or tensors) and fresh outputs, filled with junk so that a missed element shows."""
    made = [tensor(np.full(shape, 77, dtype)) for shape, dtype in outputs]
    compiled(*[tensor(x) if isinstance(x, np.ndarray) else x for x in inputs], *made)
    return [m.numpy() for m in made]


def uneven(rng: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    """Normal numbers whose rows differ in size by up to four powers of ten: a small one's faults are not small."""
    return (rng.standard_normal(shape) * 10.0 ** rng.uniform(-2, 2, (*shape[:-1], 1))).astype(np.float32)


def rounded(x: NDArray[np.float32]) -> NDArray[np.float64]:
    """x as rows of integers and scales stand for it."""
    q = quantize_rows_reference(x)
    ints = np.ascontiguousarray(q[..., :8]).view(np.int8).astype(np.float64)
    blocks = ints * np.ascontiguousarray(q[..., 8]).view(np.float32)[..., None]
    return blocks.reshape(*x.shape[:-1], 32 * q.shape[-2])[..., : x.shape[-1]]


class Terms(NamedTuple):
    """Sums as they are in f64, the sum of their terms' magnitudes, and how many terms each has."""

    sum: NDArray[np.float64]
    size: NDArray[np.float64]
    count: int = 1

    def roundings(self, steps: float = 2) -> float:
        """That f32 may lose of a sum of n terms' size: sqrt(n), in whatever order they are added (Higham and Mary, A New
        Approach to Probabilistic Rounding Error Analysis, 2019); ``steps`` more for each term."""
        return float(steps + 2 * np.sqrt(self.count))

    def __add__(self, other: NDArray[Any]) -> Terms:
        return Terms(self.sum + other, self.size + np.abs(other), self.count + 1)


def products(a: NDArray[Any], b: NDArray[Any]) -> Terms:
    """a @ b."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return Terms(a @ b, np.abs(a) @ np.abs(b), a.shape[-1])


EPS = 2.0**-24  # one rounding of f32


def assert_near(got: NDArray[Any], want: Terms, steps: float = 2) -> None:
    """Each element within what f32 may lose of it."""
    assert_within(got, want.sum, want.roundings(steps) * EPS * want.size)


def assert_within(got: NDArray[Any], want: NDArray[Any], bound: NDArray[Any]) -> None:
    """|got - want| <= bound, element by element."""
    assert got.shape == want.shape
    assert np.isfinite(got).all()
    error = np.abs(got.astype(np.float64) - want) - bound
    if not error.size:
        return
    at = np.unravel_index(int(error.argmax()), error.shape)
    assert error[at] <= 0, f"{at}: {got[at]!r} is not within {bound[at]:.1e} of {want[at]!r}"


def assert_near_reference(
    got: Mapping[str, NDArray[Any]], g: Graph, inputs: Mapping[str, Any], params: Mapping[str, Any] | None = None,
    steps: float = 32,
) -> None:
    """Each element of a graph's results within what it moves by when its operands move a little: four times the root mean
    square over six draws that change every number by up to ``steps`` of its type's roundings, and two roundings of its own."""
    rng, floats = np.random.default_rng(0), (np.float32, np.float64)
    if all(x.dtype == np.float16 for x in got.values()):  # what is inside is f32
        floats, steps = (np.float16,), 1

    def moved(given: Mapping[str, Any]) -> dict[str, Any]:
        def move(x: Any) -> Any:
            if getattr(x, "dtype", None) not in floats:
                return x
            return (x * (1 + steps * np.finfo(x.dtype).eps / 2 * rng.uniform(-1, 1, x.shape))).astype(x.dtype)

        return {k: move(x) for k, x in given.items()}

    def values(f: Mapping[str, Any], p: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
        return {k: np.asarray(x) for k, x in zip(g.output_names, evaluate(g, f, p)) if k in got}

    params = params or {}
    draws = [values(moved(inputs), moved(params)) for _ in range(6)]
    for name, want in values(inputs, params).items():
        wide = want.astype(np.float64)
        spread = np.sqrt(np.mean([(x[name].astype(np.float64) - wide) ** 2 for x in draws], axis=0))
        assert_within(got[name], wide, 4 * spread + float(np.finfo(got[name].dtype).eps) * np.abs(wide))
