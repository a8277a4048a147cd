"""Rotations by positions in spellings that no pattern knows: how pairs are laid out, tables stretched, features joined."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wasat.frontend import nn
from wasat.ir import Program
from wasat.passes import Cleanup, FuseRope, PassManager, ReadTables

import wasat as ws
from wasat.testing import random_program

ROWS, HEADS, HALF = 40, 3, 4
FREQ = np.array([1.0, 0.7, 0.25, 0.125], np.float32)
ANGLES = np.arange(ROWS, dtype=np.float32)[:, None] * FREQ


def stacked(a: nn.Tensor, b: nn.Tensor) -> nn.Tensor:
    """Side by side: a0 b0 a1 b1 .."""
    both = nn.concat([a[..., None], b[..., None]], axis=-1)
    return both.reshape(*a.shape[:-1], 2 * a.shape[-1])


def by_index(t: nn.Tensor, order: list[int]) -> nn.Tensor:
    return nn.emit("gather", t, nn.constant(np.array(order)), axis=t.rank - 1)


@dataclass(frozen=True)
class Spelling(nn.Module):
    """x [b, s, heads, d] -> the same, of which the first 8 features are rotated by positions."""

    tables: str = "computed"
    """Where cosines and sines come from."""
    stretched: str = "no"
    """How each angle stands for both features of its pair, if tables are as wide as they are."""
    pairs: str = "halves"
    apart: str = "slices"
    """How both features of all pairs are read."""
    backwards: bool = False
    factor: float = 1.0
    rest: int = 0
    """Features that pass."""
    heads_first: bool = False

    def __call__(self, x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
        x = x.swap(1, 2) if self.heads_first else x
        c, s = (t[..., None, :, :] if self.heads_first else t[..., None, :] for t in self.both(at))
        own = x[..., : 2 * HALF]
        y = self.together(own, c, s) if self.stretched != "no" else self.one_by_one(own, c, s)
        y = nn.concat([y, x[..., 2 * HALF :]], axis=-1) if self.rest else y
        return y.swap(1, 2) if self.heads_first else y

    def both(self, at: nn.Tensor) -> list[nn.Tensor]:
        """Cosines and sines [.., s, 4 or 8]."""
        if self.tables == "computed":
            a = at[..., None].cast("f32") * nn.constant(FREQ)
            tables = [nn.cos(a), nn.sin(a)]
        elif self.tables == "one looked up":
            both = nn.emit("gather", nn.constant(np.concatenate([np.sin(ANGLES), np.cos(ANGLES)], 1)), at, axis=0)
            tables = [both[..., HALF:], both[..., :HALF]]
        elif self.tables == "looked up":
            tables = [nn.emit("gather", nn.constant(f(ANGLES)), at, axis=0) for f in (np.cos, np.sin)]
        else:  # complex numbers, as real ones
            both = nn.emit("gather", nn.constant(np.stack([np.cos(ANGLES), np.sin(ANGLES)], -1)), at, axis=0)
            tables = [both[..., 0], both[..., 1]]
        if self.factor != 1:
            tables = [t * self.factor for t in tables]
        order = [i for i in range(HALF) for _ in range(2)] if self.pairs == "neighbours" else [*range(HALF)] * 2
        if self.stretched == "picked":
            tables = [by_index(t, order) for t in tables]
        elif self.stretched == "joined":
            tables = [stacked(t, t) if self.pairs == "neighbours" else nn.concat([t, t], axis=-1) for t in tables]
        elif self.stretched == "repeated":
            wide = [t[..., None] if self.pairs == "neighbours" else t[..., None, :] for t in tables]
            ends = (HALF, 2) if self.pairs == "neighbours" else (2, HALF)
            tables = [t.broadcast_to(*t.shape[:-2], *ends).reshape(*t.shape[:-2], 2 * HALF) for t in wide]
        return tables

    def parts(self, x: nn.Tensor) -> tuple[nn.Tensor, nn.Tensor]:
        neighbours = self.pairs == "neighbours"
        if self.apart == "picked":
            orders = ([0, 2, 4, 6], [1, 3, 5, 7]) if neighbours else ([0, 1, 2, 3], [4, 5, 6, 7])
            return by_index(x, orders[0]), by_index(x, orders[1])
        if self.apart == "slices":
            return (x[..., ::2], x[..., 1::2]) if neighbours else (x[..., :HALF], x[..., HALF:])
        both = x.reshape(*x.shape[:-1], HALF, 2) if neighbours else x.reshape(*x.shape[:-1], 2, HALF)
        return (both[..., 0], both[..., 1]) if neighbours else (both[..., 0, :], both[..., 1, :])

    def joined(self, a: nn.Tensor, b: nn.Tensor) -> nn.Tensor:
        return stacked(a, b) if self.pairs == "neighbours" else nn.concat([a, b], axis=-1)

    def together(self, x: nn.Tensor, c: nn.Tensor, s: nn.Tensor) -> nn.Tensor:
        a, b = self.parts(x)
        return x * c + self.joined(b, -a) * s if self.backwards else x * c + self.joined(-b, a) * s

    def one_by_one(self, x: nn.Tensor, c: nn.Tensor, s: nn.Tensor) -> nn.Tensor:
        a, b = self.parts(x)
        return self.joined(a * c + b * s, b * c - a * s) if self.backwards else self.joined(a * c - b * s, a * s + b * c)


def traced(spelling: Callable[..., nn.Tensor], rest: int = 0, at: str = "i64[b, s]") -> Program:
    return nn.trace(spelling, {"x": f"f32[b, s, {HEADS}, {2 * HALF + rest}]", "at": at}, outputs=["y"])


def fused(program: Program) -> tuple[Program, list[str]]:
    other = Program({"forward": program["forward"].clone()})
    report = PassManager([Cleanup(fold_positions=False), ReadTables(), FuseRope(), Cleanup()]).run(other)
    return other, [r.message for r in report.remarks("missed")]


def check_equal(program: Program, other: Program, rest: int = 0, rows: bool = True) -> None:
    rng = np.random.default_rng(3)
    for b, s in ((2, 5), (1, 1), (3, 4)):
        x = rng.normal(size=(b, s, HEADS, 2 * HALF + rest)).astype(np.float32)
        feed: dict[str, Any] = {"x": x, "at": rng.integers(0, ROWS, (b, s) if rows else (s,))}
        np.testing.assert_allclose(ws.run(other, **feed)["y"], ws.run(program, **feed)["y"], rtol=1e-5, atol=1e-5)


@given(st.builds(
    Spelling, tables=st.sampled_from(["computed", "one looked up", "looked up", "complex"]),
    stretched=st.sampled_from(["no", "picked", "joined", "repeated"]), pairs=st.sampled_from(["halves", "neighbours"]),
    apart=st.sampled_from(["slices", "picked", "reshaped"]), backwards=st.booleans(), factor=st.sampled_from([1.0, 1.25]),
    rest=st.sampled_from([0, 3]), heads_first=st.booleans(),
), st.booleans())  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_any_spelling(spelling: Spelling, rows: bool) -> None:
    program = traced(spelling, spelling.rest, "i64[b, s]" if rows else "i64[s]")
    other, missed = fused(program)
    g = other["forward"]
    assert (g.count("rope"), missed) == (1, [])
    assert not {n.op.name for n in g.nodes} & {"cos", "sin", "neg", "mul", "concat", "slice"}
    rope = next(n for n in g.nodes if n.is_a("rope"))
    assert rope.inputs[2].const is not None
    np.testing.assert_allclose(rope.inputs[2].const, -FREQ if spelling.backwards else FREQ, rtol=3e-7)
    assert (rope.attrs.factor, rope.attrs.interleaved) == (spelling.factor, spelling.pairs == "neighbours")  # type: ignore[attr-defined]
    check_equal(program, other, spelling.rest, rows)


class Turned(nn.Module):
    """A rotation in which one thing is other than it should be."""

    def __init__(self, change: Callable[[nn.Tensor, nn.Tensor, nn.Tensor], Any], freq: np.ndarray = FREQ) -> None:
        self.change, self.freq = change, freq

    def __call__(self, x: nn.Tensor, at: nn.Tensor) -> Any:
        a = at[..., None, None].cast("f32") * nn.constant(self.freq)
        return self.change(x, nn.cos(a), nn.sin(a))


def pairs(x: nn.Tensor) -> tuple[nn.Tensor, nn.Tensor]:
    return x[..., ::2], x[..., 1::2]


def turned(x: nn.Tensor, c: nn.Tensor, s: nn.Tensor, *, sine: int = 1, moved: int = 0) -> nn.Tensor:
    a, b = pairs(x)
    last = nn.concat([b[..., moved:], b[..., :moved]], axis=-1) if moved else b
    return stacked(a * c - last * s, sine * (a * s) + b * c)


def mixed(t: nn.Tensor, u: nn.Tensor) -> nn.Tensor:
    return nn.concat([t[..., :2], u[..., 2:]], axis=-1)


def longer(x: nn.Tensor, c: nn.Tensor, s: nn.Tensor) -> nn.Tensor:
    a, b = pairs(x)
    return stacked(a * c - b * s + a * s, a * s + b * c)


def later_half(x: nn.Tensor, c: nn.Tensor, s: nn.Tensor) -> nn.Tensor:
    """The second feature of each pair by the angles in another order."""
    a, b = pairs(x)
    order = [1, 0, 2, 3]
    return stacked(a * c - b * s, a * by_index(s, order) + b * by_index(c, order))


def only_some_heads(x: nn.Tensor, c: nn.Tensor, s: nn.Tensor) -> nn.Tensor:
    return nn.concat([turned(x, c, s)[:, :, :1], x[:, :, 1:]], axis=2)


def by_head(x: nn.Tensor, c: nn.Tensor, s: nn.Tensor) -> nn.Tensor:
    """Another direction of turning for each head."""
    sign = nn.constant(np.array([[1.0], [-1.0], [1.0]], np.float32))
    return turned(x, c, s * sign)


def scaled(x: nn.Tensor, c: nn.Tensor, s: nn.Tensor) -> nn.Tensor:
    grow = nn.constant(np.array([1.0, 1.0, 2.0, 1.0], np.float32))
    return turned(x, c * grow, s * grow)


def rolled_rows(x: nn.Tensor, c: nn.Tensor, s: nn.Tensor) -> nn.Tensor:
    a, b = pairs(x)
    b2 = nn.emit("reverse", b, axes=(1,))
    return stacked(a * c - b2 * s, a * s + b * c)


def still(t: nn.Tensor, value: float) -> nn.Tensor:
    """A table whose second and fourth columns are this number."""
    one = nn.full(t.shape[:-1], value)[..., None]
    return nn.concat([t[..., :1], one, t[..., 2:3], one], axis=-1)


MISSES: dict[str, Callable[[nn.Tensor, nn.Tensor, nn.Tensor], nn.Tensor]] = {
    "mirrored": lambda x, c, s: turned(x, c, s, sine=-1),
    "features of the next pair": lambda x, c, s: turned(x, c, s, moved=1),
    "cosines for sines in half of them": lambda x, c, s: turned(x, mixed(c, s), mixed(s, c)),
    "a third term": longer,
    "another angle for each of a pair": later_half,
    "by head": by_head,
    "a factor of some": scaled,
    "rows of other positions": rolled_rows,
    "a factor between what passes": lambda x, c, s: turned(x, still(c * 2.0, 1.0), still(s * 2.0, 0.0)),
    "sines added": lambda x, c, s: turned(x, c, s) + s[..., :1],
    "added": lambda x, c, s: turned(x, c, s) * 0.5 + x,
    "cosine alone": lambda x, c, s: stacked(pairs(x)[0] * c, pairs(x)[1] * c),
    "of products": lambda x, c, s: turned(x, c * c, s * s),
}


@pytest.mark.parametrize("name", MISSES)
def test_near_miss(name: str) -> None:
    program = traced(Turned(MISSES[name]))
    other, _ = fused(program)
    partly = {"added": 1, "sines added": 1}.get(name, 0)  # what is a rotation inside of it is one
    assert other["forward"].count("rope") == partly
    check_equal(program, other)


def test_some_heads() -> None:
    program = traced(Turned(only_some_heads))
    other, _ = fused(program)
    assert other["forward"].count("rope") == 1
    check_equal(program, other)


def test_pairs_that_pass_between_others() -> None:
    program = traced(Turned(lambda x, c, s: turned(x, still(c, 1.0), still(s, 0.0))))
    other, _ = fused(program)
    assert [n.inputs[2].const.tolist() for n in other["forward"].nodes if n.is_a("rope")] == [[1.0, 0.0, 0.25]]  # type: ignore[union-attr]
    check_equal(program, other)


def test_one_frequency_that_is_one() -> None:
    """Nothing is left of the frequency: angles are the positions."""

    def one(x: nn.Tensor, c: nn.Tensor, s: nn.Tensor) -> nn.Tensor:
        cc, ss = (nn.concat([t, t], axis=-1) for t in (c, s))
        y = x[..., :2] * cc + nn.concat([-x[..., 1:2], x[..., :1]], axis=-1) * ss
        return nn.concat([y, x[..., 2:]], axis=-1)

    program = traced(Turned(one, FREQ[:1]))
    other, missed = fused(program)
    assert (other["forward"].count("rope"), missed) == (1, [])
    check_equal(program, other)


@pytest.mark.parametrize("also", ["the products", "an output"])
def test_what_is_read_elsewhere_stays(also: str) -> None:
    def two(x: nn.Tensor, c: nn.Tensor, s: nn.Tensor) -> dict[str, nn.Tensor]:
        a, b = pairs(x)
        first, second = a * c - b * s, a * s + b * c
        return {"y": stacked(first, second), "z": nn.exp(first) if also == "the products" else first}

    program = nn.trace(Turned(two), {"x": "f32[b, s, 3, 8]", "at": "i64[b, s]"})  # type: ignore[arg-type]
    other, _ = fused(program)
    assert other["forward"].count("rope") == 0


def test_what_is_negated_before_it_is_turned() -> None:
    program = traced(Turned(lambda x, c, s: turned(-x, c, s)))
    other, _ = fused(program)
    assert other["forward"].count("rope") == 1
    check_equal(program, other)


def test_rounding_before_and_behind_stays() -> None:
    """Heads that are rounded, turned and widened again are turned as they were."""

    def rounded(x: nn.Tensor, c: nn.Tensor, s: nn.Tensor) -> nn.Tensor:
        x, c, s = (t.cast("f16") for t in (x, c, s))
        a, b = (by_index(x, [i, i + 2, i + 4, i + 6]) for i in (0, 1))
        return stacked(a * c - b * s, a * s + b * c).cast("f32")

    other, _ = fused(traced(Turned(rounded)))
    ropes = [n for n in other["forward"].nodes if n.is_a("rope")]
    assert [n.output.tensor.dtype.value for n in ropes] == ["f16"]


def test_quantized_tensors_are_passed_by() -> None:
    program = random_program("""graph @f(%x: f32[m, 64], %w: f32[12, 64]) {
  %q: int8b32f16[12, 64] = quantize(%w) {scheme="int8"}
  %s: f32[m, 64] = sin(%x)
  %y: f32[m, 12] = quantized_linear(%s, %q)
  return %y
}""")
    before = str(program)
    PassManager([ReadTables(), FuseRope()]).run(program)
    assert str(program) == before


@pytest.mark.parametrize("heads", [nn.sin, nn.cos])
def test_heads_that_are_waves_themselves(heads: Callable[[nn.Tensor], nn.Tensor]) -> None:
    """Sines of what tokens hold are no table of positions."""
    program = traced(Turned(lambda x, c, s: turned(heads(x), -c, -s, sine=1)))
    other, missed = fused(program)
    assert (other["forward"].count("rope"), missed) == (1, [])
    check_equal(program, other)


def test_neighbours_that_become_halves() -> None:
    """The first features of all pairs stand before the second ones, turned (DeepSeek)."""

    def halves(x: nn.Tensor, c: nn.Tensor, s: nn.Tensor) -> nn.Tensor:
        a, b = pairs(x)
        return nn.concat([a * c - b * s, b * c + a * s], axis=-1)

    program = traced(Turned(halves))
    other, missed = fused(program)
    assert (other["forward"].count("rope"), other["forward"].count("gather"), missed) == (1, 1, [])
    check_equal(program, other)


def test_a_table_of_other_numbers_beside_waves_is_followed_no_further() -> None:
    """Its rows are looked up at positions: what they are is not known, and no rotation is found."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            self.table = nn.Parameter((32, 4), std=1.0)

        def __call__(self, x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
            cos = nn.cos(at[..., None].cast("f32") * nn.constant(np.float32([1.0, 0.5, 0.1, 0.01])))[:, :, None]
            rows = nn.gather(self.table, nn.arange(x.shape[1]), axis=0)[None, :, None]
            a, b = x[..., :4], x[..., 4:]
            return nn.concat([a * cos + b * rows, a * -rows + b * cos], axis=-1)

    program = nn.trace(Odd(), {"x": "f32[b, s, 2, 8]", "at": "i64[b, s]"}, outputs=["y"])
    PassManager([ReadTables(), FuseRope()]).run(program)
    assert program["forward"].count("rope") == 0
