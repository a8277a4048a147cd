"""Convolutions on GPUs against the reference: the kernels by themselves, and what becomes one in a program."""
from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "backends"))
pytest.importorskip("wasat.backends.tvm.plan")  # the language of a device, out of TensorIR
import kernel_help
from gpu_help import BF16, MACHINES, Machine, on_halves, run
from kernel_help import EPS, Terms, assert_near, assert_near_reference
from plan_help import device
from test_gpu_select import choose, evaluated, kernels
from wasat.backends.tvm.gpu.kernels.convolution import Conv, convolution
from wasat.backends.tvm.targets import target_named
from wasat.ir import DType
from wasat.ir.op import OPS

from wasat.planned import PlanRunner
from wasat.testing import feed, random_program

pytestmark = pytest.mark.machines
OP = OPS["conv"]


@dataclass(frozen=True)
class Case:
    """Shapes of x and of w, and attributes; ``every``: on each machine, else on one."""

    x: tuple[int, ...]
    w: tuple[int, ...]
    strides: tuple[int, ...]
    low: tuple[int, ...]
    high: tuple[int, ...]
    dilation: tuple[int, ...] = ()
    spread: tuple[int, ...] = ()
    groups: int = 1
    every: bool = False

    @property
    def attrs(self) -> Any:
        ones = (1,) * len(self.strides)
        return OP.Attrs(self.strides, self.low, self.high, self.dilation or ones, self.spread or ones, self.groups)

    def described(self, machine: Machine, **more: Any) -> Conv:
        a = self.attrs
        padded = tuple(n > 0 or h > 0 for n, h in zip(a.low, a.high))
        return Conv(machine.limits, self.w[0] // self.groups, self.w[1], self.w[2:], a.strides, a.low, a.dilation,
                    a.input_dilation, padded, self.groups, **more)  # fmt: skip


CASES = {
    "tiles of 64 outputs in groups": Case((2, 6, 9, 11), (140, 3, 3, 2), (2, 1), (1, 0), (0, 2), (1, 2), groups=2, every=True),
    "tiles of 32": Case((1, 3, 40), (33, 3, 5), (1,), (4,), (0,)),
    "tiles of 16 in three axes": Case((2, 4, 5, 6, 7), (10, 4, 2, 3, 3), (1, 2, 1), (0, 1, 1), (1, 1, 0)),
    "spread and cropped": Case((1, 3, 7, 5), (9, 3, 4, 4), (1, 1), (3, -1), (2, -2), spread=(2, 3)),
    "one place": Case((1, 20, 3), (70, 20, 3), (1,), (0,), (0,)),
    "depthwise": Case((2, 5, 13, 9), (5, 1, 3, 3), (2, 1), (1, 2), (2, 0), groups=5, every=True),
    "few outputs, a long axis": Case((2, 4, 50), (6, 2, 19), (3,), (9,), (9,), (2,), groups=2),
    "one output, spread": Case((1, 9, 6, 5), (1, 9, 2, 3), (1, 1), (1, 2), (1, 2), spread=(2, 1)),
}


@pytest.mark.parametrize("case, machine", [
    pytest.param(c, m, id=f"{n}-{m.name}") for n, c in CASES.items() for m in (MACHINES if c.every else MACHINES[1:2])
])  # fmt: skip
def test_convolution(case: Case, machine: Machine) -> None:
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal(shape, np.float32) for shape in (case.x, case.w))
    bias = rng.standard_normal(case.w[0], np.float32) if case.every else None
    want, size = _exact(case, x, w), _exact(case, np.abs(x), np.abs(w))
    terms = Terms(want, size, math.prod(case.w[1:]))
    if bias is not None:
        terms = terms + bias.reshape(-1, *(1,) * len(case.strides))
    desc = case.described(machine, bias=bias is not None)
    got = run(machine, convolution(desc), [x, w, *([] if bias is None else [bias]), np.full(want.shape, 77, np.float32)])[-1]
    assert_near(got, terms)


def test_a_small_workgroup() -> None:
    """Of 64 threads: other tiles."""
    machine = replace(MACHINES[1], limits=replace(MACHINES[1].limits, threads=64))
    test_convolution(CASES["tiles of 64 outputs in groups"], machine)


def _exact(case: Case, x: NDArray[Any], w: NDArray[Any]) -> NDArray[np.float64]:
    return np.asarray(OP.reference(case.attrs, x.astype(np.float64), w.astype(np.float64)), np.float64)


@on_halves()
@pytest.mark.parametrize("name", ["tiles of 32", "depthwise"])
def test_convolution_of_halves(machine: Machine, half: np.dtype[Any], name: str) -> None:
    """Rounded once; weights in bf16 are read beside activations in f16."""
    case, rng = CASES[name], np.random.default_rng(1)
    x, w = rng.standard_normal(case.x).astype(half), rng.standard_normal(case.w).astype(BF16)
    bias = rng.standard_normal(case.w[0]).astype(half)
    column = bias.astype(np.float64).reshape(-1, *(1,) * len(case.strides))
    want, size = _exact(case, x, w) + column, _exact(case, np.abs(x), np.abs(w)) + np.abs(column)
    desc = case.described(machine, bias=True, dtype=half.name, stored=w.dtype.name)
    got = run(machine, convolution(desc), [x, w, bias, np.full(want.shape, 77, half)])[-1]
    unit = 2.0 ** -(8 if DType.of(half) is DType.BF16 else 11)
    kernel_help.assert_within(got, want, unit * np.abs(want) + 2 * math.prod(case.w[1:]) * EPS * size)


NET = """graph @main(%x: f32[b, 3, h, w + 1]) {
  param %a: f32[20, 3, 3, 3]
  param %p: f32[20]
  param %d: f32[20, 1, 3, 3]
  param %narrow: bf16[4, 20, 1, 1]
  %c: f32[b, 20, (h + 1)//2, (w + 2)//2] = conv(%x, %a) {strides=(2, 2), low=(1, 1), high=(1, 1)}
  %q: f32[1, 20, 1, 1] = reshape(%p) {shape=(1, 20, 1, 1)}
  %e: f32[b, 20, (h + 1)//2, (w + 2)//2] = add(%q, %c)
  %f: f32[b, 20, (h + 1)//2, (w + 2)//2] = conv(%e, %d) {strides=(1, 1), low=(1, 1), high=(1, 1), groups=20}
  %g: f32[b, 20, (h + 1)//2, (w + 2)//2] = silu(%f)
  %wide: f32[4, 20, 1, 1] = cast(%narrow) {dtype=f32}
  %y: f32[b, 4, (h + 1)//2, (w + 2)//2] = conv(%g, %wide) {strides=(1, 1), low=(0, 0), high=(0, 0)}
  return %y
}"""


@pytest.mark.parametrize("machine", MACHINES[:1], ids=lambda m: m.name)
def test_any_picture(machine: Machine) -> None:
    """Batch, height and width are those of the call; the bias is one with its convolution."""
    program = random_program(NET, seed=1)
    with device(machine.name):
        runner = PlanRunner(program.copy(), target_named("cuda:sm_90" if machine.name == "cuda" else machine.name))
        made = sorted(runner.host.plan.kernels)
        assert sum("conv_tiles" in n for n in made) == 1
        assert sum("conv_direct" in n for n in made) == 2
        assert not [n for n in made if "add" in n], made
        params = {n: program.load(n) for n in program.params}
        for dims in ({"b": 1, "h": 1, "w": 1}, {"b": 2, "h": 13, "w": 20}):
            x = feed(program["main"], dims, seed=3)
            assert_near_reference(runner("main", x), program["main"], x, params)


SUM = """graph @main(%x: f32[b, 3, s], %r: f32[20, 1]) {
  param %a: f32[20, 3, 3]
  %c: f32[b, 20, s] = conv(%x, %a) {strides=(1,), low=(1,), high=(1,)}
  %y: f32[b, 20, s] = add(%c, %r)
  return %y
}"""
NEAR_MISSES = {
    "of every place": ("f32[20, 1]", "f32[20, s]"), "of a picture": ("f32[20, 1]", "f32[b, 20, 1]"),
    "read beside it": ("return %y", "return %y, %c"), "twice itself": ("add(%c, %r)", "add(%c, %c)"),
    "one number": ("f32[20, 1]", "f32[1, 1]"), "a difference": ("add(%c, %r)", "sub(%c, %r)"),
}  # fmt: skip


@pytest.mark.parametrize("change", [("", ""), *NEAR_MISSES.values()], ids=["a bias", *NEAR_MISSES])
def test_what_is_a_bias(change: tuple[str, str]) -> None:
    program = random_program(SUM.replace(*change), seed=1)
    graphs, _ = choose(program, MACHINES[1])
    main = graphs["main"]
    assert kernels(main) == ["Conv"]
    assert ("add" in [n.op.name for n in main.nodes] or "sub" in [n.op.name for n in main.nodes]) == (change != ("", ""))
    inputs = feed(program["main"], {"b": 2, "s": 5}, seed=1)
    params = {n: program.load(n) for n in program.params}
    if change in (("", ""), NEAR_MISSES["twice itself"]):
        assert_near_reference(evaluated(main, program, inputs, MACHINES[1]), program["main"], inputs, params)


LEFT = {
    "of the sizes 4, 2, n, 0 not all are known": ("%w: f32[4, 2, n]", "low=(0,), high=(0,)", "t - n + 1"),
    "of the sizes 4, 2, 3, n not all are known": ("%w: f32[4, 2, 3], %o: f32[n]", "low=(n,), high=(0,)", "t + n - 2"),
}


@pytest.mark.parametrize("why", LEFT)
def test_what_is_left_says_why(why: str) -> None:
    w, pads, size = LEFT[why]
    text = f"graph @main(%x: f32[m, 2, t], {w}) {{\n  %y: f32[m, 4, {size}] = conv(%x, %w) {{strides=(1,), {pads}}}\n"
    _, left = choose(random_program(text + "  return %y\n}"), MACHINES[1])
    assert [x.why for x in left] == [f"conv has no kernel here: {why}"]
