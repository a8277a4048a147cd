"""What a model takes for each token beside the token: in steps, in chunks, in rows of different lengths, in generation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from wasat.frontend import nn
from wasat.ir import evaluate
from wasat.runtime import InputError

import wasat as ws

VOCAB, DIM, KINDS, PLACES = 13, 16, 3, 40


class Decoder(nn.Module):
    """Ids of another name and type, positions and a kind for each token that pick rows of tables; hidden states beside."""

    def __init__(self) -> None:
        self.embed, self.kinds, self.places = nn.Embedding(VOCAB, DIM), nn.Embedding(KINDS, DIM), nn.Embedding(PLACES, DIM)
        self.mix, self.head = nn.Attention(DIM, 2, 2, 8), nn.Linear(DIM, VOCAB)

    def __call__(self, ids: nn.Tensor, positions: nn.Tensor, kind: nn.Tensor) -> dict[str, nn.Tensor]:
        x = self.embed(ids) + self.places(positions) + self.kinds(kind)
        x = x + self.mix(x, nn.positions(ids))
        return {"hidden": x, "logits": self.head(x)}


@pytest.fixture(scope="module")
def program() -> ws.Program:
    return nn.trace(Decoder(), {"ids": "i32[b, s]", "positions": "i64[b, s]", "kind": "i64[b, s]"})


@pytest.fixture(scope="module")
def model(program: ws.Program, tmp_path_factory: pytest.TempPathFactory) -> ws.Model:
    folder: Path = tmp_path_factory.mktemp("along") / "out"
    ws.compile(program, folder, chunk=4)
    return ws.load(folder)


def forward(program: ws.Program, ids: list[int], kind: list[int], positions: list[int] | None = None) -> np.ndarray:
    at = list(range(len(ids))) if positions is None else positions
    feeds = {"ids": np.array([ids], np.int32), "positions": np.array([at]), "kind": np.array([kind])}
    params = {k: p.load() for k, p in program.params.items()}
    logits: np.ndarray = evaluate(program["forward"], feeds, params)[1][0, -1]
    return logits


@pytest.mark.parametrize("given", [False, True], ids=["counted", "given"])
def test_steps(program: ws.Program, model: ws.Model, given: bool) -> None:
    """Positions count in each row, or are what they are said to be; a chunk is four tokens."""
    rng = np.random.default_rng(0)
    ids, kind, places = (rng.integers(0, n, (2, 20)) for n in (VOCAB, KINDS, PLACES))
    session = model.session(2, context=24)
    for counts in ([7, 5], [1, 1], [0, 3], [1, 1]):
        past, n = session.past, np.array(counts)
        new = [np.zeros((2, n.max()), np.int64) for _ in range(3)]
        for x, part in zip((ids, kind, places), new):
            for r in range(2):
                part[r, : n[r]] = x[r, past[r] : past[r] + n[r]]
        got = session.step(new[0], n, kind=new[1], **({"positions": new[2]} if given else {}))
        for r in np.flatnonzero(n):
            end = session.past[r]
            want = forward(program, ids[r, :end], kind[r, :end], places[r, :end] if given else None)
            np.testing.assert_allclose(got[r], want, rtol=1e-4, atol=1e-5)


def test_generation_goes_on(program: ws.Program, model: ws.Model) -> None:
    """Positions count on, the kind stays what the last one was."""
    prompts, kind = [[3, 1, 4], [5]], np.array([[0, 1, 2], [1, 0, 0]])
    got = model.generate(prompts, max_tokens=5, inputs={"kind": kind})
    for r, prompt in enumerate(prompts):
        ids, kinds = list(prompt), kind[r, : len(prompt)].tolist()
        for token in got[r].tokens:
            assert token == forward(program, ids, kinds).argmax()
            ids.append(token)
            kinds.append(kinds[-1])
    places = np.array([[30, 31, 32]])
    (one,) = model.generate(prompts[:1], max_tokens=3, inputs={"kind": kind[:1], "positions": places})
    ids = list(prompts[0])
    for i, token in enumerate(one.tokens):
        assert token == forward(program, ids, [0, 1, *[2] * (i + 1)], list(range(30, 33 + i))).argmax()
        ids.append(token)


def test_what_does_not_fit(model: ws.Model) -> None:
    session = model.session(2, context=24)
    tokens, kind = np.zeros((2, 3), np.int64), np.zeros((2, 3), np.int64)
    for message, along in {
        r"takes kind int64\['b', 's'\] for each token: step\(\) or generate\(inputs=\) is to": {},
        r"input kind has an element for each token: \[2, 3\], not \[2, 1\]": {"kind": kind[:, :1]},
        "input kind: its rows differ in length": {"kind": [[1], [1, 2]]},
        "input kind must be int64, not float64": {"kind": kind + 0.5},
        "input segment: beside each token, the model takes positions, kind": {"kind": kind, "segment": kind},
        "input kind holds the index 3, outside -3 .. 2": {"kind": kind + 3},
        "input positions holds the index 40, outside -40 .. 39": {"kind": kind, "positions": kind + 40},
    }.items():
        with pytest.raises(InputError, match=message):
            session.step(tokens, **along)
        assert session.past.tolist() == [0, 0]
    with pytest.raises(InputError, match="takes kind"):
        model.generate([[1, 2]], max_tokens=2)
