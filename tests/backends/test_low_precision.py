"""Element types that compiled programs carry as bytes: every code, every rounding, what moves and what is refused."""

from __future__ import annotations

import itertools
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("tvm")

from wasat.backends.tvm.build import Runner, plan
from wasat.backends.tvm.ops.low_precision import NARROW
from wasat.backends.tvm.targets import cpu, target_named
from wasat.ir import ArrayParam, Builder, DType, Graph, IRError, Program, QArray, QTensorType, evaluate, parse_program, type_of
from wasat.runtime import load

import wasat as ws

TYPES = sorted(NARROW, key=str)
FLOATS = [t for t in TYPES if t.is_float]
INTEGERS = [t for t in TYPES if t.is_int]


def _same_bits(got: np.ndarray, want: np.ndarray, what: str) -> None:
    assert (got.dtype, got.shape) == (want.dtype, want.shape), what
    if want.dtype.kind in "fV" and want.dtype.itemsize > 1:  # any NaN is as good as any other
        nan = np.isnan(want)
        np.testing.assert_array_equal(np.isnan(got), nan, what)
        got, want = np.where(nan, 0, got).astype(want.dtype), np.where(nan, 0, want).astype(want.dtype)
    np.testing.assert_array_equal(got.view(f"u{want.itemsize}"), want.view(f"u{want.itemsize}"), what)


def _check_casts(cases: dict[tuple[DType, DType], np.ndarray]) -> None:
    """Each cast compiled equals its reference, bit by bit; all in one library."""
    names = {pair: f"{pair[0]}_to_{pair[1]}" for pair in cases}
    program = parse_program("\n".join(
        f"graph @{names[a, b]}(%x: {a}[n]) {{\n  %y: {b}[n] = cast(%x) {{dtype={b}}}\n  return %y\n}}" for a, b in cases
    ))  # fmt: skip
    run = Runner(program, cpu())
    for pair, x in cases.items():
        (want,) = evaluate(program[names[pair]], {"x": x})
        assert isinstance(want, np.ndarray)
        _same_bits(run(names[pair], {"x": x})["y"], want, names[pair])


def _codes(dtype: DType) -> np.ndarray:
    return np.arange(2**dtype.bits, dtype=np.uint8).view(dtype.np)


def test_every_code_decodes() -> None:
    targets = [DType.F64, DType.F32, DType.F16, DType.BF16, DType.I64, DType.I32, DType.I8, DType.U8, DType.BOOL]
    _check_casts({(a, b): _codes(a) for a in TYPES for b in targets})


def test_every_half_encodes() -> None:
    halves = np.arange(2**16, dtype=np.uint16)
    _check_casts({
        (a, b): halves.view(a.np) for a, b in itertools.product([DType.F16, DType.BF16], TYPES)
    })  # fmt: skip


def _around(dtype: DType) -> np.ndarray:
    """The f32 numbers between two neighbours of ``dtype``, the ties and what lies next to them; zeros, limits and NaN."""
    finite = _codes(dtype).astype(np.float32)
    finite = np.unique(finite[np.isfinite(finite)])
    middle = ((finite[1:].astype(np.float64) + finite[:-1]) / 2).astype(np.float32)
    top = finite[-1].astype(np.float64)
    beyond = np.minimum(top * np.array([1.01, 1.0625, 1.125, 1.25, 1.5, 1e6]), np.finfo(np.float32).max).astype(np.float32)
    x = np.concatenate([finite, middle, beyond, [0.0, np.inf, np.nan, np.finfo(np.float32).max, 1e-45, 2.0**-127]])
    x = x.astype(np.float32)
    x = np.concatenate([x, -x])
    with np.errstate(over="ignore"):
        return np.concatenate([x, np.nextafter(x, np.float32(np.inf)), np.nextafter(x, np.float32(-np.inf))])


def test_ties_and_limits_encode() -> None:
    wide = {(DType.F64, b): _around(b).astype(np.float64) * (1 + 1e-12) for b in FLOATS}
    _check_casts({(DType.F32, b): _around(b) for b in FLOATS} | wide)


def test_powers_of_two_are_the_nearest() -> None:
    x = np.array([1e-45, 1.49 * 2.0**-127, 1.5 * 2.0**-127, 2.0**-126, 2.9, 3, 1.49 * 2.0**127, 1.5 * 2.0**127, np.inf, 0, -1])
    program = parse_program("graph @g(%x: f32[n]) {\n  %y: f8e8m0[n] = cast(%x) {dtype=f8e8m0}\n  return %y\n}")
    (found,) = evaluate(program["g"], {"x": x.astype(np.float32)})
    assert np.asarray(found).view(np.uint8).tolist() == [0, 0, 1, 1, 128, 129, 254, 255, 255, 255, 255]


def test_f64_is_rounded_by_way_of_f32() -> None:
    x = np.array([1 + 2.0**-8 + 2.0**-40, 1 + 3 * 2.0**-8 - 2.0**-40, -1 - 2.0**-8 - 2.0**-40, 1e300, np.nan])
    program = parse_program("graph @g(%x: f64[n]) {\n  %y: bf16[n] = cast(%x) {dtype=bf16}\n  return %y\n}")
    (found,) = evaluate(program["g"], {"x": x})
    assert np.asarray(found)[:3].tolist() == [1, 1 + 2.0**-6, -1]  # rounded once, none would be a tie
    _check_casts({(DType.F64, DType.BF16): x})


def test_integers_encode() -> None:
    x = np.array([0, 1, -1, 3, 7, 8, -8, -9, 15, 16, 100, 127, -128], np.int64)
    _check_casts(
        {(DType.I64, b): x for b in TYPES}
        | {(DType.I8, b): x.astype(np.int8) for b in TYPES}
        | {(DType.U8, b): x.astype(np.uint8) for b in TYPES}
        | {(DType.BOOL, b): x > 0 for b in TYPES}
    )


@pytest.mark.slow
def test_narrow_to_narrow() -> None:
    # NumPy has no cast from f8e8m0 to the other narrow ones
    pairs = [(a, b) for a, b in itertools.product(TYPES, TYPES) if a is not b and DType.F8E8M0 not in (a, b)]
    _check_casts({(a, b): _codes(a) for a, b in pairs})


def test_bits_above_a_code_do_not_matter() -> None:
    x = np.arange(256, dtype=np.uint8)
    program = parse_program("\n".join(
        f"graph @{t}(%x: {t}[n]) {{\n  %y: f32[n] = cast(%x) {{dtype=f32}}\n  return %y\n}}" for t in TYPES if t.bits < 8
    ))  # fmt: skip
    run = Runner(program, cpu())
    for name in program.graphs:
        t = DType(name)
        _same_bits(run(name, {"x": x.view(t.np)})["y"], _codes(t)[x % 2**t.bits].astype(np.float32), name)


MOVES = """graph @moves(%x: {t}[b, 4], %i: i64[3], %c: bool[b, 4], %p: {t}[b, 4]) {{
  %r: {t}[4*b] = reshape(%x) {{shape=(4*b,)}}
  %s: {t}[b, 2] = slice(%x) {{starts=(0, 1), stops=(b, 3)}}
  %g: {t}[b, 3] = gather(%x, %i) {{axis=1}}
  %w: {t}[b, 4] = select(%c, %x, %p)
  %j: {t}[b, 8] = concat(%x, %p) {{axis=1}}
  %z: {t}[b, 6] = pad(%x) {{low=(0, 1), high=(0, 1), value=1.0}}
  %v: {t}[b, 4] = reverse(%x) {{axes=(1,)}}
  return %r, %s, %g, %w, %j, %z, %v
}}
"""


@pytest.mark.parametrize("dtype", [DType.F8E4M3, DType.F8E5M2FNUZ, DType.F4E2M1, DType.I4, DType.U2], ids=str)
def test_moves(dtype: DType) -> None:
    text = MOVES.format(t=dtype)
    program = parse_program(text if dtype.is_float else text.replace("1.0}", "1}"))
    codes = _codes(dtype)
    x, p = np.resize(codes, (3, 4)), np.resize(codes[::-1], (3, 4))
    feeds = {"x": x, "p": p, "i": np.array([2, 0, -1]), "c": np.arange(12).reshape(3, 4) % 3 == 0}
    got = Runner(program, cpu())("moves", feeds)
    for name, want in zip(program["moves"].output_names, evaluate(program["moves"], feeds)):
        assert isinstance(want, np.ndarray)
        _same_bits(got[name].reshape(-1), want.reshape(-1), name)


def test_parameters_and_constants() -> None:
    program = parse_program("""graph @f(%x: f32[4]) {
  param %w: f8e4m3[4]
  %c: i4[4] = constant() {value=dense<i4[4], 1 -8 7 0>}
  %a: f32[4] = cast(%w) {dtype=f32}
  %b: f32[4] = cast(%c) {dtype=f32}
  %s: f32[4] = add(%a, %b)
  %y: f32[4] = add(%s, %x)
  return %y
}""")
    w = np.array([0.5, -448.0, 2.0**-9, 3.25]).astype(ml_dtypes.float8_e4m3fn)
    program.params["w"] = ArrayParam(w, type_of(w))
    got = Runner(program, cpu())("f", {"x": np.zeros(4, np.float32)})["y"]
    np.testing.assert_array_equal(got, w.astype(np.float32) + np.array([1, -8, 7, 0], np.float32))


def test_narrow_scales_of_a_quantized_weight() -> None:
    q = QTensorType("int8", (2, 8), 4, DType.F8E8M0)
    scales = np.array([[1.0, 0.25], [2.0, 8.0]]).astype(ml_dtypes.float8_e8m0fnu)
    w = QArray(q, np.arange(16, dtype=np.int8).reshape(2, 8), scales)
    g = Graph("f")
    y = Builder(g).dequantize(g.add_param("w", q), dtype=DType.F32)
    g.set_outputs([y])
    got = Runner(Program({"f": g}, {"w": ArrayParam(w, q)}), cpu())("f", {})
    np.testing.assert_array_equal(got[g.output_names[0]], w.dense())


@pytest.mark.parametrize("op", ["add(%x, %x)", "equal(%x, %x)", "sort(%x) {axis=0}", "reduce_max(%x) {axes=(0,)}"])
@pytest.mark.parametrize("dtype, wide", [("f8e4m3", "f32"), ("i4", "i32")])
def test_arithmetic_is_refused(op: str, dtype: str, wide: str) -> None:
    out = "bool[n]" if op.startswith("equal") else f"{dtype}[]" if op.startswith("reduce") else f"{dtype}[n]"
    program = parse_program(f"graph @f(%x: {dtype}[n]) {{\n  %y: {out} = {op}\n  return %y\n}}")
    with pytest.raises(IRError, match=f"do not compute with it: cast it to {wide}"):
        Runner(program, cpu())


def test_an_artifact_takes_and_gives_codes(tmp_path: Path) -> None:
    program = parse_program("""graph @f(%x: f8e4m3[n]) {
  %y: f32[n] = cast(%x) {dtype=f32}
  %z: i4[n] = cast(%y) {dtype=i4}
  return %z
}""")
    ws.compile(program, tmp_path / "out", threads=1)
    codes = np.arange(256, dtype=np.uint8)
    (want,) = evaluate(program["f"], {"x": codes.view(DType.F8E4M3.np)})
    got = load(tmp_path / "out").run("f", x=codes)
    np.testing.assert_array_equal(got["z"].view(DType.I4.np), want)


def test_casts_and_extremes_compile_for_a_gpu() -> None:
    """Compiled, not run."""
    plan(parse_program("""graph @f(%x: f32[b, n], %c: f8e4m3[n]) {
  %e: f8e5m2[b, n] = cast(%x) {dtype=f8e5m2}
  %i: i4[b, n] = cast(%x) {dtype=i4}
  %d: f32[n] = cast(%c) {dtype=f32}
  %m: f32[b] = reduce_max(%x) {axes=(1,)}
  %a: i64[b] = arg_min(%x) {axis=1}
  return %e, %i, %d, %m, %a
}"""), target_named("cuda"))  # fmt: skip
