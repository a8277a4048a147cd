"""Rows of a session: each is as if it were alone, whoever is fed beside it; those without tokens are not touched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_model import CONTEXT, VOCAB
from wasat.backends.tvm.build import build
from wasat.backends.tvm.targets import cpu
from wasat.backends.tvm.weights import write_weights
from wasat.ir import ArrayParam, Builder, DimLike, DType, Graph, Interface, Program, State, TensorType, symbol, type_of
from wasat.runtime import InputError, Model, load, write_artifact
from wasat.runtime.interface import State as Kept
from wasat.runtime.session import Session
from wasat.runtime.slots import Slots

from wasat.manifest import manifest_of


# -- against rows that are alone ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(4))
def test_rows_are_as_if_alone(model: Model, seed: int) -> None:
    """Random subsets of rows, lengths, cuts and restarts; a session of one row for each says what must come out."""
    rng = np.random.default_rng(seed)
    batch, context = 5, 200
    session, alone = model.session(batch, context), [model.session(1, context) for _ in range(batch)]
    for _ in range(30):
        chosen = rng.random(batch) < rng.choice([0.3, 0.6, 1.0])
        chosen[rng.integers(batch)] = True
        longest = int(rng.choice([1, 1, 3, 12]))
        lengths = np.where(chosen, rng.integers(1, longest + 1, batch), 0)
        if (session.past + lengths).max() > context or rng.random() < 0.05:
            to = np.where(rng.random(batch) < 0.5, 0, session.past)
            session.truncate(to)
            for row, n in zip(alone, to):
                row.truncate(int(n))
            continue
        tokens = rng.integers(0, VOCAB, (batch, lengths.max()))
        got = session.step(tokens, lengths)
        for r in np.flatnonzero(lengths):
            np.testing.assert_allclose(got[r], alone[r].step(tokens[r : r + 1, : lengths[r]])[0], rtol=1e-4, atol=1e-5)
        assert session.past.tolist() == [int(row.past[0]) for row in alone]


def _held(session: Session) -> dict[str, np.ndarray]:
    """The states of all rows, in their order."""
    slot = np.argsort(session._row)
    return {k: b.array[slot].copy() for k, b in session._slots._buffers.items()}


def test_rows_without_tokens_stay_to_the_bit(model: Model) -> None:
    rng = np.random.default_rng(0)
    session = model.session(4, 64)
    session.step(rng.integers(0, VOCAB, (4, 9)), [9, 5, 1, 7])
    for lengths in ([0, 0, 3, 0], [1, 0, 0, 1], [0, 1, 1, 0], [0, 0, 0, 1], [2, 0, 3, 1]):
        before = _held(session)
        session.step(rng.integers(0, VOCAB, (4, max(lengths))), lengths)
        for name, x in _held(session).items():
            for r in range(4):
                assert np.array_equal(x[r], before[name][r]) == (lengths[r] == 0), (name, r, lengths)


def test_one_live_row_of_many_is_one_call_of_one_row(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    session = model.session(8, 64)
    session.step(np.ones((8, 3), np.int64))
    called: list[tuple[int, ...]] = []
    decode = session._functions["decode"]
    monkeypatch.setitem(session._functions, "decode", lambda *args: called.append(tuple(args[0].shape)) or decode(*args))
    for r in (5, 5, 0, 7):
        session.step(np.ones((8, 1), np.int64), [int(i == r) for i in range(8)])
    session.step(np.ones((8, 1), np.int64), [1, 0, 0, 1, 0, 0, 0, 1])
    session.step(np.ones((8, 1), np.int64))
    assert called == [(1, 1)] * 4 + [(3, 1), (8, 1)]


@pytest.mark.parametrize("seed", range(3))
def test_a_row_that_joins_or_leaves_moves_at_most_one(model: Model, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Whoever is live: one exchange of two slots, of which one is idle; nobody else's states are copied."""
    rng, session = np.random.default_rng(seed), model.session(8, 64)
    session.step(rng.integers(0, VOCAB, (8, 3)))
    moved: list[tuple[int, int]] = []
    swap, live = session._slots.swap, np.ones(8, np.int64)
    monkeypatch.setattr(session._slots, "swap", lambda a, b, n: moved.append((a, b)) or swap(a, b, n))
    for _ in range(48):
        changed = rng.choice(np.flatnonzero(live) if live.sum() > 1 and rng.random() < 0.55 else np.arange(8))
        live[changed] ^= 1
        if not live.any():
            live[changed] = 1
        before, moved[:] = session._row.copy(), []
        session.step(rng.integers(0, VOCAB, (8, 1)), live)
        assert len(moved) <= 1
        assert all(0 in live[before[[a, b]]] for a, b in moved)
    assert session._row.tolist() != list(range(8))


def test_padding_beyond_the_context_is_fed_to_no_row(model: Model) -> None:
    """Near the end of the context, rows of different lengths are fed one by one; idle ones stay."""
    rng = np.random.default_rng(3)
    tokens = rng.integers(0, VOCAB, (3, CONTEXT))
    session, alone = model.session(3), [model.session(1) for _ in range(3)]
    for lengths in ([CONTEXT - 3, CONTEXT - 5, 7], [3, 1, 0], [0, 4, 0], [0, 0, 2]):
        part = np.array([np.roll(t, -p) for t, p in zip(tokens, session.past)])[:, : max(lengths)]
        got = session.step(part, lengths)
        for r in np.flatnonzero(lengths):
            np.testing.assert_allclose(got[r], alone[r].step(part[r : r + 1, : lengths[r]])[0], rtol=1e-4, atol=1e-5)
    assert session.past.tolist() == [CONTEXT, CONTEXT, 9]


def test_entries_take_the_weights_that_they_read(model: Model) -> None:
    entries = model.manifest.entries
    assert not entries["sum"].weights
    assert set(entries["prefill"].weights) == set(entries["decode"].weights) == {w.name for w in model.manifest.weights}


# -- what a recurrence hands on ----------------------------------------------------------------------------------------------
BEGIN = np.array([0.5, -1.0, 2.0], np.float32)
TABLE = np.random.default_rng(1).standard_normal((16, 3)).astype(np.float32)


def _running(name: str, rows: DimLike) -> Graph:
    """Logits are the sum of a beginning and of the tokens' rows of a table, which is what is handed on; and the same with
    another beginning."""
    g = Graph(name)
    b = Builder(g)
    new = symbol("s") if name == "prefill" else 1
    tokens = g.add_input("tokens", TensorType(DType.I64, (rows, new)))
    g.add_input("past", TensorType(DType.I64, (rows,)))
    last = g.add_input("last", TensorType(DType.I64, (rows,))) if name == "prefill" else None
    h, k = (g.add_input(x, TensorType(DType.F32, (rows, 3))) for x in "hk")
    x = b.embedding(g.add_param("table", TensorType(DType.F32, TABLE.shape)), tokens, dtype="f32")
    if last is not None:
        x = b.take_row(b.cumsum(x, axis=1), last)
    x = b.reshape(x, shape=(rows, 3))
    h, k = b.add(h, x), b.add(k, x)
    g.set_outputs([b.add(h, b.mul(k, 10.0)), h, k], ["logits", "h", "k"])
    return g


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return _compiled(tmp_path_factory.mktemp("running") / "model", symbol("b"))


def _compiled(out: Path, rows: DimLike) -> Model:
    graphs = {name: _running(name, rows) for name in ("prefill", "decode")}
    params = {k: ArrayParam(x, type_of(x)) for k, x in (("table", TABLE), ("start", BEGIN))}
    states = (State.carry("h", empty=-1.5), State.carry("k", empty="start"))
    program = Program(graphs, params, Interface(context=64, chunk=4, states=states))
    program.verify()
    library = build(program, cpu(threads=2))
    write_artifact(out, manifest_of(program, library, {}), {
        "model.so": library.export, "weights.safetensors": lambda path: write_weights(path, library.plan, program.load),
        **{p.name: p for p in library.target.runtime_files()},
    })  # fmt: skip
    return load(out)


def test_carries_begin_stop_at_each_row_and_begin_again(running: Model) -> None:
    rng = np.random.default_rng(2)
    batch = 5
    session = running.session(batch)
    texts: list[list[int]] = [[] for _ in range(batch)]
    for _ in range(60):
        lengths = rng.integers(0, int(rng.choice([2, 2, 7])), batch)
        if (session.past + lengths).max() > 64 or rng.random() < 0.1:
            kept = rng.random(batch) < 0.5
            session.truncate(np.where(kept, session.past, 0))
            texts = [t if k else [] for t, k in zip(texts, kept)]
            continue
        if not lengths.any():
            continue
        tokens = rng.integers(0, 16, (batch, lengths.max()))
        got = session.step(tokens, lengths)
        for r in np.flatnonzero(lengths):
            texts[r] += tokens[r, : lengths[r]].tolist()
            total = TABLE[texts[r]].astype(np.float64).sum(axis=0)
            np.testing.assert_allclose(got[r], (total - 1.5) + 10 * (total + BEGIN), rtol=1e-4, atol=1e-4)
    session.reset()
    np.testing.assert_allclose(session.step([[3]] * batch), [TABLE[3] * 11 - 1.5 + 10 * BEGIN] * batch, rtol=1e-5)


def test_a_program_for_so_many_rows(running: Model, tmp_path: Path) -> None:
    """All of them are computed whoever has tokens; idle ones keep what they had."""
    fixed = _compiled(tmp_path / "model", 3)
    with pytest.raises(InputError, match="the program is for 3 rows; the session cannot be for 2"):
        fixed.session(2)
    one, other = fixed.session(3), running.session(3)
    for lengths in ([2, 3, 1], [0, 1, 0], [4, 0, 0], [1, 1, 1], [0, 0, 3]):
        tokens = np.arange(3 * max(lengths)).reshape(3, -1) % 16
        live = np.flatnonzero(lengths)
        np.testing.assert_allclose(one.step(tokens, lengths)[live], other.step(tokens, lengths)[live], rtol=1e-5)


def test_a_carry_cannot_be_cut(running: Model) -> None:
    session = running.session(2)
    session.step([[1, 2, 3], [4, 5, 0]], [3, 2])
    with pytest.raises(InputError, match="row 1 cannot go back to 1 of 2 positions: the carry h holds the latest only"):
        session.truncate([3, 1])
    session.truncate([0, 2])
    assert session.past.tolist() == [0, 2]


# -- slots -------------------------------------------------------------------------------------------------------------------
def _state(name: str, shape: list[Any], **fields: Any) -> Kept:
    known = dict.fromkeys(("positions", "capacity", "window", "empty")) | {"rows": 0, "cut": "never"} | fields
    return Kept(name, fields.pop("dtype", "float32"), tuple(shape), name, role="", donated=False, **{
        k: v for k, v in known.items() if k != "dtype"
    })  # fmt: skip


def test_slots_change_places_whole(running: Model) -> None:
    """Of what grows, only the positions that are held; (``running``: the runtime is loaded)."""
    slots = Slots((
        _state("full", ["b", 2, "c", 3], positions=2, cut="anywhere"), _state("carry", ["b", 3], empty=7.0),
        _state("shared", [5], rows=None),
    ), 3, 16, {})  # fmt: skip
    slots.reserve(32)
    buffers = {k: b.array for k, b in slots._buffers.items()}
    assert (buffers["carry"] == 7).all()
    for x in buffers.values():
        x[...] = np.arange(x.size).reshape(x.shape)
    before = {k: x.copy() for k, x in buffers.items()}
    slots.swap(0, 2, 17)
    for k in ("full", "carry"):
        assert np.array_equal(buffers[k][[2, 1, 0]], before[k])
    slots.swap(0, 2, 16)
    assert np.array_equal(buffers["carry"], before["carry"])
    assert np.array_equal(buffers["full"][:, :, :16], before["full"][:, :, :16])
    assert np.array_equal(buffers["full"][[2, 1, 0], :, 16:], before["full"][:, :, 16:])
    assert np.array_equal(buffers["shared"], before["shared"])
    assert [slots.may_start(i) for i in range(3)] == [True, False, False]  # 12 bytes a row
    tensors = slots.tensors(0, 2)
    assert {k: tuple(x.shape) for k, x in tensors.items()} == {"full": (2, 2, 32, 3), "carry": (2, 3), "shared": (5,)}
    slots.reserve(64)
    grown = slots._buffers["full"].array
    assert grown.shape == (3, 2, 64, 3)
    assert np.array_equal(grown[:, :, :32], buffers["full"])
    assert not grown[:, :, 32:].any()
    slots.clear(np.array([1]))
    assert slots._buffers["carry"].array[1].tolist() == [7, 7, 7]
    assert np.array_equal(slots._buffers["carry"].array[0], before["carry"][0])


def test_a_beginning_in_bfloat16(running: Model) -> None:
    slots = Slots((_state("carry", ["b", 4], dtype="bfloat16", empty=-1.5),), 2, 16, {})
    slots.reserve(16)
    assert (slots._buffers["carry"].array.view(np.uint16).astype(np.uint32) << 16).view(np.float32).tolist() == [[-1.5] * 4] * 2


