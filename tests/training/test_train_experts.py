"""A mixture of experts is trained: a compiled step against the interpreter's, and it learns."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_allclose
from wasat.backends.tvm.targets import cpu
from wasat.frontend import nn
from wasat.ir import Program, evaluate
from wasat.training.compiled import Compiled
from wasat.training.optimizers import AdamW, Constant
from wasat.training.step import train_step

DIM, E = 6, 4


class Net(nn.Module):
    """Learns which of four maps a token goes through."""

    def __init__(self) -> None:
        self.experts = nn.MoE(DIM, 10, E, 2)

    def __call__(self, x: nn.Tensor, y: nn.Tensor) -> nn.Tensor:
        return nn.mse(x + self.experts(x), y)


def data(n: int, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, DIM)).astype(np.float32)
    maps = np.random.default_rng(9).standard_normal((E, DIM, DIM)).astype(np.float32)
    return {"x": x, "y": np.einsum("nd,ndk->nk", x, maps[x[:, :E].argmax(-1)])}


def program() -> Program:
    return nn.trace(Net(), {"x": f"f32[n, {DIM}]", "y": f"f32[n, {DIM}]"}, name="loss", outputs=["loss"])


def test_a_compiled_step_is_the_interpreters() -> None:
    pytest.importorskip("tvm")
    p, given = program(), data(32, 0)
    made = train_step(p, optimizer=AdamW(), rate=Constant(0.01))
    compiled = Compiled(p, made, given, cpu(threads=2), "loss")
    step, states = compiled.plain["train_step"], dict(made.states)
    for turn in range(3):
        before = {k: x.copy() for k, x in states.items()}
        said, states = compiled.step(given, states)
        want = dict(zip(step.output_names, evaluate(step, {**given, **before})))
        assert_allclose(said["loss"], want["loss"], rtol=1e-5)  # type: ignore[arg-type]
        for k in states:
            assert_allclose(states[k], want[k], rtol=1e-4, atol=5e-6, err_msg=f"{k} in {turn}")  # type: ignore[arg-type]


def test_it_learns() -> None:
    p = program()
    made = train_step(p, optimizer=AdamW(), rate=Constant(0.01))
    g, states = made.program["train_step"], dict(made.states)
    losses = []
    for i in range(60):
        feeds = {**data(64, i), **states}
        out = dict(zip(g.output_names, evaluate(g, {v.name: feeds[v.name] for v in g.inputs})))
        states = {k: np.asarray(out[k]) for k in states}
        losses.append(float(np.asarray(out["loss"])))
    assert np.mean(losses[-10:]) < 0.6 * np.mean(losses[:10])
