"""Rotary tables whose features follow positions of several kinds: time, height, width; rows and columns."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wasat.frontend import nn
from wasat.ir import Program
from wasat.passes import Cleanup, FuseRope, PassManager

import wasat as ws

FREQ = np.array([1.0, 0.5, 0.25, 0.125], np.float32)
Tables = Callable[[nn.Tensor], tuple[nn.Tensor, nn.Tensor]]


def angles(at: nn.Tensor) -> nn.Tensor:
    """Positions [3, b, s] -> [3, b, s, 4]."""
    return at[..., None].cast("f32") * nn.constant(FREQ)


def both(a: nn.Tensor) -> tuple[nn.Tensor, nn.Tensor]:
    return nn.cos(a), nn.sin(a)


def sections(t: nn.Tensor) -> nn.Tensor:
    return nn.concat([t[0, ..., :1], t[1, ..., 1:2], t[2, ..., 2:]], axis=-1)


def parts(at: nn.Tensor) -> tuple[nn.Tensor, nn.Tensor]:
    """One feature by time, one by height, two by width (Qwen2-VL)."""
    c, s = (sections(t) for t in both(angles(at)))
    return nn.concat([c, c], axis=-1), nn.concat([s, s], axis=-1)


def parts_of_angles(at: nn.Tensor) -> tuple[nn.Tensor, nn.Tensor]:
    """Joined before cosine and sine are taken; a factor behind."""
    a = sections(angles(at))
    c, s = both(nn.concat([a, a], axis=-1))
    return c * 0.5, s * 0.5


def apart(at: nn.Tensor) -> tuple[nn.Tensor, nn.Tensor]:
    """Rows and columns of a picture, with angles of their own."""
    a = [at[i][..., None].cast("f32") * nn.constant(FREQ[:2]) for i in (1, 2)]
    c, s = (nn.concat([f(x) for x in a], axis=-1) for f in (nn.cos, nn.sin))
    return nn.concat([c, c], axis=-1), nn.concat([s, s], axis=-1)


def alternating(at: nn.Tensor) -> tuple[nn.Tensor, nn.Tensor]:
    """Height stands between the features of time, written over them (Qwen3-VL)."""
    made = []
    for t in both(angles(at)):
        x = nn.emit("scatter", t[0], nn.constant(np.array([1, 3])), t[1, ..., 1::2], axis=2)
        made.append(nn.concat([x, x], axis=-1))
    return made[0], made[1]


def repeated(at: nn.Tensor) -> tuple[nn.Tensor, nn.Tensor]:
    """All kinds are 0, 1, ..: what is in the file where no positions were given."""
    _, b, s = at.shape
    return parts(nn.arange(s)[None, None].broadcast_to(4, b, s)[1:])


SPELLINGS: dict[str, tuple[Tables, list[list[float]], float]] = {
    "parts": (parts, [[1, 0, 0, 0], [0, 0.5, 0, 0], [0, 0, 0.25, 0.125]], 1.0),
    "parts of angles": (parts_of_angles, [[1, 0, 0, 0], [0, 0.5, 0, 0], [0, 0, 0.25, 0.125]], 0.5),
    "apart": (apart, [[1, 0.5, 0, 0], [0, 0, 1, 0.5]], 1.0),
    "alternating": (alternating, [[1, 0, 0.25, 0], [0, 0.5, 0, 0.125]], 1.0),
    "repeated": (repeated, [[1, 0.5, 0.25, 0.125]], 1.0),
}


class Turned(nn.Module):
    """x [b, s, 2, 8], its halves rotated by tables."""

    def __init__(self, tables: Tables) -> None:
        self.tables = tables

    def __call__(self, x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
        c, s = (t[:, :, None] for t in self.tables(at))
        return x * c + nn.concat([-x[..., 4:], x[..., :4]], axis=-1) * s


def fused(tables: Tables) -> tuple[Program, Program, list[str]]:
    program = nn.trace(Turned(tables), {"x": "f32[b, s, 2, 8]", "at": "i64[3, b, s]"}, outputs=["y"])
    other = Program({"forward": program["forward"].clone()})
    report = PassManager([Cleanup(), FuseRope(), Cleanup()]).run(other)
    return program, other, [r.message for r in report.remarks("missed")]


def fed(b: int, s: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(b + s)
    return {"x": rng.normal(size=(b, s, 2, 8)).astype(np.float32), "at": rng.integers(0, 90, (3, b, s))}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name: str) -> None:
    """One rotation for each kind of positions, in which the features of other kinds do not turn."""
    tables, frequencies, factor = SPELLINGS[name]
    program, other, missed = fused(tables)
    g = other["forward"]
    turns = [n for n in g.nodes if n.is_a("rope")]
    assert [n.inputs[2].const.tolist() for n in turns] == frequencies  # type: ignore[union-attr]
    assert [n.attrs.factor for n in turns] == [factor, *[1.0] * (len(turns) - 1)]  # type: ignore[attr-defined]
    assert missed == []
    assert not {n.op.name for n in g.nodes} & {"cos", "sin", "concat", "scatter", "mul"}
    for b, s in ((2, 5), (1, 1), (3, 4)):
        feed = fed(b, s)
        np.testing.assert_allclose(ws.run(other, **feed)["y"], ws.run(program, **feed)["y"], rtol=1e-5, atol=2e-6)


class Learned(nn.Module):
    """Frequencies that are a parameter."""

    def __init__(self) -> None:
        self.freq = nn.Parameter((4,), std=1.0)

    def __call__(self, x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
        c, s = (sections(t)[:, :, None] for t in both(at[..., None].cast("f32") * self.freq))
        x1, x2 = x[..., :4], x[..., 4:]
        return nn.concat([x1 * c - x2 * s, x2 * c + x1 * s], axis=3)


def test_frequencies_that_are_a_parameter() -> None:
    program = nn.trace(Learned(), {"x": "f32[b, s, 2, 8]", "at": "i64[3, b, s]"}, outputs=["y"])
    other = Program({"forward": program["forward"].clone()}, dict(program.params))
    PassManager([Cleanup(), FuseRope(), Cleanup()]).run(other)
    assert (other["forward"].count("rope"), other["forward"].count("cos")) == (3, 0)
    np.testing.assert_allclose(ws.run(other, **fed(2, 5))["y"], ws.run(program, **fed(2, 5))["y"], rtol=1e-4, atol=1e-5)


def changed(c: Callable[[nn.Tensor], nn.Tensor], s: Callable[[nn.Tensor], nn.Tensor] = sections) -> Tables:
    """Tables of which cosines, or sines, are put together otherwise."""

    def tables(at: nn.Tensor) -> tuple[nn.Tensor, nn.Tensor]:
        x, y = (f(t) for f, t in zip((c, s), both(angles(at))))
        return nn.concat([x, x], axis=-1), nn.concat([y, y], axis=-1)

    return tables


def halves(at: nn.Tensor) -> tuple[nn.Tensor, nn.Tensor]:
    """The second half of the features by other kinds than the first."""
    c, s = both(angles(at))
    return (nn.concat([sections(t), t[0]], axis=-1) for t in (c, s))  # type: ignore[return-value]


def mixed(at: nn.Tensor) -> tuple[nn.Tensor, nn.Tensor]:
    c, s = both(angles(at))
    t = nn.concat([c[0, ..., :2], s[1, ..., 2:]], axis=-1)
    return nn.concat([t, t], axis=-1), nn.concat([t, t], axis=-1)


def reversed_positions(t: nn.Tensor) -> nn.Tensor:
    return sections(nn.emit("reverse", t, axes=(2,)))


def rows_exchanged(t: nn.Tensor) -> nn.Tensor:
    return sections(nn.emit("reverse", t, axes=(1,)))


def of_all_kinds(at: nn.Tensor) -> tuple[nn.Tensor, nn.Tensor]:
    """A factor that some features have, and others do not."""
    c, s = (nn.concat([t[0, ..., :2] * 2.0, t[1, ..., 2:]], axis=-1) for t in both(angles(at)))
    return nn.concat([c, c], axis=-1), nn.concat([s, s], axis=-1)


def floating(at: nn.Tensor) -> tuple[nn.Tensor, nn.Tensor]:
    """Positions that are no integers."""
    c, s = (sections(t) for t in both(nn.sqrt(at.cast("f32"))[..., None] * nn.constant(FREQ)))
    return nn.concat([c, c], axis=-1), nn.concat([s, s], axis=-1)


MISSES: dict[str, Tables] = {
    "other sections for sines": changed(sections, lambda t: nn.concat([t[1, ..., :1], t[0, ..., 1:2], t[2, ..., 2:]], axis=-1)),
    "other halves": halves,
    "cosines beside sines": mixed,
    "from the end": changed(reversed_positions, reversed_positions),
    "of other rows": changed(rows_exchanged, rows_exchanged),
    "a factor of some": of_all_kinds,
    "no integers": floating,
    "added": changed(lambda t: sections(t + t), lambda t: sections(t + t)),
    "sines first": lambda at: parts(at)[::-1],
}


@pytest.mark.parametrize("name", MISSES)
def test_near_miss_is_left_alone(name: str) -> None:
    program, other, missed = fused(MISSES[name])
    assert other["forward"].count("rope") == 0
    assert len(missed) == 1
    assert "no table of cosines" in missed[0] or "no product" in missed[0] or "repeat the same angles" in missed[0]
    np.testing.assert_allclose(ws.run(other, **fed(2, 5))["y"], ws.run(program, **fed(2, 5))["y"], rtol=1e-5, atol=1e-6)


class Pictures(nn.Module):
    """A decoder of one layer with positions of three kinds."""

    def __init__(self) -> None:
        self.embed, self.head, self.tables = nn.Embedding(11, 16, std=1.0), nn.Linear(16, 11), parts

    def __call__(self, tokens: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
        x = self.embed(tokens)
        q, k = (Turned(self.tables)(f(x).heads(2), at).swap(1, 2) for f in (nn.tanh, nn.sin))
        scores = nn.where(nn.causal(nn.positions(tokens)), q @ k.T, -np.inf)
        return self.head(x + (nn.softmax(scores) @ x.heads(2).swap(1, 2)).swap(1, 2).merge())


@cache
def pictures() -> tuple[Program, Program]:
    program = nn.trace(Pictures(), {"tokens": "i64[b, s]", "at": "i64[3, b, s]"}, outputs=["logits"])
    return program, ws.optimize(program, kv_cache=True, chunk=5)[0]


@given(st.data())
@settings(max_examples=3, deadline=None)
def test_incremental_equals_full(data: st.DataObject) -> None:
    """Positions are fed as tokens are: those of the new tokens, under their own name, whatever they are."""
    program, served = pictures()
    assert served["decode"].count("rope") == 6
    rng, n = np.random.default_rng(data.draw(st.integers(0, 99))), 12
    tokens, at = rng.integers(0, 11, (2, 2 * n)), rng.integers(0, 3, (3, 2, 2 * n)).cumsum(-1)
    states = {
        v.name: np.full(v.tensor.substitute({"b": 2, "c": 16}).concrete({}), 50, np.float32)
        for v in served["decode"].inputs if v.name in served.interface.state_names
    }  # fmt: skip
    past = np.zeros(2, np.int64)
    while past.max() < n - 5:
        lengths = np.array([data.draw(st.integers(1, 5)) for _ in range(2)])
        now = past[:, None] + np.arange(lengths.max())
        feeds: dict[str, Any] = {"tokens": np.take_along_axis(tokens, now, 1), "at": np.take_along_axis(at, now[None], 2)}
        feeds |= {"past": past, **states} | ({"last": lengths - 1} if lengths.max() > 1 else {})
        out = ws.run(served, "prefill" if lengths.max() > 1 else "decode", **feeds)
        states, past = {k: out[k] for k in states}, past + lengths
        for r, m in enumerate(past):
            want = ws.run(program, tokens=tokens[r : r + 1, :m], at=at[:, r : r + 1, :m])["logits"][0, -1]
            np.testing.assert_allclose(out["logits"][r], want, rtol=1e-4, atol=1e-5)
