"""Kernels whose sizes no tensor carries: positions, masks, broadcast numbers, of sizes that other inputs of the graph have."""

from __future__ import annotations

import random

import numpy as np
import pytest
from wasat.backends.tvm.build import Runner
from wasat.backends.tvm.targets import cpu
from wasat.ir import ArrayParam, Program, evaluate, parse, type_of

SIZES = ["s", "t", "s + t", "2*s", "s*t", "t + 1", "max(s, t)", "s // 2 + 1"]
PARAMS = {"w": np.arange(4, dtype=np.float32).reshape(1, 4), "m": np.arange(12, dtype=np.float32).reshape(3, 4)}


def chain(rng: random.Random, name: str) -> str:
    """Operations on sizes and positions, on each other's results, under sizes of both inputs, of which no element is read."""
    lines: list[str] = []
    values: list[tuple[str, str]] = []  # and their sizes, "" of a number

    def add(size: str, expression: str) -> None:
        lines.append(f"%v{len(values)}: i64[{size}] = {expression}")
        values.append((f"%v{len(values)}", size))

    for _ in range(rng.randrange(4, 9)):
        rows, numbers, size = [v for v in values if v[1]], [v for v in values if not v[1]], rng.choice(SIZES)
        kind = rng.choice(["iota", "iota", "number", "binary", "binary", "spread", "sum", "pad", "join", "cumsum", "reverse"])
        if kind == "number" or not rows:
            add("", f"dim_size() {{size={size}}}")
        if kind == "iota" or not rows:
            add(size, f"iota() {{size={size}}}")
        elif kind == "binary":
            x = rng.choice(values)
            z = rng.choice([v for v in values if v[1] in (x[1], "")])
            add(x[1], f"{rng.choice(['add', 'sub', 'mul', 'maximum'])}({x[0]}, {z[0]})")
        elif kind == "spread" and numbers:
            add(size, f"broadcast_to({rng.choice(numbers)[0]}) {{shape=({size},)}}")
        else:
            x, z = rng.choice(rows), rng.choice(rows)
            size, expression = {
                "pad": (f"{x[1]} + t", f"pad({x[0]}) {{low=(t,), high=(0,), value=7}}"),
                "join": (f"{x[1]} + {z[1]}", f"concat({x[0]}, {z[0]}) {{axis=0}}"),
                "cumsum": (x[1], f"cumsum({x[0]}) {{axis=0}}"), "reverse": (x[1], f"reverse({x[0]}) {{axes=(0,)}}"),
            }.get(kind, ("", f"reduce_sum({x[0]}) {{axes=(0,)}}"))  # fmt: skip
            add(size, expression)
    body = "".join(f"  {line}\n" for line in lines)
    returned = ", ".join(f"y{i}={v}" for i, (v, _) in enumerate(values[-3:]))
    return f"graph @{name}(%x: f32[1, s], %z: f32[1, t]) {{\n{body}  return {returned}\n}}"


_SPREAD = ' param %w: f32[1, 4] = "w"\n param %m: f32[3, 4] = "m"\n %b: f32[s, t, 4] = broadcast_to(%w) {shape=(s, t, 4)}\n'
_CALLS = {
    "spread": "",
    "softmax": " %y: f32[s, t, 4] = softmax(%b) {axis=1}",
    "sum": " %y: f32[t, 4] = reduce_sum(%b) {axes=(0,)}",
    "rms_norm": " %g: f32[4] = reshape(%w) {shape=(4,)}\n %y: f32[s, t, 4] = rms_norm(%b, %g)",
    "linear": " %y: f32[s, t, 3] = linear(%b, %m)",
    "matmul": " %p: f32[s, 4, t] = transpose(%b) {perm=(0, 2, 1)}\n %y: f32[s, t, t] = matmul(%b, %p)",
    "gather": " %i: i64[s] = iota() {size=s}\n %y: f32[s, t, 4] = gather(%b, %i) {axis=0}",
    "one_hot": " %i: i64[s] = iota() {size=s}\n %y: f32[s, 5] = one_hot(%i) {size=5}",
    "conv": " %k: f32[1, 4, 1] = reshape(%w) {shape=(1, 4, 1)}\n %p: f32[s, 4, t] = transpose(%b) {perm=(0, 2, 1)}\n"
            " %y: f32[s, 1, t] = conv(%p, %k) {strides=(1,), low=(0,), high=(0,)}",
    "a mask": " %i: i64[s] = iota() {size=s}\n %j: i64[t] = iota() {size=t}\n %c: i64[s, 1] = reshape(%i) {shape=(s, 1)}\n"
              " %n: i64[s, t] = broadcast_to(%c) {shape=(s, t)}\n %o: i64[s, t] = broadcast_to(%j) {shape=(s, t)}\n"
              " %y: bool[s, t] = greater_equal(%n, %o)",
}  # fmt: skip
_HEAD = "(%x: f32[1, s], %z: f32[1, t]) {\n"
TEXTS = [chain(random.Random(i), f"chain{i}") for i in range(32)] + [
    f"graph @{name.replace(' ', '_')}{_HEAD}{_SPREAD}{body}\n return {'b=%b' if not body else 'y=%y'}\n}}"
    for name, body in _CALLS.items()
]
GRAPHS = {g.name: g for g in map(parse, TEXTS)}


@pytest.fixture(scope="module")
def compiled() -> Runner:
    return Runner(Program(GRAPHS, {name: ArrayParam(x, type_of(x)) for name, x in PARAMS.items()}), cpu())


@pytest.mark.parametrize("name", GRAPHS)
def test_equal_to_the_interpreter(name: str, compiled: Runner) -> None:
    g = compiled.program[name]
    for s, t in ((3, 2), (1, 1), (2, 5), (0, 2)):
        inputs = {"x": np.zeros((1, s), np.float32), "z": np.zeros((1, t), np.float32)}
        got = compiled(name, inputs)
        for output, want in zip(g.output_names, evaluate(g, inputs, {k: PARAMS[k] for k in g.params})):
            np.testing.assert_allclose(got[output], np.asarray(want), rtol=1e-5, err_msg=f"{output}, s={s}, t={t}")
