"""Sessions over states that are no caches of keys and values, compiled: what idle rows hold, going back, growth."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from rows_help import check_rows, wanted
from wasat.frontend import nn
from wasat.runtime import InputError, Model, Session

import wasat as ws

VOCAB, DIM = 13, 8


class Mixed(nn.Module):
    """A convolution, a scan, a running sum, a token shift and sigmoid attention."""

    def __init__(self) -> None:
        self.embed, self.head = nn.Embedding(VOCAB, DIM, std=1.0), nn.Linear(DIM, VOCAB)
        self.conv, self.norm = nn.Conv1d(DIM, DIM, 3, padding="causal", groups=DIM), nn.RMSNorm(DIM)

    def __call__(self, tokens: nn.Tensor) -> nn.Tensor:
        x, at = self.embed(tokens), nn.positions(tokens)
        x = x + self.conv(x.swap(1, 2)).swap(1, 2)
        turns = self.norm(x).transpose(1, 0, 2)
        _, y = nn.scan(lambda h, n: (h * 0.5 + n, nn.tanh(h + n)), nn.full((x.shape[0], DIM), 1.0), turns)
        x = x + y.transpose(1, 0, 2)
        x = x + nn.sin(nn.cumsum(self.norm(x), axis=1))
        x = x - nn.concat([nn.full((x.shape[0], 1, DIM), 0.5), x[:, :-1]], axis=1)
        q = self.norm(x).heads(2).swap(1, 2)
        w = nn.sigmoid(nn.where(nn.causal(at), q @ q.T, float("-inf")))
        return self.head(self.norm(x + (w @ nn.sin(q)).swap(1, 2).merge() / (at[:, None] + 1).cast("f32")))


@pytest.fixture(scope="module")
def program() -> ws.Program:
    return nn.trace(Mixed(), {"tokens": "i64[b, s]"}, outputs=["logits"])


@pytest.fixture(scope="module")
def model(program: ws.Program, tmp_path_factory: pytest.TempPathFactory) -> Model:
    out = tmp_path_factory.mktemp("kept") / "out"
    ws.compile(program, out, chunk=8, check=True)
    return ws.load(out)


def test_what_is_kept(model: Model) -> None:
    kinds = {s.name: (s.kind, s.cut, s.shape) for s in model.manifest.interface.states}
    assert kinds == {
        "kept.0": ("full", "anywhere", ("b", "c", 2, 4)), "kept.1": ("full", "anywhere", ("b", "c", 2, 4)),
        "tail.0": ("tail", "never", ("b", 2, 8)), "carry.0": ("carry", "never", ("b", 8)),
        "carry.1": ("carry", "never", ("b", 8)), "tail.1": ("tail", "never", ("b", 1, 8)),
    }  # fmt: skip


def test_rows_of_their_own_lengths_some_of_them_idle(program: ws.Program, model: Model) -> None:
    turns = ([5, 3, 8], [1, 1, 1], [0, 4, 2], [1, 0, 1], [0, 0, 1], [6, 1, 0], [1, 1, 0], [20, 9, 0], [1, 1, 1])
    check_rows(program, model.session(3, context=64), turns, VOCAB, 1e-4)


@pytest.mark.slow
def test_forward_beside_them(program: ws.Program, tmp_path: Path) -> None:
    """All positions at once, where that is asked for; by itself nothing of the kind is there."""
    ws.compile(program, tmp_path / "out", chunk=8, keep_forward=True)
    model, tokens = ws.load(tmp_path / "out"), np.arange(10).reshape(2, 5)
    got = model.run("forward", tokens=tokens)["logits"]
    np.testing.assert_allclose(got, ws.run(program, tokens=tokens)["logits"], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(model.session(2, context=64).step(tokens), got[:, -1], rtol=1e-4, atol=1e-4)
    assert "forward" not in ws.optimize(program, chunk=8)[0].graphs


def test_going_back(program: ws.Program, model: Model) -> None:
    """Not to the middle, which no carry remembers; to nothing, yes."""
    rng = np.random.default_rng(1)
    session, tokens = model.session(2, context=64), rng.integers(0, VOCAB, (2, 6))
    session.step(tokens)
    with pytest.raises(InputError, match=r"row 1 cannot go back to 5 of 6 positions: the tail tail.0 holds the latest only"):
        session.truncate([6, 5])
    session.truncate([6, 0])
    got = session.step(tokens[:, :2])
    np.testing.assert_allclose(got[0], wanted(program, np.concatenate([tokens[0], tokens[0, :2]])), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(got[1], wanted(program, tokens[1, :2]), rtol=1e-4, atol=1e-4)
    session.reset()
    np.testing.assert_allclose(session.step(tokens)[0], wanted(program, tokens[0]), rtol=1e-4, atol=1e-4)


def test_growth(program: ws.Program, model: Model) -> None:
    """Beyond the capacity that a session opens with; at the end of the context, row by row. Rounding a running sum of so many
    is up to 2.2e-5 of a logit, over three draws."""
    rng = np.random.default_rng(2)
    session: Session = model.session(2, context=304)
    tokens = rng.integers(0, VOCAB, (2, 304))
    session.step(tokens[:, :290], [290, 250])
    got = session.step(np.stack([np.pad(tokens[0, 290:], (0, 2)), tokens[1, 250:266]]), [14, 16])
    np.testing.assert_allclose(got[0], wanted(program, tokens[0]), rtol=3e-5, atol=3e-5)
    np.testing.assert_allclose(got[1], wanted(program, tokens[1, :266]), rtol=3e-5, atol=3e-5)


class Ends(nn.Module):
    """Attention to the first two and the last three, over a table of twenty positions."""

    def __init__(self) -> None:
        self.embed, self.head = nn.Embedding(VOCAB, DIM, std=1.0), nn.Linear(DIM, VOCAB)
        self.places = nn.Embedding(20, DIM, std=1.0)

    def __call__(self, tokens: nn.Tensor) -> nn.Tensor:
        at = nn.positions(tokens)
        q = (self.embed(tokens) + self.places(at)).heads(2).swap(1, 2)
        keep = nn.causal(at) & (nn.within(at, 3) | (at[None, :] < 2))
        return self.head((nn.softmax(nn.where(keep, q @ q.T, float("-inf"))) @ nn.sin(q)).swap(1, 2).merge())


def test_first_and_last_positions_up_to_the_end_of_the_context(tmp_path: Path) -> None:
    """Padding of the shorter row would stand where the table has no rows: then each row goes by itself."""
    program = nn.trace(Ends(), {"tokens": "i64[b, s]"}, outputs=["logits"])
    ws.compile(program, tmp_path / "out", chunk=3)
    model = ws.load(tmp_path / "out")
    assert model.manifest.interface.context == 20
    session, tokens = model.session(2), np.random.default_rng(0).integers(0, VOCAB, (2, 20))
    session.step(tokens[:, :17], [17, 12])
    got = session.step(np.stack([np.pad(tokens[0, 17:18], (0, 2)), tokens[1, 12:15]]), [1, 3])
    np.testing.assert_allclose(got[0], wanted(program, tokens[0, :18]), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(got[1], wanted(program, tokens[1, :15]), rtol=1e-4, atol=1e-4)
    got = session.step(np.stack([np.pad(tokens[0, 18:20], (0, 1)), tokens[1, 15:18]]), [2, 3])
    np.testing.assert_allclose(got[0], wanted(program, tokens[0]), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(got[1], wanted(program, tokens[1, :18]), rtol=1e-4, atol=1e-4)
