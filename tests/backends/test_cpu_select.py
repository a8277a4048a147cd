# ruff: noqa: E501
"""What the CPU's kernels take and what they leave, operation by operation; both ways the graph means the same."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from kernel_help import assert_near_reference
from test_cpu import calls, selected
from wasat.backends.tvm.build import Runner
from wasat.backends.tvm.targets import cpu
from wasat.ir import IRError, Program, QTensorType, State, TensorType, evaluate, parse_type
from wasat.passes import PassManager, QuantizeCaches

from wasat.testing import feed, random_program

DIMS = {"b": 2, "s": 5, "t": 7, "c": 32}
POSITIONS = """  %column: i64[b, 1] = reshape(%past) {shape=(b, 1)}
  %steps: i64[s] = iota() {size=s}
  %positions: i64[b, s] = add(%column, %steps)
"""

# inputs, parameters, nodes and result; the operations that stand there after selection
CASES: dict[str, tuple[str, list[str]]] = {
    "linear, any rank": ("(%x: f32[b, s, 40]) { param %w: f16[70, 40] param %v: f32[70]\n %y: f32[b, s, 70] = linear(%x, %w, %v)", ["Linear"]),
    "linear of a vector": ("(%x: f32[40]) { param %w: f32[7, 40]\n %y: f32[7] = linear(%x, %w)", ["Linear"]),
    "linear, bf16": ("(%x: f32[s, 40]) { param %w: bf16[70, 40]\n %y: f32[s, 70] = linear(%x, %w)", ["Linear"]),
    "linear of a cast": (
        "(%x: f32[s, 40]) { param %w: f16[70, 40]\n %v: f32[70, 40] = cast(%w) {dtype=f32}\n %y: f32[s, 70] = linear(%x, %v)", ["Linear"]),
    "linear, bias no parameter": (
        "(%x: f32[s, 40], %v: f32[70]) { param %w: f32[70, 40]\n %y: f32[s, 70] = linear(%x, %w, %v)", ["Linear", "add"]),
    "linear, weight no parameter": ("(%x: f32[s, 40], %w: f32[70, 40]) {\n %y: f32[s, 70] = linear(%x, %w)", ["Gemm"]),
    "grouped, several of a row": (
        "(%x: f32[s, 1, 40], %r: f32[s, 3]) { param %w: f32[3, 70, 40] param %v: f32[3, 70]\n %b: f32[s, 2], %g: i64[s, 2] = top_k(%r) {k=2, axis=1}\n"
        " %y: f32[s, 2, 70] = grouped_linear(%x, %w, %g, %v)", ["top_k", "GroupRows", "Grouped"]),
    "grouped, sorted once": (
        "(%x: f32[s, 40], %r: f32[s, 3]) { param %w: f16[3, 70, 40] param %u: bf16[3, 40, 70]\n %g: i64[s] = arg_max(%r) {axis=1}\n"
        " %a: f32[s, 70] = grouped_linear(%x, %w, %g)\n %y: f32[s, 40] = grouped_linear(%a, %u, %g)", ["arg_max", "GroupRows", "Grouped", "Grouped"]),
    "grouped, quantized once": (
        "(%x: f32[s, 40], %r: f32[s, 3]) { param %n: f32[40] param %l: int8b32f16[7, 40] param %w: int4b32f16[3, 70, 40] param %u: int8b32f16[3, 5, 35]\n"
        " %h: f32[s, 40] = rms_norm(%x, %n)\n %q: f32[s, 7] = quantized_linear(%h, %l) {activation=\"int8\"}\n %b: f32[s, 2], %g: i64[s, 2] = top_k(%r) {k=2, axis=1}\n"
        " %e: f32[s, 1, 40] = reshape(%h) {shape=(s, 1, 40)}\n %a: f32[s, 2, 70] = quantized_grouped_linear(%e, %w, %g) {activation=\"int8\"}\n"
        " %m: f32[s, 2, 35] = glu(%a)\n %o: f32[s, 2, 5] = quantized_grouped_linear(%m, %u, %g) {activation=\"int8\"}\n"
        " %z: f32[s, 14] = concat(%q, %q) {axis=1}\n %k: f32[s, 10] = reshape(%o) {shape=(s, 10)}\n %y: f32[s, 24] = concat(%z, %k) {axis=1}",
        ["Norm", "LinearInt", "top_k", "GroupRows", "Grouped", "Glu", "Grouped", "concat", "reshape", "concat"]),
    "grouped, rows as they are": (
        "(%x: f32[s, 1, 40], %r: f32[s, 3]) { param %w: int8b32f16[3, 70, 40]\n %b: f32[s, 2], %g: i64[s, 2] = top_k(%r) {k=2, axis=1}\n"
        " %y: f32[s, 2, 70] = quantized_grouped_linear(%x, %w, %g)", ["top_k", "GroupRows", "Grouped"]),
    "grouped, as its file has it": (
        "(%x: f32[s, 1, 256], %r: f32[s, 3]) { param %w: q4_k[3, 70, 256]\n %b: f32[s, 2], %g: i64[s, 2] = top_k(%r) {k=2, axis=1}\n"
        " %y: f32[s, 2, 70] = quantized_grouped_linear(%x, %w, %g)", ["top_k", "GroupRows", "Grouped"]),
    "grouped, in blocks, by integers": (
        "(%x: f32[s, 1, 160], %r: f32[s, 3]) { param %w: s4b160[3, 70, 160]\n %b: f32[s, 2], %g: i64[s, 2] = top_k(%r) {k=2, axis=1}\n"
        " %y: f32[s, 2, 70] = quantized_grouped_linear(%x, %w, %g) {activation=\"int8\"}", ["top_k", "GroupRows", "QuantizeRows", "Grouped"]),
    "grouped, one group for many rows": (
        "(%x: f32[s, t, 40], %r: f32[t, 3]) { param %w: f32[3, 70, 40]\n %g: i64[t] = arg_max(%r) {axis=1}\n"
        " %y: f32[s, t, 70] = grouped_linear(%x, %w, %g)", ["arg_max", "broadcast_to", "GroupRows", "Grouped"]),
    "grouped, a row for many groups": (
        "(%x: f32[40], %r: f32[s, 3]) { param %w: f32[3, 70, 40]\n %g: i64[s] = arg_max(%r) {axis=1}\n"
        " %y: f32[s, 70] = grouped_linear(%x, %w, %g)", ["arg_max", "broadcast_to", "GroupRows", "Grouped"]),
    "grouped, bias no parameter": (
        "(%x: f32[s, 40], %r: f32[s, 3], %v: f32[3, 70]) { param %w: f32[3, 70, 40]\n %g: i64[s] = arg_max(%r) {axis=1}\n"
        " %y: f32[s, 70] = grouped_linear(%x, %w, %g, %v)", ["arg_max", "GroupRows", "Grouped", "gather", "add"]),
    "grouped, weight no parameter": (
        "(%x: f32[s, 40], %r: f32[s, 3], %w: f32[3, 70, 40]) {\n %g: i64[s] = arg_max(%r) {axis=1}\n %y: f32[s, 70] = grouped_linear(%x, %w, %g)",
        ["arg_max", "grouped_linear"]),
    "products of known sizes": (
        "(%x: f32[2, 5, 40], %w: f32[70, 40], %v: f32[70], %u: f32[10, 70]) {\n %z: f32[2, 5, 70] = linear(%x, %w, %v)\n"
        " %r: f32[10, 70] = reshape(%z) {shape=(10, 70)}\n %t: f32[70, 10] = transpose(%r) {perm=(1, 0)}\n"
        " %a: f32[70, 70] = matmul(%t, %u)\n %c: f32[10, 10] = matmul(%u, %t)\n %d: f32[10, 70] = matmul(%c, %u)\n"
        " %e: f32[10, 70] = matmul(%d, %a)\n %y: f32[10, 70] = add(%e, %r)", ["Gemm", "add", "reshape", "Gemm", "Gemm", "Gemm", "Gemm", "add"]),
    "a product of one row": ("(%x: f32[1, 40], %w: f32[70, 40]) {\n %y: f32[1, 70] = linear(%x, %w)", ["Gemm"]),
    "attention by heads of a merged projection": (
        "(%x: f32[2, 5, 36]) {\n %h: f32[2, 5, 9, 4] = reshape(%x) {shape=(2, 5, 9, 4)}\n"
        " %a: f32[2, 5, 3, 4] = slice(%h) {starts=(0, 0, 0, 0), stops=(2, 5, 3, 4), steps=(1, 1, 1, 1)}\n"
        " %c: f32[2, 5, 3, 4] = slice(%h) {starts=(0, 0, 3, 0), stops=(2, 5, 9, 4), steps=(1, 1, 2, 1)}\n"
        " %q: f32[2, 3, 5, 4] = transpose(%a) {perm=(0, 2, 1, 3)}\n %k: f32[2, 3, 4, 5] = transpose(%c) {perm=(0, 2, 3, 1)}\n"
        " %v: f32[2, 3, 5, 4] = transpose(%c) {perm=(0, 2, 1, 3)}\n %p: f32[2, 3, 5, 5] = matmul(%q, %k)\n"
        " %t: f32[2, 3, 5, 5] = transpose(%p) {perm=(0, 1, 3, 2)}\n %o: f32[2, 3, 5, 4] = matmul(%t, %v)\n"
        " %y: f32[2, 5, 3, 4] = transpose(%o) {perm=(0, 2, 1, 3)}", ["Gemm", "Gemm"]),
    "a product written as its transpose": (
        "(%x: f32[3, 5, 40], %w: f32[40, 7]) {\n %a: f32[3, 5, 7] = matmul(%x, %w)\n %y: f32[7, 3, 5] = transpose(%a) {perm=(2, 0, 1)}",
        ["Gemm"]),
    "a product whose rows and columns are apart": (
        "(%x: f32[3, 5, 40], %w: f32[40, 7]) {\n %a: f32[3, 5, 7] = matmul(%x, %w)\n %y: f32[7, 5, 3] = transpose(%a) {perm=(2, 1, 0)}",
        ["Gemm", "transpose"]),
    "a product read before it is transposed": (
        "(%x: f32[3, 3]) {\n %a: f32[3, 3] = matmul(%x, %x)\n %t: f32[3, 3] = transpose(%a) {perm=(1, 0)}\n %y: f32[3, 3] = add(%a, %t)",
        ["Gemm", "transpose", "add"]),
    "shared keys": (
        "(%x: f32[2, 6, 5, 4], %k: f32[2, 1, 4, 5]) {\n %s: f32[2, 6, 4, 5] = broadcast_to(%k) {shape=(2, 6, 4, 5)}\n"
        " %y: f32[2, 6, 5, 5] = matmul(%x, %s)", ["Gemm"]),
    "an operand that no strides describe": (
        "(%x: f32[4, 3, 5], %w: f32[6, 2]) {\n %t: f32[3, 4, 5] = transpose(%x) {perm=(1, 0, 2)}\n"
        " %r: f32[10, 6] = reshape(%t) {shape=(10, 6)}\n %y: f32[10, 2] = matmul(%r, %w)", ["transpose", "Gemm"]),
    "products of sizes known when they run": (
        "(%x: f32[b, s, 40], %w: f32[t, 40], %v: f32[t], %q: f32[b, s, 6], %k: f32[b, t, 6]) {\n %a: f32[b, s, t] = linear(%x, %w, %v)\n"
        " %h: f32[b, s, 2, 3] = reshape(%q) {shape=(b, s, 2, 3)}\n %i: f32[b, t, 2, 3] = reshape(%k) {shape=(b, t, 2, 3)}\n"
        " %l: f32[b, 2, s, 3] = transpose(%h) {perm=(0, 2, 1, 3)}\n %r: f32[b, 2, 3, t] = transpose(%i) {perm=(0, 2, 3, 1)}\n"
        " %p: f32[b, 2, s, t] = matmul(%l, %r)\n %z: f32[b, s, 2, t] = transpose(%p) {perm=(0, 2, 1, 3)}\n"
        " %m: f32[b, t, 2*s] = reshape(%z) {shape=(b, t, 2*s)}\n %y: f32[b, s, 2*s] = matmul(%a, %m)",
        ["Gemm", "add", "Gemm", "Gemm"]),
    "a convolution of pictures of any size": (
        "(%x: f32[b, 3, s, t], %w: f32[9, 3, 3, 2]) {\n %y: f32[b, 9, (s + 1) // 2, t - 1] = conv(%x, %w) {strides=(2, 1), low=(1, 0), high=(1, 0)}",
        ["pad", "Gemm"]),
    "a convolution of them with few results": (
        "(%x: f32[b, 3, s], %w: f32[7, 3, 3]) {\n %y: f32[b, 7, s - 2] = conv(%x, %w) {strides=(1,), low=(0,), high=(0,)}", ["conv"]),
    "a product of nothing": ("(%x: f32[4, 0], %w: f32[0, 7]) {\n %y: f32[4, 7] = matmul(%x, %w)", ["matmul"]),
    "a product in f64": ("(%x: f64[4, 40], %w: f64[40, 7]) {\n %y: f64[4, 7] = matmul(%x, %w)", ["matmul"]),
    "a convolution": (
        "(%x: f32[2, 3, 9, 7], %w: f32[5, 3, 3, 2]) {\n %y: f32[2, 5, 5, 6] = conv(%x, %w) {strides=(2, 1), low=(1, 0), high=(1, 0)}",
        ["pad", "Gemm"]),
    "a convolution in groups, cut and spread": (
        "(%x: f32[2, 6, 9], %w: f32[8, 3, 3]) {\n"
        " %y: f32[2, 8, 15] = conv(%x, %w) {strides=(1,), low=(-1,), high=(1,), input_dilation=(2,), groups=2}",
        ["reshape", "pad", "reshape", "slice", "slice", "pad", "Gemm", "transpose"]),
    "a convolution at few places": (
        "(%x: f32[3, 4, 8], %w: f32[6, 4, 7]) {\n %y: f32[3, 6, 2] = conv(%x, %w) {strides=(1,), low=(0,), high=(0,)}",
        ["Gemm", "transpose"]),
    "a convolution at few places, transposed": (
        "(%x: f32[3, 4, 8], %w: f32[6, 4, 7]) {\n %c: f32[3, 6, 2] = conv(%x, %w) {strides=(1,), low=(0,), high=(0,)}\n"
        " %y: f32[6, 3, 2] = transpose(%c) {perm=(1, 0, 2)}", ["Gemm"]),
    "a convolution at few places, turned": (
        "(%x: f32[3, 4, 8], %w: f32[6, 4, 7]) {\n %c: f32[3, 6, 2] = conv(%x, %w) {strides=(1,), low=(0,), high=(0,)}\n"
        " %y: f32[6, 2, 3] = transpose(%c) {perm=(1, 2, 0)}", ["Gemm", "transpose", "transpose"]),
    "a depthwise convolution": (
        "(%x: f32[2, 6, 9], %w: f32[6, 1, 3]) {\n %y: f32[2, 6, 9] = conv(%x, %w) {strides=(1,), low=(1,), high=(1,), groups=6}",
        ["conv"]),
    "a convolution in f64": (
        "(%x: f64[2, 3, 9], %w: f64[5, 3, 3]) {\n %y: f64[2, 5, 7] = conv(%x, %w) {strides=(1,), low=(0,), high=(0,)}", ["conv"]),
    "a convolution of unknown size": (
        "(%x: f32[b, 3, 9], %w: f32[5, 3, 3]) {\n %y: f32[b, 5, 7] = conv(%x, %w) {strides=(1,), low=(0,), high=(0,)}", ["conv"]),
    "linear in f64": ("(%x: f64[s, 40]) { param %w: f64[70, 40]\n %y: f64[s, 70] = linear(%x, %w)", ["linear"]),
    "integer linear, other block": (
        "(%x: f32[s, 40]) { param %w: int8b16f16[70, 40]\n %y: f32[s, 70] = quantized_linear(%x, %w)", ["quantized_linear"]),
    "integer linear, other scale": (
        "(%x: f32[s, 40]) { param %w: int4b32f32[70, 40]\n %y: f32[s, 70] = quantized_linear(%x, %w)", ["quantized_linear"]),
    "rows quantized once": (
        "(%x: f32[s, 40]) { param %w: int8b32f16[70, 40] param %v: int4b32f16[70, 40]\n"
        ' %a: f32[s, 70] = quantized_linear(%x, %w) {activation="int8"}\n'
        ' %c: f32[s, 70] = quantized_linear(%x, %v) {activation="int8"}\n %y: f32[s, 70] = add(%a, %c)',
        ["QuantizeRows", "LinearInt", "LinearInt", "add"]),
    "embedding, scaled": (
        "(%i: i32[b, s]) { param %w: f32[9, 40]\n %e: f32[b, s, 40] = embedding(%w, %i)\n %y: f32[b, s, 40] = mul(%e, 2.5:f32)",
        ["cast", "Embedding"]),
    "embedding in f16": ("(%i: i64[s]) { param %w: f16[9, 40]\n %y: f16[s, 40] = embedding(%w, %i) {dtype=f16}", ["embedding"]),
    "norm without weight": ("(%x: f32[b, s, 33]) {\n %y: f32[b, s, 33] = rms_norm(%x) {eps=0.01}", ["Norm"]),
    "layer norm of a sum": (
        "(%x: f32[s, 33], %z: f32[s, 33]) { param %w: f32[33] param %v: f32[33]\n"
        " %a: f32[s, 33] = add(%x, %z)\n %n: f32[s, 33] = layer_norm(%a, %w, %v)\n %y: f32[s, 33] = mul(%n, %a)",
        ["Norm", "mul"]),
    "norm of unknown size": ("(%x: f32[s, t]) {\n %y: f32[s, t] = rms_norm(%x)", ["rms_norm"]),
    "sum read before the norm": (
        "(%x: f32[s, 33], %z: f32[s, 33]) {\n %a: f32[s, 33] = add(%x, %z)\n %e: f32[s, 33] = exp(%a)\n"
        " %n: f32[s, 33] = rms_norm(%a)\n %y: f32[s, 33] = mul(%n, %e)", ["add", "exp", "Norm", "mul"]),
    "sum of two shapes": (
        "(%x: f32[s, 33], %z: f32[33]) {\n %a: f32[s, 33] = add(%x, %z)\n %y: f32[s, 33] = rms_norm(%a)", ["add", "Norm"]),
    "sum with itself": ("(%x: f32[s, 33]) {\n %a: f32[s, 33] = add(%x, %x)\n %y: f32[s, 33] = rms_norm(%a)", ["add", "Norm"]),
    "two norms of a sum": (
        "(%x: f32[s, 33], %z: f32[s, 33]) {\n %a: f32[s, 33] = add(%x, %z)\n %n: f32[s, 33] = rms_norm(%a)\n"
        " %m: f32[s, 33] = layer_norm(%a)\n %y: f32[s, 33] = mul(%n, %m)", ["Norm", "Norm", "mul"]),
    "norm of a sum with another eps": (
        "(%x: f32[s, 33], %z: f32[s, 33]) { param %w: f32[33]\n %n: f32[s, 33] = rms_norm(%z, %w) {eps=0.5}\n"
        " %a: f32[s, 33] = add(%x, %n)\n %y: f32[s, 33] = rms_norm(%a, %w)", ["Norm", "Norm"]),
    "norm read plain and quantized": (
        "(%x: f32[s, 33]) { param %w: int8b32f16[33, 33]\n %n: f32[s, 33] = rms_norm(%x)\n"
        ' %a: f32[s, 33] = quantized_linear(%n, %w) {activation="int8"}\n %y: f32[s, 33] = add(%a, %n)', ["Norm", "LinearInt", "add"]),
    "glu read twice": (
        "(%x: f32[s, 66]) { param %w: int8b32f16[33, 33]\n %n: f32[s, 33] = glu(%x)\n"
        ' %a: f32[s, 33] = quantized_linear(%n, %w) {activation="int8"}\n %y: f32[s, 33] = add(%a, %n)',
        ["Glu", "QuantizeRows", "LinearInt", "add"]),
    "rope, positions of all rows": (
        "(%x: f32[b, s, 3, 20], %p: i32[s], %f: f32[7]) {\n %y: f32[b, s, 3, 20] = rope(%x, %p, %f) {factor=1.5}",
        ["broadcast_to", "cast", "Rope"]),
    "rope of a norm": (
        "(%x: f32[b, s, 3, 20], %p: i64[b, s], %f: f32[10]) { param %w: f32[20]\n %n: f32[b, s, 3, 20] = rms_norm(%x, %w)\n"
        " %y: f32[b, s, 3, 20] = rope(%n, %p, %f) {interleaved=true}", ["Rope"]),
    "attention": (
        "(%q: f32[b, s, 6, 20], %k: f32[b, t, 2, 20], %v: f32[b, t, 2, 12]) {\n"
        " %y: f32[b, s, 6, 12] = attention(%q, %k, %v) {scale=0.3, causal=true, window=3, softcap=4.0}", ["Attention"]),
    "attention, window without causality": (
        "(%q: f32[b, s, 6, 20], %k: f32[b, t, 2, 20], %v: f32[b, t, 2, 12]) {\n"
        " %y: f32[b, s, 6, 12] = attention(%q, %k, %v) {scale=0.3, window=2}", ["Attention"]),
    "attention, booleans": (
        "(%q: f32[b, s, 6, 20], %k: f32[b, t, 2, 20], %v: f32[b, t, 2, 12], %m: bool[s, t]) {\n"
        " %y: f32[b, s, 6, 12] = attention(%q, %k, %v, %m) {scale=0.3}", ["select", "reshape", "Attention"]),
    "attention, addend that stretches": (
        "(%q: f32[b, s, 6, 20], %k: f32[b, t, 2, 20], %v: f32[b, t, 2, 12], %m: f32[b, 6, 1, t]) {\n"
        " %y: f32[b, s, 6, 12] = attention(%q, %k, %v, %m) {scale=0.3, causal=true}", ["broadcast_to", "Attention"]),
    "attention in f16": (
        "(%q: f16[b, s, 6, 20], %k: f16[b, t, 2, 20], %v: f16[b, t, 2, 12]) {\n"
        " %y: f16[b, s, 6, 12] = attention(%q, %k, %v) {scale=0.3}", ["attention"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def runner() -> Runner:
    """All cases in one library."""
    program = Program({})
    for i, (body, _) in enumerate(CASES.values()):
        one = random_program(f"graph @case{i}{_lines(body)}\n return %y\n}}", seed=i)
        renamed = {k: f"case{i}.{k}" for k in one.params}
        g = one.graphs[f"case{i}"]
        g.params = {renamed[k]: v for k, v in g.params.items()}
        for k, v in g.params.items():
            v.param = k
        program.graphs[g.name] = g
        program.params |= {renamed[k]: p for k, p in one.params.items()}
    return Runner(program, cpu())


def _lines(body: str) -> str:
    return body.replace(" param ", "\n param ")


@pytest.mark.parametrize("name", CASES)
def test_selected_and_equal(name: str, runner: Runner) -> None:
    i = list(CASES).index(name)
    program, graph = runner.program, f"case{i}"
    assert calls(selected(program, graph, cpu("znver4"))) == CASES[name][1]  # what is chosen depends on the width of vectors
    g = program[graph]
    inputs = feed(g, DIMS, seed=i)
    assert_near_reference(runner(graph, inputs), g, inputs, {k: program.params[k].load() for k in g.params})


# -- caches -----------------------------------------------------------------------------------------------------------------
def attention_text(edits: dict[str, str]) -> str:
    text = (
        "graph @step(%qkv: f32[b, s, 160], %past: i64[b], %kc: f32[b, c, 2, 20], %vc: f32[b, c, 2, 20], %f: f32[10]) {\n"
        "  param %qn: f32[20]\n  param %kn: f32[20]\n"
        + POSITIONS
        + "  %qs: f32[b, s, 80] = slice(%qkv) {starts=(0, 0, 0), stops=(b, s, 80)}\n"
        "  %ks: f32[b, s, 40] = slice(%qkv) {starts=(0, 0, 80), stops=(b, s, 120)}\n"
        "  %vs: f32[b, s, 40] = slice(%qkv) {starts=(0, 0, 120), stops=(b, s, 160)}\n"
        "  %q: f32[b, s, 4, 20] = reshape(%qs) {shape=(b, s, 4, 20)}\n"
        "  %k: f32[b, s, 2, 20] = reshape(%ks) {shape=(b, s, 2, 20)}\n"
        "  %v: f32[b, s, 2, 20] = reshape(%vs) {shape=(b, s, 2, 20)}\n"
        "  %qr: f32[b, s, 4, 20] = rms_norm(%q, %qn)\n  %kr: f32[b, s, 2, 20] = rms_norm(%k, %kn)\n"
        "  %qp: f32[b, s, 4, 20] = rope(%qr, %positions, %f)\n  %kp: f32[b, s, 2, 20] = rope(%kr, %positions, %f)\n"
        "  %y: f32[b, s, 4, 20], %k2: f32[b, c, 2, 20], %v2: f32[b, c, 2, 20] = "
        "cached_attention(%qp, %kp, %v, %kc, %vc, %past) {scale=0.3}\n"
        "  return %y, kc=%k2, vc=%v2\n}"
    )
    for old, new in edits.items():
        assert old in text
        text = text.replace(old, new)
    return text


STATES = tuple(State.full(f"{r}c", r) for r in "kv")
FUSED = ["QkvToCache", "CachedAttention"]
SEPARATE = ["Rope", "Rope", "CacheWrite", "CachedAttention"]
FORMS: dict[str, tuple[dict[str, str], list[str]]] = {
    "as the passes leave it": ({}, FUSED),
    "steps first": ({"add(%column, %steps)": "add(%steps, %column)"}, FUSED),
    "no rope": ({"cached_attention(%qp, %kp": "cached_attention(%qr, %kr"}, FUSED),
    "no norms": ({"rope(%qr": "rope(%q", "rope(%kr": "rope(%k"}, FUSED),
    "one norm": ({"rope(%kr": "rope(%k"}, SEPARATE),
    "two epsilons": ({"rms_norm(%k, %kn)": "rms_norm(%k, %kn) {eps=0.5}"}, SEPARATE),
    "rope of queries only": ({"(%qp, %kp": "(%qp, %kr"}, ["Norm", "Rope", "CacheWrite", "CachedAttention"]),
    "positions of another start": ({"reshape(%past)": "reshape(%other)", "%past: i64[b],": "%past: i64[b], %other: i64[b],"}, SEPARATE),
    "two ropes": ({"rope(%kr, %positions, %f)": "rope(%kr, %positions, %f) {interleaved=true}"}, SEPARATE),
    "values not last": ({
        "{starts=(0, 0, 80), stops=(b, s, 120)}": "{starts=(0, 0, 120), stops=(b, s, 160)}",
        "{starts=(0, 0, 120), stops=(b, s, 160)}\n  %q:": "{starts=(0, 0, 80), stops=(b, s, 120)}\n  %q:",
    }, SEPARATE),
    "wider projection": ({"f32[b, s, 160]": "f32[b, s, 170]"}, SEPARATE),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_projection_to_cache(name: str) -> None:
    edits, expected = FORMS[name]
    program = random_program(attention_text(edits))
    program.declare(states=STATES)
    g = selected(program, "step", cpu())
    assert [c for c in calls(g) if c[0].isupper()] == expected
    inputs = feed(program["step"], DIMS)
    got = Runner(program, cpu())("step", inputs)
    assert_near_reference(got, program["step"], inputs, {k: p.load() for k, p in program.params.items()})


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_projection_to_a_cache_of_codes(name: str, scheme: str) -> None:
    """The kernels that write round: what rounds in the graph is no operation of its own."""
    edits, expected = FORMS[name]
    program = random_program(attention_text(edits))
    program.declare(states=STATES)
    PassManager([QuantizeCaches(scheme)]).run(program)
    target = cpu()
    assert [c for c in calls(selected(program, "step", target)) if c[0].isupper() or "hadamard" in c or "fake" in c] == expected


def test_a_cache_of_codes_takes_what_is_rounded_alike() -> None:
    program = random_program(attention_text({}))
    program.declare(states=tuple(replace(s, stored="int8") for s in STATES))
    with pytest.raises(IRError, match=r"%kp was not rounded to int8, as its cache says \(quantize-caches\)"):
        selected(program, "step", cpu())
    program.declare(states=(replace(STATES[0], stored="int8"), STATES[1]))
    with pytest.raises(IRError, match="%kc is stored as int8, %vc as it is"):
        selected(program, "step", cpu())


PLAIN_STATES: dict[str, tuple[dict[str, Any], str]] = {
    "no role": ({"role": ""}, "f32[b, c, 2, 20]"),
    "another type": ({}, "f16[b, c, 2, 20]"),
    "another rank": ({}, "f32[b, c, 20]"),
    "capacity that groups do not fill": ({}, "f32[b, 40, 2, 20]"),
    "ring of unknown capacity": ({"kind": "ring", "capacity": 32}, "f32[b, c, 2, 20]"),
}


@pytest.mark.parametrize("name", PLAIN_STATES)
def test_state_keeps_its_form(name: str) -> None:
    changes, text = PLAIN_STATES[name]
    t = parse_type(text)
    assert isinstance(t, TensorType)
    assert cpu().state_layout(replace(STATES[0], **changes), t).type == t


def test_states_in_the_form_of_the_kernels() -> None:
    keys, values = (parse_type(f"f32[b, c, 2, {d}]") for d in (20, 20))
    assert not isinstance(keys, QTensorType)
    assert not isinstance(values, QTensorType)
    assert str(cpu().state_layout(STATES[0], keys).type) == "f32[b, 2, c, 20]"
    layout = cpu(cache="float16").state_layout(STATES[1], values)
    assert str(layout.type) == "f16[b, 2, c, 32]"
    x = np.random.default_rng(0).standard_normal((1, 16, 2, 20)).astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(layout.unpack(layout.pack(x)), x)


def test_caches_that_are_no_states_are_decomposed() -> None:
    program = random_program(attention_text({}))
    assert "cached_attention" in calls(selected(program, "step", cpu()))


REFUSED: dict[str, tuple[dict[str, str], dict[str, Any], str]] = {
    "read by another operation": ({"return %y": "%e: f32[b, c, 2, 20] = exp(%kc)\n  return %y, %e"}, {}, "can only be read by cached_attention"),
    "declared a ring": ({", c,": ", 32,"}, {"kind": "ring", "capacity": 32, "window": 4}, "is declared ring"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    edits, changes, message = REFUSED[name]
    program = random_program(attention_text(edits))
    program.declare(states=tuple(replace(s, **changes) for s in STATES))
    with pytest.raises(IRError, match=message):
        selected(program, "step", cpu())


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("bad", [-1, 3, 2**40])
def test_a_group_outside_is_an_error(bad: int, given: bool) -> None:
    """Whether it is an input or computed from one."""
    text = (
        "graph @g(%x: f32[s, 40], %i: i64[s]) {\n param %w: f32[3, 7, 40]\n %o: i64[s] = add(%i, 1:i64)\n"
        " %y: f32[s, 7] = grouped_linear(%x, %w, %o)\n return %y\n}"
    )
    program = random_program(text.replace("%w, %o", "%w, %i") if given else text)
    runner = Runner(program, cpu())
    x = np.ones((2, 40), np.float32)
    fine = np.array([0, 2]) - (not given)
    (want,) = evaluate(program["g"], {"x": x, "i": fine}, {"w": program.params["w"].load()})
    np.testing.assert_allclose(runner("g", {"x": x, "i": fine})["y"], want, rtol=1e-5)
    with pytest.raises(IRError, match=rf"{bad} (of i )?is outside 0 .. 2"):
        runner("g", {"x": x, "i": np.array([0, bad - (not given)])})


def test_embedding_counts_from_the_end() -> None:
    program = random_program("graph @g(%i: i64[s]) {\n param %w: f32[9, 40]\n %y: f32[s, 40] = embedding(%w, %i)\n return %y\n}")
    inputs = {"i": np.array([-1, 0, 8, -9])}
    w = program.params["w"].load()
    np.testing.assert_array_equal(Runner(program, cpu())("g", inputs)["y"], w[inputs["i"]])


LEFT = {
    "linear, weight no parameter": (
        "(%x: f32[s, 40], %w: f16[n, 40]) {\n %y: f32[s, n] = linear(%x, %w)", "linear", "its weight %w is no parameter"),
    "linear in f16": (
        "(%x: f16[s, 40]) { param %w: f16[70, 40]\n %y: f16[s, 70] = linear(%x, %w)", "linear",
        "%x is f16[s, 40], and it computes with f32"),
    "linear, blocks of 24": (
        "(%x: f32[s, 48]) { param %w: int8b24f16[70, 48]\n %y: f32[s, 70] = quantized_linear(%x, %w)", "quantized_linear",
        "its weight %w is int8b24f16[70, 48], and blocks are a multiple of 32 that divides a row"),
    "grouped, weight no parameter": (
        "(%x: f32[s, 40], %g: i64[s], %w: f32[3, 70, 40]) {\n %y: f32[s, 70] = grouped_linear(%x, %w, %g)", "grouped_linear",
        "its weight %w is no parameter"),
    "convolution by weights of unknown size": (
        "(%x: f32[2, 3, s], %w: f32[5, 3, k]) {\n %y: f32[2, 5, s - k + 1] = conv(%x, %w) {strides=(1,), low=(0,), high=(0,)}", "conv",
        "of the sizes 5, 3, k not all are known"),
    "norm of an unknown size": (
        "(%x: f32[7, s], %w: f32[s]) {\n %y: f32[7, s] = rms_norm(%x, %w)", "rms_norm", "of the sizes s not all are known"),
    "attention in f16": (
        "(%q: f16[b, s, 6, 20], %k: f16[b, t, 2, 20], %v: f16[b, t, 2, 12]) {\n"
        " %y: f16[b, s, 6, 12] = attention(%q, %k, %v) {scale=0.3}", "attention", "%q is f16[b, s, 6, 20], and it computes with f32"),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_is_said(name: str) -> None:
    body, op, why = LEFT[name]
    program, target = random_program(f"graph @g{_lines(body)}\n return %y\n}}"), cpu()
    left = target.kernels(target, program)(program["g"])
    assert left is not None
    assert [x.why for x in left] == [f"{op} has no kernel here: {why}"]


def test_nothing_is_left_of_what_kernels_do() -> None:
    body, _ = CASES["grouped, quantized once"]
    program, target = random_program(f"graph @g{_lines(body)}\n return %y\n}}"), cpu()
    assert target.kernels(target, program)(program["g"]) == []
