"""Every operation runs compiled, by a lowering or its decomposition, and agrees with its reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("tvm")

from wasat.backends.tvm.build import Runner
from wasat.backends.tvm.lower import TVM_DTYPE
from wasat.backends.tvm.targets import cpu
from wasat.ir import OPS, Builder, Graph, IRError, Op, Program, QArray, Sample, TensorType, evaluate, type_of

# operations whose operands the backend does not carry as values
NOT_COMPILED = {
    "quantize": "weights are quantized when the artifact is written, not in the compiled program",
}


def _graph(name: str, op: Op, sample: Sample) -> tuple[Graph, dict[str, Any], dict[str, Any]]:
    """A graph of one node; quantized operands (and weights of linear) are parameters, as in a real program."""
    g = Graph(name)
    values, feeds, params = [], {}, {}
    for i, x in enumerate(sample.inputs):
        array = x if isinstance(x, QArray) else np.asarray(x)
        if isinstance(array, QArray) or (op.name in ("linear", "embedding") and i == (1 if op.name == "linear" else 0)):
            values.append(g.add_param(f"{name}.w{i}", type_of(array)))
            params[f"{name}.w{i}"] = array
        else:
            values.append(g.add_input(f"x{i}", type_of(array)))
            feeds[f"x{i}"] = array
    out = Builder(g).emit(op, *values, **sample.attrs)
    g.set_outputs(list(out) if isinstance(out, tuple) else [out])
    return g, feeds, params


def _compilable(g: Graph) -> bool:
    types = [v.type for v in g.values()]
    return all(not isinstance(t, TensorType) or t.dtype in TVM_DTYPE for t in types)


@pytest.mark.parametrize("name", sorted(OPS))
def test_compiled_equals_reference(name: str) -> None:
    """All samples of one operation in one library."""
    if name in NOT_COMPILED:
        with pytest.raises(IRError):
            _run_samples(name)
        return
    _run_samples(name)


def _run_samples(name: str) -> None:
    op = OPS[name]
    cases = [_graph(f"{name}_{i}", op, s) for i, s in enumerate(op.samples())]
    cases = [c for c in cases if _compilable(c[0])]
    from wasat.ir import ArrayParam

    params = {k: ArrayParam(x, type_of(x)) for _, _, ps in cases for k, x in ps.items()}
    runner = Runner(Program({g.name: g for g, _, _ in cases}, dict(params)), cpu())
    for g, feeds, ps in cases:
        want = evaluate(g, feeds, ps)
        got = runner(g.name, feeds)
        for n, w in zip(g.output_names, want):
            assert isinstance(w, np.ndarray)
            x = got[n]
            assert x.shape == w.shape
            if w.dtype.kind in "biu":
                np.testing.assert_array_equal(x, w, err_msg=str(g))
            else:
                tol = {2: 1e-2, 4: 2e-5, 8: 1e-9}[w.dtype.itemsize]
                np.testing.assert_allclose(x.astype(np.float64), w.astype(np.float64), rtol=tol, atol=tol, err_msg=str(g))
