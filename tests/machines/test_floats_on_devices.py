"""On GPUs, nothing is known of floats that rounding, infinities or NaN make untrue; integers are divided by 0 as on CPUs."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "backends")]
from plan_help import device
from test_nan import _nothing_is_known
from wasat.backends.tvm.targets import target_named
from wasat.ir import evaluate, parse_program

from wasat.planned import PlanRunner

pytestmark = pytest.mark.machines
SPECIAL = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, -2.0, 0.3, 3000.0])


def _of_two(dtype: str) -> dict[str, str]:
    """Expressions over x and y that TVM's simplifier rewrites as those of real numbers."""
    x, truth = f"{dtype}[n]", "bool[n]"
    head = f"(%x: {x}, %y: {x}) {{\n"
    less = f"{head} %c: {truth} = less(%x, %y)\n"
    chosen = f"{head} %c: {truth} = greater(%x, 0.5:{dtype})\n %s: {x} = select(%c, %x, %y)\n"
    return {
        "not_less": f"{less} %r: {truth} = logical_not(%c)",
        "not_at_most": f"{head} %c: {truth} = less_equal(%x, %y)\n %r: {truth} = logical_not(%c)",
        "not_less_than_itself": f"{head} %c: {truth} = less(%x, %x)\n %r: {truth} = logical_not(%c)",
        "either": f"{less} %d: {truth} = less_equal(%y, %x)\n %r: {truth} = logical_or(%c, %d)",
        "sum_less_a_part": f"{head} %s: {x} = add(%x, %y)\n %r: {x} = sub(%s, %y)",
        "products": f"{head} %p: {x} = mul(%x, %y)\n %q: {x} = mul(%x, %y)\n %r: {x} = sub(%p, %q)",
        "chosen_less_other": f"{chosen} %r: {x} = sub(%s, %y)",
        "chosen_less_one": f"{chosen} %r: {x} = sub(%s, %x)",
    }


LEFT_OPEN = {"wgsl": ("minus_itself", "sum_less_a_part", "products", "over_minus_0"), "opencl": (), "cuda": ()}
"""What a language leaves to its compilers. WGSL: whether there are NaN, infinities, signs of zero (Mesa's makes 0 of x - x)."""
FUSED = ("products",)
"""A product and a difference may be one instruction, which rounds once: compared are the places of NaN."""


TYPES = {"webgpu": ["f32"], "webgpu:f16": ["f16"], "opencl": ["f32"], "cuda:sm_90": ["f32", "f16"]}
"""Others are computed in f32."""


@pytest.mark.parametrize("target", TYPES)
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_nothing_is_known_of_a_float(target: str) -> None:
    machine = target_named(target)
    assert machine.device is not None
    texts = {}
    for d in TYPES[target]:
        texts |= {f"{k}_{d}": f"{t}\n return %y\n}}\n" for k, t in _nothing_is_known(d).items()}
        texts |= {f"{k}_{d}": f"{t}\n return %r\n}}\n" for k, t in _of_two(d).items()}
    program = parse_program("".join(f"graph @{name}{text}" for name, text in texts.items()))
    x, y = (v.ravel() for v in np.meshgrid(SPECIAL, SPECIAL))
    with device(target):
        runner = PlanRunner(program.copy(), machine)
        for name, g in program.graphs.items():
            feeds = {v.name: n.astype(v.tensor.dtype.np) for v, n in zip(g.inputs, (x, y))}
            [got], [want] = runner(name, feeds).values(), evaluate(g, feeds)
            assert isinstance(want, np.ndarray)
            if name.startswith(LEFT_OPEN[machine.device.language]):
                continue
            if name.startswith(FUSED):
                got, want = np.isnan(got), np.isnan(want)
            np.testing.assert_array_equal(got.astype(np.float64), want.astype(np.float64), err_msg=name)


DIVIDED = ("div", "mod", "floor_div")


@pytest.mark.parametrize("target", ["webgpu", "opencl", "cuda:sm_90"])
def test_integers_by_zero(target: str) -> None:
    """0, as the reference has it; by -1 the least integer wraps."""
    machine = target_named(target)
    types = ("i32", "i64", "u8", "i8")
    program = parse_program("".join(
        f"graph @{op}_{t}(%x: {t}[n], %y: {t}[n]) {{\n %r: {t}[n] = {op}(%x, %y)\n return %r\n}}\n"
        for op in DIVIDED for t in types
    ))  # fmt: skip
    with device(target):
        runner = PlanRunner(program.copy(), machine)
        for name, g in program.graphs.items():
            dtype = g.inputs[0].tensor.dtype.np
            least = -(2**31) if dtype == np.int64 else np.iinfo(dtype).min
            most = 2**31 - 1 if dtype == np.int64 else np.iinfo(dtype).max
            if dtype == np.int64:
                least += 1  # -2^31 by -1 is 2^31, which 32 bits do not hold
            numbers = np.array([0, 1, 5, least, most, *([-1, -5] if least < 0 else [])]).astype(dtype)
            x, y = (v.ravel() for v in np.meshgrid(numbers, numbers))
            [got], [want] = runner(name, {"x": x, "y": y}).values(), evaluate(g, {"x": x, "y": y})
            np.testing.assert_array_equal(got, want, err_msg=name)
