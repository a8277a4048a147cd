"""Transformers as torch exports them: numbers, one fused attention per block, masks understood, caches derived, generation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from wasat.frontend.onnx import from_onnx
from wasat.ir import IRError, Program, evaluate
from wasat.passes import DeriveKVCache, PassManager, default_pipeline

import wasat as ws

HERE = Path(__file__).parents[1] / "golden" / "onnx"
# name -> (attentions, those under the causal predicate, masks that stay data)
CASES: dict[str, tuple[int, int, int]] = {
    "gpt2_eager": (2, 2, 0),
    "gpt2_sdpa_legacy": (2, 2, 2),
    "llama_sdpa": (2, 2, 0),
    "llama_sdpa_23": (2, 2, 0),
    "llama_masked": (2, 2, 2),  # a finite number stands for -inf, and a query of padding alone sees nothing
    "llama_legacy": (2, 2, 2),
    "llama_past": (2, 0, 2),
    "qwen3_sdpa": (2, 2, 0),
    "gptj": (2, 2, 0),
    "gptj_legacy": (2, 2, 2),
    "neox": (2, 2, 0),
    "qwen2_vl": (2, 2, 0),
    "qwen2_vl_alone_legacy": (2, 2, 0),
    "qwen3_vl_legacy": (2, 2, 0),
    "gemma3_eager": (2, 2, 0),
    "gemma3_sdpa_legacy": (2, 2, 2),
    "bert_eager": (2, 0, 2),
    "bert_sdpa_legacy": (2, 0, 2),
    "vit_sdpa": (2, 0, 0),
    "vit_legacy": (2, 0, 0),
    "whisper_encoder": (2, 0, 0),
    "whisper_decoder": (4, 2, 0),
    "t5_encoder": (2, 0, 2),
    "t5_decoder_legacy": (4, 2, 4),  # relative positions, added to the scores
}
CAUSAL = [
    "gpt2_eager", "gpt2_sdpa_legacy", "llama_sdpa", "llama_sdpa_23", "llama_masked", "llama_legacy", "qwen3_sdpa",
    "gptj", "gptj_legacy", "neox", "qwen2_vl", "qwen2_vl_alone_legacy", "qwen3_vl_legacy", "gemma3_eager",
    "gemma3_sdpa_legacy", "whisper_decoder", "t5_decoder_legacy",
]  # fmt: skip
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


def golden(name: str) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The inputs, and torch's output."""
    with np.load(HERE / f"{name}.npz") as z:
        return {k[3:]: z[k] for k in z.files if k.startswith("in.")}, z["out"]


def interpret(program: Program, graph: str, feeds: dict[str, Any]) -> dict[str, Any]:
    g = program[graph]
    return dict(zip(g.output_names, evaluate(g, feeds, {k: program.params[k].load() for k in g.params})))


def unmasked(name: str) -> Program:
    """The model with the padding mask, if it has one, fixed to ones."""
    path = HERE / f"{name}.onnx"
    masked = any(i.name == "attention_mask" for i in onnx.load(path, load_external_data=False).graph.input)
    return from_onnx(path, constants={"attention_mask": np.asarray(1)} if masked else {})


def test_every_file_has_its_test() -> None:
    assert sorted(p.stem for p in HERE.glob("*.onnx")) == sorted(CASES)


@pytest.mark.parametrize("name", CASES)
def test_fused(name: str) -> None:
    """The file computes what torch did, before the passes and after; no softmax stays."""
    inputs, want = golden(name)
    program = from_onnx(HERE / f"{name}.onnx")
    np.testing.assert_allclose(interpret(program, "forward", inputs)["out"], want, **TOLERANCE)
    report = PassManager(default_pipeline(kv_cache=None)).run(program)
    np.testing.assert_allclose(interpret(program, "forward", inputs)["out"], want, **TOLERANCE)
    found = [n for n in program["forward"].nodes if n.op.name == "attention"]
    causal = sum(n.attrs.causal for n in found)  # type: ignore[attr-defined]
    assert (len(found), causal, sum(len(n.inputs) == 4 for n in found)) == CASES[name]
    assert program["forward"].count("softmax") == 0
    assert not [r for r in report.remarks("missed") if "softmax" in r.message]


@pytest.mark.parametrize(
    "name, windows, ropes, norms",
    [
        ("gpt2_eager", [None, None], 0, 5), ("llama_sdpa", [None, None], 4, 5), ("llama_legacy", [None, None], 4, 5),
        ("qwen3_sdpa", [None, None], 4, 9), ("gptj", [None, None], 4, 3), ("gptj_legacy", [None, None], 4, 3),
        ("neox", [None, None], 4, 5), ("qwen2_vl", [None, None], 12, 5),
        ("qwen2_vl_alone_legacy", [None, None], 4, 5), ("qwen3_vl_legacy", [None, None], 12, 9),
        ("gemma3_eager", [5, None], 4, 13), ("gemma3_sdpa_legacy", [5, None], 4, 13),
    ],
)  # fmt: skip
def test_what_else_is_found(name: str, windows: list[int | None], ropes: int, norms: int) -> None:
    """Windows, rotary positions, norms; with a mask of ones, nothing of it is left."""
    program = unmasked(name)
    PassManager(default_pipeline(kv_cache=None)).run(program)
    g = program["forward"]
    found = [n for n in g.nodes if n.op.name == "attention"]
    assert [n.attrs.window for n in found] == windows  # type: ignore[attr-defined]
    assert all(n.attrs.causal and len(n.inputs) == 3 for n in found)  # type: ignore[attr-defined]
    assert (g.count("rope"), g.count("rms_norm") + g.count("layer_norm")) == (ropes, norms)
    assert g.count("less_equal") == g.count("cumsum") == g.count("isnan") == 0


@pytest.mark.parametrize("name", CAUSAL)
def test_generation(name: str) -> None:
    """Seven tokens by prefill, in two chunks, then one by one: every step as in the forward pass over all."""
    inputs, want = golden(name)
    program = unmasked(name)
    if inputs.pop("attention_mask", None) is not None:  # torch hid the end of the first row, which the others do not see
        inputs, want = {k: v[1:] for k, v in inputs.items()}, want[1:]
    PassManager(default_pipeline(chunk=4)).run(program)
    batch, length = inputs["input_ids"].shape
    fixed = {k: inputs.pop(k) for k in list(inputs) if k not in ("input_ids", "position_ids")}
    if "encode" in program.graphs:
        fixed = interpret(program, "encode", fixed)
    sizes = {"b": batch, "c": 16}
    caches = [v for v in program["decode"].inputs if v.name.startswith("cache.")]
    states = {v.name: np.full(v.tensor.substitute(sizes).concrete({}), 1e3, np.float32) for v in caches}
    assert len(states) == 4
    at = 0
    for step in (4, 3, *(1,) * (length - 7)):
        graph = "decode" if step == 1 else "prefill"
        feeds = {k: v[..., at : at + step] for k, v in inputs.items()} | fixed | states | {"past": np.full(batch, at)}
        if graph == "prefill":
            feeds["last"] = np.full(batch, step - 1)
        out = interpret(program, graph, {k: v for k, v in feeds.items() if k in {i.name for i in program[graph].inputs}})
        states, at = {k: out[k] for k in states}, at + step
        np.testing.assert_allclose(out["out"], want[:, at - 1], **TOLERANCE)


@pytest.mark.parametrize(
    "name, node, reason",
    [
        ("bert_eager", "attention", "it is bidirectional"),
        ("bert_sdpa_legacy", "attention", "it is bidirectional"),
        ("t5_encoder", "attention", "it is bidirectional"),
        ("whisper_encoder", "", "0 inputs that could be its tokens"),
        ("vit_sdpa", "", "0 inputs that could be its tokens"),
    ],
)
def test_no_cache(name: str, node: str, reason: str) -> None:
    program = unmasked(name)
    PassManager(default_pipeline(kv_cache=None)).run(program)
    with pytest.raises(IRError, match=reason) as e:
        PassManager([DeriveKVCache()]).run(program)
    assert any(part in str(e.value) for part in node.split("|"))


@pytest.mark.parametrize("name", ["llama_sdpa", "gpt2_eager", "t5_encoder"])
def test_compiled(name: str) -> None:
    inputs, want = golden(name)
    program, _ = ws.optimize(from_onnx(HERE / f"{name}.onnx"), kv_cache=False)
    got = ws.run(program, backend="cpu", **inputs)["out"]
    np.testing.assert_allclose(got, want, **TOLERANCE)
