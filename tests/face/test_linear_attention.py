"""Linear attention compiled: prefill by blocks, decoding over a state that is written in place, sessions of several rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from rows_help import check_rows, wanted
from wasat.backends.tvm.cpu.kernels.linear_attention import LinearAttention
from wasat.backends.tvm.lower import KernelCall, selected
from wasat.backends.tvm.targets import cpu
from wasat.frontend import nn
from wasat.runtime import InputError, Model

import wasat as ws

VOCAB, DIM = 13, 32


class Layers(nn.Module):
    """The delta rule, two query heads over each state, from a state that is learned; decays of each feature."""

    def __init__(self) -> None:
        self.embed, self.head, self.norm = nn.Embedding(VOCAB, DIM, std=1.0), nn.Linear(DIM, VOCAB), nn.RMSNorm(DIM)
        self.start = nn.Parameter((1, 2, 8, 8), std=1.0)

    def __call__(self, tokens: nn.Tensor) -> nn.Tensor:
        x = self.embed(tokens)
        h = self.norm(x)
        q, k, v = nn.sin(h).heads(4), nn.normalize(h[..., :16].heads(2), axis=-1), nn.tanh(h[..., 16:]).heads(2)
        decay, beta = -nn.softplus(h[..., :2] * 3.0), nn.sigmoid(h[..., 2:4])
        start = self.start.broadcast_to(x.shape[0], 2, 8, 8)
        x = x + nn.linear_attention(q, k, v, decay=decay, beta=beta, state=start)[0].merge()
        h = self.norm(x)
        each = nn.sigmoid(h * 2.0).heads(4)
        y, _ = nn.linear_attention(nn.sin(h).heads(4), h.heads(4), nn.tanh(h).heads(4), decay=each, log=False)
        return self.head(self.norm(x + y.merge()))


@pytest.fixture(scope="module")
def program() -> ws.Program:
    return nn.trace(Layers(), {"tokens": "i64[b, s]"}, outputs=["logits"])


@pytest.fixture(scope="module")
def model(program: ws.Program, tmp_path_factory: pytest.TempPathFactory) -> Model:
    out = tmp_path_factory.mktemp("linear") / "out"
    ws.compile(program, out, chunk=80)
    return ws.load(out)


def test_rows_of_their_own_lengths_some_of_them_idle(program: ws.Program, model: Model) -> None:
    turns = ([75, 3, 33], [1, 1, 1], [0, 40, 2], [1, 0, 1], [0, 0, 1], [6, 1, 0], [1, 1, 0], [20, 9, 0], [1, 1, 1])
    check_rows(program, model.session(3, context=256), turns, VOCAB, 2e-5)


def kernels(program: ws.Program, **how: object) -> dict[str, list[LinearAttention]]:
    served, _ = ws.optimize(program, **how)  # type: ignore[arg-type]
    target = cpu("x86-64-v3", 1)
    graphs = selected(served, target.table(), target.kernels(target, served))
    calls = {name: [n.op for n in g.nodes if isinstance(n.op, KernelCall)] for name, g in zip(served.graphs, graphs)}
    return {name: [op.desc for op in ops if isinstance(op.desc, LinearAttention)] for name, ops in calls.items()}


def test_states_are_written_in_place(program: ws.Program) -> None:
    """Those that start as zeros; one that starts otherwise is chosen first. Not those of a fixed number of rows, of which some
    are idle at times."""
    found = kernels(program, kv_cache=True)
    assert {name: [(d.single, d.in_place, d.begins) for d in descs] for name, descs in found.items()} == {
        "prefill": [(False, False, False), (False, True, True)], "decode": [(True, False, False), (True, True, True)],
    }  # fmt: skip
    for batch, in_place in ((1, True), (2, False)):
        fixed = nn.trace(Layers(), {"tokens": f"i64[{batch}, s]"}, outputs=["logits"])
        assert [d.in_place for d in kernels(fixed, kv_cache=True)["decode"]] == [False, in_place]
    assert [(d.in_place, d.begins) for d in kernels(program, kv_cache=False)["forward"]] == [(False, False)] * 2


def test_a_step_that_fails_leaves_no_half_written_state(model: Model, program: ws.Program) -> None:
    session, tokens = model.session(2, context=64), np.arange(10).reshape(2, 5)
    session.step(tokens)
    functions = session._functions
    session._functions = {**functions, "decode": lambda *args: functions["decode"](*args, 1)}
    with pytest.raises(InputError, match=r"rows \[1\] are empty now, their states having been written over: feed them again"):
        session.step(tokens[:, :1], [0, 1])
    session._functions = functions
    assert session.past.tolist() == [5, 0]
    got = session.step(tokens[:, :2])
    np.testing.assert_allclose(got[0], wanted(program, np.concatenate([tokens[0], tokens[0, :2]])), rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(got[1], wanted(program, tokens[1, :2]), rtol=2e-5, atol=2e-5)


def test_an_interrupted_step_leaves_no_half_written_state(program: ws.Program, model: Model) -> None:
    """Control-C while the entry runs: it is done with its states, the session does not know."""
    session, tokens = model.session(1, context=64), np.arange(5)[None]
    session.step(tokens)
    functions = session._functions

    def pressed(*args: object) -> None:
        functions["decode"](*args)
        raise KeyboardInterrupt

    session._functions = {**functions, "decode": pressed}
    with pytest.raises(KeyboardInterrupt):
        session.step(tokens[:, :1])
    session._functions = functions
    assert session.past.tolist() == [0]
    np.testing.assert_allclose(session.step(tokens[:, :2])[0], wanted(program, tokens[0, :2]), rtol=2e-5, atol=2e-5)


@pytest.mark.slow
def test_numbers_of_a_fixed_batch(tmp_path: Path) -> None:
    """Idle rows keep their states, whatever runs over them."""
    program = nn.trace(Layers(), {"tokens": "i64[2, s]"}, outputs=["logits"])
    ws.compile(program, tmp_path / "out", chunk=8)
    session, rng = ws.load(tmp_path / "out").session(2, context=64), np.random.default_rng(3)
    tokens = rng.integers(0, VOCAB, (2, 7))
    session.step(tokens[:, :5], [5, 3])
    session.step(tokens[:, 5:6], [1, 0])
    got = session.step(np.stack([tokens[0, 6:], tokens[1, 3:4]]))
    want = np.asarray(ws.run(program, tokens=np.stack([tokens[0], tokens[0]]))["logits"])[0, -1]
    np.testing.assert_allclose(got[0], want, rtol=2e-5, atol=2e-5)
    want = np.asarray(ws.run(program, tokens=np.stack([tokens[1, :4]] * 2))["logits"])[0, -1]
    np.testing.assert_allclose(got[1], want, rtol=2e-5, atol=2e-5)
