from __future__ import annotations

import math
from itertools import takewhile

import numpy as np
import pytest
import tvm
from kernel_help import Terms, assert_near, build, each_isa, run, target_of, uneven
from numpy.typing import NDArray
from wasat.backends.tvm.cpu import tir_pipeline
from wasat.backends.tvm.cpu.kernels.glu import Activation, Glu, glu
from wasat.backends.tvm.cpu.kernels.isa import GENERIC, Isa
from wasat.backends.tvm.cpu.kernels.norm import Norm, norm
from wasat.backends.tvm.cpu.kernels.quantize import quantize_rows_reference

Array = NDArray[np.float64]


def rms(x: Array, weight: Array | float, eps: float) -> Array:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def assert_quantized(got: NDArray[np.int32], want: Array) -> None:
    """Equal to the quantization of ``want``, up to one step where rounding noise crosses a half."""
    exact = quantize_rows_reference(want.astype(np.float32))
    q, expected = (np.ascontiguousarray(a[..., :8]).view(np.int8).astype(int) for a in (got, exact))
    assert np.abs(q - expected).max() <= 1
    assert (q != expected).mean() < 0.01
    np.testing.assert_allclose(np.ascontiguousarray(got[..., 8]).view(np.float32),
                               np.ascontiguousarray(exact[..., 8]).view(np.float32), rtol=1e-5)
    np.testing.assert_array_equal(got[..., 9], -8 * q.sum(-1))


@each_isa()
@pytest.mark.parametrize("options", [
    {}, {"weight": False}, {"residual": True}, {"residual": True, "pre_norm": True, "quantize": "both"},
    {"kind": "layer", "bias": True}, {"kind": "layer", "residual": True, "quantize": "yes"},
], ids=str)
def test_norm(isa: Isa, options: dict[str, object]) -> None:
    n, eps = 72, 1e-3
    desc = Norm(isa, n, eps=eps, threads=2, **options)  # type: ignore[arg-type]
    compiled = build(norm(desc), isa)
    rng = np.random.default_rng(0)
    w, b, bw = (rng.standard_normal(n).astype(np.float32) for _ in range(3))
    for m in (1, 5, 300):
        x, branch = uneven(rng, m, n), uneven(rng, m, n)
        args, outputs, want = [x], [], []
        total = Terms(x.astype(np.float64), np.abs(x).astype(np.float64))
        if desc.residual:
            args.append(branch)
            total += rms(branch.astype(np.float64), bw, eps) if desc.pre_norm else branch
            outputs.append(((m, n), "float32"))
            want.append(total)
        args += [a for a, on in ((bw, desc.pre_norm), (w, desc.weight), (b, desc.bias)) if on]
        weight = w if desc.weight else np.ones(n)
        if desc.kind == "layer":
            means = (part.mean(-1, keepdims=True) for part in total[:2])
            total = Terms(total.sum - next(means), total.size + next(means), total.count + 1)
        root = np.sqrt((total.sum**2).mean(-1, keepdims=True) + eps)
        y = Terms(total.sum / root * weight, total.size / root * np.abs(weight), total.count)
        if desc.bias:
            y += b
        if desc.quantize != "yes":
            outputs.append(((m, n), "float32"))
            want.append(y)
        if desc.quantize != "no":
            outputs.append(((m, -(-n // 32), 10), "int32"))
        got = run(compiled, args, *outputs)
        for g, e in zip(got, want, strict=False):
            assert_near(g, e, 4)  # the squares' sum, its root, a quotient
        if desc.quantize != "no":
            assert_quantized(got[-1], y.sum)


erf = np.vectorize(math.erf)


def sigmoid(x: Array) -> Array:
    return np.exp(np.minimum(x, 0)) / (1 + np.exp(-np.abs(x)))


def activation(x: Array, kind: str) -> Array:
    if kind == "relu":
        return np.maximum(x, 0)
    if kind == "gelu":
        return x * 0.5 * (1 + erf(x / math.sqrt(2)))
    if kind == "gelu_tanh":
        return x * sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x**3))
    return sigmoid(x) if kind == "sigmoid" else x * sigmoid(x)


@each_isa()
@pytest.mark.parametrize("kind", ["gelu", "gelu_tanh", "silu", "relu", "sigmoid"])
def test_glu(isa: Isa, kind: Activation) -> None:
    n = 70
    rng = np.random.default_rng(0)
    plain = build(glu(Glu(isa, n, kind, threads=2)), isa)
    quantized = build(glu(Glu(isa, n, kind, quantize=True, threads=2)), isa)
    for m in (1, 200):
        x = (rng.standard_normal((m, 2 * n)) * 4).astype(np.float32)
        x[0, :4] = [-200, 200, 0, -1e-4]  # saturated, and small enough for cancellation to show
        want = activation(x[:, :n].astype(np.float64), kind) * x[:, n:]
        [y] = run(plain, [x], ((m, n), "float32"))
        gate, up = np.abs(x.astype(np.float64)).reshape(m, 2, n).swapaxes(0, 1)
        size = np.abs(want)
        if kind == "gelu":  # an erf that is within 5e-7, and 1 + erf cancels
            size = gate * up
        elif kind == "gelu_tanh":  # exp of a number that is rounded
            size *= 1 + gate + gate**3 / 14
        assert_near(y, Terms(want, size + 2.0**-100 * gate * up), 4)  # what is subnormal may vanish
        [yq] = run(quantized, [x], ((m, -(-n // 32), 10), "int32"))
        assert_quantized(yq, want)


def test_arithmetic_of_many_steps_does_not_grow_when_it_is_lowered() -> None:
    """Simplifying once doubled erf's text with each of its steps: a minute of compiling."""
    module = tvm.IRModule({"main": glu(Glu(GENERIC, 64, "gelu", quantize=True)).with_attr("target", target_of(GENERIC))})
    before = len(str(module))
    for step in takewhile(lambda p: p.info.name != "tirx.VerifyMemory", tir_pipeline.lowering().passes):
        module = step(module)
    assert len(str(module)) < 4 * before
