"""Clean-up: what each rule does, what it must not touch, and that random graphs keep their meaning."""

from __future__ import annotations

import numpy as np
import pytest
from wasat.ir import Builder, DType, Graph, TensorType, evaluate
from wasat.passes import Cleanup, PassManager

from wasat.testing import InterpreterCheck, check_pass, check_untouched, random_graph, random_program

INPUTS = "%x: f32[b, 4], %y: f32[b, 4], %i: i64[b, 4], %p: bool[b, 4], %h: f16[b, 4]"


def one(*lines: str, out: str = "%z") -> str:
    body = "".join(f"  {line}\n" for line in lines)
    return f"graph @f({INPUTS}) {{\n{body}  return {out}\n}}\n"


SIMPLIFIED = {
    "x - 0": (["%z: f32[b, 4] = sub(%x, 0.0:f32)"], "z=%x"),
    "x * 1": (["%z: f32[b, 4] = mul(1.0:f32, %x)"], "z=%x"),
    "x / 1": (["%z: f32[b, 4] = div(%x, 1.0:f32)"], "z=%x"),
    "i // 1": (["%z: i64[b, 4] = floor_div(%i, 1:i64)"], "z=%i"),
    "x ** 1": (["%z: f32[b, 4] = pow(%x, 1.0:f32)"], "z=%x"),
    "min(x, x)": (["%z: f32[b, 4] = minimum(%x, %x)"], "z=%x"),
    "max(x, x)": (["%z: f32[b, 4] = maximum(%x, %x)"], "z=%x"),
    "~ ~ i": (["%n: i64[b, 4] = bit_not(%i)", "%z: i64[b, 4] = bit_not(%n)"], "z=%i"),
    "x + -0": (["%z: f32[b, 4] = add(%x, -0.0:f32)"], "z=%x"),
    "i + 0": (["%z: i64[b, 4] = add(%i, 0:i64)"], "z=%i"),
    "p and true": (["%z: bool[b, 4] = logical_and(%p, true:bool)"], "z=%p"),
    "p or p": (["%z: bool[b, 4] = logical_or(%p, %p)"], "z=%p"),
    "not not p": (["%n: bool[b, 4] = logical_not(%p)", "%z: bool[b, 4] = logical_not(%n)"], "z=%p"),
    "- - x": (["%n: f32[b, 4] = neg(%x)", "%z: f32[b, 4] = neg(%n)"], "z=%x"),
    "f16 -> f32 -> f16": (["%n: f32[b, 4] = cast(%h) {dtype=f32}", "%z: f16[b, 4] = cast(%n) {dtype=f16}"], "z=%h"),
    "cast to its own type": (["%z: f32[b, 4] = cast(%x) {dtype=f32}"], "z=%x"),
    "reshape there and back": (
        ["%n: f32[4*b] = reshape(%x) {shape=(4*b,)}", "%z: f32[b, 4] = reshape(%n) {shape=(b, 4)}"], "z=%x",
    ),
    "transpose there and back": (
        ["%n: f32[4, b] = transpose(%x) {perm=(1, 0)}", "%z: f32[b, 4] = transpose(%n) {perm=(1, 0)}"], "z=%x",
    ),
    "whole slice": (["%z: f32[b, 4] = slice(%x) {starts=(0, 0), stops=(b, 4)}"], "z=%x"),
    "slices joined again": (
        ["%l: f32[b, 1] = slice(%x) {starts=(0, 0), stops=(b, 1)}", "%r: f32[b, 3] = slice(%x) {starts=(0, 1), stops=(b, 4)}",
         "%z: f32[b, 4] = concat(%l, %r) {axis=1}"], "z=%x",
    ),
    "padding by nothing": (["%z: f32[b, 4] = pad(%x) {low=(0, 0), high=(0, 0)}"], "z=%x"),
    "broadcast to itself": (["%z: f32[b, 4] = broadcast_to(%x) {shape=(b, 4)}"], "z=%x"),
    "choice between equals": (["%z: f32[b, 4] = select(%p, %x, %x)"], "z=%x"),
    "choice by true": (["%z: f32[b, 4] = select(true:bool, %x, %y)"], "z=%x"),
    "choice by false": (["%z: f32[b, 4] = select(false:bool, %x, %y)"], "z=%y"),
    "concatenation of one": (["%z: f32[b, 4] = concat(%x) {axis=1}"], "z=%x"),
    "concatenation with nothing": (
        ["%n: f32[b, 0] = slice(%y) {starts=(0, 0), stops=(b, 0)}", "%z: f32[b, 4] = concat(%n, %x) {axis=1}"], "z=%x",
    ),
}  # fmt: skip


@pytest.mark.parametrize("lines, result", SIMPLIFIED.values(), ids=SIMPLIFIED)
def test_becomes_its_operand(lines: list[str], result: str) -> None:
    check_pass(Cleanup(), one(*lines), one(out=result), [{"b": 3}])


REWRITTEN = {
    "axes of size 1 among what is repeated": (
        ["%r: f32[b, 1, 4] = reshape(%x) {shape=(b, 1, 4)}", "%n: f32[b, 3, 4] = broadcast_to(%r) {shape=(b, 3, 4)}",
         "%z: f32[1, b, 3, 1, 4] = reshape(%n) {shape=(1, b, 3, 1, 4)}"],
        ["%reshape: f32[1, b, 1, 1, 4] = reshape(%x) {shape=(1, b, 1, 1, 4)}",
         "%z: f32[1, b, 3, 1, 4] = broadcast_to(%reshape) {shape=(1, b, 3, 1, 4)}"],
    ),
    "select by a negation": (
        ["%n: bool[b, 4] = logical_not(%p)", "%z: f32[b, 4] = select(%n, %x, %y)"], ["%z: f32[b, 4] = select(%p, %y, %x)"],
    ),
    "a sum turned around": (
        ["%n: f32[b, 4] = reverse(%x) {axes=(1,)}", "%c: f32[b, 4] = cumsum(%n) {axis=1, exclusive=true}",
         "%z: f32[b, 4] = reverse(%c) {axes=(1,)}"],
        ["%z: f32[b, 4] = cumsum(%x) {axis=1, exclusive=true, reverse=true}"],
    ),
    "slices compose": (
        ["%n: f32[b, 3] = slice(%x) {starts=(0, 1), stops=(b, 4)}", "%z: f32[b, 1] = slice(%n) {starts=(0, 1), stops=(b, 2)}"],
        ["%z: f32[b, 1] = slice(%x) {starts=(0, 2), stops=(b, 3)}"],
    ),
    "widening casts compose": (
        ["%n: f32[b, 4] = cast(%h) {dtype=f32}", "%z: f64[b, 4] = cast(%n) {dtype=f64}"],
        ["%z: f64[b, 4] = cast(%h) {dtype=f64}"],
    ),
    "constants go second, of a maximum too": (
        ["%z: f32[b, 4] = maximum(2.0:f32, %x)"], ["%z: f32[b, 4] = maximum(%x, 2.0:f32)"],
    ),
    "constants go second": (["%z: f32[b, 4] = mul(2.0:f32, %x)"], ["%z: f32[b, 4] = mul(%x, 2.0:f32)"]),
    "folding": (
        ["%c: f32[] = sqrt(16.0:f32)", "%z: f32[b, 4] = div(%x, %c)"], ["%z: f32[b, 4] = div(%x, 4.0:f32)"],
    ),
    "equal nodes merge, either order": (
        ["%a: f32[b, 4] = add(%x, %y)", "%c: f32[b, 4] = add(%y, %x)", "%z: f32[b, 4] = mul(%a, %c)"],
        ["%a: f32[b, 4] = add(%x, %y)", "%z: f32[b, 4] = mul(%a, %a)"],
    ),
    "dead code": (["%n: f32[b, 4] = exp(%x)", "%z: f32[b, 4] = neg(%x)"], ["%z: f32[b, 4] = neg(%x)"]),
    "a transpose of sizes 1 is a reshape": (
        ["%n: f32[b, 1, 4] = reshape(%x) {shape=(b, 1, 4)}", "%z: f32[1, b, 4] = transpose(%n) {perm=(1, 0, 2)}"],
        ["%z: f32[1, b, 4] = reshape(%x) {shape=(1, b, 4)}"],
    ),
    "a slice within a part of a concatenation": (
        ["%n: f32[b, 8] = concat(%x, %y) {axis=1}", "%z: f32[b, 2] = slice(%n) {starts=(0, 5), stops=(b, 7)}"],
        ["%z: f32[b, 2] = slice(%y) {starts=(0, 1), stops=(b, 3)}"],
    ),
    "a part of a concatenation": (
        ["%n: f32[b, 8] = concat(%x, %y) {axis=1}", "%m: f32[b, 4] = slice(%n) {starts=(0, 4), stops=(b, 8)}",
         "%z: f32[b, 4] = neg(%m)"],
        ["%z: f32[b, 4] = neg(%y)"],
    ),
    "repetition that the operation does by itself": (
        ["%r: f32[4] = reduce_sum(%x) {axes=(0,)}", "%n: f32[b, 4] = broadcast_to(%r) {shape=(b, 4)}",
         "%z: f32[b, 4] = sub(%n, %y)"],
        ["%r: f32[4] = reduce_sum(%x) {axes=(0,)}", "%z: f32[b, 4] = sub(%r, %y)"],
    ),
    "one joined with itself": (
        ["%r: f32[b, 1] = reduce_sum(%x) {axes=(1,), keepdims=true}", "%z: f32[b, 3] = concat(%r, %r, %r) {axis=1}"],
        ["%r: f32[b, 1] = reduce_sum(%x) {axes=(1,), keepdims=true}", "%z: f32[b, 3] = broadcast_to(%r) {shape=(b, 3)}"],
    ),
}  # fmt: skip

ROWS = """graph @f(%x: f32[b, s, 2, 3], %w: f32[6, 5], %bias: f32[5]) {
  %m: f32[b*s, 6] = reshape(%x) {shape=(b*s, 6)}
  %p: f32[b*s, 5] = matmul(%m, %w)
  %q: f32[b*s, 5] = add(%p, %bias)
  %y: f32[b, s, 5] = reshape(%q) {shape=(b, s, 5)}
  return %y
}"""


def test_rows_stay_apart_around_a_product() -> None:
    """As a Gemm over batch times sequence is exported: the sequence stays an axis of its own."""
    after = """graph @f(%x: f32[b, s, 2, 3], %w: f32[6, 5], %bias: f32[5]) {
  %reshape: f32[b, s, 6] = reshape(%x) {shape=(b, s, 6)}
  %matmul: f32[b, s, 5] = matmul(%reshape, %w)
  %add: f32[b, s, 5] = add(%matmul, %bias)
  return y=%add
}"""
    check_pass(Cleanup(), ROWS, after, [{"b": 2, "s": 3}])


def test_rows_stay_apart_around_a_linear_with_its_bias() -> None:
    """As torch.nn.Linear after a reshape is exported."""
    before = """graph @f(%x: f32[b, s, 6], %w: f32[5, 6], %bias: f32[5]) {
  %m: f32[b*s, 6] = reshape(%x) {shape=(b*s, 6)}
  %p: f32[b*s, 5] = linear(%m, %w, %bias)
  %y: f32[b, s, 5] = reshape(%p) {shape=(b, s, 5)}
  return %y
}"""
    after = """graph @f(%x: f32[b, s, 6], %w: f32[5, 6], %bias: f32[5]) {
  %linear: f32[b, s, 5] = linear(%x, %w, %bias)
  return y=%linear
}"""
    check_pass(Cleanup(), before, after, [{"b": 2, "s": 3}])


@pytest.mark.parametrize("shape, result", [((3,), "rope(%x, %i, %f)"), ((2, 1), "rope(%x, %r, %f)")])
def test_rotation_at_positions_repeated_over_rows_or_in_them(shape: tuple[int, ...], result: str) -> None:
    """Repeated for every row, or within rows (as many rows as a row has elements)."""
    size = "3" if shape == (3,) else "2"
    given = ", ".join(map(str, shape))
    text = f"""graph @f(%x: f32[2, {size}, 1, 4], %i: i64[{given}], %f: f32[2]) {{
  %r: i64[2, {size}] = broadcast_to(%i) {{shape=(2, {size})}}
  %y: f32[2, {size}, 1, 4] = rope(%x, %r, %f)
  return %y
}}"""
    program = random_program(text)
    PassManager([Cleanup()], check=InterpreterCheck([{}])).run(program)
    assert result in str(program)


def test_zeros_of_two_signs_are_two() -> None:
    text = """graph @f(%x: f32[2]) {
  %a: f32[3] = pad(%x) {low=(1,), high=(0,), value=0.0}
  %b: f32[3] = pad(%x) {low=(1,), high=(0,), value=-0.0}
  return %a, %b
}"""
    assert "value=-0.0" in str(random_program(text))
    check_untouched(Cleanup(), text)


def test_products_of_integers_stay() -> None:
    text = """graph @f(%x: i32[n, 3]) {
  param %w: i32[3, 2]
  %y: i32[n, 2] = matmul(%x, %w)
  return %y
}"""
    check_untouched(Cleanup(), text)


EXACT = {
    "f16": ("f32", "f64"), "bf16": ("f32", "f64"), "f32": ("f64",), "i8": ("i16", "i32", "i64"), "i16": ("i32", "i64"),
    "i32": ("i64",), "u8": ("u16", "u32", "u64"), "u16": ("u32", "u64"), "u32": ("u64",),
}  # fmt: skip


@pytest.mark.parametrize("source", ["f16", "bf16", "f32", "f64", "i8", "i16", "i32", "i64", "u8", "u16", "u32", "u64"])
def test_casts_there_and_back(source: str) -> None:
    """They go where every value of the one type is one of the other, and nowhere else."""
    for wide in ("f16", "bf16", "f32", "f64", "i8", "i16", "i32", "i64", "u8", "u16", "u32", "u64"):
        if wide == source:
            continue
        g = Graph("f")
        x = g.add_input("x", TensorType(DType.of(source), (2,)))
        b = Builder(g)
        g.set_outputs([b.cast(b.cast(x, dtype=wide), dtype=source)])
        program = random_program(g)
        PassManager([Cleanup()]).run(program)
        assert (len(program["f"]) == 0) == (wide in EXACT.get(source, ())), f"{source} -> {wide} -> {source}"


@pytest.mark.parametrize(
    "edits",
    [
        [("%x: f32[b, s, 2, 3]", "%x: f32[b*s, 2, 3]")],  # nothing was merged but the features
        [("%x: f32[b, s, 2, 3]", "%x: f32[b, s, 4, 2]"), ("f32[b*s, 6]", "f32[b*s, 8]"), ("(b*s, 6)", "(b*s, 8)"),
         ("[6, 5]", "[b*s, 8, 5]"), ("%p: f32[b*s, 5]", "%p: f32[b*s, b*s, 5]"), ("%q: f32[b*s, 5]", "%q: f32[b*s, b*s, 5]"),
         ("%y: f32[b, s, 5] = reshape(%q) {shape=(b, s, 5)}", "%y: f32[b*s, b*s, 5] = neg(%q)")],  # a batch of products
        [("%x: f32[b, s, 2, 3]", "%x: f32[2, 3, b, s]")],  # the features are rows
    ],
)  # fmt: skip
def test_other_merged_rows_stay(edits: list[tuple[str, str]]) -> None:
    text = ROWS
    for old, new in edits:
        text = text.replace(old, new)
    check_untouched(Cleanup(), text)


BATCHED = """graph @g(%x: f32[3, b, s], %y: f32[3, 1, 4]) {
  %m: f32[3, b*s, 1] = reshape(%x) {shape=(3, b*s, 1)}
  %p: f32[3, b*s, 4] = matmul(%m, %y)
  %z: f32[3, b, s, 4] = reshape(%p) {shape=(3, b, s, 4)}
  return %z
}"""


def test_rows_of_products_under_a_batch_are_not_merged() -> None:
    """Whatever their widths, and beside one matrix for all."""
    after = """graph @g(%x: f32[3, b, s], %y: f32[3, 1, 4]) {
  %reshape: f32[3, b, s, 1] = reshape(%x) {shape=(3, b, s, 1)}
  %reshape_1: f32[3, 1, 1, 4] = reshape(%y) {shape=(3, 1, 1, 4)}
  %matmul: f32[3, b, s, 4] = matmul(%reshape, %reshape_1)
  return z=%matmul
}"""
    dims = [{"b": 2, "s": 5}, {"b": 1, "s": 3}]
    check_pass(Cleanup(), BATCHED, after, dims)
    wide = BATCHED.replace("[3, b, s]", "[3, b, s, 5]").replace("[3, b*s, 1]", "[3, b*s, 5]").replace("b*s, 1)", "b*s, 5)")
    for y, matrix in (("f32[3, 5, 4]", "%y: f32[3, 1, 5, 4]"), ("f32[5, 4]", "%y: f32[5, 4]")):
        program = random_program(wide.replace("f32[3, 1, 4]", y))
        PassManager([Cleanup()], check=InterpreterCheck(dims)).run(program)
        assert not any(str(v.shape[1]) == "b*s" for n in program["g"].nodes for v in n.outputs), matrix


def test_rows_merged_with_features_stay_so() -> None:
    text = BATCHED.replace("%y: f32[3, 1, 4]", "%y: f32[3, s, 4]").replace("[3, b, s]", "[3, b, 2, s]")
    text = text.replace("[3, b*s, 1]", "[3, 2*b, s]").replace("b*s, 1)", "2*b, s)").replace("b*s", "2*b")
    text = text.replace("f32[3, b, s, 4]", "f32[3, b, 2, 4]").replace("(3, b, s, 4)", "(3, b, 2, 4)")
    other = text.replace("%x: f32[3, b, 2, s]", "%x: f32[3, s, b, 2]")
    check_untouched(Cleanup(), other)


@pytest.mark.parametrize("before, after", REWRITTEN.values(), ids=REWRITTEN)
def test_becomes(before: list[str], after: list[str]) -> None:
    check_pass(Cleanup(), one(*before), one(*after), [{"b": 3}])


KEPT = {
    "a sum along another axis, turned around": [
        "%n: f32[b, 4] = reverse(%x) {axes=(1,)}", "%c: f32[b, 4] = cumsum(%n) {axis=0}",
        "%z: f32[b, 4] = reverse(%c) {axes=(1,)}",
    ],
    "a sum turned around behind it alone": [
        "%c: f32[b, 4] = cumsum(%x) {axis=1}", "%z: f32[b, 4] = reverse(%c) {axes=(1,)}",
    ],
    "a sum of what is turned around on another axis": [
        "%n: f32[b, 4] = reverse(%x) {axes=(0,)}", "%c: f32[b, 4] = cumsum(%n) {axis=1}",
        "%z: f32[b, 4] = reverse(%c) {axes=(1,)}",
    ],
    "what is repeated, merged with other axes": [
        "%r: f32[b, 1, 4] = reshape(%x) {shape=(b, 1, 4)}", "%n: f32[b, 3, 4] = broadcast_to(%r) {shape=(b, 3, 4)}",
        "%z: f32[b, 12] = reshape(%n) {shape=(b, 12)}",
    ],
    "1 // i": ["%z: i64[b, 4] = floor_div(1:i64, %i)"],
    "x // 1": ["%z: f32[b, 4] = floor_div(%x, 1.0:f32)"],
    "1 ** x": ["%z: f32[b, 4] = pow(1.0:f32, %x)"],
    "a slice that may begin in another part": [
        "%n: f32[2*b, 4] = concat(%x, %y) {axis=0}", "%z: f32[2*b - 3, 4] = slice(%n) {starts=(3, 0), stops=(2*b, 4)}",
    ],
    "a slice that may end in another part": [
        "%n: f32[2*b, 4] = concat(%x, %y) {axis=0}", "%z: f32[1, 4] = slice(%n) {starts=(3, 0), stops=(4, 4)}",
    ],
    "a slice across the parts of a concatenation": [
        "%n: f32[b, 8] = concat(%x, %y) {axis=1}", "%z: f32[b, 4] = slice(%n) {starts=(0, 2), stops=(b, 6)}",
    ],
    "repetition that makes the shape": [
        "%r: f32[4] = reduce_sum(%x) {axes=(0,)}", "%u: f32[4] = reduce_sum(%y) {axes=(0,)}",
        "%n: f32[b, 4] = broadcast_to(%r) {shape=(b, 4)}", "%z: f32[b, 4] = sub(%n, %u)",
    ],
    "x + 0, where x may be -0": ["%z: f32[b, 4] = add(%x, 0.0:f32)"],
    "x - -0, where x may be -0": ["%z: f32[b, 4] = sub(%x, -0.0:f32)"],
    "0 - x": ["%z: f32[b, 4] = sub(0.0:f32, %x)"],
    "1 / x": ["%z: f32[b, 4] = div(1.0:f32, %x)"],
    "x * 0, where x may be infinite": ["%z: f32[b, 4] = mul(%x, 0.0:f32)"],
    "x - x, where x may be NaN": ["%z: f32[b, 4] = sub(%x, %x)"],
    "operands of a difference": ["%a: f32[b, 4] = sub(%x, %y)", "%c: f32[b, 4] = sub(%y, %x)", "%z: f32[b, 4] = mul(%a, %c)"],
    "f32 -> f16 -> f32 loses bits": ["%n: f16[b, 4] = cast(%x) {dtype=f16}", "%z: f32[b, 4] = cast(%n) {dtype=f32}"],
    "x * 1 that broadcasts": [
        "%r: f32[4] = reduce_sum(%x) {axes=(0,)}", "%o: f32[b, 4] = broadcast_to(1.0:f32) {shape=(b, 4)}",
        "%z: f32[b, 4] = mul(%r, %o)",
    ],
    "slices joined the other way round": [
        "%l: f32[b, 2] = slice(%x) {starts=(0, 0), stops=(b, 2)}", "%r: f32[b, 2] = slice(%x) {starts=(0, 2), stops=(b, 4)}",
        "%z: f32[b, 4] = concat(%r, %l) {axis=1}",
    ],
    "slices of two values": [
        "%l: f32[b, 2] = slice(%x) {starts=(0, 0), stops=(b, 2)}", "%r: f32[b, 2] = slice(%y) {starts=(0, 2), stops=(b, 4)}",
        "%z: f32[b, 4] = concat(%l, %r) {axis=1}",
    ],
    "slices that leave some out": [
        "%l: f32[b, 2] = slice(%x) {starts=(0, 0), stops=(b, 2)}", "%r: f32[b, 1] = slice(%x) {starts=(0, 2), stops=(b, 3)}",
        "%z: f32[b, 3] = concat(%l, %r) {axis=1}",
    ],
    "slices along the axis, of a part of another": [
        "%s: f32[b, 2, 2] = reshape(%x) {shape=(b, 2, 2)}",
        "%l: f32[b, 1, 1] = slice(%s) {starts=(0, 0, 0), stops=(b, 1, 1)}",
        "%r: f32[b, 1, 1] = slice(%s) {starts=(0, 0, 1), stops=(b, 1, 2)}", "%z: f32[b, 1, 2] = concat(%l, %r) {axis=2}",
    ],
    "several joined with themselves": ["%z: f32[b, 8] = concat(%x, %x) {axis=1}"],
    "two joined, each one": [
        "%l: f32[b, 1] = reduce_sum(%x) {axes=(1,), keepdims=true}",
        "%r: f32[b, 1] = reduce_max(%x) {axes=(1,), keepdims=true}", "%z: f32[b, 3] = concat(%l, %r, %l) {axis=1}",
    ],
    "every second element": ["%z: f32[b, 2] = slice(%x) {starts=(0, 0), stops=(b, 4), steps=(1, 2)}"],
    "rotation by padding": ["%z: f32[b, 5] = pad(%x) {low=(0, 1), high=(0, 0)}"],
    "product with a transposed value": [
        "%t: f32[4, b] = transpose(%y) {perm=(1, 0)}", "%z: f32[b, b] = matmul(%x, %t)",
    ],
    "large constants stay operations": [
        "%n: i64[100000] = iota() {size=100000}", "%w: i64[b, 4] = gather(%n, %i)", "%z: i64[b, 4] = neg(%w)",
    ],
}  # fmt: skip


@pytest.mark.parametrize("lines", KEPT.values(), ids=KEPT)
def test_stays(lines: list[str]) -> None:
    check_untouched(Cleanup(), one(*lines))


def test_weights_are_read_as_stored() -> None:
    """x @ transpose(parameter), also widened, is a linear layer."""
    text = """graph @f(%x: f32[b, 4]) {{
  param %w: {dtype}[3, 4]
{cast}{z}
  return %z
}}
"""
    plain = "  %t: f32[4, 3] = transpose(%w) {perm=(1, 0)}\n  %z: f32[b, 3] = matmul(%x, %t)"
    check_pass(
        Cleanup(), text.format(dtype="f32", cast="", z=plain),
        text.format(dtype="f32", cast="", z="  %z: f32[b, 3] = linear(%x, %w)"), [{"b": 2}],
    )  # fmt: skip
    cast = "  %c: f32[3, 4] = cast(%w) {dtype=f32}\n"
    check_pass(
        Cleanup(), text.format(dtype="f16", cast=cast, z=plain.replace("(%w)", "(%c)")),
        text.format(dtype="f16", cast=cast, z="  %z: f32[b, 3] = linear(%x, %c)"), [{"b": 2}],
    )  # fmt: skip


def test_folding_is_the_reference() -> None:
    """0/0 is NaN and 1/0 infinity, as the operation itself says."""
    g = Graph("f")
    b = Builder(g)
    g.set_outputs([b.div(b.constant(np.array([0.0, 1.0], np.float32)), b.constant(0.0))])
    program = random_program(g)
    PassManager([Cleanup()]).run(program)
    assert [n.op.name for n in program["f"].nodes] == ["constant"]
    (y,) = evaluate(program["f"], {})
    np.testing.assert_array_equal(y, [np.nan, np.inf])


def test_unused_parameters_go() -> None:
    g = Graph("f")
    g.add_param("w", TensorType(DType.F32, (2,)))
    g.set_outputs([g.add_input("x", TensorType(DType.F32, (2,)))])
    program = random_program(g)
    PassManager([Cleanup()]).run(program)
    assert not program["f"].params


@pytest.mark.parametrize("seed", range(40))
def test_random_graphs_keep_their_meaning_and_settle(seed: int) -> None:
    program = random_program(random_graph(np.random.default_rng(seed), 40))
    PassManager([Cleanup()], check=InterpreterCheck([{"b": 1, "s": 1}, {"b": 2, "s": 3}])).run(program)
    once = str(program)
    report = PassManager([Cleanup()]).run(program)
    assert str(program) == once
    assert not report.steps[0].modified


WEIGHTS = """graph @f(%x: f32[b, 4], %i: i64[b, 2]) {
  param %w: f32[4, 3]
  %y: f32[b, 3] = matmul(%x, %w)
  %z: f32[b, 2, 3] = gather(%w, %i)
  return %y, %z
}"""


def test_parameters_are_read_by_rows() -> None:
    """A product with a parameter is linear, a lookup in one an embedding: what the passes after it, and kernels, know."""
    after = """graph @f(%x: f32[b, 4], %i: i64[b, 2]) {
  param %w: f32[4, 3]
  %transpose: f32[3, 4] = transpose(%w) {perm=(1, 0)}
  %y: f32[b, 3] = linear(%x, %transpose)
  %z: f32[b, 2, 3] = embedding(%w, %i) {dtype=f32}
  return %y, %z
}"""
    check_pass(Cleanup(), WEIGHTS, after, [{"b": 3}])


@pytest.mark.parametrize(
    "edits",
    [
        [("%i: i64[b, 2]) {\n  param %w: f32[4, 3]", "%i: i64[b, 2], %w: f32[4, 3]) {")],
        [("param %w: f32[4, 3]", "param %w: f32[5, 4, 3]"), ("%y: f32[b, 3]", "%y: f32[5, b, 3]"),
         ("%z: f32[b, 2, 3]", "%z: f32[b, 2, 4, 3]")],
        [("gather(%w, %i)", "gather(%w, %i) {axis=1}"), ("%z: f32[b, 2, 3]", "%z: f32[4, b, 2]"), ("matmul(%x, %w)", "neg(%x)"),
         ("%y: f32[b, 3]", "%y: f32[b, 4]")],
        [("f32[4, 3]", "i64[4, 3]"), ("%z: f32", "%z: i64"), ("matmul(%x, %w)", "neg(%x)"), ("%y: f32[b, 3]", "%y: f32[b, 4]")],
        [("param %w: f32[4, 3]", "param %w: f32[4, 3]\n  param %v: f32[2, 4]"), ("%y: f32[b, 3] = matmul(%x,",
          "%y: f32[2, 3] = matmul(%v,"),
         ("gather(%w, %i)", "broadcast_to(1.0:f32) {shape=(b, 2, 3)}")],
    ],
)  # fmt: skip
def test_other_products_and_lookups_stay(edits: list[tuple[str, str]]) -> None:
    text = WEIGHTS
    for old, new in edits:
        assert old in text
        text = text.replace(old, new)
    check_untouched(Cleanup(), text)


ROPE = """graph @f(%x: f32[b, s, 2, 4], %at: i64[{given}], %w: f32[2]) {{
{lines}  %z: f32[b, s, 2, 4] = rope(%x, %{which}, %w) {{factor=1.5, interleaved=true}}
  return %z
}}
"""


def test_rotation_at_repeated_positions() -> None:
    repeat = "  %n: i64[b, s] = broadcast_to(%at) {shape=(b, s)}\n"
    alone = "  %reshape: i64[s] = reshape(%at) {shape=(s,)}\n"
    dims = [{"b": 2, "s": 3}, {"b": 1, "s": 1}]
    for given, lines, which in (("s", "", "at"), ("1, s", alone, "reshape")):
        before = ROPE.format(given=given, lines=repeat, which="n")
        check_pass(Cleanup(), before, ROPE.format(given=given, lines=lines, which=which), dims)
    check_untouched(Cleanup(), ROPE.format(given="b, 1", lines=repeat, which="n"))
