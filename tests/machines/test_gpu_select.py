"""What the kernels for GPUs take and what they leave, operation by operation; run on a device, it means the same."""
from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "backends"))
pytest.importorskip("wasat.backends.tvm.plan")  # the language of a device, out of TensorIR
from decoder import Decoder
from gpu_help import MACHINES, Machine, each_machine, run
from kernel_help import assert_near_reference
from plan_help import device
from rounding import assert_near, bound, spread
from test_cpu_select import CASES, DIMS
from wasat.backends.tvm.gpu.select import selection
from wasat.backends.tvm.lower import KernelCall, Left, selected
from wasat.backends.tvm.ops.primitives import PRIMITIVES
from wasat.backends.tvm.targets import target_named
from wasat.ir import Graph, Program, evaluate, evaluate_dim
from wasat.ir.evaluate import bind_symbols, run_node

from wasat.planned import PlanRunner
from wasat.testing import feed, random_program

pytestmark = pytest.mark.machines


def choose(program: Program, machine: Machine) -> tuple[dict[str, Graph], list[Left]]:
    """The graphs as they are lowered, and what kernels left."""
    left: list[Left] = []
    select = selection(machine.limits)
    graphs = selected(program, PRIMITIVES, lambda g: left.extend(select(g)), False)
    return {g.name: g for g in graphs}, left


def kernels(graph: Graph) -> list[str]:
    """The kinds of the kernels of a graph, without sizes."""
    return [type(n.op.desc).__name__ for n in graph.nodes if isinstance(n.op, KernelCall)]


def evaluated(graph: Graph, program: Program, inputs: dict[str, Any], machine: Machine) -> dict[str, np.ndarray]:
    """The graph's outputs: kernels run on the machine, other nodes by their references."""
    dims = bind_symbols(graph, inputs)
    env: dict[Any, Any] = {v: inputs[v.name] for v in graph.inputs}
    env.update({v: program.load(name) for name, v in graph.params.items()})
    for node in graph.nodes:
        if not isinstance(node.op, KernelCall):
            env.update({v: v.const for v in node.inputs if v not in env})
            env.update(zip(node.outputs, run_node(node, [env[v] for v in node.inputs], dims)))
            continue
        op, arrays = node.op, []
        env.update({v: v.const for v in node.inputs if v not in env})
        for i, v in enumerate(node.inputs):
            if i in op.layouts:
                arrays += op.layouts[i].pack(env[v])
                continue
            x = np.asarray(env[v])
            arrays.append(x.reshape([evaluate_dim(d, dims) for d in op.shapes[i]]) if i in op.shapes else x)
        new = [r for r in op.results if r.alias is None]
        for r in new:
            shape = [evaluate_dim(d, dims) for d in r.shape or r.type.shape]
            arrays.append(np.full(shape, 77, r.type.dtype.np))
        out = run(machine, op.build(op.desc), arrays)
        made = iter(out[len(arrays) - len(new) :])
        for v, r in zip(node.outputs, op.results):
            y = out[r.alias] if r.alias is not None else next(made)
            env[v] = y.reshape([evaluate_dim(d, dims) for d in r.type.shape])
    return {n: np.asarray(env.get(v, v.const)) for n, v in zip(graph.output_names, graph.outputs)}


def held(graph: Graph, inputs: Any, params: Any, want: Any, got: Any, rounds: bool) -> None:
    """Elements within what rounding moves them by. Where activations are rounded to int8, one that is half-way between two
    codes may take the other: that moves few elements by more, and none by more than such steps do."""
    fine = spread(graph, inputs, params, level=0)
    coarse = spread(graph, inputs, params) if rounds else fine
    for name, a, b in zip(graph.output_names, fine, coarse):
        assert_near(got[name], want[name], bound(want[name], b), name)
        near = np.abs(got[name].astype(np.float64) - want[name]) <= bound(want[name], a)
        assert near.mean() > 0.98, name


@pytest.mark.parametrize("name", CASES)
def test_cases_of_the_cpu(name: str) -> None:
    """Whatever the kernels of the CPU take, those for GPUs take and mean, or leave alone."""
    machine = MACHINES[1]
    program = random_program("graph @main" + CASES[name][0].replace(" param ", "\n param ") + "\n return %y\n}", seed=1)
    graphs, _ = choose(program, machine)
    inputs = feed(program["main"], DIMS, seed=1)
    params = {n: program.load(n) for n in program.params}
    assert_near_reference(evaluated(graphs["main"], program, inputs, machine), program["main"], inputs, params)


@each_machine()
@pytest.mark.parametrize("weights, activation", [("int4", "int8"), ("int8", None), ("f16", None)])
def test_decoder(machine: Machine, weights: str, activation: str | None) -> None:
    """Every heavy operation of a decoder is a kernel, in prefill and in decoding, over full and ring caches."""
    program = Decoder(weights=weights, activation=activation, act="silu").program()
    graphs, left = choose(program, machine)
    assert not [x for x in left if x.kind == "left"]
    rng, rounds = np.random.default_rng(3), activation == "int8"
    layer = {
        "prefill": ["Linear", "Norm", "Norm", "Rope", "Rope", "CacheWrite", "Attention"],
        "decode": ["Linear", "Norm", "Norm", "Rope", "Rope", "CacheWrite", "Attention"],
    }
    caches = {v.name: v for v in program["prefill"].inputs if "layers" in v.name}
    states = {n: np.zeros([evaluate_dim(d, {"b": 2, "c": 16}) for d in v.shape], np.float32) for n, v in caches.items()}
    past = np.array([0, 0], np.int64)
    for graph, s in (("prefill", 7), ("decode", 1), ("decode", 1)):
        chosen = kernels(graphs[graph])
        assert [k for k in chosen if k not in ("RoundRows",)][2:9] == layer[graph], chosen
        assert chosen.count("Attention") == chosen.count("CacheWrite") == 2
        assert chosen.count("Linear") == 9
        assert chosen.count("Embedding") == chosen.count("Glu") - 1 == 1
        assert (chosen.count("RoundRows") == 9) == rounds
        rest = {n.op.name for n in graphs[graph].nodes if not isinstance(n.op, KernelCall)}
        assert not rest & {"linear", "quantized_linear", "matmul", "dequantize", "softmax", "cached_attention"}, rest
        inputs = {"tokens": rng.integers(0, 70, (2, s)), "past": past, **states}
        if graph == "prefill":
            inputs["last"] = np.array([6, 3])
        params = {n: program.load(n) for n in program.params}
        want = dict(zip(program[graph].output_names, evaluate(program[graph], inputs, params)))
        held(program[graph], inputs, params, want, evaluated(graphs[graph], program, inputs, machine), rounds)
        states = {n: want[n] for n in states}
        past = past + s


@each_machine()
@pytest.mark.parametrize("weights", ["int8", "int4", "f16"])
def test_compiled_decoder(machine: Machine, weights: str) -> None:
    """The same through the whole of the compiler and a launch plan: a prompt, then steps over its caches."""
    with device(machine.name):
        _compiled_decoder(machine, weights)


def _compiled_decoder(machine: Machine, weights: str) -> None:
    program = Decoder(weights=weights, windows=(None, 5)).program()
    name = "cuda:sm_90" if machine.name == "cuda" else machine.name  # what the GPU in software is
    runner = PlanRunner(program, target_named(name))
    names = " ".join(runner.host.plan.kernels)
    products = [f"{kind}_{weights.replace('f16', 'float16')}" for kind in ("gemm", "gemv4", "embedding")]
    attentions = ["decode_split_full", "decode_whole_ring", "attention_whole_full", "attention_whole_ring"]
    for wanted in (*products, *attentions, "cache_write", "rms_norm_48_weight_residual", "rope", "glu"):
        assert wanted in names, (wanted, names)
    assert ("round_rows" in names) == weights.startswith("int")
    assert "matmul" not in names
    assert "dequantize" not in names
    params = {n: program.load(n) for n in program.params}
    rng, past = np.random.default_rng(3), np.array([0, 0, 0], np.int64)
    caches = [v for v in program["prefill"].inputs if "layers" in v.name]
    states = {v.name: np.zeros([evaluate_dim(d, {"b": 3, "c": 32}) for d in v.shape], np.float32) for v in caches}
    for graph, s in (("prefill", 11), ("decode", 1), ("decode", 1)):
        inputs = {"tokens": rng.integers(0, 70, (3, s)), "past": past, **states}
        inputs |= {"last": np.array([10, 3, 0])} if graph == "prefill" else {}
        want = dict(zip(program[graph].output_names, evaluate(program[graph], inputs, params)))
        held(program[graph], inputs, params, want, runner(graph, inputs), weights.startswith("int"))
        states, past = {n: np.asarray(want[n]) for n in states}, past + s


HALF = """graph @f(%x: bf16[b, m, 64]) {
  param %a: bf16[96, 64]
  param %b: int4b32f16[96, 64]
  %p: bf16[b, m, 96] = linear(%x, %a)
  %q: bf16[b, m, 96] = quantized_linear(%x, %b)
  %r: bf16[b, m, 96] = quantized_linear(%x, %b) {activation="int8"}
  %s: bf16[b, m, 96] = add(%p, %q)
  %t: bf16[b, m, 96] = add(%s, %r)
  return %t
}"""


def test_tensor_cores_are_told() -> None:
    """Of products of many rows, which are theirs and why others are not; few rows say nothing, nor do devices without."""
    program = random_program(HALF, seed=1)
    _, left = choose(program, MACHINES[-1])
    assert [(x.kind, x.why) for x in left] == [
        ("fast", "2 products of many rows on tensor cores"),
        ("slow", "1 product of many rows without tensor cores: its activations are rounded to int8"),
    ]
    assert choose(program, MACHINES[1])[1] == []
    few = random_program(str(program["f"]).replace("[b, m,", "[b, 1,"), seed=1)
    assert choose(few, MACHINES[-1])[1] == []


def test_products_in_bf16_are_kernels() -> None:
    """Rows in bf16 that are rounded to int8, too."""
    program = random_program(HALF, seed=1)
    graphs, _ = choose(program, MACHINES[-1])
    assert sorted(kernels(graphs["f"])) == ["Linear", "Linear", "Linear", "RoundRows"]
    inputs = feed(program["f"], {"b": 2, "m": 9}, seed=1)
    params = {n: program.load(n) for n in program.params}
    [want] = evaluate(program["f"], inputs, params)
    held(program["f"], inputs, params, {"t": want}, evaluated(graphs["f"], program, inputs, MACHINES[-1]), True)
