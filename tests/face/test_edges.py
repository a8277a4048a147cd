"""What types leave to the run: sizes, indices. The interpreter and an artifact give the same numbers or the same refusal.

All graphs are entries of one artifact. A case is a graph, and runs of it: inputs, and the numbers or the words of the error.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from wasat.backends.tvm.build import Runner
from wasat.backends.tvm.targets import cpu
from wasat.frontend import nn
from wasat.ir import ArrayParam, Program, QArray, QTensorType, WasatError, parse, type_of
from wasat.runtime import InputError, Model, RuntimeErrorBase

import wasat as ws

Run = tuple[dict[str, Any], Any]


def f(*rows: Any) -> np.ndarray:
    return np.array(rows, np.float32)


def count(*shape: int) -> np.ndarray:
    """1, 2, 3, …: no number looks like its neighbour, or like fresh memory."""
    return np.arange(1, 1 + int(np.prod(shape)), dtype=np.float32).reshape(shape)


SIZES: dict[str, tuple[str, list[Run]]] = {
    "add": ("(%x: f32[b, s], %z: f32[c, t]) {\n %y: f32[b, s] = add(%x, %z)", [
        ({"x": count(2, 3), "z": count(2, 3)}, 2 * count(2, 3)),
        ({"x": count(2, 3), "z": count(2, 2)}, "needs s == t, which b=2, s=3, c=2, t=2 does not satisfy"),
        ({"x": count(1, 3), "z": count(2, 3)}, "needs b == c"),
    ]),
    "select": ("(%c: bool[n], %x: f32[m], %z: f32[k]) {\n %y: f32[n] = select(%c, %x, %z)", [
        ({"c": np.ones(4, bool), "x": count(2), "z": count(4)}, "needs n == m"),
        ({"c": np.ones(4, bool), "x": count(4), "z": count(4)}, count(4)),
    ]),
    "matmul": ("(%x: f32[b, k], %z: f32[m, n]) {\n %y: f32[b, n] = matmul(%x, %z)", [
        ({"x": count(2, 3), "z": count(2, 4)}, "needs k == m"),
    ]),
    "rms_norm": ("(%x: f32[b, k], %w: f32[m]) {\n %y: f32[b, k] = rms_norm(%x, %w)", [
        ({"x": count(2, 4), "w": count(3)}, "needs m == k"),
    ]),
    "glu": ("(%x: f32[n]) {\n %y: f32[n // 2] = glu(%x)", [({"x": count(3)}, "needs n % 2 == 0")]),
    "twice": ("(%x: f32[2*n], %z: f32[m]) {\n %y: f32[m] = add(%x, %z)", [
        ({"x": count(4), "z": count(4)}, 2 * count(4)), ({"x": count(4), "z": count(2)}, "needs 2*n == m"),
        ({"x": count(3), "z": count(3)}, "2*n"),
    ]),
    "reshape": ("(%x: f32[n]) {\n %y: f32[2, 3] = reshape(%x) {shape=(2, 3)}", [
        ({"x": count(6)}, count(2, 3)), ({"x": count(5)}, "needs n == 6"),
    ]),
    "slice": ("(%x: f32[n]) {\n %y: f32[2] = slice(%x) {starts=(2,), stops=(4,)}", [
        ({"x": count(4)}, f(3, 4)), ({"x": count(3)}, "needs 4 <= n"),
    ]),
    "slice from behind": ("(%x: f32[n]) {\n %y: f32[3] = slice(%x) {starts=(n - 4,), stops=(n - 1,)}", [
        ({"x": count(5)}, f(2, 3, 4)), ({"x": count(3)}, "needs 0 <= n - 4"),
    ]),
    "slice of another size": ("(%x: f32[n], %z: f32[m]) {\n %y: f32[m] = slice(%x) {starts=(0,), stops=(m,)}", [
        ({"x": count(4), "z": count(2)}, f(1, 2)), ({"x": count(2), "z": count(4)}, "needs m <= n"),
    ]),
    "pad": ("(%x: f32[n], %z: f32[m]) {\n %y: f32[m] = pad(%x) {low=(0,), high=(m - n,)}", [
        ({"x": count(2), "z": count(3)}, f(1, 2, 0)), ({"x": count(3), "z": count(2)}, "needs 0 <= m - n"),
    ]),
    "pool": ('(%x: f32[1, 1, n]) {\n %y: f32[1, 1, n - 2] = pool(%x) {kind="max", kernel=(3,), strides=(1,), low=(0,), '
             'high=(0,)}', [
        ({"x": count(1, 1, 4)}, count(1, 1, 2) + 2), ({"x": count(1, 1, 2)}, "needs 1 <= n - 2"),
    ]),
    "conv": ("(%x: f32[1, 1, n], %w: f32[1, 1, 3]) {\n %y: f32[1, 1, n - 2] = conv(%x, %w) {strides=(1,), "
             "low=(0,), high=(0,)}", [
        ({"x": count(1, 1, 3), "w": count(1, 1, 3)}, f([[14]])),
        ({"x": count(1, 1, 1), "w": count(1, 1, 3)}, "needs 0 <= n - 2"),
    ]),
    "top_k": ("(%x: f32[n]) {\n %y: f32[3], %at: i64[3] = top_k(%x) {k=3}", [
        ({"x": count(4)}, f(4, 3, 2)), ({"x": count(2)}, "needs 3 <= n"),
    ]),
    "scatter_along": (
        "(%x: f32[n, 2], %i: i64[m, k], %u: f32[m, k]) {\n %y: f32[n, 2] = scatter_along(%x, %i, %u) {axis=0}", [
            ({"x": count(1, 2), "i": np.array([[0, 0]]), "u": f([7, 8])}, f([7, 8])),
            ({"x": count(1, 2), "i": np.array([[0, 0, 0]]), "u": f([7, 8, 9])}, "needs k <= 2"),
        ]),
    "scan": (
        "(%a: f32[n], %z: f32[m]) {\n %y: f32[n] = scan(%a, %z) {body=graph @body(%s: f32[], %t: f32[]) {\n"
        "  %u: f32[] = add(%s, %t)\n  return %u\n }, carries=0, slices=2}", [
            ({"a": count(3), "z": count(3)}, 2 * count(3)), ({"a": count(3), "z": count(2)}, "needs n == m"),
        ]),
    "scan of rows whose width its body says": (
        "(%a: f32[n], %z: f32[m, k]) {\n %y: f32[2] = scan(%a, %z) {body=graph @body(%s: f32[2], %t: f32[2]) {\n"
        "  %u: f32[2] = mul(%s, %t)\n  return %u\n }, carries=1, slices=1}", [
            ({"a": count(2), "z": count(2, 2)}, f(3, 16)), ({"a": count(2), "z": count(2, 3)}, "needs k == 2"),
            ({"a": count(2), "z": count(0, 2)}, f(1, 2)), ({"a": count(3), "z": count(1, 2)}, "needs n == 2"),
        ]),
    "cond whose branches say sizes": (
        "(%c: bool[], %a: f32[n], %z: f32[m, k]) {\n %y: f32[2] = cond(%c, %a, %z) {then=graph @then(%s: f32[2], "
        "%t: f32[2, 3]) {\n  %u: f32[2] = reduce_sum(%t) {axes=(1,)}\n  %v: f32[2] = mul(%s, %u)\n  return %v\n }, "
        "otherwise=graph @otherwise(%s: f32[2], %t: f32[2, 3]) {\n  return %s\n }}", [
            ({"c": np.array(True), "a": count(2), "z": count(2, 3)}, f(6, 30)),
            ({"c": np.array(False), "a": count(2), "z": count(2, 3)}, f(1, 2)),
            ({"c": np.array(False), "a": count(2), "z": count(2, 2)}, "needs k == 3"),
        ]),
}  # fmt: skip

_OUT = {"past the end": (5, "index 5 is outside -5 .. 4"), "before the beginning": (-6, "index -6 is outside -5 .. 4"),
        "huge": (10**12, "index 1000000000000 is outside -5 .. 4")}  # fmt: skip
_X = f(1, 2, 3, 4, 5)
_W = np.arange(10, dtype=np.float32).reshape(5, 2)


def _indexed(body: str, inputs: Callable[[np.ndarray], dict[str, Any]], last: np.ndarray) -> tuple[str, list[Run]]:
    """Runs with the indices 0 and -1, which gives ``last``, and with each that is outside."""
    def ids(i: int) -> np.ndarray:
        return np.array([0, i])

    return body, [(inputs(ids(-1)), last), *((inputs(ids(i)), words) for i, words in _OUT.values())]


INDICES: dict[str, tuple[str, list[Run]]] = {
    "gather": _indexed(
        "(%x: f32[n], %j: i64[m]) {\n %i: i64[m] = neg(%j)\n %y: f32[m] = gather(%x, %i)",
        lambda i: {"x": _X, "j": -i}, f(1, 5)),
    "gather of a second axis": _indexed(
        "(%x: f32[2, n], %j: i64[m]) {\n %i: i64[m] = neg(%j)\n %y: f32[2, m] = gather(%x, %i) {axis=1}",
        lambda i: {"x": np.stack([_X, -_X]), "j": -i}, f([1, 5], [-1, -5])),
    "take_along": _indexed(
        "(%x: f32[b, n], %j: i64[1, m]) {\n %i: i64[1, m] = neg(%j)\n %y: f32[b, m] = take_along(%x, %i) {axis=1}",
        lambda i: {"x": _X[None], "j": -i[None]}, f([1, 5])),
    "scatter": _indexed(
        "(%x: f32[n], %j: i64[m], %u: f32[m]) {\n %i: i64[m] = neg(%j)\n %y: f32[n] = scatter(%x, %i, %u)",
        lambda i: {"x": _X, "j": -i, "u": f(7, 8)}, f(7, 2, 3, 4, 8)),
    "scatter_along": _indexed(
        "(%x: f32[n], %j: i64[m], %u: f32[m]) {\n %i: i64[m] = neg(%j)\n %y: f32[n] = scatter_along(%x, %i, %u)",
        lambda i: {"x": _X, "j": -i, "u": f(7, 8)}, f(7, 2, 3, 4, 8)),
    "take_row": _indexed(
        "(%x: f32[2, n], %j: i64[2]) {\n %i: i64[2] = neg(%j)\n %y: f32[2, 1] = take_row(%x, %i)",
        lambda i: {"x": np.stack([_X, _X]), "j": -i}, f([1], [5])),
    "embedding": _indexed(
        '(%j: i64[m]) {\n param %w: f32[5, 2] = "w"\n %i: i64[m] = neg(%j)\n %y: f32[m, 2] = embedding(%w, %i)',
        lambda i: {"j": -i}, f([0, 1], [8, 9])),
    "embedding of a table that comes in": _indexed(
        "(%w: f32[n, 2], %j: i64[m]) {\n %i: i64[m] = neg(%j)\n %y: f32[m, 2] = embedding(%w, %i)",
        lambda i: {"w": _W, "j": -i}, f([0, 1], [8, 9])),
    "quantized table": _indexed(
        '(%j: i64[m]) {\n param %q: int8b32f32[5, 2] = "q"\n %i: i64[m] = neg(%j)\n'
        ' %y: f32[m, 2] = quantized_embedding(%q, %i)',
        lambda i: {"j": -i}, f([0, 1], [8, 9])),
    "quantized table in f16": _indexed(
        '(%j: i64[m]) {\n param %q: int8b32f32[5, 2] = "q"\n %i: i64[m] = neg(%j)\n'
        ' %h: f16[m, 2] = quantized_embedding(%q, %i) {dtype=f16}\n %y: f32[m, 2] = cast(%h) {dtype=f32}',
        lambda i: {"j": -i}, f([0, 1], [8, 9])),
    "u64": ("(%x: f32[5], %j: u64[m]) {\n %i: u64[m] = bit_not(%j)\n %y: f32[m] = gather(%x, %i)", [
        ({"x": _X, "j": ~np.array([4], np.uint64)}, f(5)),
        ({"x": _X, "j": ~np.array([2**64 - 1], np.uint64)}, "is outside -5 .. 4"),
    ]),
    "i8": ("(%x: f32[5], %j: i8[m]) {\n %i: i8[m] = neg(%j)\n %y: f32[m] = gather(%x, %i)", [
        ({"x": _X, "j": np.array([1], np.int8)}, f(5)), ({"x": _X, "j": np.array([-5], np.int8)}, "index 5 is outside -5 .. 4"),
    ]),
    "what wraps before it is an index": (
        "(%x: f32[5], %k: i8[m]) {\n %c: i64[1] = constant() {value=dense<i64[1], 255>}\n %n: i8[1] = cast(%c) {dtype=i8}\n"
        " %i: i8[m] = add(%n, %k)\n %j: i64[300] = iota() {size=300}\n %w: i8[300] = cast(%j) {dtype=i8}\n"
        " %s: i8[m] = gather(%w, %i)\n %y: f32[m] = gather(%x, %s)", [
            ({"x": _X, "k": np.array([1], np.int8)}, f(1)),
        ]),
    "a count that wraps": (
        "(%x: f32[200], %z: f32[200]) {\n %j: i64[200] = iota() {size=200}\n %w: i8[200] = cast(%j) {dtype=i8}\n"
        " %g: f32[200] = gather(%x, %w)\n %y: f32[200] = add(%g, %z)", [
            ({"x": np.arange(200, dtype=np.float32), "z": np.zeros(200, np.float32)},
             np.arange(200, dtype=np.float32)[np.arange(200).astype(np.int8)]),
        ]),
    "in a loop": (
        "(%x: f32[5], %i: i64[m]) {\n %y: f32[m] = scan(%i, %x) {body=graph @body(%j: i64[], %t: f32[5]) {\n"
        "  %u: f32[] = gather(%t, %j)\n  return %u\n }, carries=0, slices=1}", [
            ({"x": _X, "i": np.array([4, -1, 0])}, f(5, 5, 1)),
            ({"x": _X, "i": np.array([0, 5])}, "index 5 is outside -5 .. 4"),
        ]),
    "an input": ("(%x: f32[n], %i: i32[m]) {\n %y: f32[m] = gather(%x, %i)", [
        ({"x": _X, "i": np.array([4, -5], np.int32)}, f(5, 1)), ({"x": _X, "i": np.array([5], np.int32)}, "5"),
        ({"x": _X, "i": np.array([-6], np.int32)}, "-6"), ({"x": _X[:0], "i": np.array([0], np.int32)}, "0"),
    ]),
    "labels": (
        "(%x: f32[m, 5], %l: i64[m]) {\n %p: f32[m, 5] = log_softmax(%x) {axis=1}\n"
        " %c: i64[m, 1] = reshape(%l) {shape=(m, 1)}\n"
        " %t: f32[m, 1] = take_along(%p, %c) {axis=1}\n %y: f32[] = reduce_sum(%t) {axes=(0, 1)}", [
            ({"x": np.zeros((1, 5), np.float32), "l": np.array([4])}, np.float32(-np.log(5))),
            ({"x": np.zeros((1, 5), np.float32), "l": np.array([5])}, "index 5 is outside"),
        ]),
    "a cache": ("(%c: f32[b, 6, 3], %new: f32[b, s, 3], %past: i64[b]) {\n %y: f32[b, 6, 3] = cache_update(%c, %new, %past)", [
        ({"c": np.zeros((1, 6, 3), np.float32), "new": np.ones((1, 2, 3), np.float32), "past": np.array([4])},
         np.array([[[0] * 3] * 4 + [[1] * 3] * 2], np.float32)),
        ({"c": np.zeros((1, 6, 3), np.float32), "new": np.ones((1, 2, 3), np.float32), "past": np.array([5])}, ""),
        ({"c": np.zeros((1, 6, 3), np.float32), "new": np.ones((1, 2, 3), np.float32), "past": np.array([-1])}, "-1"),
    ]),
    "one_hot has no outside": ("(%i: i64[m]) {\n %y: f32[m, 3] = one_hot(%i) {size=3}", [
        ({"i": np.array([2, 3, -1, 10**12])}, f([0, 0, 1], [0] * 3, [0] * 3, [0] * 3)),
    ]),
    "one_hot of more than a byte": (
        "(%i: u8[m], %w: f32[300, 1]) {\n %h: f32[m, 300] = one_hot(%i) {size=300}\n %y: f32[m, 1] = matmul(%h, %w)", [
            ({"i": np.array([0, 255], np.uint8), "w": count(300, 1)}, f([1], [256])),
        ]),
    "one_hot of more than signed bytes": (
        "(%i: i8[m], %w: f32[200, 1]) {\n %h: f32[m, 200] = one_hot(%i) {size=200}\n %y: f32[m, 1] = matmul(%h, %w)", [
            ({"i": np.array([-100, 127], np.int8), "w": count(200, 1)}, f([0], [128])),
        ]),
    "groups of more than a byte": (
        "(%x: f32[m, 1], %z: f32[m, 1], %i: u8[m]) {\n %y: f32[258, 1, 1] = grouped_outer(%x, %z, %i) {size=258}", [
            ({"x": count(2, 1), "z": count(2, 1), "i": np.array([0, 255], np.uint8)},
             np.array([1, *[0] * 254, 4, 0, 0], np.float32).reshape(258, 1, 1)),
        ]),
}  # fmt: skip

_A, _B = np.array([True, True, False, False]), np.array([True, False, True, False])
_BACK = (  # n halved and doubled: n where it is even
    " %h: f32[1, n // 2] = slice(%x) {starts=(0, 0), stops=(1, 2*(n // 2)), steps=(1, 2)}\n"
    " %r: f32[1, n // 2, 1] = reshape(%h) {shape=(1, n // 2, 1)}\n"
    " %t: f32[1, n // 2, 2] = broadcast_to(%r) {shape=(1, n // 2, 2)}\n"
    " %u: f32[1, 2*(n // 2)] = reshape(%t) {shape=(1, 2*(n // 2))}\n"
)
_ODD = ({"x": count(1, 5)}, "needs")
LOWERED: dict[str, tuple[str, list[Run]]] = {
    "a parameter without axes": ('(%x: f32[n]) {\n param %t: f32[] = "t"\n %y: f32[n] = mul(%x, %t)', [
        ({"x": count(3)}, count(3) / 2),
    ]),
    "a number computed when loaded": (
        '(%x: f32[n]) {\n param %t: f32[] = "t"\n %e: f32[] = exp(%t)\n %y: f32[n] = mul(%x, %e)', [
            ({"x": count(3)}, count(3) * np.float32(np.exp(0.5))),
        ]),
    **{f"{op} of booleans": (f"(%a: bool[n], %b: bool[n]) {{\n %y: bool[n] = {op}(%a, %b)", [({"a": _A, "b": _B}, want)])
       for op, want in {
           "equal": _A == _B, "not_equal": _A != _B, "less": _A < _B, "less_equal": _A <= _B, "greater": _A > _B,
           "greater_equal": _A >= _B,
       }.items()},
    "positions behind a past": (
        "(%x: f32[b, s], %z: f32[b, t]) {\n %i: i64[s] = iota() {size=s}\n %p: i64[] = dim_size() {size=t}\n"
        " %y: i64[s] = add(%i, %p)", [
            ({"x": count(1, 3), "z": count(1, 2)}, np.array([2, 3, 4])),
        ]),
    "linear of no rows": ('(%x: f32[n, 2]) {\n param %w: f32[5, 2] = "w"\n %y: f32[n, 5] = linear(%x, %w)', [
        ({"x": np.zeros((0, 2), np.float32)}, np.zeros((0, 5), np.float32)), ({"x": f([1, 0])}, f([0, 2, 4, 6, 8])),
    ]),
    "quantized linear of no rows": (
        '(%x: f32[n, 2]) {\n param %q: int8b32f32[5, 2] = "q"\n %d: f32[5, 2] = dequantize(%q)\n'
        ' %y: f32[n, 5] = linear(%x, %d)', [
            ({"x": np.zeros((0, 2), np.float32)}, np.zeros((0, 5), np.float32)), ({"x": f([1, 0])}, f([0, 2, 4, 6, 8])),
        ]),
    "a join": (f"(%x: f32[1, n]) {{\n{_BACK} %y: f32[2, n] = concat(%x, %u) {{axis=0}}", [
        ({"x": count(1, 4)}, f([1, 2, 3, 4], [1, 1, 3, 3])), _ODD,
    ]),
    "a join, the other first": (f"(%x: f32[1, n]) {{\n{_BACK} %y: f32[2, n] = concat(%u, %x) {{axis=0}}", [
        ({"x": count(1, 4)}, f([1, 1, 3, 3], [1, 2, 3, 4])), _ODD,
    ]),
    "a join before a convolution": (
        f"(%x: f32[1, n], %w: f32[1, 2, 1]) {{\n{_BACK} %j: f32[2, n] = concat(%x, %u) {{axis=0}}\n"
        " %k: f32[1, 2, n] = reshape(%j) {shape=(1, 2, n)}\n"
        " %y: f32[1, 1, n] = conv(%k, %w) {strides=(1,), low=(0,), high=(0,)}", [
            ({"x": count(1, 4), "w": f([[1], [10]])}, f([[11, 12, 33, 34]])),
            ({"x": count(1, 5), "w": f([[1], [10]])}, "needs"),
        ]),
    "a sum of what was halved": (f"(%x: f32[1, n]) {{\n{_BACK} %y: f32[1, n] = add(%x, %u)", [
        ({"x": count(1, 4)}, f([2, 3, 6, 7])), _ODD,
    ]),
    "a product of what was halved": (
        f"(%x: f32[1, n]) {{\n{_BACK} %v: f32[2*(n // 2), 1] = transpose(%u) {{perm=(1, 0)}}\n"
        " %y: f32[1, 1] = matmul(%x, %v)", [
            ({"x": count(1, 4)}, f([24])), _ODD,
        ]),
}  # fmt: skip

CASES = {**SIZES, **INDICES, **LOWERED}


def program_of(cases: dict[str, tuple[str, list[Run]]], params: dict[str, Any]) -> Program:
    """One graph for each case."""
    graphs = {}
    for i, (body, _) in enumerate(cases.values()):
        g = parse(f"graph @case{i}{body}\n return y=%y\n}}")
        graphs[g.name] = g
    return Program(graphs, {k: ArrayParam(x, type_of(x)) for k, x in params.items()})


@pytest.fixture(scope="module")
def program() -> Program:
    q = QArray(QTensorType("int8", (5, 2), 32, "f32"), np.arange(10, dtype=np.int8).reshape(5, 2), np.ones((5, 1), np.float32))  # type: ignore[arg-type]
    return program_of(CASES, {"w": _W, "q": q, "t": np.array(0.5, np.float32)})


@pytest.fixture(scope="module")
def model(program: Program, tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder: Path = tmp_path_factory.mktemp("edges") / "edges.wasat"
    ws.compile(program, folder, kv_cache=False)
    return ws.load(folder)


@pytest.mark.parametrize("backend", ["interpreter", "artifact"])
@pytest.mark.parametrize("name", CASES)
def test_numbers_or_refusal(name: str, backend: str, program: Program, model: Model) -> None:
    entry = f"case{list(CASES).index(name)}"
    for inputs, want in CASES[name][1]:
        def call(inputs: dict[str, Any] = inputs) -> np.ndarray:
            run = ws.run(program, entry, **inputs) if backend == "interpreter" else model.run(entry, **inputs)
            return np.asarray(run["y"])

        if isinstance(want, str):
            with pytest.raises((WasatError, RuntimeErrorBase)) as e:
                call()
            assert want in str(e.value)
        else:
            got = call()
            assert got.shape == want.shape
            np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.fixture(scope="module")
def runner(program: Program) -> Runner:
    """The cases, compiled in this process: weights come by another way."""
    return Runner(program, cpu())


@pytest.mark.parametrize("name", LOWERED)
def test_numbers_in_this_process(name: str, runner: Runner) -> None:
    for inputs, want in LOWERED[name][1]:
        if not isinstance(want, str):
            got = runner(f"case{list(CASES).index(name)}", inputs)["y"]
            assert got.shape == want.shape
            np.testing.assert_allclose(got, want, rtol=1e-6)


class Extended(nn.Module):
    """A decoder whose table of tokens goes on with rows that come in."""

    def __init__(self) -> None:
        self.embed, self.head = nn.Embedding(5, 8), nn.Linear(8, 5)

    def __call__(self, tokens: nn.Tensor, more: nn.Tensor) -> nn.Tensor:
        x = nn.gather(nn.concat([self.embed(nn.arange(5)), more], axis=0), tokens)
        h, at = x.heads(2), nn.positions(tokens)
        scores = nn.where(nn.causal(at), nn.einsum("b s h d, b t h d -> b h s t", h, h), -np.inf)
        return self.head(nn.einsum("b h s t, b t h d -> b s h d", nn.softmax(scores), h).merge())


def test_tokens_beyond_a_table_that_is_given_are_refused(tmp_path: Path) -> None:
    program = nn.trace(Extended(), {"tokens": "i64[b, s]", "more": "f32[m, 8]"}, outputs=["logits"])
    ws.compile(program, tmp_path / "m", kv_cache=True, chunk=16)
    session = ws.load(tmp_path / "m").session(context=32)
    for rows in (2, 1):
        session.encode(more=count(rows, 8))
        assert session.step([[0, 4 + rows]]).shape == (1, 5)
        for s in (1, 2):
            with pytest.raises(InputError, match=f"token {5 + rows} is outside the vocabulary of {5 + rows}"):
                session.step([[5 + rows] * s])
