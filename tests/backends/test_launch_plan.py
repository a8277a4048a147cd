"""Launch plans as they are made, without a device: steps, memory, what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("tvm")

from wasat.backends.tvm.build import Planned, plan
from wasat.backends.tvm.plan.sizes import tree
from wasat.backends.tvm.targets import target_named
from wasat.ir import IRError, Program, State, parse, symbol
from wasat.ir.dims import floordiv, minimum
from wasat.runtime.hosts.plan import value


def made(text: str, target: str = "webgpu", states: tuple[State, ...] = ()) -> Planned:
    program = Program({"f": parse(text)})
    program.declare(states=states)
    return plan(program, target_named(target))


def entry(planned: Planned) -> dict[str, Any]:
    """The entry ``f``, through JSON and back."""
    found: dict[str, Any] = json.loads(planned.launches.text())["entries"]["f"]
    return found


def shown(steps: list[dict[str, Any]]) -> list[Any]:
    """The steps, by what they are, and those inside them."""
    return [
        s["op"] if s["op"] in ("launch", "copy", "check")
        else [s["op"], *(shown(s[k]) for k in ("steps", "then", "otherwise") if k in s)]
        for s in steps
    ]  # fmt: skip


def test_sizes_are_trees() -> None:
    b, n = symbol("b"), symbol("n")
    d = minimum(floordiv(b * n * 3 - n + 5, 4), 2 * b)
    t = json.loads(json.dumps(tree(d)))
    for binding in ({"b": 1, "n": 7}, {"b": 5, "n": 2}):
        assert value(t, binding) == min((binding["b"] * binding["n"] * 3 - binding["n"] + 5) // 4, 2 * binding["b"])
    assert tree(7) == 7
    assert tree(b) == "b"
    assert tree(b + 2 * n - 3) == ["-", ["+", "b", ["*", 2, "n"]], 3]


CHAIN = """graph @f(%x: f32[n, 8], %w: f32[8, 8]) {
  %a: f32[n, 8] = matmul(%x, %w)
  %b: f32[n, 8] = tanh(%a)
  %c: f32[n, 8] = matmul(%b, %w)
  %d: f32[n, 8] = matmul(%c, %w)
  %e: f32[n, 8] = matmul(%d, %w)
  return %e
}"""


def test_a_chain_takes_turns_in_two_places() -> None:
    planned = made(CHAIN)
    e = entry(planned)
    assert shown(e["steps"]) == ["launch"] * 4
    assert e["symbols"] == [{"name": "n", "array": 0, "axis": 0}]
    assert [a["kind"] for a in e["arrays"]] == ["input", "input", "scratch", "scratch"]
    assert e["arrays"][0] == {"kind": "input", "name": "x", "dtype": "float32", "shape": ["n", 8], "bytes": ["*", 32, "n"]}
    assert e["arrays"][2] == {"kind": "scratch", "bytes": ["*", 32, "n"]}
    assert [o["name"] for o in e["outputs"]] == ["e"]
    # fused, with the nodes that it computes, and their lines
    assert [n.split(" = ")[1] for n in e["steps"][0]["nodes"]] == ["matmul(%x, %w)", "tanh(%a)"]
    assert e["steps"][0]["lines"] == ["<text>:2", "<text>:3"]
    source, kernels = planned.launches.source, planned.launches.json["kernels"]
    for s in e["steps"]:
        start, end = kernels[s["kernel"]]["at"]
        assert f"fn {s['kernel']}(" in source[start:end]
        assert len(s["arrays"]) == len(kernels[s["kernel"]]["writes"])
        assert len(s["scalars"]) == len(kernels[s["kernel"]]["scalars"])
        assert sum(kernels[s["kernel"]]["writes"]) == 1


STATE = """graph @f(%new: f32[b, s, 2, 4], %past: i64[b], %cache: f32[b, c, 2, 4]) {
  %next: f32[b, c, 2, 4] = cache_update(%cache, %new, %past) {ring=false}
  %sum: f32[b, 2, 4] = reduce_sum(%OPERAND) {axes=(1,)}
  return %sum, cache=%next
}"""


@pytest.mark.parametrize("target", ["webgpu", "opencl"])
def test_a_state_is_written_in_its_place(target: str) -> None:
    e = entry(made(STATE.replace("OPERAND", "next"), target, states=(State.full("cache", "k"),)))
    assert "copy" not in shown(e["steps"])
    assert e["arrays"][2]["kind"] == "state"
    assert 2 in e["steps"][0]["arrays"]


@pytest.mark.parametrize("target", ["webgpu", "opencl"])
def test_a_state_that_is_read_later_is_not(target: str) -> None:
    """The sum is that of the cache as it was."""
    e = entry(made(STATE.replace("OPERAND", "cache"), target, states=(State.full("cache", "k"),)))
    order = shown(e["steps"])
    writes = [i for i, s in enumerate(e["steps"]) if s["op"] == "copy" and s["to"] == 2]
    reads = [i for i, s in enumerate(e["steps"]) if s["op"] == "launch" and "reduce_sum" in str(s["nodes"])]
    assert "copy" in order
    assert max(reads) < min(writes)


def test_what_is_given_is_never_written() -> None:
    """An input is copied before an operation that works in place."""
    text = STATE.replace("OPERAND", "next").replace("cache=%next", "%next")
    e = entry(made(text))
    assert e["steps"][0]["op"] == "copy"
    assert e["steps"][0]["from"] == 2
    kernels = made(text).launches.json["kernels"]
    for s in e["steps"][1:]:
        assert not {i for i, w in zip(s["arrays"], kernels[s["kernel"]]["writes"]) if w} & {0, 1, 2}


SCAN = """graph @f(%h: f32[3], %x: f32[n, 3]) {
  %last: f32[3], %all: f32[n, 3] = scan(%h, %x) {body=graph @turn(%h: f32[3], %x: f32[3]) {
    %next: f32[3] = add(%h, %x)
    return %next, y=%next
  }, carries=1, slices=1REVERSE}
  return %last, %all
}"""


@pytest.mark.parametrize("reverse", ["", ", reverse=true"])
def test_a_scan_is_a_counted_loop(reverse: str) -> None:
    e = entry(made(SCAN.replace("REVERSE", reverse)))
    (loop,) = [s for s in e["steps"] if s["op"] == "loop"]
    assert loop["count"] == "n"
    assert any(loop["symbol"] in json.dumps(s.get("scalars", [])) for s in loop["steps"])
    assert all(o["array"] != 0 for o in e["outputs"])


@pytest.mark.parametrize("text, message", [
    ("graph @f(%x: f64[n]) {\n  %y: f64[n] = add(%x, %x)\n  return %y\n}", "this target has no float64: cast to f32"),
    ("graph @f(%x: i64[n]) {\n  %y: i64[n] = add(%x, 4294967296:i64)\n  return %y\n}", "4294967296 does not fit into"),
])  # fmt: skip
def test_refused_by_name(text: str, message: str) -> None:
    with pytest.raises(IRError, match=message):
        made(text)
    made(text, "opencl")


def test_the_same_program_is_the_same_plan() -> None:
    a, b = made(CHAIN).launches, made(CHAIN).launches
    assert (a.text(), a.source) == (b.text(), b.source)


def test_groups_keep_to_the_arrays_that_a_kernel_may_take() -> None:
    names = [f"x{i}" for i in range(12)]
    lines = [f"  %s1: f32[n] = add(%{names[0]}, %{names[1]})"]
    lines += [f"  %s{i}: f32[n] = add(%s{i - 1}, %{names[i]})" for i in range(2, 12)]
    text = f"graph @f({', '.join(f'%{n}: f32[n]' for n in names)}) {{\n" + "\n".join(lines) + "\n  return %s11\n}"
    kernels = made(text).launches.json["kernels"]
    assert 1 < len(kernels) < 11
    assert all(len(k["writes"]) <= 8 for k in kernels.values())


def test_constants_that_do_not_fit_are_refused() -> None:
    """What folding made of constants that fit, each by itself."""
    text = """graph @f(%x: i64[n]) {
  %a: i64[2] = constant() {value=dense<i64[2], 2000000000 5>}
  %b: i64[2] = mul(%a, %a)
  %s: i64[] = reduce_sum(%b) {axes=(0,)}
  %y: i64[n] = add(%x, %s)
  return %y
}"""
    with pytest.raises(IRError, match="in 32 bits"):
        made(text)
