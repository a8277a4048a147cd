"""Training steps on a GPU in software, by TVM's schedules: the interpreter's losses, gradients applied, states."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "training")]
from soft_cuda import soft_gpu
from test_compiled import CASES, GOOD, LOSS
from wasat.backends.tvm.build import BuildError
from wasat.backends.tvm.targets import target_named
from wasat.ir import ArrayParam, Interface, Program, evaluate, parse, type_of
from wasat.passes import PassManager, default_pipeline
from wasat.training.compiled import specialized
from wasat.training.loop import Trained
from wasat.training.optimizers import AdamW, Constant
from wasat.training.step import train_step

import wasat as ws
from wasat import nn
from wasat.planned import PlanRunner

pytestmark = pytest.mark.machines


def steps(program: Program, batch: dict[str, Any], turns: int, **options: Any) -> None:
    """Runs so many steps of a program's @loss on the device, each beside the interpreter's from the same states."""
    made = train_step(program, rate=Constant(0.05), **options)
    states = dict(made.states)
    step = specialized(made.program["train_step"], {**batch, **states})
    compiled = Program({"train_step": step.clone()}, made.program.params, Interface(states=made.program.interface.states))
    PassManager([p for p in default_pipeline(kv_cache=None) if p.name not in ("merge-linears", "hoist-params")]).run(compiled)
    with soft_gpu():
        runner = PlanRunner(compiled, target_named("cuda:sm_90"))
        for turn in range(turns):
            want = dict(zip(step.output_names, evaluate(step, {**batch, **states})))
            got = runner("train_step", {**batch, **states})
            assert got.keys() == want.keys()
            for name, x in want.items():
                rtol = 2e-3 if "precision" in options else 1e-4
                np.testing.assert_allclose(got[name], x, rtol=rtol, atol=5e-6, err_msg=f"{name} in {turn}")
            assert any(not np.array_equal(want[k], states[k]) for k in states)
            states = {k: got[k] for k in states}


@pytest.mark.parametrize("case", CASES)
def test_a_step(case: str) -> None:
    rng = np.random.default_rng(0)
    params = {"w": rng.standard_normal((4, 6), np.float32), "bias": rng.standard_normal(6).astype(np.float32)}
    program = Program({"loss": parse(LOSS)}, {k: ArrayParam(x, type_of(x)) for k, x in params.items()})
    steps(program, GOOD, 3, **CASES[case])


def test_a_step_of_a_transformer() -> None:
    """Embedding, norm, causal attention, a gated layer, cross entropy: their gradients, from products to scatters."""

    class Block(nn.Module):
        def __init__(self) -> None:
            self.embed, self.norm = nn.Embedding(11, 16), nn.RMSNorm(16)
            self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
            self.up, self.head = nn.Linear(16, 24), nn.Linear(16, 11)
            self.down = nn.Linear(24, 16)

        def __call__(self, tokens: nn.Tensor, targets: nn.Tensor) -> nn.Tensor:
            x = self.embed(tokens)
            y = self.norm(x)
            at = nn.arange(y.shape[1])
            scores = nn.einsum("b s d, b t d -> b s t", self.q(y), self.k(y)) * 0.25
            seen = nn.where(at[:, None] >= at[None, :], scores, float("-inf"))
            x = x + self.o(nn.softmax(seen, axis=-1) @ self.v(y))
            x = x + self.down(nn.silu(self.up(x)))
            return nn.cross_entropy(self.head(x), targets, axis=-1)

    program = nn.trace(Block(), {"tokens": "i64[b, s]", "targets": "i64[b, s]"}, outputs=["loss"], name="loss")
    rng = np.random.default_rng(1)
    for name, p in program.params.items():
        shape = p.type.concrete({})  # type: ignore[union-attr]
        program.params[name] = ArrayParam((0.3 * rng.standard_normal(shape)).astype(np.float32), p.type)
    tokens = rng.integers(0, 11, (2, 7))
    steps(program, {"tokens": tokens, "targets": np.roll(tokens, -1, 1)}, 2, optimizer=AdamW(), clip=1.0)


def test_a_run(tmp_path: Path) -> None:
    """``ws.train`` on the device, and on from its checkpoint: the losses and weights of the processor, as far as sums of
    another order have them. Where there is no device, a sentence."""
    rng = np.random.default_rng(0)
    params = {"w": rng.standard_normal((4, 6), np.float32), "bias": rng.standard_normal(6).astype(np.float32)}

    def run(folder: str, target: str, steps: int) -> Trained:
        program = Program({"loss": parse(LOSS)}, {k: ArrayParam(x, type_of(x)) for k, x in params.items()})
        options: dict[str, Any] = {"optimizer": AdamW(), "rate": Constant(0.05), "target": target, "save_every": 2}
        return ws.train(program, [GOOD] * steps, tmp_path / folder, steps=steps, evaluation=lambda: [GOOD], **options)

    with soft_gpu() as gpu:
        run("cuda", "cuda:sm_90", 2)
        launched = gpu.count("launches")
        got = run("cuda", "cuda:sm_90", 4)
        assert gpu.count("launches") > launched > 0
    want = run("cpu", "cpu", 4)
    assert [line["step"] for line in got.log] == [1, 2, 3, 4]
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose([x[name] for x in got.log], [x[name] for x in want.log], rtol=1e-5)
    assert got.log[-1]["eval.loss"] == pytest.approx(want.log[-1]["eval.loss"], rel=1e-5)
    assert got.log[-1]["loss"] < 0.9 * got.log[0]["loss"]
    for name, x in want.states.items():
        np.testing.assert_allclose(got.states[name], x, rtol=1e-4, atol=1e-6, err_msg=name)
    missing = r"compiles for cuda.* but nothing runs it here: that needs an NVIDIA"
    with soft_gpu(devices=0), pytest.raises(BuildError, match=missing):
        run("none", "cuda:sm_90", 1)
