"""Sessions against the interpreter: chunks, batches, padding, rings, growth, limits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny_model import CHUNK, CONTEXT, RING, VOCAB, WINDOW, Reference
from wasat.backends.tvm.build import build
from wasat.backends.tvm.targets import cpu
from wasat.backends.tvm.weights import write_weights
from wasat.ir import ArrayParam, Builder, DimLike, DType, Graph, Interface, Program, TensorType, symbol
from wasat.runtime import ContextLimitError, InputError, Model, load, write_artifact

from wasat.manifest import manifest_of


def _tokens(n: int, seed: int = 0) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(0, VOCAB, n)]


def _near(got: np.ndarray, want: np.ndarray) -> None:
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


def test_token_by_token_equals_the_interpreter_past_the_ring(model: Model, reference: Reference) -> None:
    tokens = _tokens(3 * RING)
    session = model.session()
    for t, want in zip(tokens, reference.feed(tokens)):
        _near(session.step([[t]])[0], want)
    assert session.past.tolist() == [3 * RING]


@pytest.mark.parametrize("cuts", [(40,), (1, 39), (CHUNK, CHUNK + 1, 23), (CHUNK - 1, 33), (17, 2, 1, 20)])
def test_any_chunking_gives_the_same_logits(model: Model, reference: Reference, cuts: tuple[int, ...]) -> None:
    tokens = _tokens(40, 1)
    want = list(reference.feed(tokens))
    session, at = model.session(), 0
    for n in cuts:
        got = session.step([tokens[at : at + n]])
        at += n
        _near(got[0], want[at - 1])


def test_caches_grow_and_keep_what_they_hold(model: Model, reference: Reference) -> None:
    tokens = _tokens(560, 2)  # beyond the first capacity, and beyond its double
    want = list(reference.feed(tokens))
    session = model.session()
    for at in range(0, 560, 70):
        _near(session.step([tokens[at : at + 70]])[0], want[at + 69])


def test_padded_rows_equal_rows_alone(model: Model, program: Program) -> None:
    rows = [_tokens(n, 3 + n) for n in (37, 1, CHUNK, 20)]
    session = model.session(4)
    padded = np.zeros((4, 37), np.int64)
    for r, row in enumerate(rows):
        padded[r, : len(row)] = row
    refs = [Reference(program) for _ in rows]
    _near(session.step(padded, [len(r) for r in rows]), np.array([list(ref.feed(row))[-1] for ref, row in zip(refs, rows)]))
    assert session.past.tolist() == [37, 1, 8, 20]
    for _ in range(WINDOW + 1):  # what padding left behind must never be seen
        _near(session.step([[5], [6], [7], [8]]), np.array([next(ref.feed([t])) for ref, t in zip(refs, (5, 6, 7, 8))]))


def test_a_row_that_gets_nothing_stays_as_it_is(model: Model, program: Program) -> None:
    a, b = Reference(program), Reference(program)
    session = model.session(2)
    session.step([[1, 2, 3], [4, 5, 6]])
    list(a.feed([1, 2, 3])), list(b.feed([4, 5, 6]))
    for t in range(2 * RING):
        _near(session.step([[t], [0]], [1, 0])[0], next(a.feed([t])))
    _near(session.step([[9], [9]])[1], next(b.feed([9])))


def test_padding_beyond_the_largest_cache_is_not_written(model: Model, program: Program) -> None:
    """Row 0 is full but for three positions: the padding that row 1's tokens would put behind it has no place."""
    full, other = _tokens(CONTEXT - 3, 4), _tokens(2 * CHUNK, 5)
    refs = [Reference(program), Reference(program)]
    session = model.session(2)
    session.step([full, [0] * len(full)], [len(full), 0])
    list(refs[0].feed(full))
    tokens = np.array([[1, 2, 3] + [0] * (2 * CHUNK - 3), other])
    _near(session.step(tokens, [2, 2 * CHUNK]), np.array([list(refs[0].feed([1, 2]))[-1], list(refs[1].feed(other))[-1]]))
    _near(session.step([[3], [4]]), np.array([next(refs[0].feed([3])), next(refs[1].feed([4]))]))
    _near(session.step([[0], [5]], [0, 1])[1], next(refs[1].feed([5])))


def test_reset_forgets(model: Model, reference: Reference) -> None:
    session = model.session()
    session.step([_tokens(50, 6)])
    session.reset()
    want = list(reference.feed([3, 1, 4]))
    _near(session.step([[3, 1, 4]])[0], want[-1])


def test_what_was_forgotten_does_not_stand_in_the_way(model: Model, program: Program) -> None:
    """After reset(), or truncate(0), a ring that once wrapped can be cut back like a fresh one."""
    session = model.session()
    for forget in (session.reset, lambda: session.truncate(0)):
        session.step([_tokens(3 * RING, 10)])
        forget()
        session.step([[3, 1, 4, 1, 5]])
        session.truncate(2)
        ref = Reference(program)
        list(ref.feed([3, 1]))
        _near(session.step([[9]])[0], next(ref.feed([9])))


def test_truncate_goes_back(model: Model, program: Program) -> None:
    tokens = _tokens(RING, 7)
    session = model.session()
    session.step([tokens])
    session.truncate(RING - 2)
    ref = Reference(program)
    list(ref.feed(tokens[: RING - 2]))
    for t in (9, 10, 11):
        _near(session.step([[t]])[0], next(ref.feed([t])))


def test_truncate_refuses_what_a_ring_has_overwritten(model: Model, program: Program) -> None:
    tokens = _tokens(RING + 10, 8)
    session = model.session()
    for t in tokens:
        session.step([[t]])
    oldest = len(tokens) - RING  # the first position the ring still holds
    with pytest.raises(InputError, match=f"hold the last {RING} only"):
        session.truncate(oldest + WINDOW - 2)
    assert session.past.tolist() == [len(tokens)]
    session.truncate(oldest + WINDOW - 1)
    ref = Reference(program)
    list(ref.feed(tokens[: oldest + WINDOW - 1]))
    _near(session.step([[2]])[0], next(ref.feed([2])))
    session.truncate(0)
    _near(session.step([[2]])[0], next(Reference(program).feed([2])))
    with pytest.raises(InputError, match="cannot be cut to"):
        session.truncate(2)


def test_context_limit_is_an_error_before_anything_is_written(model: Model, reference: Reference) -> None:
    session = model.session(context=20)
    want = list(reference.feed(_tokens(20, 9)))
    session.step([_tokens(20, 9)[:17]])
    with pytest.raises(ContextLimitError, match=r"17 tokens and 4 more make 21.*context is 20"):
        session.step([[1, 2, 3, 4]])
    assert session.past.tolist() == [17]
    _near(session.step([_tokens(20, 9)[17:]])[0], want[-1])
    with pytest.raises(ContextLimitError):
        session.step([[1]])
    with pytest.raises(ContextLimitError, match=f"the model takes 1 to {CONTEXT}"):
        model.session(context=CONTEXT + 1)


@pytest.mark.parametrize("tokens, lengths, message", [
    ([[VOCAB]], None, f"token {VOCAB} is outside the vocabulary of {VOCAB}"),
    ([[-1]], None, "token -1 is outside"),
    ([[1], [2]], None, r"must be integers \[1, s\]"),
    ([[]], None, "s >= 1"),
    ([[1.0]], None, "must be integers"),
    ([1], None, "must be integers"),
    ([[1, 2]], [3], "whole numbers from 0 to 2"),
    ([[1, 2]], [0], "not all 0"),
    ([[1, 2]], [-1], "whole numbers"),
    ([[1, 2]], [1, 1], "must be 1 whole numbers"),
])  # fmt: skip
def test_tokens_that_cannot_be(model: Model, tokens: list, lengths: list | None, message: str) -> None:
    session = model.session()
    with pytest.raises(InputError, match=message):
        session.step(tokens, lengths)
    assert session.past.tolist() == [0]


def test_ragged_rows_and_empty_batches(model: Model) -> None:
    with pytest.raises(InputError, match="pad them on the right"):
        model.session(2).step([[1, 2], [3]])
    with pytest.raises(InputError, match="batch is 0"):
        model.session(0)


def test_run_calls_an_entry_without_caches(model: Model) -> None:
    x = np.arange(12, dtype=np.float32).reshape(4, 3)
    out = model.run("sum", x=x, y=x[::-1])
    np.testing.assert_array_equal(out["total"], x + x[::-1])
    np.testing.assert_array_equal(out["twice"], 2 * x)


@pytest.mark.parametrize("entry, arrays, message", [
    ("nothing", {}, "no entry 'nothing'; it has prefill, decode, sum"),
    ("decode", {}, "keeps caches: use session"),
    ("sum", {"x": np.zeros((1, 3))}, "takes x, y; given: x"),
    ("sum", {"x": np.zeros((1, 3)), "y": np.zeros((1, 3), np.float32)}, "x must be float32, not float64"),
    ("sum", {"x": np.zeros(3, np.float32), "y": np.zeros((1, 3), np.float32)}, "not 1 of them"),
    ("sum", {"x": np.zeros((2, 3), np.float32), "y": np.zeros((1, 3), np.float32)}, r"y has shape \[1, 3\].*\[2, 3\]"),
    ("sum", {"x": np.zeros((2, 4), np.float32), "y": np.zeros((2, 3), np.float32)}, r"x has shape \[2, 4\]"),
])  # fmt: skip
def test_run_refuses(model: Model, entry: str, arrays: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        model.run(entry, **arrays)


@pytest.mark.parametrize("length", [1.5, None, "1", [1, 2], [[1, 2], [3]], True, 10**30, [0.0]])
def test_lengths_to_cut_to_that_are_none(model: Model, length: object) -> None:
    session = model.session()
    session.step([[1, 2, 3]])
    with pytest.raises(InputError):
        session.truncate(length)  # type: ignore[arg-type]
    assert session.past.tolist() == [3]
    session.truncate(np.int32(1))
    assert session.past.tolist() == [1]


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.int32, np.uint32, np.uint64])
def test_tokens_of_any_integer_type(model: Model, dtype: type[np.integer]) -> None:
    tokens, session, other = [[1, 2, 3]], model.session(np.int64(1)), model.session()  # type: ignore[arg-type]
    for part in (tokens, [[4]]):
        _near(session.step(np.array(part, dtype), np.array([len(part[0])], dtype)), other.step(part))


@pytest.mark.parametrize("tokens", [None, "abc", [[None]], [["a"]], [[True]], [[2**64]], [[10**30]], {}, [[1.5]], 3])
def test_what_holds_no_tokens(model: Model, tokens: object) -> None:
    with pytest.raises(InputError):
        model.session().step(tokens)  # type: ignore[arg-type]


@pytest.mark.parametrize("lengths", [3, None, "1", [1.0], [None], [[1]], [True], [2**64], [[1, 2], [3]]])
def test_what_holds_no_lengths(model: Model, lengths: object) -> None:
    if lengths is not None:
        with pytest.raises(InputError):
            model.session().step([[1, 2]], lengths)  # type: ignore[arg-type]


@pytest.mark.parametrize("arguments", [{"batch": 1.5}, {"batch": None}, {"batch": "1"}, {"batch": True}, {"context": 2.5},
                                       {"context": "8"},
                                       {"batch": 2**62}, {"batch": 10**30}, {"context": 0}, {"context": -1}])  # fmt: skip
def test_sessions_that_cannot_be(model: Model, arguments: dict) -> None:
    with pytest.raises(InputError):
        model.session(**arguments)


@pytest.mark.parametrize("odd", [None, "x", [[1], [2, 3]], object(), [[None]], {"a": 1}, 10**30])
def test_run_refuses_what_is_no_array(model: Model, odd: object) -> None:
    with pytest.raises(InputError):
        model.run("sum", x=odd, y=np.zeros((1, 3), np.float32))
    with pytest.raises(InputError):
        model.run(odd, x=1)  # type: ignore[arg-type]


def test_indices_that_a_step_bounds_are_checked_in_the_step(tmp_path: Path) -> None:
    """``at`` counts through the step's own tokens: how many there are, encode() cannot know."""

    def graph(name: str, s: DimLike) -> Graph:
        g = Graph(name)
        b, n = Builder(g), symbol("b")
        tokens = g.add_input("tokens", TensorType(DType.I64, (n, s)))
        for own in ("past", "last") if name == "prefill" else ("past",):
            g.add_input(own, TensorType(DType.I64, (n,)))
        at = g.add_input("at", TensorType(DType.I64, (n, 1, 1)))
        table = g.add_param("table", TensorType(DType.F32, (8, 4)))
        picked = b.take_along(b.embedding(table, tokens), at, axis=1)
        g.set_outputs([b.reshape(picked, shape=(n, 4))], ["logits"])
        return g

    table = np.arange(32, dtype=np.float32).reshape(8, 4)
    graphs = {"prefill": graph("prefill", symbol("s")), "decode": graph("decode", 1)}
    program = Program(graphs, {"table": ArrayParam(table, TensorType(DType.F32, (8, 4)))}, Interface(context=64))
    library = build(program, cpu())
    write_artifact(tmp_path / "model", manifest_of(program, library, {}), {
        "model.so": library.export, "weights.safetensors": lambda path: write_weights(path, library.plan, program.load),
        **{p.name: p for p in library.target.runtime_files()},
    })  # fmt: skip
    session = load(tmp_path / "model").session(batch=1)
    session.encode(at=np.array([[[2]]]))
    np.testing.assert_array_equal(session.step([[1, 5, 3]]), table[[3]])
    with pytest.raises(InputError, match=r"input at holds the index 2, outside -2 \.\. 1"):
        session.step([[1, 5]])
    with pytest.raises(InputError, match="input at holds the index 2"):
        session.step([[1]])
