"""Compile a PrimFunc for one instruction set and run it on NumPy arrays."""

from __future__ import annotations

import os

os.environ.setdefault("TVM_NUM_THREADS", "2")
os.environ.setdefault("TVM_BIND_THREADS", "0")

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import tvm
from numpy.typing import NDArray
from soft import SOFT
from wasat.backends.tvm.cpu import tir_pipeline
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


@cache
def _flags() -> frozenset[str]:
    with open("/proc/cpuinfo") as lines:
        found = (line.split(":")[1].split() for line in lines if line.startswith(("flags", "Features")))
        return frozenset(next(found, ()))


def lacks(isa: Isa) -> list[str]:
    """What this processor would need for the set."""
    return [flag for flag in NEEDS[isa] if flag not in _flags()]


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


def run(compiled: Any, inputs: list[Any], *outputs: tuple[tuple[int, ...], str]) -> list[NDArray[Any]]:
    """Call with inputs (arrays or tensors) and fresh outputs, filled with junk so that a missed element shows."""
    made = [tensor(np.full(shape, 77, dtype)) for shape, dtype in outputs]
    compiled(*[tensor(x) if isinstance(x, np.ndarray) else x for x in inputs], *made)
    return [m.numpy() for m in made]


def rounded(x: NDArray[np.float32]) -> NDArray[np.float64]:
    """x as rows of integers and scales stand for it."""
    q = quantize_rows_reference(x)
    ints = np.ascontiguousarray(q[..., :8]).view(np.int8).astype(np.float64)
    blocks = ints * np.ascontiguousarray(q[..., 8]).view(np.float32)[..., None]
    return blocks.reshape(*x.shape[:-1], 32 * q.shape[-2])[..., : x.shape[-1]]


def assert_near(got: NDArray[Any], want: NDArray[Any], tolerance: float) -> None:
    """Largest difference, relative to the largest magnitude of ``want``."""
    assert got.shape == want.shape
    assert np.isfinite(got).all()
    scale = float(np.abs(want).max()) or 1.0
    error = float(np.abs(got.astype(np.float64) - want).max()) / scale
    assert error <= tolerance, f"relative difference {error:.2e} > {tolerance:.1e}"
