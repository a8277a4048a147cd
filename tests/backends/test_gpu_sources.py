"""Every kernel for GPUs becomes CUDA, without a GPU and without nvcc; what it shares fits into what a device promises."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tvm
import tvm_ffi
from wasat.backends.tvm.gpu.kernels.attention import Attention, attention
from wasat.backends.tvm.gpu.kernels.convolution import Conv, convolution
from wasat.backends.tvm.gpu.kernels.elementwise import CacheWrite, Embedding, Glu, Rope, cache_write, embedding, glu, rope
from wasat.backends.tvm.gpu.kernels.formats import Codes, Floats, format_of
from wasat.backends.tvm.gpu.kernels.linear import Linear, linear
from wasat.backends.tvm.gpu.kernels.linear_attention import LinearAttention, linear_attention
from wasat.backends.tvm.gpu.kernels.rows import Norm, RoundRows, Softmax, norm, round_rows, softmax
from wasat.backends.tvm.gpu.limits import Limits
from wasat.backends.tvm.gpu.select import selection
from wasat.ir import DType, QTensorType, TensorType
from wasat.ir.ops.quant import quantize_array
from wasat.ir.schemes import SCHEMES

from wasat.testing import random_program

WEBGPU = Limits()
SMALL = Limits(threads=64)
F16 = Limits(f16=True)


def of(kind: str, limits: Limits = WEBGPU) -> Floats | Codes:
    type = TensorType(DType.of(kind), (8, 512)) if kind in ("f32", "f16", "bf16") else QTensorType(kind, (8, 512))
    f = format_of(type, limits.f16)
    assert not isinstance(f, str)
    return f


CASES: list[tuple[Any, Any]] = [
    *((Linear(WEBGPU, 70, 512, of(kind), rows), linear) for kind in ("f32", "f16", "bf16", "int8", "int4", *SCHEMES)
      for rows in ((1, 32) if kind in ("f16", "int4") else (4,))),
    (Linear(SMALL, 70, 77, of("int4"), 32, bias=True), linear),
    (Linear(F16, 70, 77, of("f16", F16), 32, dtype="float16"), linear),
    (Linear(WEBGPU, 70, 64, of("int4"), 1, bias=True, experts=5, per=2), linear),
    (Norm(WEBGPU, 70), norm), (Norm(WEBGPU, 700, "layer", bias=True, residual=True), norm), (Softmax(WEBGPU, None), softmax),
    (RoundRows(WEBGPU, 70), round_rows), (Glu(WEBGPU, 37, "gelu"), glu), (Rope(WEBGPU, 4, 24, 16), rope),
    (Embedding(WEBGPU, 9, 70, of("int8")), embedding), (CacheWrite(WEBGPU, 2, 16, 8, ring=True), cache_write),
    (Attention(WEBGPU, 4, 2, 256, 256, 0.1, mask="fB"), attention),
    (Attention(WEBGPU, 4, 2, 64, 64, 0.1, 3.0, 9, cached=True, ring=True, mask="bBH"), attention),
    *((Conv(limits, n, 8, (3, 3), (1, 1), (1, 1), (1, 1), (1, 1), (True, True), bias=True), convolution)
      for limits, n in ((WEBGPU, 64), (WEBGPU, 32), (WEBGPU, 16), (WEBGPU, 4), (SMALL, 64), (SMALL, 16))),
    *((LinearAttention(limits, 8, 2, 128, 128, "feature", True, in_place=False), linear_attention)
      for limits in (WEBGPU, SMALL)),
    (Attention(WEBGPU, 8, 1, 256, 256, 0.1, cached=True, decode=True), attention),
    (Attention(WEBGPU, 4, 4, 64, 64, 0.1, cached=True, decode=True), attention),
]  # fmt: skip


def device_code(module: Any) -> str:
    if module.kind == "cuda":
        return str(module.inspect_source("cuda"))
    return "".join(device_code(m) for m in module.imports)


@pytest.fixture
def only_sources() -> Iterator[None]:
    """Keeps TVM from calling a compiler, which it does once its CUDA runtime was loaded in this process."""
    name = "tvm_callback_cuda_compile"
    before = tvm_ffi.get_global_func(name, allow_missing=True)
    tvm_ffi.register_global_func(name, lambda code: code.encode(), override=True)
    yield
    if before is not None:
        tvm_ffi.register_global_func(name, before, override=True)


@pytest.mark.usefixtures("only_sources")
@pytest.mark.parametrize("desc, build", [pytest.param(d, f, id=f"{i}-{d.name}") for i, (d, f) in enumerate(CASES)])
def test_cuda(desc: Any, build: Any) -> None:
    target = tvm.target.Target({"kind": "cuda", "arch": "sm_80"}, host={"kind": "llvm"})
    with target:
        made = tvm.tirx.build(tvm.IRModule({desc.name: build(desc)}), target=target)
    source = device_code(getattr(made, "mod", made))
    assert "__global__" in source
    sizes = {"float": 4, "int": 4}
    for kernel in source.split("__global__")[1:]:
        shared = re.findall(r"__shared__ (\w+) \w+\[(\d+)\]", kernel)
        assert sum(sizes[t] * int(n) for t, n in shared) <= desc.limits.shared
        [threads] = set(re.findall(r"__launch_bounds__\((\d+)\)", kernel))
        assert int(threads) <= desc.limits.threads


def test_layouts() -> None:
    """Codes from the lowest bits of the first word on, then scales, at a multiple of four words a row."""
    w = quantize_array(np.arange(80, dtype=np.float32).reshape(2, 40), QTensorType("int4", (2, 40)))
    f = of("int4")
    packed = f.pack(w)
    assert packed.shape == f.param(2, 40)[0] == (2, 12)
    codes = (packed[:, :5, None] >> np.arange(0, 32, 4, dtype=np.uint32)) & 15
    np.testing.assert_array_equal(codes.reshape(2, 40).astype(int) - 8, w.values)
    np.testing.assert_array_equal(np.ascontiguousarray(packed[:, 8:9]).view(np.float16), w.scales)


def test_types_without_a_format() -> None:
    assert "whole octets" in str(format_of(QTensorType("int4", (2, 40), 4), False))
    assert "zero points" in str(format_of(QTensorType("int4", (2, 64), 32, DType.F16, True), False))
    assert "f64" in str(format_of(TensorType(DType.F64, (2, 40)), False))


LEFT = {
    "its weight is no parameter": "(%x: f32[s, 40], %w: f32[70, 40]) {\n %y: f32[s, 70] = linear(%x, %w)",
    "it computes with f16": "(%x: f16[s, 40]) {\n param %w: f16[70, 40]\n %y: f16[s, 70] = linear(%x, %w)",
    "not of whole octets": "(%x: f32[s, 40]) {\n param %w: int4b4f16[70, 40]\n %y: f32[s, 70] = quantized_linear(%x, %w)",
    "its axis is not the last one": "(%x: f32[s, 40]) {\n %y: f32[s, 40] = softmax(%x) {axis=0}",
    "not all are known": "(%x: f32[s, t]) {\n %y: f32[s, t] = rms_norm(%x)",
    "of no elements": "(%x: f32[s, 40]) {\n param %w: f32[0, 40]\n %y: f32[s, 0] = linear(%x, %w)",
}


@pytest.mark.parametrize("why", LEFT)
def test_what_is_left_says_why(why: str) -> None:
    program = random_program(f"graph @main{LEFT[why]}\n return %y\n}}")
    graph = program["main"]
    before = str(graph)
    [left] = selection(WEBGPU)(graph)
    assert why in left.why
    assert left.graph == "main"
    assert str(graph) == before
