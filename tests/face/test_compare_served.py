"""Comparing what a session calls: prefill and decode beside forward, node by node, and as an artifact has them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from conftest import Run
from test_compare import Wrong
from wasat.ir import ArrayParam, Builder, Graph, Program, WasatError
from wasat.passes.core import GraphPass, Remarks

import wasat as ws
from wasat.comparison import Side, compare
from wasat.testing import random_program

MODEL = """
graph @forward(%tokens: i64[b, s]) {
  param %embed.weight: f32[7, 8]
  param %up.weight: f32[16, 8]
  param %down.weight: f32[8, 16]
  %e: f32[b, s, 8] = embedding(%embed.weight, %tokens)
  %q: f32[b, s, 2, 4] = reshape(%e) {shape=(b, s, 2, 4)}
  %o: f32[b, s, 2, 4] = attention(%q, %q, %q) {causal=true, scale=0.5}
  %r: f32[b, s, 8] = reshape(%o) {shape=(b, s, 8)}
  %u: f32[b, s, 16] = linear(%r, %up.weight)
  %a: f32[b, s, 16] = silu(%u)
  %d: f32[b, s, 8] = linear(%a, %down.weight)
  %h: f32[b, s, 8] = add(%d, %e)
  %logits: f32[b, s, 7] = linear(%h, %embed.weight)
  return %logits
}
"""


@pytest.fixture(scope="module")
def model() -> Program:
    return random_program(MODEL)


@pytest.fixture(scope="module")
def artifact(model: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("served") / "m.wasat"
    program = model.copy()
    program.declare(context=32)
    ws.compile(program, out, kv_cache=True)
    return out


@dataclass(frozen=True)
class Scaled(GraphPass):
    """Multiplies what one graph computes as ``where`` by a little more than one."""

    name = "scaled"
    graph: str = "decode"
    where: str = "d"

    def run_graph(self, graph: Graph, remarks: Remarks) -> bool:
        if graph.name != self.graph:
            return False
        [node] = [v.node for v in graph.values() if v.name == self.where]
        assert node is not None
        users = list(node.output.uses)
        new = Builder(graph, before=node.next).mul(node.output, np.float32(1.001))
        for user, i in users:
            graph.set_inputs(user, [new if j == i else v for j, v in enumerate(user.inputs)])
        return True


@pytest.mark.slow
def test_an_artifact_beside_its_model(model: Program, artifact: Path) -> None:
    found = compare(model, artifact, tokens=7)
    assert found.ok, str(found)
    assert [s.name.partition(",")[0] for s in found.stages] == ["@forward", "@forward", "@prefill", "@decode"]
    assert all(s.values > 5 and not s.skipped for s in found.stages[1:])
    assert [d.value for d in found.outputs] == [
        "logits", "prefill: logits", "decode: logits", "artifact prefill: logits", "artifact decode: logits",
    ]  # fmt: skip
    assert all(d.largest < 1e-4 for d in found.outputs)  # of logits around 10


@pytest.mark.slow
def test_an_artifact_of_other_weights(model: Program, artifact: Path) -> None:
    other = model.copy()
    other.params["down.weight"] = ArrayParam(model.load("down.weight") * np.float32(1.001), model.params["down.weight"].type)
    found = compare(other, artifact, tokens=5)
    assert {d.value for d in found.outputs if d.differs} == {"artifact prefill: logits", "artifact decode: logits"}
    assert found.first is None  # its nodes, compiled anew, are right
    assert not found.ok


@pytest.mark.parametrize("entry", ["prefill", "decode"])
def test_a_pass_that_breaks_one_entry(model: Program, entry: str) -> None:
    found = compare(model, "after:default", served=True, tokens=6, passes=["default", Scaled(entry)])
    assert [d.value for d in found.outputs if d.differs] == [f"{entry}: logits"]
    [worst] = [d for d in found.outputs if d.differs]
    assert len(worst.index) == 3
    assert not found.ok


def test_a_node_that_is_wrong_in_every_entry(model: Program) -> None:
    made, _ = ws.optimize(model, kv_cache=True, keep_forward=True)
    found = compare(made, Side("wrong", made, engine=Wrong("silu", 1 + 1e-4)), served=True, tokens=6)
    named = {s.name.partition(",")[0]: [d.value for d in s.differences] for s in found.stages if s.differences}
    assert named == {"@forward": ["a"], "@prefill": ["a"], "@decode": ["a"]}


def test_a_model_that_looks_ahead_has_no_entries() -> None:
    ahead = random_program(MODEL.replace("causal=true, ", ""))
    with pytest.raises(WasatError, match="no KV cache can be derived"):
        compare(ahead, "cpu", served=True)


def test_what_is_served_by_others(model: Program, tmp_path: Path) -> None:
    np.save(tmp_path / "logits.npy", np.zeros((3, 7), np.float32))
    with pytest.raises(WasatError, match=r"logits\.npy has no prefill and decode of ours"):
        compare(model, tmp_path / "logits.npy", served=True)


def test_an_artifact_without_caches(tmp_path: Path) -> None:
    encoder = random_program("""
graph @forward(%x: f32[b, 8]) {
  param %w: f32[8, 8]
  %y: f32[b, 8] = linear(%x, %w)
  return %y
}
""")
    ws.compile(encoder, tmp_path / "e.wasat")
    assert compare(encoder, tmp_path / "e.wasat").ok
    encoder.params["w"] = ArrayParam(encoder.load("w") * np.float32(1.001), encoder.params["w"].type)
    found = compare(encoder, tmp_path / "e.wasat")
    assert [d.value for d in found.outputs if d.differs] == ["y"]


@pytest.mark.slow
def test_the_command(run: Run, model: Program, artifact: Path, tmp_path: Path) -> None:
    ws.save_program(model, tmp_path / "model")
    code, said, err = run("compare", tmp_path / "model", artifact, "--tokens", 4)
    assert (code, err) == (0, "")
    assert "artifact decode: logits" in said
    assert "@decode, node by node" in said
