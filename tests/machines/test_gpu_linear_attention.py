"""Linear attention on GPUs: the kernel against the recurrence, token by token in f64, and what becomes one in a program."""
from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "backends"))
pytest.importorskip("wasat.backends.tvm.plan")  # the language of a device, out of TensorIR
from gpu_help import BF16, MACHINES, Machine, on_halves, run
from kernel_help import assert_within, uneven
from plan_help import device
from test_gpu_select import choose
from test_kernels_linear_attention import RULES, decays, reference
from wasat.backends.tvm.gpu.kernels.linear_attention import LinearAttention, linear_attention
from wasat.backends.tvm.gpu.select import selection
from wasat.backends.tvm.lower import KernelCall
from wasat.frontend import nn
from wasat.ir import ArrayParam, State

import wasat as ws
from wasat.testing import random_program

pytestmark = pytest.mark.machines
OPENCL = MACHINES[1]


def check(machine: Machine, desc: LinearAttention, b: int, s: int) -> None:
    """y and the state within what rounding loses: of the types that they have."""
    rng = np.random.default_rng(s)
    h, g, d, e = desc.heads, desc.kv_heads, desc.key_dim, desc.value_dim
    half, stored = np.dtype(_np(desc.dtype)), np.dtype(_np(desc.stored))
    q, k = rng.standard_normal((b, s, h, d)).astype(np.float32), rng.standard_normal((b, s, g, d)).astype(np.float32)
    k /= np.sqrt((k * k).sum(-1, keepdims=True))
    v, state = uneven(rng, b, s, g, e).astype(half), rng.standard_normal((b, g, d, e)).astype(stored)
    q, k = q.astype(half), k.astype(half)
    each = [d] if desc.decay == "feature" else []
    decay = None if desc.decay == "no" else decays(rng, desc.log, b, s, g, *each).astype(_np(desc.decays))
    beta = rng.uniform(0, 1, (b, s, g)).astype(_np(desc.betas)) if desc.delta else None
    past = np.arange(b)[::-1].copy()
    begins = np.where(past[:, None, None, None] == 0, 0, state).astype(stored) if desc.begins else state
    held = np.where(past[:, None, None, None] == 0, np.nan, state).astype(stored) if desc.begins else state
    wide = [None if x is None else x.astype(np.float64) for x in (q, k, v, begins, decay, beta)]
    want, after, y_lost, lost = reference(desc, *wide, 2 * np.sqrt(d))  # type: ignore[arg-type]
    operands = [q, k, v, *(x for x in (decay, beta) if x is not None), *([past] if desc.begins else []), held]
    made = [np.full((b, s, h, e), 77, half), *([] if desc.in_place else [np.full((b, g, d, e), 77, stored)])]
    out = run(machine, linear_attention(desc), [*operands, *made])
    y, new = out[len(operands)], out[-1] if not desc.in_place else out[len(operands) - 1]
    tiny = 8 * float(np.finfo(np.float32).tiny)  # devices have no subnormal numbers
    if s:
        assert_within(y, want, y_lost + tiny + _share(half) * np.abs(want))
    assert_within(new, after, lost + tiny + _share(stored) * np.abs(after))
    if not desc.in_place:
        np.testing.assert_array_equal(out[len(operands) - 1], held)


def _np(name: str) -> Any:
    return BF16 if name == "bfloat16" else name


def _share(dtype: np.dtype[Any]) -> float:
    """What rounding to 16 bits moves, of an element and of those of f16 that are next to 0."""
    return {2: 2.0**-8 if dtype == BF16 else 2.0**-10, 4: 0.0}[dtype.itemsize]


def described(machine: Machine, case: str, h: int, g: int, d: int, e: int, **more: Any) -> LinearAttention:
    decay, delta, log, before = RULES[case]
    return LinearAttention(machine.limits, h, g, d, e, decay, delta, 0.5, log, before, **more)


@pytest.mark.parametrize("machine", MACHINES, ids=lambda m: m.name)
@pytest.mark.parametrize("case", ["gated delta", "gated by feature, read before"])
def test_on_each_machine(machine: Machine, case: str) -> None:
    """Two query heads over each state; features that are no multiples of threads; rows that begin with nothing."""
    check(machine, described(machine, case, 4, 2, 20, 37, begins=True), 2, 13)


@pytest.mark.parametrize("case", ["linear, read before", "gated by factors, read before", "delta", "gated delta by feature"])
def test_each_rule(case: str) -> None:
    check(OPENCL, described(OPENCL, case, 2, 2, 16, 24, in_place=False), 2, 9)


@pytest.mark.parametrize("h, g, d, e, s", [(1, 1, 1, 1, 5), (8, 1, 16, 8, 1), (2, 2, 130, 3, 4), (2, 1, 8, 12, 0)])
def test_heads_and_features(h: int, g: int, d: int, e: int, s: int) -> None:
    """One of each, eight heads with a state and one token, a key longer than a workgroup is wide, no tokens."""
    check(OPENCL, described(OPENCL, "gated delta", h, g, d, e, in_place=False), 2, s)


@on_halves()
def test_halves(machine: Machine, half: np.dtype[Any]) -> None:
    """What is between the tokens is f32, and the state as it is kept."""
    types = {"dtype": half.name, "betas": half.name, "decays": "float32"}
    check(machine, described(machine, "gated delta", 4, 2, 16, 24, stored="float32", **types), 2, 9)


def test_a_query_head_has_a_state() -> None:
    with pytest.raises(ValueError, match="3 heads are not a multiple of 2 kv heads"):
        linear_attention(LinearAttention(OPENCL.limits, 3, 2, 8, 8))


class Recurrent(nn.Module):
    """Gated delta rule between two tables."""

    def __init__(self) -> None:
        self.table = nn.Embedding(30, 16)
        self.q, self.k, self.v = (nn.Linear(16, n, bias=False) for n in (16, 8, 12))
        self.gate, self.out = nn.Linear(16, 2), nn.Linear(24, 30)

    def __call__(self, tokens: nn.Tensor) -> nn.Tensor:
        x = self.table(tokens)
        q, k, v = self.q(x).heads(2), nn.normalize(self.k(x).heads(1), axis=-1), self.v(x).heads(1)
        gate = nn.sigmoid(self.gate(x))
        y, _ = nn.linear_attention(q, k, v, decay=gate[..., :1], beta=gate[..., 1:], log=False)
        return self.out(y.merge())


@pytest.mark.parametrize("target", ["webgpu"])
def test_a_session(target: str, tmp_path: Path) -> None:
    """A prompt in two pieces, then tokens: what the interpreter makes of all of them at once. The state is written in place;
    what a row held before it was emptied takes no part."""
    program = nn.trace(Recurrent(), {"tokens": "i64[b, s]"}, outputs=["logits"])
    rng = np.random.default_rng(2)
    for name, p in program.params.items():
        program.params[name] = ArrayParam(rng.standard_normal(p.type.concrete({})).astype(np.float32), p.type)  # type: ignore
    tokens = rng.integers(0, 30, (2, 12))
    want = ws.run(program, tokens=tokens)["logits"]
    with device(target):
        ws.compile(program, tmp_path / "a.wasat", target=target)
        made = json.loads((tmp_path / "a.wasat" / "plan.json").read_text())
        for entry in ("prefill", "decode"):
            steps = made["entries"][entry]["steps"]
            assert [s["kernel"] for s in steps if s["op"] == "launch" and "linear_attention_gated_delta" in s["kernel"]]
            assert not [s for s in steps if s["op"] != "launch"], steps
        session = ws.load(tmp_path / "a.wasat").session(2, context=16)
        for _ in range(2):
            found = [session.step(tokens[:, i:j]) for i, j in ((0, 3), (3, 10), (10, 11), (11, 12))]
            for got, at in zip(found, (2, 9, 10, 11)):
                np.testing.assert_allclose(got, want[:, at], rtol=1e-4, atol=1e-4)
            session.reset()


STATE = """graph @main(%q: f32[b, s, 2, 8], %k: f32[b, s, 1, 8], %v: f32[b, s, 1, 4], %a: f32[b, 1, 8, 4]) {
  %y: f32[b, s, 2, 4], %z: f32[b, 1, 8, 4] = linear_attention(%q, %k, %v, %a) {rule="linear"}
  return %y, %z
}"""
NOT_IN_PLACE = {
    "another reader": ("return %y, %z", "%w: f32[b, 1, 8, 4] = neg(%a)\n  return %y, %z, %w"),
    "kept as it was": ("return %y, %z", "return %y, %z, %a"), "not given up": ("donated", ""), "no state": ("%a", "%other"),
}  # fmt: skip


@pytest.mark.parametrize("change", [("", ""), *NOT_IN_PLACE.values()], ids=["in place", *NOT_IN_PLACE])
def test_what_is_written_over(change: tuple[str, str]) -> None:
    graph = random_program(STATE.replace(*change)).graphs["main"]
    selection(OPENCL.limits, [State.trained("a", donated=change[0] != "donated")])(graph)
    [call] = [n.op.desc for n in graph.nodes if isinstance(n.op, KernelCall)]
    assert call.in_place == (change == ("", ""))


LEFT = {
    "it computes with f64": ("f64", 4, 8), "9 heads with a state": ("f32", 9, 8), "of 1032 features": ("f32", 2, 1032),
}  # fmt: skip


@pytest.mark.parametrize("why", LEFT)
def test_what_is_left_says_why(why: str) -> None:
    t, h, d = LEFT[why]
    text = f"""graph @main(%q: {t}[b, s, {h}, {d}], %k: {t}[b, s, 1, {d}], %v: {t}[b, s, 1, 4], %a: {t}[b, 1, {d}, 4]) {{
  %y: {t}[b, s, {h}, 4], %z: {t}[b, 1, {d}, 4] = linear_attention(%q, %k, %v, %a) {{rule="linear"}}
  return %y, %z
}}"""
    _, [left] = choose(random_program(text), OPENCL)
    assert why in left.why
