"""An operation from outside: one class with its meaning, its facts and its kernel, and no table edited (CONTRIBUTING)."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tvm import tirx
from tvm.script import tirx as T
from wasat.backends.tvm.lower import Context, Lowering
from wasat.ir import OPS, ErrorSample, IRError, Op, Sample, TypeMismatch, evaluate, register
from wasat.ir.axes import Factor, along, product
from wasat.ir.op import floating
from wasat.passes import DeriveKVCache, PassManager

import wasat as ws
from wasat.testing import random_program

HERE = Path(__file__).parent
DECODER = """graph @forward(%tokens: i64[b, s]) {
  param %table: f32[9, 6]
  param %w: f32[9, 6]
  %x: f32[b, s, 6] = embedding(%table, %tokens)
  %y: f32[b, s, 6] = centered(%x)
  %logits: f32[b, s, 9] = linear(%y, %w)
  return %logits
}"""


def kernel(dtype: str) -> tirx.PrimFunc:
    """x [rows, width] less the mean of each row."""

    @T.prim_func(s_tir=True)
    def centered(a: T.handle, b: T.handle):  # type: ignore[no-untyped-def, valid-type]
        rows = T.int64()
        width = T.int64()
        X = T.match_buffer(a, (rows, width), dtype)
        Y = T.match_buffer(b, (rows, width), dtype)
        for i in T.parallel(rows):
            with T.sblock("row"):
                r = T.axis.spatial(rows, i)
                T.reads(X[r, 0:width])
                T.writes(Y[r, 0:width])
                total = T.sblock_alloc_buffer((1,), dtype)
                total[0] = T.cast(0.0, dtype)
                for j in T.serial(width):
                    total[0] = total[0] + X[r, j]
                for j in T.serial(width):
                    Y[r, j] = X[r, j] - total[0] / T.cast(width, dtype)

    return centered


def lower(ctx: Context, node: Any, x: Any) -> Any:
    t = node.output.tensor
    flat = t.with_shape(product(*t.shape[:-1]), t.shape[-1])
    called = ctx.kernel(("centered", t.dtype), lambda: kernel({4: "float32", 8: "float64"}[t.dtype.bits // 8]), "centered")
    return ctx.view(ctx.call(called, [ctx.view(x, t.shape, flat.shape)], ctx.type(flat)), flat.shape, t.shape)


@pytest.fixture
def centered() -> Iterator[Op]:
    @register
    class Centered(Op):
        """x less its mean along the last axis."""

        name = "centered"
        kind = "row"
        precision = "wide"
        lowering = Lowering(lower)

        def infer(self, attrs: Any, x: Any) -> Any:
            if not floating(x).rank:
                raise TypeMismatch("x has no axis")
            return x

        def axes(self, attrs: Any, x: Any) -> Any:
            return along(x.shape, (x.rank - 1,), lambda size: Factor(size, "normalized"))

        def reference(self, attrs: Any, x: np.ndarray) -> np.ndarray:
            return np.asarray(x - x.mean(-1, keepdims=True), x.dtype)

        def vjp(self, b: Any, node: Any, g: Any) -> Any:
            return [b.emit(self, g)]

        def samples(self) -> Any:
            yield Sample([np.arange(12, dtype=np.float32).reshape(3, 4) ** 2])
            yield Sample([np.arange(24.0).reshape(2, 3, 4) % 7])
            yield Sample([np.ones(1, np.float32)])

        def errors(self) -> Any:
            yield ErrorSample(["i32[2]"], {}, "must be float")
            yield ErrorSample(["f32[]"], {}, "has no axis")

    try:
        yield OPS[Centered.name]
    finally:
        del OPS[Centered.name]


def sweep(path: str) -> Iterator[Callable[[str], None]]:
    """The tests of a file that every differentiable operation which is no composite has to pass."""
    spec = importlib.util.spec_from_file_location(Path(path).stem + "_again", HERE / path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, test in vars(module).items():
        for mark in getattr(test, "pytestmark", ()) if name.startswith("test_") else ():
            if mark.args[0] == "name" and {"tanh", "reduce_sum", "centered"} <= set(mark.args[1]):
                yield test


def test_the_sweeps_prove_it(centered: Op) -> None:
    """Types, meaning, text, refusals, both derivatives, the axis rule; and every sample compiled."""
    tests = [t for path in ("ir/test_registry.py", "ir/test_axes.py", "backends/test_tvm_ops.py") for t in sweep(path)]
    names = {t.__name__ for t in tests}
    assert {"test_gradient_equals_finite_differences", "test_an_element_reaches_only_what_the_rule_says"} <= names
    assert "test_compiled_equals_reference" in names
    for test in tests:
        test(centered.name)


def test_passes_ask_it(centered: Op) -> None:
    """A cache is derived through it along features, refused along tokens, and the step computes it with its own kernel."""
    program = random_program(DECODER)
    served = program.copy()
    PassManager([DeriveKVCache(chunk=4)]).run(served)
    assert [n.op for n in served["decode"].nodes if n.op is centered]
    tokens = np.array([[3, 1, 4, 1, 5]])
    params = {name: p.load() for name, p in program.params.items()}
    want = evaluate(program["forward"], {"tokens": tokens}, params)[0]
    got = ws.run(served, "decode", backend="cpu", tokens=tokens[:, 4:], past=np.array([4]))
    np.testing.assert_allclose(got["logits"], want[:, 4], rtol=1e-5, atol=1e-5)
    turned = DECODER.replace("%y: f32[b, s, 6] = centered(%x)", """%t: f32[b, 6, s] = transpose(%x) {perm=(0, 2, 1)}
  %c: f32[b, 6, s] = centered(%t)
  %y: f32[b, s, 6] = transpose(%c) {perm=(0, 2, 1)}""")  # fmt: skip
    with pytest.raises(IRError, match=r"(?s)%c: f32\[b, 6, s\] = centered\(%t\)"):
        PassManager([DeriveKVCache()]).run(random_program(turned))


def test_its_kernel_goes_before_its_decomposition(centered: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    class Both(type(centered)):  # type: ignore[misc]
        name = "both"

        def decompose(self, b: Any, attrs: Any, x: Any) -> Any:
            raise AssertionError("there is a kernel")

    monkeypatch.setitem(OPS, "both", Both())
    g = ws.parse("""graph @forward(%x: f32[n, 3]) {
  %y: f32[n, 3] = both(%x)
  return %y
}""")
    got = ws.run(ws.Program({"forward": g}), backend="cpu", x=np.array([[1, 2, 6]], np.float32))
    assert got["y"].tolist() == [[-2, -1, 3]]
