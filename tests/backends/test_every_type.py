"""Every primitive of every type that TVM treats apart: booleans, and floats of 16 bits. The interpreter's numbers, compiled."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from wasat.backends.tvm.build import Runner
from wasat.backends.tvm.targets import cpu
from wasat.ir import DType, Graph, Program, WasatError, evaluate, parse

UNARY = [
    "abs", "exp", "log", "sqrt", "rsqrt", "sin", "cos", "tan", "tanh", "erf", "floor", "ceil", "logical_not", "isinf", "isnan",
    "bit_not", "sigmoid", "neg", "sign", "round", "asin", "acos", "atan", "sinh", "cosh", "asinh", "acosh", "atanh", "expm1",
    "log1p",
]  # fmt: skip
BINARY = [
    "add", "sub", "mul", "div", "floor_div", "mod", "pow", "shift_left", "shift_right", "maximum", "minimum", "bit_and",
    "bit_or", "bit_xor", "logical_and", "logical_or", "logical_xor", "equal", "not_equal", "less", "less_equal", "greater",
    "greater_equal", "atan2",
]  # fmt: skip
REDUCE = ["reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_any", "reduce_all"]
FORMS = {
    **{op: [f"%y: TYPE[n] = {op}(%x)", f"%y: bool[n] = {op}(%x)"] for op in UNARY},
    **{op: [f"%y: TYPE[n] = {op}(%x, %z)", f"%y: bool[n] = {op}(%x, %z)"] for op in BINARY},
    **{op: [f"%y: TYPE[] = {op}(%x) {{axes=(0,)}}"] for op in REDUCE},
    **{op: [f"%y: i64[] = {op}(%x) {{axis=0}}"] for op in ("arg_max", "arg_min")},
    **{op: [f"%y: TYPE[n] = {op}(%x) {{axis=0}}"] for op in ("cumsum", "sort")},
    "top_k": ["%y: TYPE[2], %at: i64[2] = top_k(%x) {k=2}"],
    "matmul": ["%a: TYPE[1, n] = reshape(%x) {shape=(1, n)}\n %b: TYPE[n, 1] = reshape(%z) {shape=(n, 1)}\n"
               " %y: TYPE[1, 1] = matmul(%a, %b)"],
    "select": ["%y: TYPE[n] = select(%c, %x, %z)"],
    "concat": ["%y: TYPE[2*n] = concat(%x, %z) {axis=0}"],
    "reverse": ["%y: TYPE[n] = reverse(%x) {axes=(0,)}"],
    "pad": ["%y: TYPE[n + 1] = pad(%x) {low=(1,), high=(0,), value=1}",
            "%y: TYPE[n + 1] = pad(%x) {low=(1,), high=(0,), value=true}"],
    "gather": ["%y: TYPE[n] = gather(%x, %i)"],
    "take_along": ["%y: TYPE[n] = take_along(%x, %i) {axis=0}"],
    "scatter": ["%y: TYPE[n] = scatter(%x, %i, %z)"],
    "scatter_along": ["%y: TYPE[n] = scatter_along(%x, %i, %z) {axis=0}"],
}  # fmt: skip


def graphs() -> dict[str, Graph]:
    """One for each operation and type that go together."""
    found = {}
    for t in ("bool", "f16", "bf16"):
        for op, forms in FORMS.items():
            for form in forms:
                text = f"graph @{op}_{t}(%x: {t}[n], %z: {t}[n], %i: i64[n], %c: bool[n]) {{\n {form}\n return y=%y\n}}"
                try:
                    found.setdefault(f"{op}_{t}", parse(text.replace("TYPE", t)))
                except WasatError:  # the operation is not of this type
                    continue
    return found


GRAPHS = graphs()


@pytest.fixture(scope="module")
def compiled() -> Runner:
    return Runner(Program(GRAPHS, {}), cpu())


@pytest.mark.parametrize("name", GRAPHS)
def test_equal_to_the_interpreter(name: str, compiled: Runner) -> None:
    dtype = GRAPHS[name].inputs[0].tensor.dtype
    x = np.array([0, 0.5, -0.5, 1, 1.5, -1.5, 0, 3]).astype(dtype.np)
    inputs = {"x": x, "z": x[::-1].copy(), "i": np.array([7, 0, 1, 2, 6, 5, 4, 3]), "c": x > 0}
    if dtype is DType.BOOL:
        inputs |= {"x": np.array([1, 1, 0, 0, 1, 0, 1, 1], bool), "z": np.array([1, 0, 1, 0, 0, 0, 1, 0], bool)}
    with np.errstate(all="ignore"):
        want = np.asarray(evaluate(GRAPHS[name], inputs)[0])
    got = compiled(name, inputs)["y"]
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    near = 4 * float(ml_dtypes.finfo(got.dtype).eps) if DType.of(got.dtype).is_float else 0
    np.testing.assert_allclose(got.astype(float), want.astype(float), rtol=near, atol=near)


def test_all_are_there() -> None:
    """What goes with no type here would be tested nowhere; these are of integers alone."""
    of_integers = {"bit_not", "bit_and", "bit_or", "bit_xor", "shift_left", "shift_right"}
    assert {name.rsplit("_", 1)[0] for name in GRAPHS} == set(FORMS) - of_integers
