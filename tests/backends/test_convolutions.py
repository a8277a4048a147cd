"""Convolutions compiled as products: every stride, padding, cropping, dilation and group, and their gradients."""

from __future__ import annotations

import math

import numpy as np
import pytest
from kernel_help import Terms, assert_near, assert_near_reference
from test_cpu import calls, selected
from wasat.backends.tvm.build import Runner
from wasat.backends.tvm.targets import cpu
from wasat.ir import Builder, DType, Graph, IRError, Program, TensorType, evaluate
from wasat.passes import Differentiate, PassManager


def drawn(rng: np.random.Generator, name: str) -> Graph | None:
    """A convolution by chance; None for one without a result."""

    def some(low: int, high: int, count: int) -> tuple[int, ...]:
        return tuple(int(n) for n in rng.integers(low, high, count))

    axes, groups = int(rng.integers(1, 4)), int(rng.choice([1, 1, 2, 3]))
    (n, each, own), space = some(1, 4, 3), some(3, 20 if axes < 3 else 7, axes)
    g = Graph(name)
    x = g.add_input("x", TensorType(DType.F32, (n, each * groups, *space)))
    w = g.add_input("w", TensorType(DType.F32, ((own + 1) * groups, each, *some(1, 5, axes))))
    b = Builder(g)
    try:
        y = b.conv(
            x, w, strides=some(1, 4, axes), low=some(-1, 4, axes), high=some(-1, 4, axes), dilation=some(1, 3, axes),
            input_dilation=some(1, 3, axes), groups=groups,
        )  # fmt: skip
    except IRError:
        return None
    g.set_outputs([y], ["y"])
    return g if 0 not in y.shape else None


def test_any_convolution() -> None:
    rng = np.random.default_rng(0)
    program = Program({g.name: g for i in range(60) if (g := drawn(rng, f"g{i}")) is not None})
    assert len(program.graphs) > 40
    runner = Runner(program, cpu())
    for name, g in program.graphs.items():
        assert "Gemm" in calls(selected(program, name, cpu()))
        inputs = {v.name: rng.standard_normal(v.shape, np.float32) for v in g.inputs}
        sums = [np.asarray(evaluate(g, {k: f(x) for k, x in inputs.items()})[0], np.float64) for f in (np.asarray, np.abs)]
        assert_near(runner(name, inputs)["y"], Terms(*sums, math.prod(g.inputs[1].shape[1:])))


@pytest.mark.parametrize("shape, kernel, strides", [
    ((6, 3, 16, 16), (8, 3, 3, 3), (2, 2)), ((2, 5, 11), (4, 5, 3), (1,)), ((3, 8, 9, 7), (8, 4, 5, 5), (1, 1)),
])  # fmt: skip
def test_gradients(shape: tuple[int, ...], kernel: tuple[int, ...], strides: tuple[int, ...]) -> None:
    g, half = Graph("loss"), tuple(k // 2 for k in kernel[2:])
    x, w = (g.add_input(n, TensorType(DType.F32, s)) for n, s in (("x", shape), ("w", kernel)))
    b = Builder(g)
    y = b.conv(x, w, strides=strides, low=half, high=half, groups=shape[1] // kernel[1])
    g.set_outputs([b.reduce_sum(b.mul(y, b.sin(y)), axes=tuple(range(len(shape))))], ["loss"])
    program = Program({"loss": g})
    PassManager([Differentiate(wrt=("x", "w"))]).run(program)
    rng = np.random.default_rng(1)
    inputs = {"x": rng.standard_normal(shape, np.float32), "w": rng.standard_normal(kernel, np.float32)}
    assert calls(selected(program, "gradients", cpu())).count("Gemm") == 3
    assert_near_reference(Runner(program, cpu())("gradients", inputs), program["gradients"], inputs)
