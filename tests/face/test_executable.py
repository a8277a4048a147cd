"""A program compiled once and called often."""

from __future__ import annotations

import numpy as np
import pytest

import wasat as ws
from wasat import nn

pytest.importorskip("tvm")


def test_it_keeps_what_was_compiled() -> None:
    program = ws.trace(nn.Sequential(nn.Linear(3, 2)), {"x": "f32[n, 3]"}, outputs=["y"])
    w = np.arange(6, dtype=np.float32).reshape(2, 3)
    ws.load_weights(program, {"0.weight": w})
    f = ws.Executable(program)
    program.graphs.clear()
    program.params.clear()
    for n in (1, 4):
        x = np.random.default_rng(n).standard_normal((n, 3), np.float32)
        np.testing.assert_allclose(f(x=x)["y"], x @ w.T, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(f("forward", x=x)["y"], x @ w.T, rtol=1e-5, atol=1e-6)
    with pytest.raises(ws.WasatError, match="takes x; lacking: x; unknown: z"):
        f(z=x)
    with pytest.raises(ws.WasatError, match="no graph @backward"):
        f("backward", x=x)
    with pytest.raises(ws.WasatError):
        f(x=x[:, :2])
