"""Integers in compiled code: the interpreter's values at the ends of every type, by zero, by -1, beyond the width."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from wasat.backends.tvm.build import Runner
from wasat.backends.tvm.targets import cpu
from wasat.ir import DType, evaluate, parse, parse_program

TYPES = ["i8", "i16", "i32", "i64", "u8", "u16", "u32", "u64"]
BINARY = [
    "add", "sub", "mul", "div", "floor_div", "mod", "pow", "shift_left", "shift_right", "maximum", "minimum", "bit_and",
    "bit_or", "bit_xor",
]  # fmt: skip
COMPARE = ["less", "less_equal", "greater", "greater_equal", "equal", "not_equal"]
UNARY = ["neg", "abs", "sign", "bit_not"]


def ends(dtype: str) -> list[int]:
    """Numbers at which something may go wrong."""
    low, high = DType(dtype).range
    found = [low, low + 1, -128, -100, -7, -2, -1, 0, 1, 2, 3, 7, 31, 32, 63, 64, 100, 127, 200, 255, high // 2 + 1, high]
    return [x for x in found if low <= x <= high]


def all_ops(dtype: str) -> str:
    lines = [f"  %{op}: {dtype}[n] = {op}(%x, %z)\n" for op in BINARY]
    lines += [f"  %{op}: bool[n] = {op}(%x, %z)\n" for op in COMPARE]
    lines += [f"  %{op}: {dtype}[n] = {op}(%x)\n" for op in UNARY]
    names = ", ".join(f"%{op}" for op in [*BINARY, *COMPARE, *UNARY])
    return f"graph @{dtype}(%x: {dtype}[n], %z: {dtype}[n]) {{\n{''.join(lines)}  return {names}\n}}\n"


def chain(rng: random.Random, name: str) -> str:
    """Operations on each other's results and on constants: what is fused into one loop, where compilers reason about ranges."""
    dtype = rng.choice(TYPES)
    values, bools, lines = ["%x", "%z"], [], []

    def operand() -> str:
        return rng.choice(values) if rng.random() < 0.65 else f"{rng.choice(ends(dtype))}:{dtype}"

    for i in range(rng.randrange(3, 9)):
        kind = rng.random()
        pair = [rng.choice(values), operand()]
        rng.shuffle(pair)
        if kind < 0.65:
            lines.append(f"%v{i}: {dtype}[n] = {rng.choice(BINARY)}({', '.join(pair)})")
            values.append(f"%v{i}")
        elif kind < 0.75:
            lines.append(f"%v{i}: {dtype}[n] = {rng.choice(UNARY)}({rng.choice(values)})")
            values.append(f"%v{i}")
        elif kind < 0.9 or not bools:
            lines.append(f"%b{i}: bool[n] = {rng.choice(COMPARE)}({', '.join(pair)})")
            bools.append(f"%b{i}")
        else:
            lines.append(f"%v{i}: {dtype}[n] = select({rng.choice(bools)}, {', '.join(pair)})")
            values.append(f"%v{i}")
    body = "".join(f"  {line}\n" for line in lines)
    return f"graph @{name}(%x: {dtype}[n], %z: {dtype}[n]) {{\n{body}  return {', '.join((values[2:] + bools)[-3:])}\n}}\n"


KNOWN = """graph @zero_minus(%x: u32[n], %z: u32[n]) {
  %y: u32[n] = sub(0:u32, %x)
  return %y
}
graph @largest(%x: u64[n], %z: u64[n]) {
  %a: u64[n] = add(%x, 18446744073709551615:u64)
  %y: u64[n] = mul(%z, %a)
  return %y
}
graph @overflow(%x: i32[n], %z: i32[n]) {
  %s: i32[n] = add(%x, 1:i32)
  %y: bool[n] = greater(%s, %x)
  return %y
}
graph @overflow_of_i64(%x: i64[n], %z: i64[n]) {
  %s: i64[n] = add(%x, 1:i64)
  %y: bool[n] = greater(%s, %x)
  return %y
}
"""
CHAINS = [f"chain{i}" for i in range(24)]


@pytest.fixture(scope="module")
def compiled() -> Runner:
    """All graphs in one library."""
    rng = random.Random(0)
    texts = [*map(all_ops, TYPES), KNOWN, *(chain(rng, name) for name in CHAINS)]
    return Runner(parse_program("".join(texts)), cpu())


@pytest.mark.parametrize("name", [*TYPES, "zero_minus", "largest", "overflow", "overflow_of_i64", *CHAINS])
def test_equal_to_the_interpreter(name: str, compiled: Runner) -> None:
    g = compiled.program[name]
    dtype = g.inputs[0].tensor.dtype
    x, z = np.array(list(itertools.product(ends(dtype.value), repeat=2)), dtype.np).T
    got = compiled(name, {"x": x, "z": z})
    for output, want in zip(g.output_names, evaluate(g, {"x": x, "z": z})):
        assert isinstance(want, np.ndarray)
        wrong = np.flatnonzero(got[output] != want)
        cases = [(output, int(x[i]), int(z[i]), int(want[i]), int(got[output][i])) for i in wrong[:5]]
        assert not cases


def test_values_by_hand() -> None:
    """What the interpreter says itself: NumPy's quotients, torch's negative powers, C's width."""

    def value(op: str, x: int, z: int, dtype: str = "i32") -> int:
        g = parse(f"graph @g(%x: {dtype}[], %z: {dtype}[]) {{\n  %y: {dtype}[] = {op}(%x, %z)\n  return %y\n}}")
        return int(evaluate(g, {"x": np.array(x, DType(dtype).np), "z": np.array(z, DType(dtype).np)})[0])  # type: ignore[arg-type]

    least = -(2**31)
    assert [value(op, 7, 0) for op in ("div", "floor_div", "mod")] == [0, 0, 0]
    assert [value(op, least, -1) for op in ("div", "floor_div", "mod")] == [least, least, 0]
    assert [value(op, -7, 2) for op in ("div", "floor_div", "mod")] == [-3, -4, 1]
    powers = [(2, -1), (1, -3), (-1, -3), (-1, -4), (0, -1), (3, 21)]
    assert [value("pow", x, z) for x, z in powers] == [0, 1, -1, 1, 0, 1870418611]
    assert [value("shift_left", 1, z) for z in (31, 32, -1)] == [least, 0, 0]
    assert [value("shift_right", -8, z) for z in (1, 31, 32, -1)] == [-4, -1, -1, -1]
    assert value("sub", 0, 1, "u8") == 255
