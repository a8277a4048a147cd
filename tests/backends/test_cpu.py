"""Kernel selection on the CPU: what becomes a kernel call, and that graphs mean the same compiled as interpreted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from decoder import Decoder
from kernel_help import assert_near_reference
from wasat.backends.tvm.build import Runner
from wasat.backends.tvm.lower import KernelCall, lower_program
from wasat.backends.tvm.targets import Target, cpu
from wasat.ir import Graph, Program, evaluate, verify
from wasat.passes import PassManager, QuantizeCaches


def selected(program: Program, graph: str, target: Target) -> Graph:
    g = program[graph].clone()
    target.kernels(target, program)(g)
    verify(g)
    return g


def calls(g: Graph) -> list[str]:
    """The kernels that a graph calls, without their sizes, and whatever else it applies."""
    return [type(n.op.desc).__name__ if isinstance(n.op, KernelCall) else n.op.name for n in g.nodes if n.inputs]


def feeds(
    program: Program, graph: str, b: int, s: int, past: list[int], c: int, states: dict[str, Any], seed: int
) -> dict[str, Any]:  # fmt: skip
    rng = np.random.default_rng(seed)
    g = program[graph]
    made: dict[str, Any] = {"tokens": rng.integers(0, 70, (b, s)), "past": np.array(past)}
    if any(v.name == "last" for v in g.inputs):
        made["last"] = rng.integers(0, s, b)
    for v in g.inputs:
        if v.name not in made:
            made[v.name] = states.get(v.name, np.zeros(v.tensor.concrete({"b": b, "c": c}), np.float32))
    return made


def assert_same_steps(decoder: Decoder, target: Target, steps: float = 32) -> None:
    """A prompt in two chunks of uneven size, rows at different positions, then single tokens. ``steps``: by how many
    roundings the numbers inside may be off (`assert_near_reference`)."""
    program = decoder.program()
    names = program.interface.state_names
    runner = Runner(program, target)
    params = {k: p.load() for k, p in program.params.items()}
    states: dict[str, Any] = {}
    c, b, past = 64, 2, [0, 3]
    for seed, (graph, s) in enumerate([("prefill", 7), ("prefill", 12), ("decode", 1), ("prefill", 1), ("decode", 1)]):
        given = feeds(program, graph, b, s, past, c, states, seed)
        got = runner(graph, given)
        assert_near_reference(got, program[graph], given, params, steps)
        states = {n: got[n].astype(np.float32) for n in names}
        past = [p + s for p in past]


FLOAT = {
    "f32": Decoder(weights="f32"),
    "f16, biases, no norms of heads": Decoder(weights="f16", bias=True, qk_norm=False, act="silu"),
    "bf16, no post norms": Decoder(weights="bf16", post_norm=False, head_dim=20),
    "int8 weights": Decoder(weights="int8", activation=None, kv_heads=1),
    "int4 weights, odd sizes": Decoder(weights="int4", activation=None, dim=50, hidden=45, heads=3, kv_heads=3, head_dim=18),
}


@pytest.mark.parametrize("name", FLOAT)
def test_decoder_equals_reference(name: str) -> None:
    assert_same_steps(FLOAT[name], cpu())


@pytest.mark.parametrize(
    "decoder", [Decoder(weights="int8"), Decoder(weights="int4", bias=True, post_norm=False)], ids=["int8", "int4"]
)
def test_integer_decoder_equals_reference(decoder: Decoder) -> None:
    # where rounding noise crosses a half, one element of a row is one 127th of its block's largest off
    assert_same_steps(decoder, cpu(), 2**16)


def test_caches_in_f16() -> None:
    assert_same_steps(Decoder(weights="f32"), cpu(cache="float16"), 2**13)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_caches_of_codes(scheme: str) -> None:
    """The interpreter rounds alike. Where what is written is so near to a half that its own rounding decides, one code may be
    another: of all but a few elements the caches are the same numbers."""
    program = Decoder(weights="f32").program()
    PassManager([QuantizeCaches(scheme)]).run(program)
    runner, params = Runner(program, cpu()), {k: p.load() for k, p in program.params.items()}
    names, states, past = program.interface.state_names, {}, [0, 3]
    for seed, (graph, s) in enumerate([("prefill", 7), ("prefill", 12), ("decode", 1), ("prefill", 1), ("decode", 1)]):
        given = feeds(program, graph, 2, s, past, 64, states, seed)
        got = runner(graph, given)
        want = dict(zip(program[graph].output_names, evaluate(program[graph], given, params)))
        for n in names:
            assert np.mean(np.abs(got[n] - want[n]) > 1e-6 * np.abs(want[n]).max()) < 1e-3, n
        np.testing.assert_allclose(got["logits"], want["logits"], rtol=1e-4, atol=1e-4)
        states, past = {n: want[n] for n in names}, [p + s for p in past]


def test_one_thread() -> None:
    assert_same_steps(Decoder(weights="f32"), cpu(threads=1))


LAYER = [
    "Norm", "LinearInt", "QkvToCache", "CachedAttention", "reshape", "QuantizeRows", "LinearInt", "Norm", "LinearInt", "Glu",
    "LinearInt",
]  # fmt: skip


def test_what_is_fused() -> None:
    target = cpu()
    program = Decoder().program()
    g = selected(program, "decode", target)
    assert calls(g) == ["Embedding", *LAYER, *LAYER, "Norm", "LinearInt"]
    descs = [n.op.desc for n in g.nodes if isinstance(n.op, KernelCall)]
    norms = [d for d in descs if type(d).__name__ == "Norm"]
    assert [(d.residual, d.pre_norm, d.quantize) for d in norms] == [
        (False, False, "yes"), (True, True, "yes"), (True, True, "yes"), (True, True, "yes"), (True, True, "yes")
    ]  # fmt: skip
    assert [d.decode for d in descs if type(d).__name__ == "CachedAttention"] == [True, True]
    prefill = selected(program, "prefill", target)
    attention = [n.op.desc for n in prefill.nodes if isinstance(n.op, KernelCall) and "attention" in n.op.name]
    assert [d.decode for d in attention] == [False, False]


def test_tied_table_is_packed_once() -> None:
    target = cpu()
    program = Decoder().program()
    _, plan = lower_program(program, target.table(), target.state_types(program), target.kernels(target, program))
    assert len([name for name, _ in plan.layouts if name == "embed"]) == 1
    assert len({a.name for a in plan.arrays}) == len(plan.arrays)

