"""Launch plans, run: every operation on software devices as its reference says, a decoder through sessions."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "backends"), str(HERE.parent / "runtime")]
from plan_help import device, loaded, need
from test_tvm_ops import NOT_COMPILED, _graph
from tiny_model import CONTEXT, Reference, tiny_program
from wasat.backends.tvm.targets import Target, target_named
from wasat.ir import OPS, ArrayParam, Graph, IRError, Program, evaluate, parse, parse_program, type_of
from wasat.runtime import ArtifactError, InputError, Model
from wasat.runtime.hosts.open import open_machine

import wasat as ws
from wasat.planned import PlanRunner
from wasat.testing import random_program

pytestmark = pytest.mark.machines
SWEPT = ("webgpu:f16", "opencl", "cuda:sm_90")
"""What the sweep runs on: between them, they take all of the ways in which elements are stored."""


@pytest.mark.parametrize("name", sorted(OPS))
@pytest.mark.parametrize("target", SWEPT)
def test_an_operation_is_what_its_reference_says(target: str, name: str) -> None:
    """All samples of an operation. Element types that a device lacks are refused by name."""
    if name in NOT_COMPILED:
        return
    with device(target):
        _sweep(target_named(target), name)


def _sweep(machine: Target, name: str) -> None:
    assert machine.device is not None
    cases = [_graph(f"{name}_{i}", OPS[name], s) for i, s in enumerate(OPS[name].samples())]
    taken = []
    for g, feeds, ps in cases:
        lacking = _types(g) & set(machine.device.lacks)
        if not lacking and (machine.device.integers == 64 or _fits(g, feeds)):
            taken.append((g, feeds, ps))
            continue
        params = {k: ArrayParam(x, type_of(x)) for k, x in ps.items()}
        with pytest.raises((IRError, InputError), match=r"this target has no |does not fit into|this device keeps"):
            PlanRunner(Program({g.name: g}, dict(params)), machine)(g.name, feeds)
    if not taken:
        return
    params = {k: ArrayParam(x, type_of(x)) for _, _, ps in taken for k, x in ps.items()}
    runner = PlanRunner(Program({g.name: g for g, _, _ in taken}, dict(params)), machine)
    for g, feeds, ps in taken:
        assert all(s["from"] != s["to"] for s in _steps(runner.host.plan.entries[g.name]["steps"]) if s["op"] == "copy"), str(g)
        got = runner(g.name, feeds)
        for n, w in zip(g.output_names, evaluate(g, feeds, ps)):
            assert isinstance(w, np.ndarray)
            _same(got[n], w, str(g))


def _steps(steps: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The steps of a plan, with those in loops and choices."""
    for s in steps:
        yield s
        for inner in ("steps", "then", "otherwise"):
            yield from _steps(s.get(inner, []))


def _types(g: Graph) -> set[str]:
    """NumPy's names of the element types of a graph's values, and of those in its bodies."""
    found = {v.tensor.dtype.np.name for v in g.values() if hasattr(v.type, "dtype")}
    for node in g.nodes:
        node.attrs.with_bodies(lambda body: bool(found.update(_types(body))))
    return found


def _fits(g: Graph, feeds: dict[str, Any]) -> bool:
    """Whether all integers of a sample, results included, are of 32 bits."""
    held = [*feeds.values(), *evaluate(g, feeds, {})] if not g.params else list(feeds.values())
    held += [v.const for v in g.values() if v.const is not None]
    held += [np.asarray(x) for node in g.nodes for x in vars(node.attrs).values() if isinstance(x, (int, float))]
    whole = [x for x in held if isinstance(x, np.ndarray) and x.size and x.dtype.kind in "iuf"]
    return all(
        x.min() >= -(2**31) and x.max() < 2**31 for x in whole
        if x.dtype.itemsize == 8 and np.isfinite(x).all()
    )  # fmt: skip


def _same(x: Any, w: np.ndarray, where: str) -> None:
    assert x.shape == w.shape, where
    if w.dtype.kind in "biu" or w.dtype.itemsize == 1:
        np.testing.assert_array_equal(x, w, err_msg=where)
    else:
        tol = {2: 1e-2, 4: 2e-5, 8: 1e-9}[w.dtype.itemsize]
        np.testing.assert_allclose(x.astype(np.float64), w.astype(np.float64), rtol=tol, atol=tol, err_msg=where)


@pytest.fixture(scope="module", params=["webgpu", "opencl"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    need(request.param)
    return loaded(tiny_program(), request.param, tmp_path_factory.mktemp("plan") / "tiny.wasat")


def test_a_decoder_through_sessions(model: Model) -> None:
    """Rows of different lengths, prefilled in chunks and decoded, alone and together, past the first capacity."""
    program = tiny_program()
    rng = np.random.default_rng(0)
    session, rows = model.session(2), [Reference(program) for _ in range(2)]
    prompt = rng.integers(0, 250, (2, 13))
    got = session.step(prompt, [13, 9])
    for r, n in enumerate((13, 9)):
        np.testing.assert_allclose(got[r], list(rows[r].feed(prompt[r, :n].tolist()))[-1], atol=1e-5)
    for counts in ([1, 1], [1, 1], [0, 1], [1, 0], [1, 1]):
        tokens = rng.integers(0, 250, (2, 1))
        got = session.step(tokens, counts)
        for r in np.flatnonzero(counts):
            np.testing.assert_allclose(got[r], next(rows[r].feed(tokens[r].tolist())), atol=1e-5)
    long, alone = model.session(1), Reference(program)
    ids = rng.integers(0, 250, (1, 270))
    got = long.step(ids)
    np.testing.assert_allclose(got[0], list(alone.feed(ids[0].tolist()))[-1], atol=1e-5)
    long.truncate(268)
    np.testing.assert_allclose(long.step(ids[:, 268:269])[0], list(_fresh(program, ids[0, :269]))[-1], atol=1e-5)
    long.reset()
    np.testing.assert_allclose(long.step(ids[:, :3])[0], list(_fresh(program, ids[0, :3]))[-1], atol=1e-5)


def _fresh(program: Program, ids: np.ndarray) -> Any:
    return Reference(program).feed(ids.tolist())


def test_generated_tokens_and_what_is_refused(model: Model) -> None:
    program = tiny_program()
    prompt = [3, 70, 11, 5]
    (found,) = model.generate([prompt], max_tokens=6)
    assert found.tokens == Reference(program).greedy(prompt, 6)[: len(found.tokens)]
    x = np.ones((4, 3), np.float32)
    np.testing.assert_array_equal(model.run("sum", x=x, y=2 * x)["total"], 3 * x)
    with pytest.raises(InputError, match="outside the vocabulary"):
        model.session(1).step([[CONTEXT]])


def test_a_step_of_decode_is_one_submission_that_allocates_nothing(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine: Any = model.engine.memory.machine
    session = model.session(1)
    session.step([[1, 2, 3]])
    session.step([[4]])
    session.step([[5]])
    calls: list[str] = []
    for name in ("allocate", "record", "run"):
        own = getattr(machine, name)
        monkeypatch.setattr(machine, name, lambda *a, own=own, name=name: (calls.append(name), own(*a))[1])
    session.step([[6]])
    assert calls == ["run"]


@pytest.mark.parametrize("target", ["webgpu", "opencl"])
def test_integers_that_do_not_fit(target: str) -> None:
    need(target)
    program = parse_program("graph @f(%x: i64[n]) {\n  %y: i64[n] = add(%x, 1:i64)\n  return %y\n}")
    runner = PlanRunner(program, target_named(target))
    big = np.array([2**40])
    if target == "opencl":
        np.testing.assert_array_equal(runner("f", {"x": big})["y"], big + 1)
    else:
        with pytest.raises(InputError, match=r"input x holds 1099511627776; this device keeps int64 in int32"):
            runner("f", {"x": big})


@pytest.mark.parametrize("target", ["webgpu", "opencl"])
def test_memory_that_ends(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the package raises where a device has no more is told as a sentence, for weights, sessions and what is computed."""
    need(target)
    machine: Any = open_machine(target, {"threads": 1, "shared": 1, "buffers": 1, "f16": False})

    class Full(Exception):
        pass

    def full(*args: Any, **options: Any) -> None:
        raise Full("none left")

    if target == "webgpu":
        monkeypatch.setattr("wgpu.GPUOutOfMemoryError", Full)
        monkeypatch.setattr(machine, "device", SimpleNamespace(create_buffer=full))
    else:
        monkeypatch.setattr(machine, "_cl", SimpleNamespace(Buffer=full, MemoryError=Full, mem_flags=machine._cl.mem_flags))
    with pytest.raises(MemoryError, match=r"has no 64 bytes free \(none left\): use fewer or shorter sessions"):
        machine.allocate(64)


@pytest.mark.parametrize("target", ["webgpu", "opencl"])
def test_a_computed_index_is_clamped(target: str) -> None:
    """Nothing is read outside a tensor, whatever is computed."""
    need(target)
    text = """graph @f(%x: f32[4, 2], %i: i32[n]) {
  %twice: i32[n] = mul(%i, 1000:i32)
  %y: f32[n, 2] = gather(%x, %twice) {axis=0}
  return %y
}"""
    x = np.arange(8, dtype=np.float32).reshape(4, 2)
    got = PlanRunner(Program({"f": parse(text)}), target_named(target))("f", {"x": x, "i": np.array([0, 1, 2], np.int32)})["y"]
    np.testing.assert_array_equal(got, x[[0, 3, 3]])


@pytest.mark.parametrize("quantize", [None, "int4"])
def test_compile_and_load(tmp_path: Path, quantize: str | None) -> None:
    """As users do it; the weights are those that the interpreter has."""
    need("webgpu")
    program = random_program("""graph @forward(%x: f32[n, 64]) {
  param %w: f32[32, 64]
  %y: f32[n, 32] = linear(%x, %w)
  %z: f32[n, 32] = gelu(%y)
  return %z
}""")
    options: dict[str, Any] = {"quantize": quantize, "activation": None}
    ws.compile(program, tmp_path / "artifact", target="webgpu", **options)
    assert {p.name for p in (tmp_path / "artifact").iterdir()} == {
        "manifest.json", "plan.json", "kernels.wgsl", "weights.safetensors",
    }  # fmt: skip
    x = np.random.default_rng(1).standard_normal((5, 64)).astype(np.float32)
    want = ws.run(ws.optimize(program, **options)[0], x=x)["z"]
    found = ws.load(tmp_path / "artifact").run("forward", x=x)["z"]
    np.testing.assert_allclose(found, want, atol=2e-5)
    (tmp_path / "artifact" / "kernels.wgsl").write_text("")
    with pytest.raises(ArtifactError, match=r"kernels\.wgsl has 0 bytes"):
        ws.load(tmp_path / "artifact")


@pytest.mark.parametrize("target", ["webgpu", "opencl"])
def test_run_in_this_process(target: str) -> None:
    """``ws.run`` and ``Executable`` take the targets of launch plans as they take the processor."""
    need(target)
    program = random_program("graph @forward(%x: f32[n, 8]) {\n  %y: f32[n, 8] = tanh(%x)\n  return %y\n}")
    for n in (1, 5):
        x = np.random.default_rng(n).standard_normal((n, 8)).astype(np.float32)
        np.testing.assert_allclose(ws.run(program, backend=target, x=x)["y"], np.tanh(x), atol=1e-6)


@pytest.mark.parametrize("target", ["webgpu", "opencl"])
@pytest.mark.parametrize("body", [
    # one size that is a difference: an input's axis less 3
    """%z: f32[b, s, t + 2, 4] = slice(%x) {starts=(0, 3, 0, 0), stops=(b, s + 3, t + 2, 4)}
  %y: f32[b, 4, s, t + 2] = transpose(%z) {perm=(0, 3, 1, 2)}""",
    # two, the second of them within a thread; a sum in each
    """%z: f32[b, s, t, 4] = slice(%x) {starts=(0, 3, 2, 0), stops=(b, s + 3, t + 2, 4)}
  %w: f32[b, t, s, 4] = transpose(%z) {perm=(0, 2, 1, 3)}
  %y: f32[b, t, s] = reduce_sum(%w) {axes=(3,)}""",
    """%z: f32[b, s, t, 4] = slice(%x) {starts=(0, 0, 1, 0), stops=(b, s, t + 1, 4)}
  %w: f32[b, 4, t, s] = transpose(%z) {perm=(0, 3, 2, 1)}
  %y: f32[b, 4, t] = reduce_max(%w) {axes=(3,)}""",
], ids=["one", "two and a sum", "largest of one"])  # fmt: skip
def test_sizes_that_are_differences(target: str, body: str) -> None:
    """Loops over them do not become one with others."""
    need(target)
    program = random_program(f"graph @f(%x: f32[b, s + 3, t + 2, 4]) {{\n  {body}\n  return %y\n}}")
    runner = PlanRunner(program.copy(), target_named(target))
    for b, s, t in ((1, 1, 1), (2, 5, 3), (3, 0, 4), (2, 300, 1)):
        x = np.random.default_rng(s).standard_normal((b, s + 3, t + 2, 4)).astype(np.float32)
        if "reduce_max" in body and s == 0:
            continue
        want = ws.run(program, "f", x=x)["y"]
        np.testing.assert_allclose(runner("f", {"x": x})["y"], want, atol=1e-5)


@pytest.mark.parametrize("target", ["webgpu", "opencl"])
def test_a_kernel_of_any_width(target: str) -> None:
    """Its sum is one of those that TVM's rule shares among threads in a way that TVM does not lower."""
    need(target)
    text = "graph @f(%x: f32[m, 2, b], %w: f32[4, 2, n]) {\n"
    text += "  %y: f32[m, 4, b - n + 1] = conv(%x, %w) {strides=(1,), low=(0,), high=(0,)}\n  return %y\n}"
    program = random_program(text)
    runner = PlanRunner(program.copy(), target_named(target))
    for m, b, n in ((1, 1, 1), (2, 9, 3), (3, 70, 65)):
        rng = np.random.default_rng(n)
        arrays = {"x": rng.standard_normal((m, 2, b), np.float32), "w": rng.standard_normal((4, 2, n), np.float32)}
        np.testing.assert_allclose(runner("f", arrays)["y"], ws.run(program, "f", **arrays)["y"], atol=1e-4)
