"""Loops that sizes end: how often they turn is told from what their conditions compare; turning them one by one is right."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx")

from onnx_models import add_initializers, model, run
from wasat.frontend.onnx import FromData, OnnxError, from_onnx
from wasat.frontend.onnx.turns import Line, conditions, how_often
from wasat.ir import DimLike, evaluate_dim, symbol

import wasat as ws

Row = np.ndarray
TESTS: dict[str, Callable[[int, int], bool]] = {
    "Less": lambda a, b: a < b, "LessOrEqual": lambda a, b: a <= b,
    "Greater": lambda a, b: a > b, "GreaterOrEqual": lambda a, b: a >= b,
}  # fmt: skip
TURNED = {"Less": "Greater", "LessOrEqual": "GreaterOrEqual", "Greater": "Less", "GreaterOrEqual": "LessOrEqual"}
NEGATED = {"Less": "GreaterOrEqual", "LessOrEqual": "Greater", "Greater": "LessOrEqual", "GreaterOrEqual": "Less"}
MOST = 2**63 - 1


def _comparison(name: str, left: str, right: str, form: int, to: str) -> str:
    """``to = left < right``, in one of four spellings, and as whole numbers or floats."""
    f = ""
    if form >= 4:  # as tf2onnx compares
        f = f"{to}_l = Cast <to = 1> ({left}) {to}_r = Cast <to = 1> ({right}) "
        left, right, form = f"{to}_l", f"{to}_r", form - 4
    if form == 0:
        return f"{f}{to} = {name}({left}, {right})"
    if form == 1:
        return f"{f}{to} = {TURNED[name]}({right}, {left})"
    if form == 2:
        return f"{f}{to}_n = {NEGATED[name]}({left}, {right}) {to} = Not({to}_n)"
    return f"{f}{to}_a = {name}({left}, {right}) {to} = And({to}_a, {to}_a)"


KNOWN = 101
"""Of 120 loops; in the others it depends on the size which comparison ends them."""


class While:
    """``i = start; while cond(i): h = h / 2 + i; i += step``, until so many turns, with a break perhaps."""

    def __init__(self, seed: int) -> None:
        r = Random(seed)
        self.start, self.step = r.randint(-2, 3), r.choice([1, 1, 2, 3])
        self.shift, self.name = r.randint(-2, 2), r.choice(["Less", "LessOrEqual"])
        self.ahead = r.randint(0, 2)  # how far in front of the counter is what the body compares
        self.asked = r.choice([True, True, False])  # or is the first turn taken for granted
        self.limit = r.choice(["none", "most", "size", "shorter"])
        self.stop = r.choice([None, None, r.randint(0, 6)])
        self.forms = [r.randrange(8) for _ in range(2)]
        self.back = r.choice([False, True])  # counted by a difference, and broken by the other branch

    def text(self) -> str:
        limit = {"none": "", "most": "most", "size": "n", "shorter": "short"}[self.limit]
        first = _comparison(self.name, "start", "bound", self.forms[0], "first") if self.asked else "first = Identity(yes)"
        more = _comparison(self.name, "far", "bound", self.forms[1], "more")
        leave = "again = Identity(more)"
        if self.stop is not None:
            late, then, other = ("Less", "yes", "no") if self.back else ("GreaterOrEqual", "no", "yes")
            leave = (
                f"late = {late}(i, stop) go_on = If (late) <then_branch = t () => (bool p) {{ p = Identity({then}) }}, "
                f"else_branch = e () => (bool q) {{ q = Identity({other}) }}> again = And(more, go_on)"
            )
        return f"""g (float[n, 2] x, float[2] h) => (float[2] last, int64 count, float[t, 2] all) {{
          shape = Shape <end = 1> (x) n = Squeeze(shape) bound = Add(n, shift) short = Sub(n, two) {first}
          last, count, all = Loop ({limit}, first, h, start) <body = b (int64 turn, bool c, float[2] a, int64 i)
              => (bool again, float[2] next, int64 j, float[2] row) {{
            half = Mul(a, point) f = Cast <to = 1> (i) next = Add(half, f) row = Neg(next)
            j = {"Sub(i, less)" if self.back else "Add(i, step)"} far = Add(i, ahead) {more} {leave} }}> }}"""

    def program(self) -> ws.Program:
        numbers = {"shift": self.shift, "start": self.start, "step": self.step, "less": -self.step, "two": 2}
        numbers |= {"ahead": self.ahead + self.step, "most": MOST, "stop": self.stop or 0}
        arrays: dict[str, Any] = {k: np.array(v, np.int64) for k, v in numbers.items()}
        text = self.text()
        arrays |= {"yes": np.array(True), "no": np.array(False), "point": np.float32(0.5)}
        return from_onnx(add_initializers(model(text), **{k: np.asarray(v) for k, v in arrays.items() if k in text}))

    def right(self, n: int, h: Row) -> tuple[Row, int, Row]:
        limit = {"none": MOST, "most": MOST, "size": n, "shorter": n - 2}[self.limit]
        holds, i, turn, rows = TESTS[self.name], self.start, 0, []
        go = holds(i, n + self.shift) if self.asked else True
        while go and turn < limit:
            h = h / 2 + np.float32(i)
            rows.append(-h)
            go = holds(i + self.ahead + self.step, n + self.shift) and (self.stop is None or i < self.stop)
            i, turn = i + self.step, turn + 1
        return h, i, np.reshape(np.float32(rows), (turn, 2))


def test_loops_turn_as_often_as_their_conditions_say() -> None:
    known = 0
    for seed in range(120):
        case = While(seed)
        try:
            p = case.program()
        except FromData:
            continue
        known += 1
        for n in (0, 1, 2, 3, 6, 9):
            h = np.float32([1, -3])
            for got, want in zip(run(p, np.zeros((n, 2), np.float32), h), case.right(n, h)):
                np.testing.assert_array_equal(got, want, err_msg=f"{case.__dict__} at {n}")
    assert known == KNOWN, known


def test_the_number_of_turns_is_right_or_not_told() -> None:
    """Of any lines with n, for any n: what `how_often` says is what counting says."""
    r, n, told = Random(5), symbol("n"), 0
    for _ in range(3000):
        steps = ([0], [0], [-1, -2, 0, 1], [-1, -3])
        lines = [Line(r.randint(-4, 4) + n * r.choice([0, 1, 1, 2, -1]), r.choice(s)) for s in steps]
        first, again = lines[: r.randint(0, 2)], lines[r.randint(2, 3) :]
        limit = r.choice([None, None, n, n - 2, 2 * n, 5])
        turns = how_often(limit, first, again)
        if turns is None:
            continue
        told += 1
        for size in range(9):
            def at(d: DimLike, size: int = size) -> int:
                return evaluate_dim(d, {"n": size})

            most = 99 if limit is None else at(limit)
            count = 0
            while count < most and all(at(p.offset) + p.step * (count - 1) >= 0 for p in (again if count else first)):
                count += 1
            assert at(turns) == count, (limit, first, again, size)
    assert told > 300, told


@pytest.mark.parametrize("text, want", [
    ("%y: bool[] = logical_and(%a, %b)", [1, 2]),
    ("%c: bool[] = logical_and(%a, %b)\n  %y: bool[] = logical_not(%c)", None),
    ("%y: bool[] = logical_or(%a, %b)", None),
    ("%y: bool[] = select(%a, false:bool, true:bool)", [-2]),
    ("%y: bool[] = select(%a, true:bool, false:bool)", [1]),
    ("%c: bool[] = logical_not(%a)\n  %y: bool[] = select(%c, false:bool, true:bool)", [1]),
    ("%y: bool[] = select(%a, %b, true:bool)", None),
    ("%c: bool[] = select(%a, true:bool, false:bool)\n  %y: bool[] = logical_not(%c)", [-2]),
    ("%y: bool[] = select(%a, true:bool, true:bool)", None),
])  # fmt: skip
def test_what_a_condition_compares(text: str, want: list[int] | None) -> None:
    given = "%a: bool[] = less(%i, 2:i64)\n  %b: bool[] = less_equal(%i, 2:i64)"
    g = ws.parse(f"graph @g(%i: i64[]) {{\n  {given}\n  {text}\n  return %y\n}}")
    lines = conditions(g.outputs[0], {g.inputs[0]: Line(0, 1)})
    assert (None if lines is None else [p.offset for p in lines]) == want


@pytest.mark.parametrize("seed", [0, 3, 7])
def test_loops_that_sizes_end_compile(seed: int) -> None:
    case = While(seed)
    p = case.program()
    for n in (0, 1, 5):
        h = np.float32([1, -3])
        got = ws.run(p, backend="cpu", x=np.zeros((n, 2), np.float32), h=h)
        for a, want in zip(got.values(), case.right(n, h)):
            np.testing.assert_array_equal(a, want)


SEQUENCE = """g (float[b, n, 2] x) => (float[b, t, 2] y) {
  shape = Shape <start = 1, end = 2> (x) size = Squeeze(shape) turns = Add(size, shift) empty = SEQUENCE
  rows = Loop (turns, yes, empty) <body = b (int64 i, bool c, seq(float[b, 2]) xs) => (bool c, seq(float[b, 2]) ys) {
    from = Unsqueeze(i, zero) j = Add(i, width) to = Unsqueeze(j, zero) piece = Slice(x, from, to, one)
    mean = ReduceMean <keepdims = KEEP> (piece, one) ys = SequenceInsert(xs, mean) }>
  y = ConcatFromSequence <axis = 1, new_axis = NEW> (rows) }"""

APPENDED = "ys = SequenceInsert(xs, mean)"
JOINED = "ConcatFromSequence <axis = 1, new_axis = NEW> (rows)"


def _sequence(text: str = SEQUENCE, new: bool = True, width: int = 1, before: bool = False) -> ws.Program:
    text = text.replace("KEEP", str(int(not new))).replace("NEW", str(int(new)))
    first = "start = Gather <axis = 1> (x, AT) empty = SequenceConstruct(start)".replace("AT", "first" if new else "zero")
    text = text.replace("empty = SEQUENCE", first if before else "empty = SequenceEmpty <dtype = 1> ()")
    arrays = {"zero": np.array([0]), "one": np.array([1]), "yes": np.array(True), "first": np.array(0)}
    arrays |= {"width": np.array(width), "shift": np.array(1 - width)}
    return from_onnx(add_initializers(model(text), **{k: v for k, v in arrays.items() if k in text}))


@pytest.mark.parametrize("backend", ["interpreter", "cpu"])
@pytest.mark.parametrize("new, width, before", [(True, 1, False), (True, 3, True), (False, 2, True), (False, 3, False)])
def test_a_sequence_that_each_turn_appends_to(new: bool, width: int, before: bool, backend: str) -> None:
    """``rows.append(x[:, i : i + width].mean(1))``, as torch scripts it."""
    p = _sequence(new=new, width=width, before=before)
    for n in (width, 4, 7):
        x = np.random.default_rng(n).standard_normal((2, n, 2)).astype(np.float32)
        rows = [x[:, 0]] * before + [x[:, i : i + width].mean(1) for i in range(n + 1 - width)]
        np.testing.assert_allclose(ws.run(p, backend=backend, x=x)["y"], np.stack(rows, 1), rtol=1e-6)


def test_the_length_of_a_sequence_that_a_loop_makes() -> None:
    text = SEQUENCE.replace("float[b, t, 2] y", "int64 y").replace(JOINED, "SequenceLength(rows)")
    p = _sequence(text)
    assert run(p, np.zeros((1, 6, 2), np.float32))[0] == 6


@pytest.mark.parametrize("edit, why", [
    ((APPENDED, f"{APPENDED.replace('ys', 'zs')} ys = SequenceInsert(zs, mean)"), "not every turn appends one"),
    ((APPENDED, "ys = SequenceInsert(xs, mean, at)"), "depends on how often a Loop turns"),
    ((APPENDED, "k = SequenceLength(xs) ys = SequenceInsert(xs, mean)"), "depends on how often a Loop"),
    ((f"y = {JOINED}", "at = Identity(zero) y = SequenceAt(rows, at)"), "how often a Loop"),
    ((f"y = {JOINED}", "y = Identity(rows)"), "'y' is a sequence of n tensors"),
])  # fmt: skip
def test_sequences_of_a_length_that_a_run_decides_are_refused(edit: tuple[str, str], why: str) -> None:
    text = SEQUENCE.replace(*edit).replace("mean, at", "mean, first")
    with pytest.raises(OnnxError, match=why):
        _sequence(text)


PLACE = """g (float[n, 2] x, int64 i) => (float[k, 2] y) {
  from = Unsqueeze(i, zero) j = Add(i, two) to = Unsqueeze(j, zero) y = Slice(x, from, to, zero) }"""


@pytest.mark.parametrize("backend", ["interpreter", "cpu"])
def test_a_slice_of_a_size_from_a_place_that_a_run_decides(backend: str) -> None:
    """Is what Slice takes, where so many elements are there, and else an error."""
    p = from_onnx(add_initializers(model(PLACE), zero=np.array([0]), two=np.array(2)))
    x = np.arange(10, dtype=np.float32).reshape(5, 2)
    for i in (0, 3, -3, -5):
        np.testing.assert_array_equal(ws.run(p, backend=backend, x=x, i=np.asarray(i))["y"], x[i:][:2])
    for i in (4, 5, -1, -2, -6, 2**62):
        with pytest.raises(Exception, match="gather"):
            ws.run(p, backend=backend, x=x, i=np.asarray(i))


@pytest.mark.parametrize("to", ["j = Add(k, two)", "j = Add(i, k)", "j = Mul(i, two)", "j = Sub(i, two)"])
def test_a_slice_whose_size_a_run_decides_is_refused(to: str) -> None:
    text = PLACE.replace("int64 i)", "int64 i, int64 k)").replace("j = Add(i, two)", to)
    with pytest.raises(FromData, match="where a Slice starts depends on the numbers in i"):
        from_onnx(add_initializers(model(text), zero=np.array([0]), **({"two": np.array(2)} if "two" in to else {})))
